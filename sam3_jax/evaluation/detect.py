"""A model's predictions for pairs of image and phrase; each image is encoded once.

A thread reads images ahead. Images are encoded, and prompts decoded, in batches of one size each,
so that four programs are compiled whatever the data. Masks are copied to the host as run lengths,
batch by batch.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.inference import predictor
from sam3_jax.inference.predictor import IMAGE_BATCHES, Sam3
from sam3_jax.inference.text_cache import TextCache
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.outputs.instances import Instances, instances, xywh
from sam3_jax.types import Detections, ImageEmbedding

PromptKind = Literal["text", "box", "text+box"]

MIN_SCORE = 0.05  # lower scores do not change the average precision either
MAX_PREDICTIONS = 100  # per pair, as in COCO's average precision

Progress = Callable[[str, float], None]  # name of an image, and the fraction done before it


def detect_pairs(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  *,
  prompt: PromptKind = "text",
  min_score: float = MIN_SCORE,
  progress: Progress | None = None,
) -> Iterator[tuple[Pair, list[EvalPrediction]]]:
  """The model's predictions for each pair.

  Args:
    model: its `params` are read for each batch; a `Sam3` with new ones compiles nothing again.
    pairs: without duplicates.
    images: the directory of their file names.
    prompt: the phrase; the largest box of the pair's objects (the first of equals, no crowd); or
      the phrase, and that box if there is one. With "box", pairs without objects are left out.
    min_score: lower scores are left out; at most 100 predictions are kept for each pair.

  Yields:
    Each pair with its predictions, best first, image by image. Boxes are clipped to the image
    and rounded to hundredths of a pixel, as in files.

  Raises:
    FileNotFoundError, ValueError: images cannot be read, or phrases or boxes are faulty.
  """
  by_image = collections.defaultdict(list)
  for pair in pairs:
    if (pair_prompt := as_prompt(pair, prompt)) is not None:
      by_image[pair.file_name].append((pair, pair_prompt))
  grouped, texts = list(by_image.items()), TextCache(model)
  size = min(len(grouped), IMAGE_BATCHES[0])
  batches = [grouped[i : i + size] for i in range(0, len(grouped), size or 1)]
  waiting = None
  with ThreadPoolExecutor(1) as pool:
    loads = _read_ahead(pool, batches, Path(images))
    for i, (batch, pixels) in enumerate(zip(batches, loads, strict=True)):
      if progress is not None:
        progress(batch[0][0], i / len(batches))
      embedding = model.encode(pixels + pixels[-1:] * (size - len(pixels)))
      queries = [(row, *query) for row, (_, own) in enumerate(batch) for query in own]
      texts.add([query_prompt for *_, query_prompt in queries])
      for group in _groups(queries, predictor.prompts_at_once(model.platform)[0]):
        found = _decode(model, embedding, group, texts)
        if waiting is not None:  # meanwhile the device works on the next batch
          yield from _results(*waiting, min_score)
        waiting = found, [pair for _, pair, _ in group]
  if waiting is not None:
    yield from _results(*waiting, min_score)


def as_prompt(pair: Pair, prompt: PromptKind) -> Prompt | None:
  """The prompt for a pair; see `detect_pairs`. None if the pair has no box to prompt with."""
  objects = [target for target in pair.objects if not target.crowd]
  boxes = []
  if prompt != "text" and objects:
    x, y, w, h = max(objects, key=lambda target: target.box[2] * target.box[3]).box
    boxes = [(x, y, x + w, y + h)]
  if prompt == "box":
    return Prompt(boxes=boxes) if boxes else None
  return Prompt(text=pair.phrase, boxes=boxes)


_Query = tuple[int, Pair, Prompt]  # row of the embedding, the pair, and its prompt


def _read_ahead(
  pool: ThreadPoolExecutor, batches: Sequence[Sequence[tuple[str, list]]], images: Path
) -> Iterator[list[UInt8[np.ndarray, "h w 3"]]]:
  """The images of each batch, read while the previous batch is evaluated."""

  def read(batch):
    return [read_image(images / name) for name, _ in batch]

  following = pool.submit(read, batches[0]) if batches else None
  for i in range(len(batches)):
    pixels = following.result()  # pyright: ignore[reportOptionalMemberAccess]
    following = pool.submit(read, batches[i + 1]) if i + 1 < len(batches) else None
    yield pixels


def _groups(queries: Sequence[_Query], size: int) -> Iterator[list[_Query]]:
  """Groups of at most `size`: full batches of one image first, then the rest together."""
  rest = []
  for row in sorted({row for row, *_ in queries}):
    own = [query for query in queries if query[0] == row]
    full = len(own) // size * size
    yield from (own[i : i + size] for i in range(0, full, size))
    rest += own[full:]
  yield from (rest[i : i + size] for i in range(0, len(rest), size))


def _decode(
  model: Sam3, embedding: ImageEmbedding, group: Sequence[_Query], texts: TextCache
) -> Detections:
  """Decodes a batch, padded with its last prompt."""
  group = [*group, *[group[-1]] * (predictor.prompts_at_once(model.platform)[0] - len(group))]
  prompts = [prompt for *_, prompt in group]
  rows, most = [row for row, *_ in group], min(MAX_PREDICTIONS, model.config.queries)
  return model.decode(embedding, prompts, rows, text=texts[prompts], max_detections=most)


def _results(
  found: Detections, pairs: Sequence[Pair], min_score: float
) -> Iterator[tuple[Pair, list[EvalPrediction]]]:
  # `instances` keeps scores above its threshold, so take the next lower float32.
  threshold = float(np.nextafter(np.float32(min_score), np.float32(0)))
  padding = len(found) - len(pairs)
  by_prompt = instances(found, [threshold] * len(pairs) + [1.0] * padding)  # no score exceeds 1
  for pair, pair_instances in zip(pairs, by_prompt, strict=False):
    yield pair, _predictions(pair_instances, pair)


def _predictions(found: Instances, pair: Pair) -> list[EvalPrediction]:
  boxes = xywh(found.boxes, (pair.height, pair.width))
  # str keeps all digits of a float32, so that no score is rounded across a threshold.
  return [
    EvalPrediction(float(str(score)), (x, y, w, h), found.masks.rle(i))
    for i, (score, (x, y, w, h)) in enumerate(zip(found.scores, boxes.tolist(), strict=True))
  ]
