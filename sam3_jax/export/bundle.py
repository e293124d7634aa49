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
import numpy as np

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.checkpoint.writer import NewFolder
from sam3_jax.export.exportable import Function, Sizes, functions, parameters
from sam3_jax.export.onnx import check as check_onnx
from sam3_jax.export.onnx import write_onnx
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import Tokenizer

PLATFORMS = ("tpu", "cuda", "rocm", "cpu")
PARAMS, MANIFEST, TOKENS = "params.safetensors", "manifest.json", "tokens.json"
FORMAT_VERSION = 1

# What the arrays are, for the manifest; shapes and dtypes stand beside.
MEANINGS = {
  "pixels": "RGB, 0 to 255; the whole image resized to this square, whatever its aspect ratio",
  "image": "what encode_image returns",
  "text": "what encode_text returns",
  "visual": "what encode_visual returns",
  "tokens": "ids: start, phrase, end, then 0",
  "image_index": "row of the encoded images that each prompt is about",
  "boxes": "examples: centre x, centre y, width, height as fractions of the image's sides",
  "positive": "true on an example, false on a counterexample",
  "valid": "false on padding",
  "xy": "points and corners of boxes: x, y as fractions of the image's sides",
  "labels": "1 on the object, 0 off it, 2 and 3 a box's first and last corner, -1 padding",
  "mask": "logits of an earlier decode_visual, in [-32, 32]",
  "has_mask": "false where mask is padding",
  "scores": "of each query, in [0, 1]",
  "presence_logit": "logit that the image holds the concept at all",
  "mask_logits": "of the whole image, on a square grid; above 0 is inside",
  "semantic_logits": "that a cell belongs to the concept, whichever instance",
  "iou": "of each mask with the object that was meant, as the model guesses it, in [0, 1]",
  "object_logit": "that there is an object at all",
}
FOUND = {"boxes": "x0, y0, x1, y1 as fractions of the image's sides; they may leave [0, 1]"}

Made = Mapping[str, tuple[Function, Any]]
Shapes = Mapping[str, jax.ShapeDtypeStruct]
Tell = Callable[[str, float], None]


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
  _check_packages(onnx)
  sizes = sizes or Sizes()
  dtype = checkpoint.check_dtype(dtype or ("float32" if "cpu" in platforms else "bfloat16")).name
  stored = checkpoint.open_stored(bundle)
  visual = any(path.startswith(f"{checkpoint.VISUAL}/") for path in stored.dtypes)
  params = parameters(stored.config, dtype, visual=visual)
  made = functions(stored.config, dtype, sizes, visual=visual)
  manifest = {
    "format_version": FORMAT_VERSION,
    "jax": jax.__version__,
    "dtype": dtype,
    "info": stored.info,
    "platforms": ["onnx"] if onnx else list(platforms),
    "sizes": dataclasses.asdict(sizes),
    "params": None if onnx else PARAMS,
    "programs": _describe(made, params),
  }
  with NewFolder(out) as folder, folder.under_its_name():
    place = folder.temporary
    folder.check_space(sum(math.prod(x.shape) * x.dtype.itemsize for x in params.values()))
    if onnx:
      _write_onnx(place, made, params, stored, tell)
    else:
      _write_stablehlo(place, made, params, platforms, tell)
      _write_params(place / PARAMS, stored, params)
    _write_tokens(place, stored, phrases)
    (place / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    folder.appear()
  return manifest


def _check_packages(onnx: bool) -> None:
  if onnx:
    check_onnx()
  elif importlib.util.find_spec("flatbuffers") is None:
    raise ImportError("jax.export needs the package flatbuffers: pip install 'sam3-jax[export]'.")


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


def _write_stablehlo(
  place: Path, made: Made, params: Shapes, platforms: Sequence[str], tell: Tell
) -> None:
  """A folder for each platform, with a file for each program."""
  for i, platform in enumerate(platforms):
    (place / platform).mkdir()
    for j, (name, (function, inputs)) in enumerate(made.items()):
      tell(f"{name} for {platform}", (i * len(made) + j) / (len(platforms) * len(made)))
      exported = jax.export.export(jax.jit(function), platforms=[platform])(params, inputs)
      (place / platform / f"{name}.stablehlo").write_bytes(exported.serialize())


def _write_onnx(
  place: Path, made: Made, params: Shapes, stored: checkpoint.Stored, tell: Tell
) -> None:
  """A file for each program; of the parameters, no more are in memory than one reads."""

  def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
    wanted, found = set(paths), {}
    for item, there in stored.items.items():
      if wanted.intersection(there):
        for path, x in stored.read(item).items():
          if path in wanted:
            found[path] = x.astype(params[path].dtype, copy=False)
    return found

  for j, (name, (function, inputs)) in enumerate(made.items()):
    tell(f"{name} for ONNX", j / len(made))
    write_onnx(place / f"{name}.onnx", function, params, inputs, read)


def _write_params(path: Path, stored: checkpoint.Stored, params: Shapes) -> None:
  """Nothing larger than an item of the checkpoint is in memory at a time."""
  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.converters.writers.safetensors import write_safetensors

  def arrays() -> Iterator[np.ndarray]:
    for item, paths in stored.items.items():
      read = stored.read(item)
      for path in paths:
        yield read.pop(path).astype(params[path].dtype)

  order = [path for paths in stored.items.values() for path in paths]
  write_safetensors(
    path, [(name, params[name].shape, params[name].dtype.name) for name in order], arrays()
  )


def _write_tokens(place: Path, stored: checkpoint.Stored, phrases: Sequence[str]) -> None:
  (place / "tokenizer.model").write_bytes(stored.tokenizer)
  tokenizer = Tokenizer(stored.tokenizer, context=stored.config.text.context)
  tokenizer.check(phrases)
  rows = {phrase: tokenizer([phrase])[0].tolist() for phrase in (BOXES_ALONE, *phrases)}
  (place / TOKENS).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(made: Made, params: Shapes) -> dict[str, Any]:
  """What each program takes and returns."""
  return {
    name: {
      "inputs": _described(inputs, MEANINGS),
      "outputs": _described(jax.eval_shape(function, params, inputs), MEANINGS | FOUND),
    }
    for name, (function, inputs) in made.items()
  }


def _described(tree: Any, meanings: Mapping[str, str], name: str = "") -> Any:
  """The arrays' shapes, dtypes and meanings, in the dictionaries in which they are."""
  if isinstance(tree, Mapping):
    if name:  # what another program returns is described there
      return {"is": meanings[name]}
    return {key: _described(value, meanings, key) for key, value in tree.items()}
  described = {"shape": list(tree.shape), "dtype": tree.dtype.name}
  return described | ({"is": meanings[name]} if name in meanings else {})
