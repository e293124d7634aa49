"""Helpers that know nothing of the model: console, paths, atomic files, validation."""
