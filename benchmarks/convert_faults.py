"""Single faults in files of every layout: each must be refused, or found by its checksum, by name.

  python benchmarks/convert_faults.py --out benchmarks/results

The tiny model's seeded weights are written in Meta's layout, in three of Hugging Face's and as a
preset of KerasHub, without the converters (by `tests/layouts.py` and its neighbours), and then with
one thing wrong. A message must be one line, name the tensor and leave nothing behind. A file that
was cut off may be named instead (a zip archive has its directory at the end, and the HDF5 library
opens none), and so may an index of Orbax, which is no tensor's. A square matrix cannot be told from
its transpose: only others are transposed. The exit status is 1 if a fault was missed.
"""

import argparse
import collections
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from timing import machine

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from keras_preset import datasets, write_file, write_preset
from layouts import TOKENIZER, layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.layouts import meta
from tiny import CONFIG
from torch_archive import save_arrays

from sam3_jax.checkpoint import bundle

CUT, FLIPPED = "file cut off", "bit flipped in params/"
CHANGES = ("missing", "extra", "transposed", "truncated", "renamed", "dtype", "not finite")
KINDS = (*CHANGES, CUT, FLIPPED)
DOUBLED = "tracker_model." * 2  # names are told as facebook/sam3 has them
DTYPES = ("float64", "float16", "int64")  # that every format can hold
Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
  """How the tiny model is written; `prepare` makes a folder without weights."""

  arrays: Callable[[], Arrays]
  prepare: Callable[[Path], Any]
  file: str
  write: Callable[[Path, Arrays], Any]


class Outcome(NamedTuple):
  """What became of a fault; `named`: "tensor", "file", or nothing, and then `message` is wrong."""

  kind: str
  name: str
  named: str
  message: str


def _save(path: Path, arrays: Arrays) -> None:
  save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _huggingface(kind: str) -> Layout:
  nothing = {"x": np.ones(1)}
  arrays = lambda: layout(kind)  # noqa: E731
  return Layout(arrays, lambda folder: write_folder(folder, nothing), "model.safetensors", _save)


LAYOUTS = {
  "meta": Layout(
    lambda: layout("meta") | meta.rope_tables(CONFIG), Path.mkdir, "sam3.pt", save_arrays
  ),
  "huggingface": _huggingface("hub"),
  "huggingface, names doubled": _huggingface("doubled"),
  "huggingface, detector": _huggingface("detector"),
  "keras": Layout(
    datasets,
    lambda folder: write_preset(folder, {"x": np.ones(1)}),
    "model.weights.h5",
    write_file,
  ),
}


def change(
  rng: np.random.Generator, arrays: Arrays, kind: str, dtypes: tuple[str, ...] = DTYPES
) -> tuple[dict[str, np.ndarray], str]:
  """The tensors with one of them wrong, and the name that a message must have."""
  arrays = dict(arrays)
  names = [n for n, a in arrays.items() if kind != "transposed" or a.shape != a.shape[::-1]]
  name = str(rng.choice(names))
  array = arrays[name]
  match kind:
    case "missing":
      del arrays[name]
    case "extra":
      name = f"{name}2"
      arrays[name] = array
    case "transposed":
      arrays[name] = array.T
    case "truncated":
      arrays[name] = np.delete(array, -1, int(rng.integers(array.ndim)))
    case "renamed":
      arrays[name[:-1] + "x"] = arrays.pop(name)
    case "dtype":
      real = array.real if np.iscomplexobj(array) else array
      arrays[name] = real.astype(rng.choice([d for d in dtypes if d != str(array.dtype)]))
    case "not finite":
      changed = array.copy()
      changed.flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf, -np.inf])
      arrays[name] = changed
  return arrays, name


class Faults:
  """A layout in a folder, whole and converted, for one fault after another."""

  def __init__(self, kind: str, folder: Path, seed: int):
    self.layout, self.rng = LAYOUTS[kind], np.random.default_rng(seed)
    self.arrays = self.layout.arrays()
    self.source, self.bundle, self.out = folder / "source", folder / "bundle", folder / "out"
    self.layout.prepare(self.source)
    self.weights = self.source / self.layout.file
    self.config = CONFIG if kind == "meta" else None
    self.layout.write(self.weights, self.arrays)
    convert(self.source, self.bundle, tokenizer=TOKENIZER, config=self.config)
    manifest = json.loads((self.bundle / "manifest.json").read_text())
    self.parameters = manifest["parameters"]
    self.files = [file for file in (self.bundle / "params").rglob("*") if file.is_file()]

  def outcome(self, kind: str) -> Outcome:
    """Makes one fault of this kind, and says what was said of it."""
    if kind == FLIPPED:
      return self._flip()
    arrays, name = change(self.rng, self.arrays, kind)
    self.layout.write(self.weights, arrays)
    if kind == CUT:
      name = self.layout.file
      os.truncate(self.weights, int(self.rng.integers(1, self.weights.stat().st_size)))
    message = _refusal(
      lambda: convert(self.source, self.out, tokenizer=TOKENIZER, config=self.config)
    )
    whole = "\n" not in message and not self.out.exists()
    name = name.replace(DOUBLED, DOUBLED[: len(DOUBLED) // 2])
    tensor = any(one in message for one in (arrays if kind == CUT else [name]))
    named = "tensor" if tensor else "file" if kind == CUT and name in message else ""
    return Outcome(kind, name, named if whole else "", message)

  def _flip(self) -> Outcome:
    sizes = np.array([file.stat().st_size for file in self.files])
    file = self.files[self.rng.choice(len(self.files), p=sizes / sizes.sum())]
    content = file.read_bytes()
    place, bit = int(self.rng.integers(len(content))), int(self.rng.integers(8))
    changed = bytearray(content)
    changed[place] ^= 1 << bit
    file.write_bytes(changed)
    message = _refusal(lambda: bundle.verify(self.bundle))
    file.write_bytes(content)
    tensor = any(re.search(rf"\b{name} differs", message) for name in self.parameters)
    named = "tensor" if tensor else "file" if f"{file} differs" in message else ""
    return Outcome(FLIPPED, f"bit {bit} of byte {place} in {file.name}", named, message)


def _refusal(action: Callable[[], None]) -> str:
  """What was said; nothing if the fault was taken."""
  try:
    action()
  except (ValueError, FileNotFoundError) as error:
    return str(error)
  return ""


def run(kind: str, count: int, seed: int = 0) -> list[Outcome]:
  """So many faults of a layout, of one kind after another."""
  with tempfile.TemporaryDirectory() as folder:
    faults = Faults(kind, Path(folder), seed)
    return [faults.outcome(KINDS[number % len(KINDS)]) for number in range(count)]


def table(found: Mapping[str, list[Outcome]]) -> list[str]:
  """What was found, as the lines of a table in Markdown."""
  lines = [
    f"| {' | '.join(['layout', 'tensors', *KINDS, 'found', 'by tensor', 'by file'])} |",
    "|---" * (len(KINDS) + 5) + "|",
  ]
  for kind, outcomes in found.items():
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    told = collections.Counter(outcome.kind for outcome in outcomes if outcome.named)
    named = collections.Counter(outcome.named for outcome in outcomes)
    cells = [f"{told[each]} of {counts[each]}" for each in KINDS]
    total = f"**{told.total()} of {len(outcomes)}**"
    row = [kind, len(LAYOUTS[kind].arrays()), *cells, total, named["tensor"], named["file"]]
    lines.append(f"| {' | '.join(map(str, row))} |")
  return lines


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: all")
  parser.add_argument("--count", type=int, default=200, help="faults of a layout")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="folder for convert-faults.md and .json")
  arguments = parser.parse_args()
  found = {}
  for kind in arguments.layout or LAYOUTS:
    found[kind] = run(kind, arguments.count, arguments.seed)
    for missed in (outcome for outcome in found[kind] if not outcome.named):
      print(f"{kind}: {missed.kind}, {missed.name}: {missed.message or 'taken'}", file=sys.stderr)
  lines = [f"Single faults in files of the tiny model, seed {arguments.seed}; {machine()}.", ""]
  lines += table(found)
  print("\n".join(lines))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "convert-faults.md").write_text("\n".join(lines) + "\n")
    values = {"seed": arguments.seed, "machine": machine(), "layouts": _counted(found)}
    (arguments.out / "convert-faults.json").write_text(json.dumps(values, indent=2) + "\n")
  return int(any(not outcome.named for outcomes in found.values() for outcome in outcomes))


def _counted(found: Mapping[str, list[Outcome]]) -> dict[str, dict[str, dict[str, int]]]:
  """Of each layout and kind, how many faults were told by tensor, by file and not at all."""
  return {
    layout: {
      kind: {
        named or "missed": sum(one.kind == kind and one.named == named for one in outcomes)
        for named in ("tensor", "file", "")
      }
      for kind in KINDS
    }
    for layout, outcomes in found.items()
  }


if __name__ == "__main__":
  sys.exit(main())
