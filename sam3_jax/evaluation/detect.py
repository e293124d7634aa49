"""Predictions of a model for pairs: each image is encoded once, whatever is asked about it.

Images are read ahead by a thread, and encoded and prompted in batches of one size each, so that
four programs are compiled whatever the data. Masks leave the device as run lengths, batch by batch.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import UInt8

from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.predictions import Prediction
from sam3_jax.inference import predictor
from sam3_jax.inference.predictor import IMAGE_BATCHES, Sam3
from sam3_jax.inference.text_cache import TextCache
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.outputs.instances import Instances, instances, xywh
from sam3_jax.types import Detections, ImageEmbedding

Ask = Literal["text", "box", "text+box"]

LEAST = 0.05  # lower scores are of no account for average precision either
MOST = 100  # predictions of a pair: as many as COCO's average precision takes

Progress = Callable[[str, float], None]  # an image's name, and the fraction done before it


def predict(
  model: Sam3,
  pairs: Sequence[Pair],
  images: str | Path,
  *,
  prompt: Ask = "text",
  least: float = LEAST,
  progress: Progress | None = None,
) -> Iterator[tuple[Pair, list[Prediction]]]:
  """What the model finds for each pair.

  Args:
    model: its `params` are read at each batch; one `Sam3` given new ones compiles nothing again.
    pairs: each once.
    images: the folder that their file names are below.
    prompt: what the model is told: the phrase; the largest box of the pair's objects (the first of
      equals, no crowd); or the phrase, and that box if there is one. With "box", pairs without
      objects are left out.
    least: lower scores are left out; of a pair, the best 100 are kept.

  Yields:
    Each pair with its predictions, best first, image by image. Boxes are clipped to the image
    and rounded to hundredths of a pixel, as they go on disk.

  Raises:
    FileNotFoundError, ValueError: of images that cannot be read, and faulty phrases and boxes.
  """
  by_image = collections.defaultdict(list)
  for pair in pairs:
    if (asked := as_prompt(pair, prompt)) is not None:
      by_image[pair.file_name].append((pair, asked))
  source_images, texts = list(by_image.items()), TextCache(model)
  size = min(len(source_images), IMAGE_BATCHES[0])
  batches = [source_images[i : i + size] for i in range(0, len(source_images), size or 1)]
  waiting = None
  with ThreadPoolExecutor(1) as pool:
    loads = _ahead(pool, batches, Path(images))
    for i, (batch, pixels) in enumerate(zip(batches, loads, strict=True)):
      if progress is not None:
        progress(batch[0][0], i / len(batches))
      embedding = model.encode(pixels + pixels[-1:] * (size - len(pixels)))
      asked = [(row, *one) for row, (_, several) in enumerate(batch) for one in several]
      texts.add([one for *_, one in asked])
      for group in _groups(asked):
        found = _decode(model, embedding, group, texts)
        if waiting is not None:  # the device works on the next batch meanwhile
          yield from _results(*waiting, least)
        waiting = found, [pair for _, pair, _ in group]
  if waiting is not None:
    yield from _results(*waiting, least)


def as_prompt(pair: Pair, prompt: Ask) -> Prompt | None:
  """What is asked about a pair; see `predict`. None if there is nothing to ask with."""
  objects = [one for one in pair.objects if not one.crowd]
  boxes = []
  if prompt != "text" and objects:
    x, y, w, h = max(objects, key=lambda one: one.box[2] * one.box[3]).box
    boxes = [(x, y, x + w, y + h)]
  if prompt == "box":
    return Prompt(boxes=boxes) if boxes else None
  return Prompt(text=pair.phrase, boxes=boxes)


_Asked = tuple[int, Pair, Prompt]  # row of the embedding, what it is about, and the prompt


def _ahead(
  pool: ThreadPoolExecutor, batches: Sequence[Sequence[tuple[str, list]]], images: Path
) -> Iterator[list[UInt8[np.ndarray, "h w 3"]]]:
  """The images of each batch, read while the one before is in work."""

  def read(batch):
    return [read_image(images / name) for name, _ in batch]

  following = pool.submit(read, batches[0]) if batches else None
  for i in range(len(batches)):
    source_images = following.result()  # pyright: ignore[reportOptionalMemberAccess]
    following = pool.submit(read, batches[i + 1]) if i + 1 < len(batches) else None
    yield source_images


def _groups(asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
  """Groups of at most one batch, of one image where it fills them, else of several."""
  size, rest = predictor.prompts_at_once()[0], []
  for row in sorted({row for row, *_ in asked}):
    own = [one for one in asked if one[0] == row]
    whole = len(own) // size * size
    yield from (own[i : i + size] for i in range(0, whole, size))
    rest += own[whole:]
  yield from (rest[i : i + size] for i in range(0, len(rest), size))


def _decode(
  model: Sam3, embedding: ImageEmbedding, group: Sequence[_Asked], texts: TextCache
) -> Detections:
  """A full batch: the last prompt fills it up."""
  group = [*group, *[group[-1]] * (predictor.prompts_at_once()[0] - len(group))]
  prompts = [prompt for *_, prompt in group]
  rows, most = [row for row, *_ in group], min(MOST, model.config.queries)
  return model.decode(embedding, prompts, rows, text=texts[prompts], max_detections=most)


def _results(
  found: Detections, pairs: Sequence[Pair], least: float
) -> Iterator[tuple[Pair, list[Prediction]]]:
  above = float(np.nextafter(np.float32(least), np.float32(0)))  # `instances` takes those over it
  filling = len(found) - len(pairs)
  found_in = instances(found, [above] * len(pairs) + [1.0] * filling)  # none is over 1
  for pair, one in zip(pairs, found_in, strict=False):
    yield pair, _predictions(one, pair)


def _predictions(found: Instances, pair: Pair) -> list[Prediction]:
  boxes = xywh(found.boxes, (pair.height, pair.width))
  # As many digits as tell float32 scores apart: so none is rounded over a threshold.
  return [
    Prediction(float(str(score)), (x, y, w, h), found.masks.rle(i))
    for i, (score, (x, y, w, h)) in enumerate(zip(found.scores, boxes.tolist(), strict=True))
  ]
