"""Evaluation: cgF1 and its parts, COCO's average precision, and visual prompts.

concept.py has the metric, which knows no model; predict.py a model's predictions; score.py brings
both together (`evaluate` is what training calls), and run.py is the command. coco.py has the
average precision, clicks.py visual prompts and everything, predictions.py files of results, and
worst.py the page of what went wrong.
"""
