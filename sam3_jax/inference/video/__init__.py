"""Tracking in video: the memory of earlier frames, groups of objects, and sessions."""
