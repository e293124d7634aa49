"""A stateful worker for Ray Data, or any other engine that maps a function over batches.

  dataset = ray.data.read_images("images", include_paths=True)
  found = dataset.map_batches(Segmenter, fn_constructor_kwargs={"prompts": ["cat"]}, concurrency=2)

The engine does what `run` does for a job: reading, retries, autoscaling, writing. This module does
not import Ray. `examples/ray_batch.py` is a complete program.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.batch.engine import Engine, Slot
from sam3_jax.batch.load_image import error_reason
from sam3_jax.batch.prompt_schema import (
  check_coordinates,
  concept_prompts,
  parse_json,
  parse_prompts,
  visual_prompts,
)
from sam3_jax.batch.records import make_record
from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.inference import sharding
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import MAX_PIXELS, read_image, resize
from sam3_jax.inputs.prompts import Prompt, as_prompts
from sam3_jax.registry import find_checkpoint

IMAGE_COLUMNS = ("image", "bytes")  # input columns with images; they are not passed through


class Segmenter:
  """A checkpoint on this process's devices, called with batches of any length.

  An image that cannot be used yields a row with the reason instead of an exception, so that the
  engine does not repeat the worker's other images.
  """

  def __init__(
    self,
    prompts: str | Prompt | Sequence[str | Prompt] | None = None,
    *,
    checkpoint: str | Path = "sam3-tiny",
    threshold: float = 0.5,
    max_detections: int = 100,
    max_pixels: int = MAX_PIXELS,
    images: int = 4,
    dtype: str | None = None,
    threads: int = 4,
  ):
    """Loads the checkpoint.

    Args:
      prompts: for images without prompts of their own.
      checkpoint: directory or name.
      threshold: minimum score of an instance, exclusive.
      max_detections: maximum number of instances for each prompt; the best are kept.
      max_pixels: larger images are refused.
      images: images per batch on each device.
      dtype: as in `Sam3.from_checkpoint`.
      threads: for reading images and encoding masks.

    Raises:
      FileNotFoundError, ValueError: from `find_checkpoint` and `Sam3.from_checkpoint`, or a phrase
        is too long for the model.
    """
    self._prompts = None if prompts is None else as_prompts(prompts)
    self._threshold, self._max_pixels, self._threads = threshold, max_pixels, threads
    mesh = sharding.make_mesh()
    model = Sam3.from_checkpoint(find_checkpoint(checkpoint), dtype=dtype, mesh=mesh, verify=True)
    self._model = model
    if self._prompts is not None:
      model.tokenizer.check(prompt.phrase for prompt in self._prompts)
    self._engine = Engine(
      model, threshold=threshold, images=images, max_detections=max_detections,
      visual=VISUAL in model.params,
    )  # fmt: skip

  def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Segments a batch.

    Args:
      batch: columns of equal length: `image` (pixels as `read_image` takes them) or `bytes` (of a
        file); optionally `path`, for the name, and `prompts`, JSON lists in the format of
        `listed_images.LINE_FORMAT`. Other columns are passed through.

    Returns:
      The columns except the image column, and `record`, JSON as a line of a part (see
      `sam3_jax.batch`; empty if the image failed), and `error`, the reason or empty.

    Raises:
      ValueError: there is no image column.
    """
    column = next((name for name in IMAGE_COLUMNS if name in batch), None)
    if column is None:
      raise ValueError(f"a batch needs a column image or bytes; got {sorted(batch)}.")
    count, batch_size = len(batch[column]), self._engine.batch_size
    names = [str(name) for name in batch.get("path", [""] * count)]
    own = batch.get("prompts", [None] * count)
    with ThreadPoolExecutor(self._threads) as pool:
      slots = list(pool.map(self._slot, batch[column], own))
      records = []
      for first in range(0, count, batch_size):
        part = slots[first : first + batch_size]
        pending = self._engine.start([slot if isinstance(slot, Slot) else None for slot in part])
        results = zip(part, names[first:], pending.instances(), strict=False)
        records += pool.map(lambda result: _record(*result), results)
    passed = {name: values for name, values in batch.items() if name not in IMAGE_COLUMNS}
    errors = [slot if isinstance(slot, str) else "" for slot in slots]
    return passed | {"record": np.array(records, object), "error": np.array(errors, object)}

  def _slot(self, source: Any, own: Any) -> Slot | str:
    """An image and its prompts, or the reason why they cannot be used."""
    try:
      prompts = self._prompts
      if own is not None:
        prompts = parse_prompts({"prompts": parse_json(own, "prompts must be a JSON list")})
      if not prompts:
        raise ValueError(
          "it has no prompts; pass prompts to the Segmenter, or add a column prompts."
        )
      if prompts is not self._prompts:
        self._model.tokenizer.check(prompt.phrase for prompt in concept_prompts(prompts))
      if visual_prompts(prompts):
        self._model.visual_params()  # raises if the checkpoint has no head
      image = read_image(source, max_pixels=self._max_pixels)
      size = image.shape[0], image.shape[1]
      check_coordinates(prompts, *size)
      return Slot(resize(image, self._model.config.image_size), size, prompts)
    except Exception as error:  # decoders raise any exception on a broken file
      return error_reason(error)


def _record(slot: Slot | str, name: str, results: Any) -> str:
  if isinstance(slot, str):
    return ""
  return make_record(None, name, slot.size, slot.prompts, results).decode()
