"""Decodes visual prompts (points, boxes, masks) in batches, for `Sam3.decode_visual`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from sam3_jax.inference.batch_sharding import BatchSharding
from sam3_jax.inference.batching import batches_by_image, drop_repeats, take
from sam3_jax.inference.output_buffer import OutputBuffer
from sam3_jax.inference.programs import Programs
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual, pack_visual
from sam3_jax.model.visual.head import MULTIMASK_OUTPUTS
from sam3_jax.outputs.detections import VisualMasks
from sam3_jax.types import VisualEmbedding

VISUAL_BATCHES = (16, 4, 1)  # 22 MB per prompt at the released size, as XLA plans for a CPU


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisualRequest:
  """Prompts of one call of `Sam3.decode_visual`, checked.

  Attributes:
    embedding: the images.
    prompts: the prompts.
    images: the image of each prompt.
    sizes: height and width of the source image of each prompt.
    multimask: as in `Sam3.decode_visual`.
    mask_size: side of the grid of masks.
  """

  embedding: VisualEmbedding
  prompts: Sequence[VisualPrompt]
  images: Int[np.ndarray, " P"]
  sizes: Int[np.ndarray, "P 2"]
  multimask: bool
  mask_size: int

  def __post_init__(self):
    for prompt, size in zip(self.prompts, self.sizes, strict=True):
      check_visual(prompt, *size.tolist(), mask_size=self.mask_size)
      if prompt.mask is not None and not prompt.mask.any():
        raise ValueError(
          "the mask of a prompt is 0 everywhere, like the masks that decode(min_score=...) skips: "
          "pass the logits of a computed mask."
        )

  def buffer(self, dtype: Any, memory_budget: float, device: Any) -> OutputBuffer:
    """A buffer for the masks of all prompts.

    Raises:
      ValueError: the host has too little memory for them.
    """
    names, side = [field.name for field in dataclasses.fields(VisualMasks)], self.mask_size
    shape = len(self.prompts), MULTIMASK_OUTPUTS if self.multimask else 1, side, side
    masks = {"mask_logits": jax.ShapeDtypeStruct(shape, dtype)}
    buffer = OutputBuffer(names, masks, memory_budget, device)
    buffer.reserve(len(self.prompts))
    return buffer


def decode_visual(
  programs: Programs,
  params: Any,
  sharding: BatchSharding,
  request: VisualRequest,
  buffer: OutputBuffer,
) -> VisualMasks:
  """The masks of a request, one row per prompt.

  Args:
    programs: of the model.
    params: the part of the parameters for visual prompts.
    sharding: of the batches.
    request: the prompts.
    buffer: from `request.buffer`.
  """
  for batch in batches_by_image(request.images, VISUAL_BATCHES, sharding.devices):
    images, image = np.unique(request.images[batch], return_inverse=True)
    if len(images) > 1:
      images, image = request.images[batch], sharding.local_rows(len(batch))
    else:  # each device has the image once, and computes once what its prompts share
      images = images.repeat(sharding.devices)
    sizes = request.sizes[batch]
    packed = pack_visual([request.prompts[i] for i in batch], sizes, image.astype(np.int32))
    embedding, prompts = sharding.put((take(request.embedding, images), packed))
    outputs = programs.decode_visual(params, embedding, prompts, request.multimask)
    sources = sharding.replicate((request.images[batch].astype(np.int32), sizes))
    part, rows = drop_repeats(VisualMasks(*outputs, *sources), batch)
    if buffer.is_whole(rows):
      return part
    buffer.put(part, rows)
  return VisualMasks(**buffer.arrays)
