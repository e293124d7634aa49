"""Annotation files: pairs of a picture and a phrase, with the objects that match."""
