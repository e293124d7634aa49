"""Synthetic scenes composed of drawings, with phrases and masks."""
