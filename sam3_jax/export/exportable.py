"""The model's programs as functions of plain dictionaries, for files that other programs run."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sam3_jax.checkpoint import bundle
from sam3_jax.config import Config
from sam3_jax.inference import sharding
from sam3_jax.inputs.prompts import BOX_SIZES
from sam3_jax.inputs.visual_prompts import POINT_SIZES
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import VisualHead
from sam3_jax.types import ImageEmbedding, Prompts, TextEmbedding, VisualEmbedding, VisualPrompts
from sam3_jax.utils.param_tree import nest

Function = Callable[[Mapping[str, Any], Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Of the batches, which are part of a program.

  Attributes:
    images: encoded in one call.
    prompts: decoded in one call, and phrases encoded.
    boxes: slots for example boxes of a prompt.
    points: slots for points of a visual prompt, of which a box takes two.
    max_detections: keeps the best so many queries of a prompt; None keeps all.
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
  """Each program as a function of parameters by path and of arrays, and the shapes of those.

  Args:
    config, dtype: of the model and of its computation.
    sizes: of the batches.
    visual: whether the parameters have a head for visual prompts.
  """
  run, params = _Programs(config, dtype, sizes, visual), parameters(config, dtype, visual=visual)
  side, mask = config.image_size, config.mask_size
  count, boxes, points = sizes.prompts, sizes.boxes, sizes.points
  pixels = {"pixels": _array("uint8", sizes.images, side, side, 3)}
  tokens = {"tokens": _array("int32", count, config.text.context)}
  image = jax.eval_shape(run.encode_image, params, pixels)
  asked = {
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
    "decode": (run.decode, asked),
  }
  if visual:
    pointed = {
      "visual": jax.eval_shape(run.encode_visual, params, image),
      "image_index": _array("int32", count),
      "xy": _array("float32", count, points, 2),
      "labels": _array("int32", count, points),
      "mask": _array("float32", count, mask, mask),
      "has_mask": _array("bool", count),
    }
    made |= {
      "encode_visual": (run.encode_visual, image),
      "decode_visual": (run.decode_visual, pointed),
      "decode_visual_single": (run.decode_visual_single, pointed),
    }
  return made


def parameters(config: Config, dtype: str, *, visual: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """The first argument of every program, by path."""
  shapes = bundle.expected_shapes(config, visual=visual)
  return {path: _array(dtype, *shape) for path, shape in sorted(shapes.items())}


class _Programs:
  """Those that `Sam3` runs, each of parameters by path and of one dictionary."""

  def __init__(self, config: Config, dtype: str, sizes: Sizes, visual: bool):
    # No program takes a concept's points, and what makes nothing of none is left out.
    config = dataclasses.replace(config, concept_points=False)
    self.visual, self.max_detections = visual, sizes.max_detections
    self.detector, head = Detector(config, dtype), VisualHead(config, dtype)
    self.encode = sharding.image_encoder(self.detector, keep=lambda *both: both)
    self.detect = sharding.prompt_decoder(self.detector)
    self.to_visual, self.to_masks = sharding.visual_encoder(head), sharding.visual_decoder(head)

  def encode_image(self, params, inputs):
    pixels = inputs["pixels"]
    embedding, trunk = self.encode(nest(params), pixels, _no_sizes(pixels))
    found = {name: getattr(embedding, name) for name in ("fine", "middle", "coarse", "attended")}
    return found | {"trunk": trunk} if self.visual else found

  def encode_text(self, params, inputs):
    variables = {"params": nest(params)}
    return _plain(self.detector.apply(variables, inputs["tokens"], method=Detector.encode_text))

  def decode(self, params, inputs):
    image = {name: x for name, x in inputs["image"].items() if name != "trunk"}
    index, rows = inputs["image_index"], ("boxes", "positive", "valid")
    prompts = Prompts(
      image=index, first_id=index, text=TextEmbedding(**inputs["text"]),
      **{name: inputs[name] for name in rows},
    )  # fmt: skip
    embedding = ImageEmbedding(**image, sizes=_no_sizes(image["coarse"]))
    found = _plain(self.detect(nest(params), embedding, prompts, self.max_detections))
    return {name: x for name, x in found.items() if name not in ("image_index", "sizes", "ids")}

  def encode_visual(self, params, inputs):
    return _plain(self.to_visual(nest(params), inputs["trunk"]))

  def decode_visual(self, params, inputs, multimask=True):
    prompts = {name: x for name, x in inputs.items() if name not in ("visual", "image_index")}
    asked = VisualPrompts(image=inputs["image_index"], **prompts)
    found = self.to_masks(nest(params), VisualEmbedding(**inputs["visual"]), asked, multimask)
    return dict(zip(("mask_logits", "iou", "object_logit"), found, strict=True))

  def decode_visual_single(self, params, inputs):
    return self.decode_visual(params, inputs, multimask=False)


def _plain(fields: Any) -> dict[str, Any]:
  """The arrays of a struct as a dictionary, without what describes them or is not there."""
  arrays = [one for one in dataclasses.fields(fields) if one.metadata.get("pytree_node", True)]
  found = {one.name: getattr(fields, one.name) for one in arrays}
  return {name: array for name, array in found.items() if array is not None}


def _no_sizes(rows: Any) -> jax.Array:
  """Of the source images, which no number depends on."""
  return jnp.ones((len(rows), 2), jnp.int32)


def _array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
