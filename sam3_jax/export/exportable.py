"""The programs of a model as functions of plain dictionaries, for export."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sam3_jax.checkpoint import bundle
from sam3_jax.config import Config
from sam3_jax.inference.programs import Programs
from sam3_jax.inputs.prompts import BOX_SIZES
from sam3_jax.inputs.visual_prompts import POINT_SIZES
from sam3_jax.types import ImageEmbedding, Prompts, TextEmbedding, VisualEmbedding, VisualPrompts
from sam3_jax.utils.param_tree import nest

Function = Callable[[Mapping[str, Any], Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Sizes of batches, which an exported program fixes.

  Attributes:
    images: encoded in one call.
    prompts: prompts decoded, and phrases encoded, in one call.
    boxes: exemplar boxes of a prompt.
    points: points of a visual prompt; a box takes two.
    max_detections: keeps at most N queries of a prompt, the best; None keeps all.
  """

  images: int = 1
  prompts: int = 1
  boxes: int = BOX_SIZES[0]
  points: int = POINT_SIZES[0]
  max_detections: int | None = None

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if value is not None and value < 1:
        raise ValueError(f"{name} must be 1 or more; got {value}.")


def functions(
  config: Config, dtype: str, sizes: Sizes, *, visual: bool
) -> dict[str, tuple[Function, Any]]:
  """Each program, a function of parameters by path and of arrays, with the shapes of the arrays.

  Args:
    config: sizes of the model.
    dtype: of the computation.
    sizes: of the batches.
    visual: whether the parameters have a head for visual prompts.
  """
  run, params = _Exportable(config, dtype, sizes, visual), parameters(config, dtype, visual=visual)
  side, mask = config.image_size, config.mask_size
  count, boxes, slots = sizes.prompts, sizes.boxes, sizes.points
  pixels = {"pixels": _array("uint8", sizes.images, side, side, 3)}
  tokens = {"tokens": _array("int32", count, config.text.context)}
  image = jax.eval_shape(run.encode_image, params, pixels)
  concepts = {
    "image": image,
    "text": jax.eval_shape(run.encode_text, params, tokens),
    "image_index": _array("int32", count),
    "boxes": _array("float32", count, boxes, 4),
    "positive": _array("bool", count, boxes),
    "valid": _array("bool", count, boxes),
  }
  made: dict[str, tuple[Any, Any]] = {
    "encode_image": (run.encode_image, pixels),
    "encode_text": (run.encode_text, tokens),
    "decode": (run.decode, concepts),
  }
  if visual:
    visual_prompts = {
      "visual": jax.eval_shape(run.encode_visual, params, image),
      "image_index": _array("int32", count),
      "xy": _array("float32", count, slots, 2),
      "labels": _array("int32", count, slots),
      "mask": _array("float32", count, mask, mask),
      "has_mask": _array("bool", count),
    }
    made |= {
      "encode_visual": (run.encode_visual, image),
      "decode_visual": (run.decode_visual, visual_prompts),
      "decode_visual_single": (run.decode_visual_single, visual_prompts),
    }
  return made


def parameters(config: Config, dtype: str, *, visual: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes of the first argument of every program, by path; no program uses the tracker."""
  shapes = bundle.expected_shapes(dataclasses.replace(config, video=None), visual=visual)
  return {path: _array(dtype, *shape) for path, shape in sorted(shapes.items())}


class _Exportable:
  """The programs as functions of parameters by path and of one dictionary."""

  def __init__(self, config: Config, dtype: str, sizes: Sizes, visual: bool):
    # No program takes concept points; without them, their encoder is left out.
    config = dataclasses.replace(config, concept_points=False)
    self.programs = Programs(config, dtype)
    self.visual, self.max_detections = visual, sizes.max_detections

  def encode_image(self, params, inputs):
    pixels = inputs["pixels"]
    embedding, trunk = self.programs.encode(nest(params), pixels, _no_sizes(pixels))
    maps = {name: getattr(embedding, name) for name in ("fine", "middle", "coarse", "attended")}
    return maps | {"trunk": trunk} if self.visual else maps

  def encode_text(self, params, inputs):
    return _plain(self.programs.encode_text(nest(params), inputs["tokens"]))

  def decode(self, params, inputs):
    image = {name: x for name, x in inputs["image"].items() if name != "trunk"}
    index = inputs["image_index"]
    prompts = Prompts(
      image=index,
      first_id=index,
      text=TextEmbedding(**inputs["text"]),
      **{name: inputs[name] for name in ("boxes", "positive", "valid")},
    )
    embedding = ImageEmbedding(**image, sizes=_no_sizes(image["coarse"]))
    detect = self.programs.prompts.detect
    found = _plain(detect(nest(params), embedding, prompts, self.max_detections))
    return {name: x for name, x in found.items() if name not in ("image_index", "sizes", "ids")}

  def encode_visual(self, params, inputs):
    return _plain(self.programs.encode_visual(nest(params), inputs["trunk"]))

  def decode_visual(self, params, inputs, multimask=True):
    fields = {name: x for name, x in inputs.items() if name not in ("visual", "image_index")}
    prompts = VisualPrompts(image=inputs["image_index"], **fields)
    embedding = VisualEmbedding(**inputs["visual"])
    outputs = self.programs.decode_visual(nest(params), embedding, prompts, multimask)
    return dict(zip(("mask_logits", "iou", "object_logit"), outputs, strict=True))

  def decode_visual_single(self, params, inputs):
    return self.decode_visual(params, inputs, multimask=False)


def _plain(fields: Any) -> dict[str, Any]:
  """The arrays of a struct as a dictionary, without those that are None."""
  arrays = [one for one in dataclasses.fields(fields) if one.metadata.get("pytree_node", True)]
  found = {one.name: getattr(fields, one.name) for one in arrays}
  return {name: array for name, array in found.items() if array is not None}


def _no_sizes(rows: Any) -> jax.Array:
  """Sizes of source images, which change no exported value."""
  return jnp.ones((len(rows), 2), jnp.int32)


def _array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
