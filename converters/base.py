"""A checkpoint of ours as a source of what another file lacks, or of what an adapter changes."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import bundle
from sam3_jax.checkpoint.bundle import VISUAL, expected_shapes
from sam3_jax.config import Config, LiteTextConfig

from .engine import restore
from .layouts import keras_hub
from .layouts.unread import translate
from .rules import Entry, Source, Table


class Base:
  """An opened checkpoint; its parameters are read item by item, when they are asked for."""

  def __init__(self, path: str | Path):
    self.stored = bundle.open_stored(path)
    self.config: Config = self.stored.config
    self.identity = self.stored.identity
    self.visual = any(name.startswith(f"{VISUAL}/") for name in self.stored.dtypes)
    self.lite = isinstance(self.config.text, LiteTextConfig)
    if self.config.trunk.stem:
      raise ValueError(
        f"{self.stored.path} cannot be a base: its image encoder has a convolutional stem, for "
        "which no layout that is converted has a place."
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
    """A parameter as stored, by its place in our tree."""
    item = self._item_of[path]
    if self._cached[0] != item:
      self._cached = "", {}  # before the next is read
      self._cached = item, self.stored.read(item)
    return self._cached[1][path]

  def dtype(self, path: str) -> str:
    return self.stored.dtypes[path]

  def sources(self, table: Table) -> dict[str, Source]:
    """All that this checkpoint has of a layout's tensors, by canonical name."""
    visual = self.visual and bool(table.visual)
    shapes = expected_shapes(self.config, visual=self.visual)
    layout = table.name.partition(",")[0]
    kept = {}
    if layout != "keras":  # which has no names for them
      kept = translate(self.unread | self._frequencies(), layout, self.config)
    entries = table.entries(self.config, visual=visual)
    found = {
      name: Source(array.shape, str(array.dtype), lambda array=array: array, made=True)
      for name, array in kept.items()
      if name not in entries
    }
    for name, entry in entries.items():
      found[name] = self._source(name, entry, shapes)
    return found

  def rest(self, names: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What this checkpoint keeps unread and no layout but its own has a name for, less `names`."""
    here = translate(self.unread, "huggingface", self.config)
    there = translate(self.unread, "meta", self.config)
    return {
      name: array
      for name, array in self.unread.items()
      if name not in here and name not in there and name not in names
    }

  def _source(self, name: str, entry: Entry, shapes: Mapping[str, tuple[int, ...]]) -> Source:
    places = {path: self.dtype(path) for path, _ in entry.slots}

    def read() -> np.ndarray:
      flat = {path: self.read(path) for path in places}
      return restore(name, entry, flat, self.unread, self.config)

    dtype = next(iter(places.values()))
    return Source(entry.shape(shapes, self.config), dtype, read, made=True)

  def _frequencies(self) -> dict[str, np.ndarray]:
    from .export import FREQUENCIES
    from .layouts.unread import SHARED_FREQUENCIES

    if FREQUENCIES not in self._item_of:
      return {}
    return dict.fromkeys(SHARED_FREQUENCIES, self.read(FREQUENCIES))


def check_same_size(config: Config, base: Base, where: str) -> None:
  """Raises ValueError if a config.json is of another model than the base."""
  one, other = (_comparable(c) for c in (config, base.config))
  if differing := [name for name in one if one[name] != other[name]]:
    raise ValueError(
      f"{where} is of another model than the base {base.path}: they differ in "
      f"{', '.join(differing)}. Give the checkpoint that it was trained from."
    )


def _comparable(config: Config) -> dict[str, Any]:
  values = dataclasses.asdict(config)
  values["text"].pop("mask_padding", None)
  return {name: x for name, x in values.items() if name not in ("dropout", "concept_points")}
