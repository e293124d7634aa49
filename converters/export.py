"""Exports a sam3-jax checkpoint to Meta's or Hugging Face's layout.

Tensors that our model does not read come from the checkpoint's `unread`, whichever layout they were
read from. Tensors that the source never had are zero and listed. At most one item of the checkpoint
is in memory at a time.
"""

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.checkpoint.bundle import VISUAL, Stored, expected_shapes, open_stored
from sam3_jax.checkpoint.writer import NewFolder
from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.utils.param_tree import raise_faults

from .layouts import huggingface, keras_hub, meta
from .layouts.huggingface_config import write_config
from .layouts.unread import (
  DETECTOR,
  FREQUENCIES,
  NECK,
  SHARED_FREQUENCIES,
  TRACKER,
  memory_layers,
  translate,
)
from .plan import plan
from .selection import name_in_file
from .sources import open_weights
from .table import Entry, Table
from .writers.safetensors import write_safetensors
from .writers.torch_files import write_torch
from .writers.vocabulary import entries as vocabulary_entries
from .writers.vocabulary import write_huggingface, write_openai

TABLES: dict[str, Table] = {"huggingface": huggingface.TABLE, "meta": meta.TABLE}
FILES = {"huggingface": "model.safetensors", "meta": "sam3.pt"}
REPORT = "export.json"


@dataclasses.dataclass(frozen=True)
class Exported:
  """What `export` wrote.

  Attributes:
    file: the name of the file with the weights.
    tensors: the number of its tensors.
    parameters: the number of their elements.
    zero_filled: tensors that the checkpoint lacks, which are zero in the file.
    left_out: parts that the file lacks and tensors that the layout cannot store, with the reason.
  """

  file: str
  tensors: int
  parameters: int
  zero_filled: tuple[str, ...]
  left_out: dict[str, str]


def export(
  bundle: str | Path,
  out: str | Path,
  layout: str,
  *,
  verify: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> Exported:
  """Writes a directory that transformers or Meta's package loads completely.

  Args:
    bundle: the checkpoint's directory; parameters keep the dtype they are stored in.
    out: the output directory. It must not exist or be empty; it appears when it is complete.
      huggingface: model.safetensors, config.json, the tokenizer and the image processor's settings;
      meta: sam3.pt and bpe_simple_vocab_16e6.txt.gz. Both: export.json, the returned report.
    layout: one of `TABLES`.
    verify: read the file as `convert` does, and compare every tensor with the checkpoint's.
    progress: called with the current step and the fraction of the work done before it.

  Raises:
    FileNotFoundError: `bundle` does not exist.
    ValueError: it is damaged or a model that the layout does not support; `layout` is unknown; or
      `out` is not empty or cannot be written. Nothing is left behind then.
  """
  if layout not in TABLES:
    raise ValueError(f"layout {layout!r} must be one of {', '.join(TABLES)}.")
  stored = open_stored(bundle)
  _check_model(stored, layout)
  job = _Job(stored, layout, progress or (lambda step, fraction: None))
  write = write_safetensors if layout == "huggingface" else write_torch
  with NewFolder(out) as folder, folder.under_its_name():
    folder.check_space(job.nbytes())
    write(folder.temporary / FILES[layout], job.listing, job.arrays())
    if verify:
      job.compare(folder.temporary / FILES[layout])
    if layout == "huggingface":
      _write_huggingface(folder.temporary, stored, job.memory_layers)
    else:
      write_openai(stored.tokenizer, folder.temporary)
    report = {"from": stored.info, **dataclasses.asdict(job.exported)}
    (folder.temporary / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    folder.appear()
  return job.exported


class _Job:
  """All tensors of a file in the order of writing, grouped by origin."""

  def __init__(self, stored: Stored, layout: str, report: Callable[[str, float], None]):
    self.stored, self.report = stored, report
    lite = isinstance(stored.config.text, LiteTextConfig)
    self.table = table = huggingface.LITE if lite else TABLES[layout]
    self.config = dataclasses.replace(stored.config, concept_points=layout == "meta")
    self.unread = stored.unread()
    self.unread = keras_hub.as_huggingface(self.unread) or self.unread
    item_of = {path: item for item, paths in stored.items.items() for path in paths}
    visual = any(path.startswith(f"{VISUAL}/") for path in item_of)
    given = translate(self.unread | self._frequencies(item_of), layout, self.config)
    video = self.config.video
    self.memory_layers = video.layers if video else memory_layers(given)
    entries = table.entries(self.config, visual=visual)
    self.kept = {name: array for name, array in given.items() if name not in entries}
    unread_shapes = table.unread_shapes(self.config, self.kept)
    parts = {DETECTOR, *(unread_shapes[name][0] for name in self.kept)}
    parts |= {NECK, TRACKER} if visual else set()
    self.items: dict[str, dict[str, Entry]] = {item: {} for item in stored.items}
    self.shapes = shapes = expected_shapes(self.config, visual=visual)
    self.zeros: dict[str, tuple[int, ...]] = {}
    self.listing: list[tuple[str, tuple[int, ...], str]] = []
    for name, entry in entries.items():
      path = entry.slots[0][0]
      if path in item_of:
        self.items[item_of[path]][name] = entry
      else:
        self.zeros[name] = entry.shape(shapes, self.config)
    for name, (part, shape) in unread_shapes.items():
      if part in parts and name not in self.kept and name not in entries:
        self.zeros[name] = shape
    self.dtype = collections.Counter(stored.dtypes.values()).most_common(1)[0][0]
    derived = table.derived(self.config, {})
    self.derived = {name: source.read() for name, source in derived.items()}
    for found in self.items.values():
      for name, entry in found.items():
        dtype = stored.dtypes[entry.slots[0][0]]
        self.listing.append((name, entry.shape(shapes, self.config), dtype))
    self.listing += [(name, shape, self.dtype) for name, shape in self.zeros.items()]
    for name, array in (*self.kept.items(), *self.derived.items()):
      self.listing.append((name, array.shape, str(array.dtype)))
    self.exported = self._exported(layout, parts, entries, given)

  def nbytes(self) -> int:
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for _, shape, dtype in self.listing)

  def arrays(self) -> Iterator[np.ndarray]:
    """The tensors, in the order of `listing`."""
    total, done = sum(map(len, self.stored.items.values())), 0
    for item, entries in self.items.items():
      self.report(f"writing {item}", done / total)
      flat = self.stored.read(item)
      for name, entry in entries.items():
        yield entry.restore(name, flat, self.unread, self.config)
      done += len(flat)
      flat.clear()  # free the item before reading the next
    self.report("writing unread tensors", 1.0)
    for shape in self.zeros.values():
      yield np.zeros(shape, jnp.dtype(self.dtype))
    yield from self.kept.values()
    yield from self.derived.values()

  def compare(self, path: Path) -> None:
    """Reads the file back as `convert` does; raises ValueError that names differing tensors."""
    sources = {name_in_file(name, source): source for name, source in open_weights(path).items()}
    plan(self.table, sources, self.shapes, self.config)
    faults = [
      f"{name} is {sources[name].dtype}, expected {dtype}"
      for name, _, dtype in self.listing
      if sources[name].dtype != dtype
    ]

    def check(name: str, found: Iterable[np.ndarray], expected: Iterable[np.ndarray]) -> None:
      if not all(map(_same_bits, found, expected)):
        faults.append(f"{name} differs from the checkpoint's")

    for item, entries in self.items.items():
      self.report(f"comparing {item}", 1.0)
      flat = self.stored.read(item)
      for name, entry in entries.items():
        array, head = sources[name].read(), entry.rule.skip
        pieces = (flat[path][index] for path, index in entry.slots)
        check(name, entry.rule.split(array, self.config), pieces)
        if head:
          kept = self.unread.get(entry.rule.skipped_name(name), np.zeros_like(array[:, :head]))
          check(name, [array[:, :head]], [kept.astype(array.dtype)])
      flat.clear()
    for name, shape in self.zeros.items():
      check(name, [sources[name].read()], [np.zeros(shape, jnp.dtype(self.dtype))])
    for name, array in (*self.kept.items(), *self.derived.items()):
      check(name, [sources[name].read()], [array])
    raise_faults(faults, f"{path} was written wrongly", "Export again.")

  def _frequencies(self, item_of: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The tensor of visual prompts that Hugging Face's layout stores twice, under its names."""
    if FREQUENCIES not in item_of:
      return {}
    array = self.stored.read(item_of[FREQUENCIES])[FREQUENCIES]
    return dict.fromkeys(SHARED_FREQUENCIES, array)

  def _exported(
    self,
    layout: str,
    parts: set[str],
    entries: Mapping[str, Entry],
    given: Mapping[str, np.ndarray],
  ) -> Exported:
    heads = [entry.rule.skipped_name(name) for name, entry in entries.items() if entry.rule.skip]
    left_out = {part: "this checkpoint has none" for part in (NECK, TRACKER) if part not in parts}
    unsupported = f"the layout {layout} cannot store it"
    if self.stored.config.concept_points and not self.config.concept_points:
      left_out["geometry/point_*"] = unsupported
    exported = translate(given, _layout_of(self.unread), self.config)
    for name in self.unread:
      if name not in exported and name not in heads:
        left_out[name] = unsupported
    return Exported(
      file=FILES[layout],
      tensors=len(self.listing),
      parameters=sum(math.prod(shape) for _, shape, _ in self.listing),
      zero_filled=(*self.zeros, *(name for name in heads if name not in self.unread)),
      left_out=left_out,
    )


def _same_bits(found: np.ndarray, expected: np.ndarray) -> bool:
  one, other = (
    np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (found, expected)
  )
  return found.shape == expected.shape and np.array_equal(one, other)


def _layout_of(names: Mapping[str, Any]) -> str:
  return "meta" if any(name.startswith("detector.") for name in names) else "huggingface"


def _check_model(stored: Stored, layout: str) -> None:
  """Refuses models that no other program can run."""
  config: Config = stored.config
  if config.trunk.stem:
    raise ValueError(
      f"{stored.path} has a trunk with a convolutional stem, which the layout {layout} does not "
      "support; only models of the released architecture can be exported."
    )
  lite = isinstance(config.text, LiteTextConfig)
  visual = any(path.startswith(f"{VISUAL}/") for path in stored.dtypes)
  if lite and (layout != "huggingface" or visual):
    raise ValueError(
      f"{stored.path} has the text encoder of LiteText, which no other program supports with "
      f"{'a head for visual prompts' if visual else f'the layout {layout}'}; "
      "only the layout huggingface supports it, without that head."
    )
  try:
    vocabulary_entries(stored.tokenizer)
  except ValueError as error:
    raise ValueError(f"{stored.path} cannot be written as {layout}: {error}") from error


def _write_huggingface(folder: Path, stored: Stored, layers: int) -> None:
  write_huggingface(stored.tokenizer, folder, stored.config.text.context)
  settings = {"dtype": next(iter(stored.dtypes.values())), **write_config(stored.config, layers)}
  (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
  side = {"height": stored.config.image_size, "width": stored.config.image_size}
  processor = {
    "processor_class": "Sam3Processor",
    "image_processor_type": "Sam3ImageProcessor",
    "size": side,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
  }
  (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
