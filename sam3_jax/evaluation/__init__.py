"""Evaluation: cgF1 and its parts, COCO's average precision."""
