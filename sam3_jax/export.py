"""The model's programs as files that JAX alone runs.

  manifest.json                what each program takes and returns, and what the weights' licence is
  params.safetensors           the first argument of every program
  tokens.json                  ids of phrases, for `encode_text`
  tokenizer.model              for other phrases: `sam3_jax.Tokenizer` reads it
  PLATFORM/PROGRAM.stablehlo   for `jax.export.deserialize`

A program's second argument and its result are dictionaries of arrays. There is a file for each
platform: `ops.attention` takes its steps by platform, and a program for several would make that
choice anew in every loop.
"""

import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3_jax import checkpoint, parallel
from sam3_jax.config import Config
from sam3_jax.model.sam3 import Detector
from sam3_jax.onnx import check as check_onnx
from sam3_jax.onnx import write_onnx
from sam3_jax.prompts import BOX_SIZES, VISUAL
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import nest
from sam3_jax.types import (
  ImageEmbedding,
  Prompts,
  TextEmbedding,
  VisualEmbedding,
  VisualPrompts,
)
from sam3_jax.visual.head import VisualHead
from sam3_jax.visual.prompts import POINT_SIZES
from sam3_jax.writer import NewFolder

PLATFORMS = ("tpu", "cuda", "rocm", "cpu")
PARAMS, MANIFEST, TOKENS = "params.safetensors", "manifest.json", "tokens.json"
FORMAT_VERSION = 1

# What the arrays are, for the manifest; shapes and dtypes stand beside.
MEANINGS = {
  "pixels": "RGB, 0 to 255; the whole picture resized to this square, whatever its aspect ratio",
  "image": "what encode_image returns",
  "text": "what encode_text returns",
  "visual": "what encode_visual returns",
  "tokens": "ids: start, phrase, end, then 0",
  "image_index": "row of the encoded pictures that each prompt is about",
  "boxes": "examples: centre x, centre y, width, height as fractions of the picture's sides",
  "positive": "true on an example, false on a counterexample",
  "valid": "false on padding",
  "xy": "points and corners of boxes: x, y as fractions of the picture's sides",
  "labels": "1 on the object, 0 off it, 2 and 3 a box's first and last corner, -1 padding",
  "mask": "logits of an earlier decode_visual, in [-32, 32]",
  "has_mask": "false where mask is padding",
  "scores": "of each query, in [0, 1]",
  "presence": "logit that the picture holds the concept at all",
  "mask_logits": "of the whole picture, on a square grid; above 0 is inside",
  "semantic_logits": "that a cell belongs to the concept, whichever instance",
  "iou": "of each mask with the object that was meant, as the model guesses it, in [0, 1]",
  "object_logit": "that there is an object at all",
}
FOUND = {"boxes": "x0, y0, x1, y1 as fractions of the picture's sides; they may leave [0, 1]"}

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
  detector, head = Detector(config, dtype), VisualHead(config, dtype)
  encode = parallel.image_encoder(detector, keep=lambda *both: both)
  detect = parallel.prompt_decoder(detector)
  to_visual, to_masks = parallel.visual_encoder(head), parallel.visual_decoder(head)

  def encode_image(params, inputs):
    pixels = inputs["pixels"]
    embedding, trunk = encode(nest(params), pixels, _no_sizes(pixels))
    found = {name: getattr(embedding, name) for name in ("fine", "middle", "coarse", "attended")}
    return found | {"trunk": trunk} if visual else found

  def encode_text(params, inputs):
    variables = {"params": nest(params)}
    return _plain(detector.apply(variables, inputs["tokens"], method=Detector.encode_text))

  def decode(params, inputs):
    image = {name: x for name, x in inputs["image"].items() if name != "trunk"}
    index, rows = inputs["image_index"], ("boxes", "positive", "valid")
    prompts = Prompts(
      image=index, first_id=index, text=TextEmbedding(**inputs["text"]),
      **{name: inputs[name] for name in rows},
    )  # fmt: skip
    embedding = ImageEmbedding(**image, sizes=_no_sizes(image["coarse"]))
    found = _plain(detect(nest(params), embedding, prompts, sizes.max_detections))
    return {name: x for name, x in found.items() if name not in ("image_index", "sizes", "ids")}

  def encode_visual(params, inputs):
    return _plain(to_visual(nest(params), inputs["trunk"]))

  def decode_visual(params, inputs, multimask=True):
    prompts = {name: x for name, x in inputs.items() if name not in ("visual", "image_index")}
    asked = VisualPrompts(image=inputs["image_index"], **prompts)
    found = to_masks(nest(params), VisualEmbedding(**inputs["visual"]), asked, multimask)
    return dict(zip(("mask_logits", "iou", "object_logit"), found, strict=True))

  def decode_visual_single(params, inputs):
    return decode_visual(params, inputs, multimask=False)

  params = parameters(config, dtype, visual=visual)
  side, mask = config.image_size, config.mask_size
  count, boxes, points = sizes.prompts, sizes.boxes, sizes.points
  pixels = {"pixels": _array("uint8", sizes.images, side, side, 3)}
  tokens = {"tokens": _array("int32", count, config.text.context)}
  image = jax.eval_shape(encode_image, params, pixels)
  asked = {
    "image": image,
    "text": jax.eval_shape(encode_text, params, tokens),
    "image_index": _array("int32", count),
    "boxes": _array("float32", count, boxes, 4),
    "positive": _array("bool", count, boxes),
    "valid": _array("bool", count, boxes),
  }
  made: dict[str, tuple[Any, Any]] = {
    "encode_image": (encode_image, pixels),
    "encode_text": (encode_text, tokens),
    "decode": (decode, asked),
  }
  if visual:
    pointed = {
      "visual": jax.eval_shape(encode_visual, params, image),
      "image_index": _array("int32", count),
      "xy": _array("float32", count, points, 2),
      "labels": _array("int32", count, points),
      "mask": _array("float32", count, mask, mask),
      "has_mask": _array("bool", count),
    }
    made |= {
      "encode_visual": (encode_visual, image),
      "decode_visual": (decode_visual, pointed),
      "decode_visual_single": (decode_visual_single, pointed),
    }
  return made


def parameters(config: Config, dtype: str, *, visual: bool) -> dict[str, jax.ShapeDtypeStruct]:
  """What `params.safetensors` holds, by path."""
  shapes = checkpoint.expected_shapes(config, visual=visual)
  return {path: _array(dtype, *shape) for path, shape in sorted(shapes.items())}


def export(
  bundle: str | Path,
  out: str | Path,
  *,
  platforms: Sequence[str] | None = None,
  sizes: Sizes | None = None,
  dtype: str | None = None,
  phrases: Sequence[str] = (),
  onnx: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
  """Writes the folder described above; no device of these platforms is needed.

  Args:
    bundle: the checkpoint's folder.
    out: a folder that does not exist yet, or is empty; it appears when it is complete.
    platforms: some of `PLATFORMS`; tpu, cuda and cpu if None.
    sizes: of the batches; those of `Sizes` if None.
    dtype: of parameters and computation, "float32" or "bfloat16"; None for bfloat16 unless a CPU is
      among the platforms.
    phrases: to keep token ids of; those of a prompt of boxes alone, "visual", are there anyway.
    onnx: writes PROGRAM.onnx, parameters inside, in place of all the platforms' files.
    progress: is told what is being done, and which fraction of the whole was done before that.

  Returns:
    The manifest.

  Raises:
    FileNotFoundError: there is nothing at `bundle`.
    ImportError: the package flatbuffers is missing, or jax2onnx with `onnx`.
    ValueError: it is damaged, a platform is unknown or given with `onnx`, a size is below 1, or
      `out` is not empty or cannot be written. Nothing is left then.
  """
  platforms, tell = check_platforms(platforms, onnx), progress or (lambda what, fraction: None)
  if onnx:
    check_onnx()
  elif importlib.util.find_spec("flatbuffers") is None:
    raise ImportError("jax.export needs the package flatbuffers: pip install 'sam3-jax[export]'.")
  sizes = sizes or Sizes()
  dtype = checkpoint.check_dtype(dtype or ("float32" if "cpu" in platforms else "bfloat16")).name
  stored = checkpoint.open_stored(bundle)
  config, paths = stored.config, [path for item in stored.items.values() for path in item]
  visual = any(path.startswith(f"{checkpoint.VISUAL}/") for path in paths)
  params = parameters(config, dtype, visual=visual)
  made = functions(config, dtype, sizes, visual=visual)
  tokenizer = Tokenizer(stored.tokenizer, context=config.text.context)
  rows = {phrase: tokenizer([phrase])[0].tolist() for phrase in (VISUAL, *phrases)}
  manifest = {
    "format_version": FORMAT_VERSION,
    "jax": jax.__version__,
    "dtype": dtype,
    "info": stored.info,
    "platforms": ["onnx"] if onnx else list(platforms),
    "sizes": dataclasses.asdict(sizes),
    "params": None if onnx else PARAMS,
    "programs": {
      name: {
        "inputs": _described(inputs, MEANINGS),
        "outputs": _described(jax.eval_shape(function, params, inputs), MEANINGS | FOUND),
      }
      for name, (function, inputs) in made.items()
    },
  }
  with NewFolder(out) as folder, folder.under_its_name():
    place, total = folder.temporary, len(made) * len(platforms) + 1
    folder.check_room(sum(math.prod(x.shape) * x.dtype.itemsize for x in params.values()))
    if onnx:
      arrays = {path: x for item in stored.items for path, x in stored.read(item).items()}
      arrays = {path: x.astype(params[path].dtype) for path, x in arrays.items()}
      for j, (name, (function, inputs)) in enumerate(made.items()):
        tell(f"{name} for ONNX", j / total)
        write_onnx(place / f"{name}.onnx", function, arrays, inputs)
    for i, platform in enumerate(() if onnx else platforms):
      (place / platform).mkdir()
      for j, (name, (function, inputs)) in enumerate(made.items()):
        tell(f"{name} for {platform}", (i * len(made) + j) / total)
        exported = jax.export.export(jax.jit(function), platforms=[platform])(params, inputs)
        (place / platform / f"{name}.stablehlo").write_bytes(exported.serialize())
    if not onnx:
      tell("parameters", (total - 1) / total)
      _write_params(place / PARAMS, stored, params)
    (place / "tokenizer.model").write_bytes(stored.tokenizer)
    (place / TOKENS).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    folder.appear()
  return manifest


def check_platforms(platforms: Sequence[str] | None, onnx: bool = False) -> tuple[str, ...]:
  """Each once; ValueError where there is none, an unknown one, or any for ONNX."""
  if onnx and platforms is not None:
    raise ValueError(f"ONNX is for no platform; leave out platforms {','.join(platforms)!r}.")
  if platforms is None:
    return ("cpu",) if onnx else ("tpu", "cuda", "cpu")
  for platform in platforms:
    if platform not in PLATFORMS:
      raise ValueError(f"platform {platform!r} is not one of {', '.join(PLATFORMS)}.")
  if not platforms:
    raise ValueError(f"no platform given; name some of {', '.join(PLATFORMS)}.")
  return tuple(dict.fromkeys(platforms))


def _write_params(
  path: Path, stored: checkpoint.Stored, params: Mapping[str, jax.ShapeDtypeStruct]
) -> None:
  """Nothing larger than an item of the checkpoint is in memory at a time."""
  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.converters.safetensors import (  # pyright: ignore[reportMissingImports]
    write_safetensors,
  )

  def arrays() -> Iterator[np.ndarray]:
    for item, paths in stored.items.items():
      read = stored.read(item)
      for path in paths:
        yield read.pop(path).astype(params[path].dtype)

  order = [path for paths in stored.items.values() for path in paths]
  write_safetensors(
    path, [(name, params[name].shape, params[name].dtype.name) for name in order], arrays()
  )


def _described(tree: Any, meanings: Mapping[str, str], name: str = "") -> Any:
  """The arrays' shapes, dtypes and meanings, in the dictionaries in which they are."""
  if isinstance(tree, Mapping):
    if name:  # what another program returns is described there
      return {"is": meanings[name]}
    return {key: _described(value, meanings, key) for key, value in tree.items()}
  described = {"shape": list(tree.shape), "dtype": tree.dtype.name}
  return described | ({"is": meanings[name]} if name in meanings else {})


def _plain(fields: Any) -> dict[str, Any]:
  """A struct as a dictionary."""
  return {field.name: getattr(fields, field.name) for field in dataclasses.fields(fields)}


def _no_sizes(rows: Any) -> jax.Array:
  """Of the source pictures, which no number depends on."""
  return jnp.ones((len(rows), 2), jnp.int32)


def _array(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
