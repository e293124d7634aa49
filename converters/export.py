"""The way back: a checkpoint of ours in Meta's or Hugging Face's layout, for their packages.

Tensors that our model does not read come from the checkpoint's `unread`, from whichever layout they
were kept; what the source never had is zero and listed. Nothing larger than an item of the
checkpoint is in memory at a time.
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

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.checkpoint.bundle import VISUAL, Stored, expected_shapes
from sam3_jax.checkpoint.writer import NewFolder
from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.utils.param_tree import raise_faults

from .engine import plan, restore, skipped_name
from .layouts import huggingface, keras_hub, meta
from .layouts.huggingface_config import write_config
from .layouts.unread import DETECTOR, NECK, SHARED_FREQUENCIES, TRACKER, memory_layers, translate
from .readers.safetensors import write_safetensors
from .rules import Entry, Table
from .selection import name_in_file
from .sources import open_weights
from .torch_writer import write_torch
from .vocabulary_files import entries as check_vocabulary
from .vocabulary_files import write_huggingface, write_openai

TABLES: dict[str, Table] = {"huggingface": huggingface.TABLE, "meta": meta.TABLE}
FILES = {"huggingface": "model.safetensors", "meta": "sam3.pt"}
REPORT = "export.json"
FREQUENCIES = f"{VISUAL}/prompt/frequencies"


@dataclasses.dataclass(frozen=True)
class Exported:
  """What was written.

  Attributes:
    file: the one with the weights.
    tensors: how many are in it.
    parameters: of all of them.
    zero_filled: the ones that the checkpoint did not have, and that are zero now.
    left_out: what else is missing or had no place in the layout, with the reason.
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
  """Writes a folder that transformers or Meta's package loads, with nothing missing.

  Args:
    bundle: the checkpoint's folder; parameters keep the dtype they are stored in.
    out: a folder that does not exist yet, or is empty; it appears when it is complete.
      huggingface: model.safetensors, config.json, the tokenizer and the image processor's settings;
      meta: sam3.pt and bpe_simple_vocab_16e6.txt.gz. Both: what was zero-filled, in export.json.
    layout: one of `TABLES`.
    verify: read the file as `convert` does, and compare every tensor with the checkpoint's.
    progress: is told what is being done, and which fraction of the whole was done before that.

  Raises:
    FileNotFoundError: there is nothing at `bundle`.
    ValueError: it is damaged or no model that the layout has room for; `layout` is another; or
      `out` is not empty or cannot be written. Nothing is left then.
  """
  if layout not in TABLES:
    raise ValueError(f"layout {layout!r} must be one of {', '.join(TABLES)}.")
  stored = checkpoint.open_stored(bundle)
  _check_model(stored, layout)
  job = _Job(stored, layout, progress or (lambda what, fraction: None))
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
  """All tensors of a file in the order in which they are written, by where they come from."""

  def __init__(self, stored: Stored, layout: str, tell: Callable[[str, float], None]):
    self.stored, self.tell = stored, tell
    lite = isinstance(stored.config.text, LiteTextConfig)
    self.table = table = huggingface.LITE if lite else TABLES[layout]
    self.config = dataclasses.replace(stored.config, concept_points=layout == "meta")
    self.unread = stored.unread()
    self.unread = keras_hub.as_huggingface(self.unread) or self.unread
    item_of = {path: item for item, paths in stored.items.items() for path in paths}
    visual = any(path.startswith(f"{VISUAL}/") for path in item_of)
    given = translate(self.unread | self._frequencies(item_of), layout, self.config)
    self.memory_layers = memory_layers(given)
    entries = table.entries(self.config, visual=visual)
    self.kept = {name: array for name, array in given.items() if name not in entries}
    facts = table.kept(self.config, self.kept)
    parts = {DETECTOR, *(facts[name][0] for name in self.kept)}
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
    for name, (part, shape) in facts.items():
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
      self.tell(f"writing {item}", done / total)
      flat = self.stored.read(item)
      for name, entry in entries.items():
        yield restore(name, entry, flat, self.unread, self.config)
      done += len(flat)
      flat.clear()  # before the next item is read
    self.tell("writing what the model does not read", 1.0)
    for shape in self.zeros.values():
      yield np.zeros(shape, jnp.dtype(self.dtype))
    yield from self.kept.values()
    yield from self.derived.values()

  def compare(self, path: Path) -> None:
    """Reads what was written as `convert` does; ValueError names the tensors whose bits are not the
    checkpoint's."""
    sources = {name_in_file(name, one): one for name, one in open_weights(path).items()}
    plan(self.table, sources, self.shapes, self.config)
    faults = [
      f"{name} is {sources[name].dtype}, expected {dtype}"
      for name, _, dtype in self.listing
      if sources[name].dtype != dtype
    ]

    def check(name: str, found: Iterable[np.ndarray], wanted: Iterable[np.ndarray]) -> None:
      if not all(map(_same_bits, found, wanted)):
        faults.append(f"{name} is not what the checkpoint has")

    for item, entries in self.items.items():
      self.tell(f"comparing {item}", 1.0)
      flat = self.stored.read(item)
      for name, entry in entries.items():
        array, head = sources[name].read(), entry.rule.skip
        pieces = (flat[path][index] for path, index in entry.slots)
        check(name, entry.rule.split(array, self.config), pieces)
        if head:
          kept = self.unread.get(skipped_name(name, entry.rule), np.zeros_like(array[:, :head]))
          check(name, [array[:, :head]], [kept.astype(array.dtype)])
      flat.clear()
    for name, shape in self.zeros.items():
      check(name, [sources[name].read()], [np.zeros(shape, jnp.dtype(self.dtype))])
    for name, array in (*self.kept.items(), *self.derived.items()):
      check(name, [sources[name].read()], [array])
    raise_faults(faults, f"{path} was not written as it should be", "Write it again.")

  def _frequencies(self, item_of: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The one tensor of visual prompts that Hugging Face's layout has twice, under its names."""
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
    heads = [skipped_name(name, entry.rule) for name, entry in entries.items() if entry.rule.skip]
    left_out = {part: "this checkpoint has none" for part in (NECK, TRACKER) if part not in parts}
    no_place = f"the layout {layout} has no place for it"
    if self.stored.config.concept_points and not self.config.concept_points:
      left_out["geometry/point_*"] = no_place
    back = translate(given, _layout_of(self.unread), self.config)
    for name in self.unread:
      if name not in back and name not in heads:
        left_out[name] = no_place
    return Exported(
      file=FILES[layout],
      tensors=len(self.listing),
      parameters=sum(math.prod(shape) for _, shape, _ in self.listing),
      zero_filled=(*self.zeros, *(name for name in heads if name not in self.unread)),
      left_out=left_out,
    )


def _same_bits(found: np.ndarray, wanted: np.ndarray) -> bool:
  one, other = (np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in (found, wanted))
  return found.shape == wanted.shape and np.array_equal(one, other)


def _layout_of(names: Mapping[str, Any]) -> str:
  return "meta" if any(name.startswith("detector.") for name in names) else "huggingface"


def _check_model(stored: Stored, layout: str) -> None:
  """Refuses what no other program could run."""
  config: Config = stored.config
  if config.trunk.stem:
    raise ValueError(
      f"{stored.path} has a trunk with a convolutional stem, for which the layout {layout} has no "
      "place; only models of the released architecture can be written."
    )
  lite = isinstance(config.text, LiteTextConfig)
  visual = any(path.startswith(f"{VISUAL}/") for path in stored.dtypes)
  if lite and (layout != "huggingface" or visual):
    raise ValueError(
      f"{stored.path} has the text encoder of LiteText, and no other program has that with "
      f"{'a head for visual prompts' if visual else f'the layout {layout}'}; "
      "only the layout huggingface has a place for it, for concepts alone."
    )
  try:
    check_vocabulary(stored.tokenizer)
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
