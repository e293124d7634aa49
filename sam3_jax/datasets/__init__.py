"""Annotation files, and synthetic images with annotations."""
