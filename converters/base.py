"""The base checkpoint: supplies parts that a source lacks, and weights that an adapter changes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import bundle
from sam3_jax.checkpoint.bundle import VISUAL, expected_shapes
from sam3_jax.config import Config, LiteTextConfig

from .layouts import keras_hub
from .layouts.unread import FREQUENCIES, SHARED_FREQUENCIES, translate
from .source import Source
from .table import Entry, Table


class Base:
  """An opened checkpoint; its parameters are read item by item, on demand."""

  def __init__(self, path: str | Path):
    self.stored = bundle.open_stored(path)
    self.config: Config = self.stored.config
    self.identity = self.stored.identity
    self.visual = any(name.startswith(f"{VISUAL}/") for name in self.stored.dtypes)
    self.lite = isinstance(self.config.text, LiteTextConfig)
    if self.config.trunk.stem:
      raise ValueError(
        f"{self.stored.path} cannot be a base: its image encoder has a convolutional stem, which "
        "no source layout supports."
      )
    unread = self.stored.unread()
    self.unread = keras_hub.as_huggingface(unread) or unread
    self._item_of = {path: item for item, paths in self.stored.items.items() for path in paths}
    self._cached: tuple[str, dict[str, np.ndarray]] = "", {}

  @property
  def path(self) -> str:
    return self.stored.path

  @property
  def name(self) -> str:
    return str(self.stored.info.get("name") or Path(self.path).name)

  def read(self, path: str) -> np.ndarray:
    """Reads a parameter in its stored dtype, by its path in our tree."""
    item = self._item_of[path]
    if self._cached[0] != item:
      self._cached = "", {}  # free the item before reading the next
      self._cached = item, self.stored.read(item)
    return self._cached[1][path]

  def dtype(self, path: str) -> str:
    return self.stored.dtypes[path]

  def sources(self, table: Table) -> dict[str, Source]:
    """All tensors of a layout that this checkpoint can supply, by canonical name."""
    visual = self.visual and bool(table.visual_rules)
    shapes = expected_shapes(self.config, visual=self.visual)
    layout = table.name.partition(",")[0]
    kept = {}
    if layout != "keras":  # KerasHub has no names for unread tensors
      kept = translate(self.unread | self._frequencies(), layout, self.config)
    entries = table.entries(self.config, visual=visual)
    found = {
      name: Source(array.shape, str(array.dtype), lambda array=array: array, in_file=False)
      for name, array in kept.items()
      if name not in entries
    }
    for name, entry in entries.items():
      found[name] = self._source(name, entry, shapes)
    return found

  def other_unread(self, names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Unread tensors that neither Meta's nor Hugging Face's layout names, except `names`."""
    here = translate(self.unread, "huggingface", self.config)
    there = translate(self.unread, "meta", self.config)
    return {
      name: array
      for name, array in self.unread.items()
      if name not in here and name not in there and name not in names
    }

  def _source(self, name: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    dtypes = {path: self.dtype(path) for path, _ in entry.slots}

    def read() -> np.ndarray:
      params = {path: self.read(path) for path in dtypes}
      return entry.restore(name, params, self.unread, self.config)

    dtype = next(iter(dtypes.values()))
    return Source(entry.shape(shapes, self.config), dtype, read, in_file=False)

  def _frequencies(self) -> dict[str, np.ndarray]:
    if FREQUENCIES not in self._item_of:
      return {}
    return dict.fromkeys(SHARED_FREQUENCIES, self.read(FREQUENCIES))


def check_same_size(config: Config, base: Base, where: str) -> None:
  """Raises ValueError if a config.json, named by `where`, is of another model than the base."""
  one, other = (_comparable(c) for c in (config, base.config))
  if differing := [name for name in one if one[name] != other[name]]:
    raise ValueError(
      f"{where} is of another model than the base {base.path}: they differ in "
      f"{', '.join(differing)}. Give the checkpoint that it was trained from."
    )


def _comparable(config: Config) -> dict[str, Any]:
  values = dataclasses.asdict(config)
  values["text"].pop("mask_padding", None)
  other = "dropout", "concept_points", "video"
  return {name: x for name, x in values.items() if name not in other}
