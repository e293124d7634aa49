"""The model as a stateful worker of a data engine: Ray Data, or any other that maps batches.

  dataset = ray.data.read_images("images", include_paths=True)
  found = dataset.map_batches(Segmenter, fn_constructor_kwargs={"prompts": ["cat"]}, concurrency=2)

The engine brings what `run` does for one job: reading, retries, autoscaling, writing. Nothing here
imports Ray. `examples/ray_batch.py` is a whole program.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.batch.engine import Engine, Slot
from sam3_jax.batch.loading import reason_of
from sam3_jax.batch.prompt_schema import check_places, concepts, from_json, own_prompts, pointing
from sam3_jax.batch.records import record
from sam3_jax.checkpoint import bundle as checkpoints
from sam3_jax.inference import sharding
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import MAX_PIXELS, read_image, resize
from sam3_jax.inputs.prompts import Prompt, as_prompts
from sam3_jax.registry import find_checkpoint

IMAGES = ("image", "bytes")  # columns that an image may come in; they do not come out again


class Segmenter:
  """A checkpoint on this process's devices, called with batches of any length.

  An image that cannot be used makes no error but a row that says why, so that a worker's other
  images are not done again and again.
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
      prompts: asked about every image that comes without its own.
      checkpoint: folder or name.
      threshold: instances score above it.
      max_detections: of each prompt, the best.
      max_pixels: larger images are refused.
      images: images that each device works on at a time.
      dtype: as in `Sam3.from_checkpoint`.
      threads: that read images and make run lengths.

    Raises:
      FileNotFoundError, ValueError: as `find_checkpoint` and `Sam3.from_checkpoint`; a phrase that
        the model cannot read.
    """
    self._prompts = None if prompts is None else as_prompts(prompts)
    self._threshold, self._max_pixels, self._threads = threshold, max_pixels, threads
    mesh = sharding.make_mesh()
    model = Sam3.from_checkpoint(find_checkpoint(checkpoint), dtype=dtype, mesh=mesh, verify=True)
    self._model = model
    if self._prompts is not None:
      model.tokenizer.check(prompt.phrase for prompt in self._prompts)
    self._engine = Engine(
      model, threshold=threshold, images=images, most=max_detections,
      visual=checkpoints.VISUAL in model.params,
    )  # fmt: skip

  def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Segments a batch.

    Args:
      batch: columns of equal length: `image` (pixels as `read_image` takes them) or `bytes` (of a
        file); perhaps `path`, for the name; perhaps `prompts`, JSON lists as `inputs.FORM` has
        them. Others are passed through.

    Returns:
      The columns but for the image's, and `record`, JSON as a line of a part's file (see
      `sam3_jax.batch`; empty if it failed), and `error`, the reason or empty.

    Raises:
      ValueError: no column of images.
    """
    column = next((name for name in IMAGES if name in batch), None)
    if column is None:
      raise ValueError(f"a batch needs a column image or bytes; got {sorted(batch)}.")
    rows = len(batch[column])
    names = [str(name) for name in batch.get("path", [""] * rows)]
    own = batch.get("prompts", [None] * rows)
    with ThreadPoolExecutor(self._threads) as pool:
      slots = list(pool.map(self._slot, batch[column], own))
      records = []
      for first in range(0, rows, self._engine.rows):
        part = slots[first : first + self._engine.rows]
        work = self._engine.start([one if isinstance(one, Slot) else None for one in part])
        jobs = zip(part, names[first:], work.instances(), strict=False)
        records += pool.map(lambda job: _record(*job), jobs)
    passed = {name: values for name, values in batch.items() if name not in IMAGES}
    errors = [one if isinstance(one, str) else "" for one in slots]
    return passed | {"record": np.array(records, object), "error": np.array(errors, object)}

  def _slot(self, source_image: Any, own: Any) -> Slot | str:
    """An image and its prompts, or what is wrong with them."""
    try:
      prompts = self._prompts
      if own is not None:
        prompts = own_prompts({"prompts": from_json(own, "prompts must be a list in JSON")})
      if not prompts:
        raise ValueError("it has no prompts; give the Segmenter some, or a column prompts.")
      if prompts is not self._prompts:
        self._model.tokenizer.check(prompt.phrase for prompt in concepts(prompts))
      if pointing(prompts):
        self._model.visual_params()  # raises where there is no head
      image = read_image(source_image, max_pixels=self._max_pixels)
      size = image.shape[0], image.shape[1]
      check_places(prompts, *size)
      return Slot(resize(image, self._model.config.image_size), size, prompts)
    except Exception as error:  # whatever a decoder makes of a broken file
      return reason_of(error)


def _record(slot: Slot | str, name: str, found: Any) -> str:
  return (
    "" if isinstance(slot, str) else record(None, name, slot.size, slot.prompts, found).decode()
  )
