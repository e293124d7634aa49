"""Scenes composed of drawings, with phrases and masks."""
