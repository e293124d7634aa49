"""Annotation files and synthetic scenes."""
