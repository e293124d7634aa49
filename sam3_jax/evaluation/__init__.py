"""Evaluation: cgF1 and its parts, COCO's average precision, visual prompts and mask generation.

`cgf1` has the metric, which is independent of the model. `detect` computes a model's predictions.
`score` combines both; training calls its `evaluate`. `run` is the work of the command.
`average_precision` has COCO's metric, `clicks` evaluates visual prompts, `mask_generation`
evaluates masks of everything in an image, `predictions` reads and writes prediction files, and
`error_gallery` draws a page of the worst pairs.
"""
