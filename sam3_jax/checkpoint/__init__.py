"""Checkpoints as directories: read, written, verified, and found by name."""
