"""Reads the arrays of a checkpoint item by item, without holding all of them in memory."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import integrity
from sam3_jax.checkpoint.orbax_items import stored_arrays
from sam3_jax.checkpoint.validate import OpenedCheckpoint, open_checkpoint
from sam3_jax.config import Config


@dataclasses.dataclass(frozen=True)
class Stored:
  """A checkpoint whose arrays can be read item by item.

  Attributes:
    path: of the directory.
    identity: digest of parameters, configuration and tokenizer; see utils/identity.py.
    config: sizes of the model.
    info: its metadata; see `bundle.save`.
    tokenizer: bytes of tokenizer.model.
    dtypes: stored dtypes of the parameters, by path.
    items: paths of the parameters of each item, one or more top-level parts of the tree.
    read: reads the parameters of an item as stored, by path, and compares their checksums.
    unread: reads the source's tensors that the model does not read, likewise.
  """

  path: str
  identity: str
  config: Config
  info: dict[str, Any]
  tokenizer: bytes
  dtypes: dict[str, str]
  items: dict[str, tuple[str, ...]]
  read: Callable[[str], dict[str, np.ndarray]]
  unread: Callable[[], dict[str, np.ndarray]]


def open_stored(path: str | Path) -> Stored:
  """Opens a checkpoint; raises as `bundle.load`."""
  opened = open_checkpoint(path)
  path, manifest = opened.path, opened.manifest

  def read(item: str) -> dict[str, np.ndarray]:
    return integrity.read_compared(path / "params" / item, manifest["parameters"])

  dtypes = {name: entry["dtype"] for name, entry in manifest["parameters"].items()}
  items = {item: tuple(stored_arrays(path / "params" / item)) for item in manifest["items"]}
  return Stored(
    path=str(path),
    identity=opened.identity,
    config=opened.config,
    info=opened.info,
    tokenizer=opened.tokenizer,
    dtypes=dtypes,
    items=items,
    read=read,
    unread=functools.partial(_read_unread, opened),
  )


def load_unread(path: str | Path) -> dict[str, np.ndarray]:
  """The source's tensors that the model does not read, by the source's names."""
  return _read_unread(open_checkpoint(path))


def _read_unread(opened: OpenedCheckpoint) -> dict[str, np.ndarray]:
  entries = opened.manifest["unread"]
  return integrity.read_compared(opened.path / "unread", entries) if entries else {}
