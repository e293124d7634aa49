"""Exports the programs of a model to files that run with JAX alone.

  manifest.json                inputs and outputs of each program, and the licence of the weights
  params.safetensors           the first argument of every program
  tokens.json                  token ids of phrases, for `encode_text`
  tokenizer.model              for other phrases; `sam3_jax.Tokenizer` reads it
  PLATFORM/PROGRAM.stablehlo   for `jax.export.deserialize`

The second argument and the result of a program are dictionaries of arrays. Each platform has its
own file: `ops.attention` depends on the platform, and a program for several would choose its steps
again in every loop.
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

from sam3_jax.checkpoint.bundle import VISUAL, Stored, check_dtype, open_stored
from sam3_jax.checkpoint.writer import NewFolder
from sam3_jax.export.exportable import Function, Sizes, functions, parameters
from sam3_jax.export.onnx import check as check_onnx
from sam3_jax.export.onnx import write_onnx
from sam3_jax.inputs.prompts import BOXES_ALONE
from sam3_jax.inputs.tokenizer import Tokenizer

PLATFORMS = ("tpu", "cuda", "rocm", "cpu")
PARAMS, MANIFEST, TOKENS = "params.safetensors", "manifest.json", "tokens.json"
FORMAT_VERSION = 1

# Descriptions of the arrays for the manifest, which also has their shapes and dtypes.
DESCRIPTIONS = {
  "pixels": "RGB, 0 to 255; the whole image resized to this square, whatever its aspect ratio",
  "image": "the result of encode_image",
  "text": "the result of encode_text",
  "visual": "the result of encode_visual",
  "tokens": "ids: start, phrase, end, then 0",
  "image_index": "row of the encoded image of each prompt",
  "boxes": "exemplar boxes: center x, center y, width, height as fractions of the image's sides",
  "positive": "true for a positive box, false for a negative one",
  "valid": "false for padding",
  "xy": "points and corners of boxes: x, y as fractions of the image's sides",
  "labels": "1 on the object, 0 off it, 2 and 3 for a box's first and last corner, -1 for padding",
  "mask": "logits of an earlier decode_visual, in [-32, 32]",
  "has_mask": "false if the mask is padding",
  "scores": "of each query, in [0, 1]",
  "presence_logit": "logit that the image contains the concept",
  "mask_logits": "on a square grid over the whole image; above 0 is inside",
  "semantic_logits": "logits that a cell belongs to any instance of the concept",
  "iou": "predicted IoU of each mask with the object, in [0, 1]",
  "object_logit": "logit that there is an object",
}
OUTPUT_DESCRIPTIONS = {
  "boxes": "x0, y0, x1, y1 as fractions of the image's sides; they may leave [0, 1]"
}

Functions = Mapping[str, tuple[Function, Any]]
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
  """Exports a checkpoint and returns the manifest; needs no device of the platforms.

  Args:
    bundle: the checkpoint's directory.
    out: a new or empty directory; it appears when it is complete.
    platforms: some of `PLATFORMS`; None for tpu, cuda and cpu.
    sizes: of the batches; None for the defaults of `Sizes`.
    dtype: "float32" or "bfloat16"; None for float32 if the platforms include cpu, else bfloat16.
    phrases: phrases to store token ids of, besides "visual", that of prompts without a phrase.
    onnx: writes PROGRAM.onnx, which includes the parameters, instead of the other formats.
    progress: called with what is done next, and the fraction done so far.

  Raises:
    FileNotFoundError: there is nothing at `bundle`.
    ImportError: the package flatbuffers is missing, or jax2onnx with `onnx`.
    ValueError: the checkpoint is damaged, a platform is unknown or given with `onnx`, a size is
      below 1, or `out` is not empty or cannot be written.
  """
  platforms, tell = check_platforms(platforms, onnx), progress or (lambda what, fraction: None)
  _check_packages(onnx)
  sizes = sizes or Sizes()
  dtype = check_dtype(dtype or ("float32" if "cpu" in platforms else "bfloat16")).name
  stored = open_stored(bundle)
  visual = any(path.startswith(f"{VISUAL}/") for path in stored.dtypes)
  params = parameters(stored.config, dtype, visual=visual)
  programs = functions(stored.config, dtype, sizes, visual=visual)
  manifest = {
    "format_version": FORMAT_VERSION,
    "jax": jax.__version__,
    "dtype": dtype,
    "info": stored.info,
    "platforms": ["onnx"] if onnx else list(platforms),
    "sizes": dataclasses.asdict(sizes),
    "params": None if onnx else PARAMS,
    "programs": _describe(programs, params),
  }
  with NewFolder(out) as folder, folder.under_its_name():
    path = folder.temporary
    folder.check_space(_nbytes(params))
    if onnx:
      _write_onnx(path, programs, params, stored, tell)
    else:
      _write_stablehlo(path, programs, params, platforms, tell)
      _write_params(path / PARAMS, stored, params)
    _write_tokens(path, stored, phrases)
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    folder.appear()
  return manifest


def _nbytes(params: Shapes) -> int:
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in params.values())


def _check_packages(onnx: bool) -> None:
  if onnx:
    check_onnx()
  elif importlib.util.find_spec("flatbuffers") is None:
    raise ImportError("jax.export needs the package flatbuffers: pip install 'sam3-jax[export]'.")


def check_platforms(platforms: Sequence[str] | None, onnx: bool = False) -> tuple[str, ...]:
  """Distinct platforms; ValueError if one is unknown, there is none, or ONNX gets any."""
  if onnx and platforms is not None:
    raise ValueError(f"ONNX has no platforms; leave out platforms {','.join(platforms)!r}.")
  if platforms is None:
    return ("cpu",) if onnx else ("tpu", "cuda", "cpu")
  for platform in platforms:
    if platform not in PLATFORMS:
      raise ValueError(f"platform {platform!r} is not one of {', '.join(PLATFORMS)}.")
  if not platforms:
    raise ValueError(f"no platform given; name some of {', '.join(PLATFORMS)}.")
  return tuple(dict.fromkeys(platforms))


def _write_stablehlo(
  folder: Path, programs: Functions, params: Shapes, platforms: Sequence[str], tell: Tell
) -> None:
  """Writes a directory for each platform, with a file for each program."""
  for i, platform in enumerate(platforms):
    (folder / platform).mkdir()
    for j, (name, (function, inputs)) in enumerate(programs.items()):
      tell(f"{name} for {platform}", (i * len(programs) + j) / (len(platforms) * len(programs)))
      exported = jax.export.export(jax.jit(function), platforms=[platform])(params, inputs)
      (folder / platform / f"{name}.stablehlo").write_bytes(exported.serialize())


def _write_onnx(
  folder: Path, programs: Functions, params: Shapes, stored: Stored, tell: Tell
) -> None:
  """Writes a file for each program; holds the parameters of one program in memory."""

  def read(paths: Sequence[str]) -> dict[str, np.ndarray]:
    wanted, found = set(paths), {}
    for item, there in stored.items.items():
      if wanted.intersection(there):
        for path, x in stored.read(item).items():
          if path in wanted:
            found[path] = x.astype(params[path].dtype, copy=False)
    return found

  for j, (name, (function, inputs)) in enumerate(programs.items()):
    tell(f"{name} for ONNX", j / len(programs))
    write_onnx(folder / f"{name}.onnx", function, params, inputs, read)


def _write_params(path: Path, stored: Stored, params: Shapes) -> None:
  """Writes the parameters that a program uses; holds one item of the checkpoint in memory."""
  # setuptools maps the directory converters/ to this name, which pyright cannot know.
  from sam3_jax.converters.writers.safetensors import (  # pyright: ignore[reportMissingImports]
    write_safetensors,
  )

  items = {item: [path for path in paths if path in params] for item, paths in stored.items.items()}

  def arrays() -> Iterator[np.ndarray]:
    for item, paths in items.items():
      read = stored.read(item) if paths else {}
      for path in paths:
        yield read.pop(path).astype(params[path].dtype)

  order = [path for paths in items.values() for path in paths]
  write_safetensors(
    path, [(name, params[name].shape, params[name].dtype.name) for name in order], arrays()
  )


def _write_tokens(folder: Path, stored: Stored, phrases: Sequence[str]) -> None:
  (folder / "tokenizer.model").write_bytes(stored.tokenizer)
  tokenizer = Tokenizer(stored.tokenizer, context=stored.config.text.context)
  tokenizer.check(phrases)
  rows = {phrase: tokenizer([phrase])[0].tolist() for phrase in (BOXES_ALONE, *phrases)}
  (folder / TOKENS).write_text(json.dumps(rows, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(programs: Functions, params: Shapes) -> dict[str, Any]:
  """The inputs and outputs of each program, for the manifest."""
  return {
    name: {
      "inputs": _described(inputs, DESCRIPTIONS),
      "outputs": _described(
        jax.eval_shape(function, params, inputs), DESCRIPTIONS | OUTPUT_DESCRIPTIONS
      ),
    }
    for name, (function, inputs) in programs.items()
  }


def _described(tree: Any, descriptions: Mapping[str, str], name: str = "") -> Any:
  """Shapes, dtypes and descriptions of arrays, nested as the arrays are."""
  if isinstance(tree, Mapping):
    if name:  # the result of another program, which its entry describes
      return {"is": descriptions[name]}
    return {key: _described(value, descriptions, key) for key, value in tree.items()}
  described = {"shape": list(tree.shape), "dtype": tree.dtype.name}
  return described | ({"is": descriptions[name]} if name in descriptions else {})
