"""All figures of predictions against one truth or several, and of a model as training asks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation import concept
from sam3_jax.evaluation.coco import average_precision
from sam3_jax.evaluation.predict import LEAST, Ask, Progress, as_prompt, predict
from sam3_jax.evaluation.predictions import Prediction
from sam3_jax.inference.predictor import Sam3


class Scorer:
  """Scores predictions pair by pair; holds sums only.

  Args:
    truths: a list of pairs for each annotator, mostly one. The first says what the pairs are; of
      each pair, the truth that fits the predictions best counts, for masks and boxes separately.
    prompt: as in `predict`; with "box", pairs without objects are left out.
    score: the least at which a prediction counts.

  Attributes:
    pairs: those of the first truth that count: left out are pairs that are not exhaustively
      annotated in every truth.

  Raises:
    ValueError: truths that are not about the same pairs, or none of their pairs counts.
  """

  def __init__(self, *truths: Sequence[Pair], prompt: Ask = "text", score: float = concept.SCORE):
    self._truths = [{pair.id: pair for pair in truth} for truth in truths]
    self._prompt: Ask = prompt
    self._score = score
    self._masks, self._boxes = concept.Tally(), concept.Tally()
    for i, other in enumerate(self._truths[1:], start=2):
      _check_same(self._truths[0], other, i)
    self.pairs = [pair for pair in truths[0] if self._counts(pair)]
    if not self.pairs:
      objects = "has an object and " if prompt == "box" else ""
      raise ValueError(
        f"nothing to score: of {len(truths[0])} pairs none {objects}is annotated exhaustively; "
        "give other annotations."
      )

  def add(self, pair: Pair, found: Sequence[Prediction]) -> concept.Counts:
    """Scores one of `pairs`; returns what its masks gave."""
    masks, boxes = self._best(pair, found, "masks"), self._best(pair, found, "boxes")
    self._masks.add(masks)
    self._boxes.add(boxes)
    return masks

  def metrics(self) -> dict[str, Any]:
    """Figures of the pairs added so far.

    Returns:
      `prompt`, `threshold`, `truths`, `pairs`, `positive_pairs` (those with objects in the truth
      that counts), and all of `concept.Tally.figures`: of masks, and of boxes as `box_cgf1` etc.
    """
    return {
      "prompt": self._prompt,
      "threshold": self._score,
      "truths": len(self._truths),
      "pairs": self._masks.pairs,
      "positive_pairs": self._masks.positives,
      **self._masks.figures(),
      **{f"box_{name}": value for name, value in self._boxes.figures().items()},
    }

  def _best(self, pair: Pair, found: Sequence[Prediction], kind: concept.Kind) -> concept.Counts:
    objects = [truth[pair.id].objects for truth in self._truths]
    return concept.best([concept.count(one, found, kind, self._score) for one in objects])

  def _counts(self, pair: Pair) -> bool:
    if not all(truth[pair.id].exhaustive for truth in self._truths):
      return False
    return as_prompt(pair, self._prompt) is not None


def evaluate(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  *,
  prompt: Ask = "text",
  score: float = concept.SCORE,
  precision: bool = False,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """A model's figures on pairs: what the training loop logs.

  To score parameters as they change, set `model.params` and call again: nothing is compiled anew.

  Args:
    model: a `Sam3`.
    pairs: of `annotations.read`.
    images: the folder that their file names are below.
    prompt: "text", "box" or "text+box"; see `predict`.
    score: the least at which a prediction counts.
    precision: compute `average_precision` too; it takes the predictions of low scores, and memory.
    progress: called with an image's name and the fraction done.

  Returns:
    See `Scorer.metrics`.

  Raises:
    ValueError, FileNotFoundError: no pair to score, or what `predict` raises.
  """
  scorer, kept = Scorer(pairs, prompt=prompt, score=score), {}
  least = min(LEAST, score) if precision else score
  found = predict(model, scorer.pairs, images, prompt=prompt, least=least, progress=progress)
  for pair, predictions in found:
    scorer.add(pair, predictions)
    if precision:
      kept[pair.id] = predictions
  return scorer.metrics() | (average_precision(scorer.pairs, kept) if precision else {})


def _check_same(first: Mapping[int, Pair], other: Mapping[int, Pair], number: int) -> None:
  for pair in first.values():
    twin = other.get(pair.id)
    if twin is None or _about(twin) != _about(pair):
      raise ValueError(
        f"truth {number} {'lacks' if twin is None else 'has something else as'} pair {pair.id} "
        f"({pair.file_name}, {pair.phrase!r}); several truths must be about the same pairs."
      )


def _about(pair: Pair) -> tuple[object, ...]:
  return pair.image_id, pair.phrase, pair.width, pair.height
