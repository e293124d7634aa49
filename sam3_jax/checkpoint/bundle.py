"""Checkpoints ("bundles"): the layout of the directory, `save` and `load`.

  config.json       format version, model configuration, metadata
  params/ITEM/      Orbax; each large part of the tree (trunk, text) is an item, the others are the
                    item `rest`; the parts `visual`, the head for visual prompts, and `video`, the
                    tracker, are optional
  unread/           Orbax; tensors of the source that the model does not read, by the source's names
  tokenizer.model   SentencePiece
  fingerprint.json  outputs of the model for a fixed image; optional
  manifest.json     shape, dtype and checksum of each parameter, a seal that they fit the
                    configuration, and the use of the source's tensors; see manifest.py
  SHA256SUMS        the checksum of every other file, in the format of sha256sum

Orbax restores a wrong shape silently if no sharding is given, and a flipped bit always. The
manifest is therefore compared with the model and with the stored arrays before anything is
restored, and the checksums as integrity.py says. A directory appears under its name only when it is
complete.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sam3_jax.checkpoint.inspection import Summary as Summary
from sam3_jax.checkpoint.inspection import add_checksums as add_checksums
from sam3_jax.checkpoint.inspection import inspect as inspect
from sam3_jax.checkpoint.inspection import verify as verify
from sam3_jax.checkpoint.orbax_items import REST, Shardings, restore_item
from sam3_jax.checkpoint.parameters import DTYPES, VISUAL, check_dtype, expected_shapes
from sam3_jax.checkpoint.parameters import VIDEO as VIDEO
from sam3_jax.checkpoint.stored import Stored as Stored
from sam3_jax.checkpoint.stored import load_unread as load_unread
from sam3_jax.checkpoint.stored import open_stored as open_stored
from sam3_jax.checkpoint.validate import OpenedCheckpoint, open_checkpoint
from sam3_jax.checkpoint.writer import Writer
from sam3_jax.config import Config
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.devices import default_device
from sam3_jax.utils.param_tree import compare, flatten, nest, not_finite, raise_faults

VERIFYING = 0.5  # fraction of the progress of loading for comparing all checksums


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A loaded checkpoint.

  Attributes:
    config: sizes of the model.
    params: the tree that the Flax modules take as `{"params": params}`. Its part `visual`, if the
      checkpoint has one, is the parameters of `visual.head.VisualHead`, and its part `video` those
      of `video.tracker.VideoTracker`.
    tokenizer: bytes of tokenizer.model.
    info: its metadata: name, source, licence, whether it is trained; see `save`.
    identity: digest of parameters, configuration and tokenizer; see utils/identity.py.
  """

  config: Config
  params: dict[str, Any]
  tokenizer: bytes
  info: dict[str, Any]
  identity: str


def save(
  path: str | Path,
  params: Mapping[str, Any],
  config: Config,
  tokenizer: bytes,
  *,
  info: Mapping[str, Any] | None = None,
  unread: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Writes a checkpoint; it appears at `path` when it is complete.

  Args:
    path: a new or empty directory, or `gs://bucket/path`, where a checkpoint is complete when it
      has SHA256SUMS.
    params: NumPy or JAX arrays, float32 or bfloat16; each process must hold all of them.
    config: sizes of the model.
    tokenizer: bytes of a SentencePiece model.
    info: metadata, plain values: `name`, `source` (what it was made from), `licence` (of the
      weights), `trained` (False for random parameters), `origin` (of a conversion: `files` with
      `bytes` and `sha256` by name, and the `repository` on the hub).
    unread: tensors to keep beside the parameters, by name.

  Raises:
    ValueError: the parameters do not fit the configuration or are not finite, `tokenizer` is not a
      CLIP vocabulary, or `path` is not empty or cannot be written.
  """
  flat = flatten(params)
  wanted = expected_shapes(config, visual=VISUAL in params)
  faults = compare({name: array.shape for name, array in flat.items()}, wanted)
  faults += [
    f"{name} is {array.dtype}; expected one of {', '.join(DTYPES)}"
    for name, array in flat.items()
    if str(array.dtype) not in DTYPES
  ]
  raise_faults(faults or not_finite(flat), "these parameters cannot be saved")
  Tokenizer(tokenizer)
  with Writer(path) as writer:
    for part, tree in params.items():
      writer.add(part, jax.tree.map(np.asarray, tree))
    reasons = dict.fromkeys(unread or {}, "kept from the source")
    writer.finish(config, tokenizer, info=info or {}, unread=unread, unread_reasons=reasons)


def load(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  sharding: Shardings | None = None,
  verify: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> Bundle:
  """Loads a checkpoint, after checking that it is complete and fits the model.

  Args:
    path: a directory, or `gs://bucket/path` (needs the extra `gcs`).
    dtype: one of `DTYPES`, to load the parameters in; None keeps the stored dtypes.
    sharding: of the parameters; None puts them on `devices.default_device()`.
    verify: compares the checksums of all files first, not only of small ones.
    progress: called with what is read next, and the fraction done so far.

  Raises:
    FileNotFoundError: there is nothing at `path`.
    ValueError: it is not a complete checkpoint of this format version; a parameter is missing,
      unknown, of the wrong shape or not finite; or `dtype` is not one of `DTYPES`.
  """
  bundle, read = begin(path, dtype=dtype, sharding=sharding, verify=verify, progress=progress)
  return dataclasses.replace(bundle, params=read())


def begin(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  sharding: Shardings | None = None,
  verify: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> tuple[Bundle, Callable[[], dict[str, Any]]]:
  """Opens a checkpoint to load it; takes the arguments of `load` and raises the same errors.

  Returns:
    The checkpoint, with `jax.ShapeDtypeStruct`s as parameters, and a function that reads the
    parameters.
  """
  if dtype is not None:
    check_dtype(dtype)
  tell = progress or (lambda what, fraction: None)
  start = VERIFYING if verify else 0.0
  on_checksums = (lambda fraction: tell("checksums", start * fraction)) if verify else None
  if on_checksums:
    on_checksums(0.0)
  opened = open_checkpoint(path, verify=verify, progress=on_checksums)
  target = sharding or jax.sharding.SingleDeviceSharding(default_device())

  def shape_of(name: str, entry: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    shape = tuple(entry["shape"])
    placed = target(name, shape) if callable(target) else target
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or entry["dtype"]), sharding=placed)

  entries = opened.manifest["parameters"]
  shapes = {name: shape_of(name, entry) for name, entry in entries.items()}

  def read() -> dict[str, Any]:
    return _read(opened, shapes, lambda what, done: tell(what, start + (1 - start) * done))

  bundle = Bundle(opened.config, nest(shapes), opened.tokenizer, opened.info, opened.identity)
  return bundle, read


def _read(
  opened: OpenedCheckpoint,
  shapes: Mapping[str, jax.ShapeDtypeStruct],
  progress: Callable[[str, float], None],
) -> dict[str, Any]:
  """The tree of parameters, with these dtypes and shardings."""
  params: dict[str, Any] = {}
  total, done = sum(x.size for x in shapes.values()), 0
  for item in opened.manifest["items"]:
    progress("parameters" if item == REST else item, done / max(1, total))
    restored = restore_item(opened.path / "params" / item, shapes)
    done += sum(array.size for array in jax.tree.leaves(restored))
    params |= restored
  progress("parameters that are not finite", 1.0)
  raise_faults(not_finite(flatten(params)), f"{opened.path} cannot be used")
  return params
