"""Evaluation: cgF1 and its parts, COCO's average precision.

concept.py has the metric, which knows no model; predict.py a model's predictions; score.py brings
both together (`evaluate` is what training calls), and run.py is the command.
"""
