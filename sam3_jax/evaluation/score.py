"""Scores predictions against the ground truth of annotators, and models for training."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation import cgf1
from sam3_jax.evaluation.average_precision import average_precision
from sam3_jax.evaluation.detect import MIN_SCORE, Progress, PromptKind, as_prompt, detect_pairs
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.inference.predictor import Sam3


class Scorer:
  """Scores predictions pair by pair; keeps only sums.

  Args:
    truths: the ground truth, a list of pairs for each annotator, usually one. The first determines
      the pairs. For each pair, the annotator with the best score counts, for masks and boxes
      separately.
    prompt: as in `detect_pairs`; with "box", pairs without objects are left out.
    score: minimum score of a prediction, inclusive.

  Attributes:
    pairs: the pairs of the first annotator that are scored; pairs that are not exhaustively
      annotated by every annotator are left out.

  Raises:
    ValueError: the annotators do not have the same pairs, or no pair is to be scored.
  """

  def __init__(
    self, *truths: Sequence[Pair], prompt: PromptKind = "text", score: float = cgf1.THRESHOLD
  ):
    self._truths = [{pair.id: pair for pair in truth} for truth in truths]
    self._prompt: PromptKind = prompt
    self._score = score
    self._masks, self._boxes = cgf1.MetricSums(), cgf1.MetricSums()
    for i, other in enumerate(self._truths[1:], start=2):
      _check_same(self._truths[0], other, i)
    self.pairs = [pair for pair in truths[0] if self._is_scored(pair)]
    if not self.pairs:
      objects = "has an object and " if prompt == "box" else ""
      raise ValueError(
        f"nothing to score: of {len(truths[0])} pairs none {objects}is annotated exhaustively; "
        "give other annotations."
      )

  def add(self, pair: Pair, found: Sequence[EvalPrediction]) -> cgf1.PairCounts:
    """Scores one of `pairs`; returns the counts of its masks."""
    masks, boxes = self._best(pair, found, "masks"), self._best(pair, found, "boxes")
    self._masks.add(masks)
    self._boxes.add(boxes)
    return masks

  def metrics(self) -> dict[str, Any]:
    """Metrics of the pairs added so far.

    Returns:
      `prompt`, `threshold`, `truths`, `pairs`, `positive_pairs` (pairs with objects of the
      annotator that counts), and all of `cgf1.MetricSums.metrics`: of masks, and of boxes as
      `box_cgf1` etc.
    """
    return {
      "prompt": self._prompt,
      "threshold": self._score,
      "truths": len(self._truths),
      "pairs": self._masks.pairs,
      "positive_pairs": self._masks.positives,
      **self._masks.metrics(),
      **{f"box_{name}": value for name, value in self._boxes.metrics().items()},
    }

  def _best(self, pair: Pair, found: Sequence[EvalPrediction], kind: cgf1.Kind) -> cgf1.PairCounts:
    truths = [truth[pair.id].objects for truth in self._truths]
    return cgf1.best_truth(
      [cgf1.count_matches(objects, found, kind, self._score) for objects in truths]
    )

  def _is_scored(self, pair: Pair) -> bool:
    if not all(truth[pair.id].exhaustive for truth in self._truths):
      return False
    return as_prompt(pair, self._prompt) is not None


def evaluate(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  *,
  prompt: PromptKind = "text",
  score: float = cgf1.THRESHOLD,
  precision: bool = False,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """The metrics of a model on pairs, as logged in training.

  To score parameters as they change, set `model.params` and call again: nothing is recompiled.

  Args:
    model: a `Sam3`.
    pairs: from `annotations.read`.
    images: the directory of their file names.
    prompt: "text", "box" or "text+box"; see `detect_pairs`.
    score: minimum score of a prediction, inclusive.
    precision: also compute `average_precision`, which needs predictions with low scores, and
      memory.
    progress: called with the name of an image and the fraction done.

  Returns:
    See `Scorer.metrics`.

  Raises:
    ValueError, FileNotFoundError: no pair to score, or errors of `detect_pairs`.
  """
  scorer, kept = Scorer(pairs, prompt=prompt, score=score), {}
  min_score = min(MIN_SCORE, score) if precision else score
  found = detect_pairs(
    model, scorer.pairs, images, prompt=prompt, min_score=min_score, progress=progress
  )
  for pair, predictions in found:
    scorer.add(pair, predictions)
    if precision:
      kept[pair.id] = predictions
  return scorer.metrics() | (average_precision(scorer.pairs, kept) if precision else {})


def _check_same(first: Mapping[int, Pair], other: Mapping[int, Pair], number: int) -> None:
  for pair in first.values():
    twin = other.get(pair.id)
    if twin is None or _subject(twin) != _subject(pair):
      raise ValueError(
        f"annotation file {number} {'lacks' if twin is None else 'has something else as'} pair "
        f"{pair.id} ({pair.file_name}, {pair.phrase!r:.60}); all annotation files must have "
        "the same pairs."
      )


def _subject(pair: Pair) -> tuple[object, ...]:
  return pair.image_id, pair.phrase, pair.width, pair.height
