"""Makes single faults in files of every layout; each must be reported by the tensor's name.

  python benchmarks/convert_faults.py --out benchmarks/results

Writes the seeded weights of the tests' golden model in Meta's layout, in three of Hugging Face's
and as a KerasHub preset, without the converters (by `tests/layouts.py` and similar modules), and
then with one fault. The error must be one line that names the tensor, and no output may be left.
For a truncated file the message may name the file instead: a zip archive has its directory at the
end, and the HDF5 library opens no truncated file. The same holds for an index of Orbax, which
belongs to no tensor. Only non-square tensors are transposed, as the shape of a square one does not
change. The exit status is 1 if a fault was missed.
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

from golden_model import CONFIG
from keras_preset import datasets, write_file, write_preset
from layouts import TOKENIZER, layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.layouts import meta
from torch_archive import save_arrays

from sam3_jax.checkpoint import bundle

TRUNCATED, FLIPPED = "file truncated", "bit flipped in params/"
CHANGES = ("missing", "extra", "transposed", "truncated", "renamed", "dtype", "not finite")
KINDS = (*CHANGES, TRUNCATED, FLIPPED)
DOUBLED = "tracker_model." * 2  # messages have the names of facebook/sam3
DTYPES = ("float64", "float16", "int64")  # which every format supports
Arrays = Mapping[str, np.ndarray]


class Layout(NamedTuple):
  """How to write the golden model; `prepare` makes a directory without weights."""

  arrays: Callable[[], Arrays]
  prepare: Callable[[Path], Any]
  file: str
  write: Callable[[Path, Arrays], Any]


class Outcome(NamedTuple):
  """The result of a fault: `named` is "tensor", "file" or, if `message` is wrong, empty."""

  kind: str
  name: str
  named: str
  message: str


def _save(path: Path, arrays: Arrays) -> None:
  save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _huggingface(kind: str) -> Layout:
  placeholder = {"x": np.ones(1)}
  arrays = lambda: layout(kind)  # noqa: E731
  return Layout(
    arrays, lambda folder: write_folder(folder, placeholder), "model.safetensors", _save
  )


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
  """Returns the tensors with one fault, and the name that the message must have."""
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
  """A source and its converted bundle, in which faults are made one after another."""

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
    """Makes one fault of this kind and returns its outcome."""
    if kind == FLIPPED:
      return self._flip()
    arrays, name = change(self.rng, self.arrays, kind)
    self.layout.write(self.weights, arrays)
    if kind == TRUNCATED:
      name = self.layout.file
      os.truncate(self.weights, int(self.rng.integers(1, self.weights.stat().st_size)))
    message = _refusal(
      lambda: convert(self.source, self.out, tokenizer=TOKENIZER, config=self.config)
    )
    clean = "\n" not in message and not self.out.exists()
    name = name.replace(DOUBLED, DOUBLED[: len(DOUBLED) // 2])
    tensor = any(one in message for one in (arrays if kind == TRUNCATED else [name]))
    named = "tensor" if tensor else "file" if kind == TRUNCATED and name in message else ""
    return Outcome(kind, name, named if clean else "", message)

  def _flip(self) -> Outcome:
    sizes = np.array([file.stat().st_size for file in self.files])
    file = self.files[self.rng.choice(len(self.files), p=sizes / sizes.sum())]
    content = file.read_bytes()
    offset, bit = int(self.rng.integers(len(content))), int(self.rng.integers(8))
    changed = bytearray(content)
    changed[offset] ^= 1 << bit
    file.write_bytes(changed)
    message = _refusal(lambda: bundle.verify(self.bundle))
    file.write_bytes(content)
    tensor = any(re.search(rf"\b{name} differs", message) for name in self.parameters)
    named = "tensor" if tensor else "file" if f"{file} differs" in message else ""
    return Outcome(FLIPPED, f"bit {bit} of byte {offset} in {file.name}", named, message)


def _refusal(action: Callable[[], None]) -> str:
  """The error message; empty if the fault was not found."""
  try:
    action()
  except (ValueError, FileNotFoundError) as error:
    return str(error)
  return ""


def run(kind: str, count: int, seed: int = 0) -> list[Outcome]:
  """Makes `count` faults in a layout, cycling through the kinds."""
  with tempfile.TemporaryDirectory() as folder:
    faults = Faults(kind, Path(folder), seed)
    return [faults.outcome(KINDS[number % len(KINDS)]) for number in range(count)]


def table(found: Mapping[str, list[Outcome]]) -> list[str]:
  """The results as the lines of a Markdown table."""
  lines = [
    f"| {' | '.join(['layout', 'tensors', *KINDS, 'found', 'by tensor', 'by file'])} |",
    "|---" * (len(KINDS) + 5) + "|",
  ]
  for kind, outcomes in found.items():
    counts = collections.Counter(outcome.kind for outcome in outcomes)
    reported = collections.Counter(outcome.kind for outcome in outcomes if outcome.named)
    named = collections.Counter(outcome.named for outcome in outcomes)
    cells = [f"{reported[each]} of {counts[each]}" for each in KINDS]
    total = f"**{reported.total()} of {len(outcomes)}**"
    row = [kind, len(LAYOUTS[kind].arrays()), *cells, total, named["tensor"], named["file"]]
    lines.append(f"| {' | '.join(map(str, row))} |")
  return lines


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--layout", choices=LAYOUTS, action="append", help="default: all")
  parser.add_argument("--count", type=int, default=200, help="faults per layout")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="output directory of convert-faults.md and .json")
  arguments = parser.parse_args()
  found = {}
  for kind in arguments.layout or LAYOUTS:
    found[kind] = run(kind, arguments.count, arguments.seed)
    for missed in (outcome for outcome in found[kind] if not outcome.named):
      print(
        f"{kind}: {missed.kind}, {missed.name}: {missed.message or 'not found'}", file=sys.stderr
      )
  lines = [
    f"Single faults in files of the tests' golden model, seed {arguments.seed}; {machine()}.",
    "",
  ]
  lines += table(found)
  print("\n".join(lines))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "convert-faults.md").write_text("\n".join(lines) + "\n")
    values = {"seed": arguments.seed, "machine": machine(), "layouts": _counted(found)}
    (arguments.out / "convert-faults.json").write_text(json.dumps(values, indent=2) + "\n")
  return int(any(not outcome.named for outcomes in found.values() for outcome in outcomes))


def _counted(found: Mapping[str, list[Outcome]]) -> dict[str, dict[str, dict[str, int]]]:
  """For each layout and kind, the faults reported by tensor, by file, and missed."""
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
