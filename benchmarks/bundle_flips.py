"""Makes single faults in the files of a checkpoint; each must be found before any computation.

  python benchmarks/bundle_flips.py --count 500

Makes one fault at a time in a checkpoint of the tests' golden model with everything that a
checkpoint can have (several items, unread tensors, fingerprint.json, README.md, LICENSE). A fault
is a flipped bit, or a file that is truncated, emptied, removed, added, or exchanged with another.
Half of the bits are in a file chosen with probability proportional to its size, the others in any
file. Every fault must be found by `bundle.verify` (`sam3-jax inspect --verify`) and by the check of
`batch`, `train` and `evaluate` (`bundle.begin(verify=True)`), with a message of one line that names
the file. The number found by opening the checkpoint is printed too. The exit status is 1 if a fault
was missed.
"""

import argparse
import collections
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from golden_model import CONFIG, parameters, visual_parameters
from layouts import TOKENIZER

from sam3_jax.checkpoint import bundle, checksums, fingerprint, writer
from sam3_jax.utils.paths import file_sizes

FLIPPED = "bit flipped"
OTHERS = ("truncated", "emptied", "removed", "added", "exchanged")
ADDED = ("params/rest/d/0123", "params/rest/extra", "params/x/d/0", "unread/d/0123")
CHECKS: dict[str, Callable[[Path], object]] = {
  "verify": bundle.verify,
  "before a job": lambda path: bundle.begin(path, verify=True),
  "opening": bundle.begin,
}
REQUIRED = ("verify", "before a job")


class Outcome(NamedTuple):
  """A fault, and each check's message; empty unless it is one line that names the file."""

  kind: str
  what: str
  messages: dict[str, str]

  @property
  def missed(self) -> bool:
    return not all(self.messages[name] for name in REQUIRED)


def make(path: Path) -> Path:
  """Writes a checkpoint with everything that a checkpoint can have."""
  rng, own = np.random.default_rng(0), writer.OWN_ITEM
  unread = {f"tracker.{i}": rng.standard_normal((64, 32)).astype(np.float32) for i in range(4)}
  params = {**parameters(), bundle.VISUAL: visual_parameters()}
  writer.OWN_ITEM = 500_000  # gives this small model several items
  try:
    info = {"name": "tiny", "trained": False}
    bundle.save(path, params, CONFIG, TOKENIZER.read_bytes(), info=info, unread=unread)
  finally:
    writer.OWN_ITEM = own
  numbers = {"encode phrase": [0.5, 1.0, 0.25]}
  fingerprint.write(fingerprint.Fingerprint("float32", numbers), path)
  (path / "README.md").write_text("# A model\n\nNot trained.\n")
  (path / "LICENSE").write_text("No restrictions.\n")
  checksums.write(path)
  return path


class Faults:
  """A checkpoint in which faults are made one after another."""

  def __init__(self, path: Path, seed: int):
    self.path, self.rng = path, np.random.default_rng(seed)
    self.sizes = file_sizes(path)

  def outcome(self, kind: str) -> Outcome:
    """Makes a fault, runs the checks, and repairs the checkpoint."""
    name = self._any() if kind != FLIPPED or self.rng.integers(2) else self._by_size()
    what, named = name, [name]
    before = {name: (self.path / name).read_bytes()}
    data = bytearray(before[name])
    match kind:
      case "bit flipped":
        offset, bit = int(self.rng.integers(len(data))), int(self.rng.integers(8))
        data[offset] ^= 1 << bit
        what = f"bit {bit} of byte {offset} in {name}"
        (self.path / name).write_bytes(data)
        named = ["SHA256SUMS", *self.sizes] if name == checksums.FILE else [name]
      case "truncated" | "emptied":
        size = int(self.rng.integers(len(data))) if kind == "truncated" else 0
        (self.path / name).write_bytes(data[:size])
        named = ["SHA256SUMS", *self.sizes] if name == checksums.FILE else [name]
      case "removed":
        (self.path / name).unlink()
      case "added":
        name = what = str(self.rng.choice(ADDED))
        before, named = {}, [name]
        (self.path / name).parent.mkdir(parents=True, exist_ok=True)
        (self.path / name).write_bytes(bytes(data))
      case "exchanged":
        other = self._any()
        while before[name] == (self.path / other).read_bytes():
          other = self._any()
        before[other] = (self.path / other).read_bytes()
        (self.path / name).write_bytes(before[other])
        (self.path / other).write_bytes(before[name])
        what, named = f"{name} and {other}", ["SHA256SUMS", name, other]
    messages = {check: _refusal(use, self.path, named) for check, use in CHECKS.items()}
    self._repair(name, before)
    return Outcome(kind, what, messages)

  def _repair(self, name: str, before: dict[str, bytes]) -> None:
    for other, content in before.items():
      (self.path / other).write_bytes(content)
    if not before:
      (self.path / name).unlink()
      if name.startswith("params/x/"):
        shutil.rmtree(self.path / "params/x")

  def _any(self) -> str:
    return str(self.rng.choice([name for name, size in self.sizes.items() if size]))

  def _by_size(self) -> str:
    sizes = np.array(list(self.sizes.values()))
    return str(self.rng.choice(list(self.sizes), p=sizes / sizes.sum()))


def _refusal(use: Callable[[Path], object], path: Path, named: list[str]) -> str:
  """The message, if it is one line that names a file; else empty."""
  try:
    use(path)
  except ValueError as error:
    message = str(error)
    return message if "\n" not in message and any(name in message for name in named) else ""
  return ""


def run(count: int, others: int, seed: int = 0, path: Path | None = None) -> list[Outcome]:
  """Flips `count` bits and makes `others` faults of each other kind, in a copy of a bundle."""
  with tempfile.TemporaryDirectory() as folder:
    copy = Path(folder) / "bundle"
    if path is None:
      make(copy)
    else:
      shutil.copytree(path, copy)
    faults = Faults(copy, seed)
    outcomes = [faults.outcome(FLIPPED) for _ in range(count)]
    outcomes += [faults.outcome(kind) for kind in OTHERS for _ in range(others)]
    bundle.verify(copy)  # the repaired copy has no faults
    return outcomes


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--count", type=int, default=500, help="bits to flip")
  parser.add_argument("--others", type=int, default=30, help="faults of each other kind")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--bundle", type=Path, help="damage a copy of this checkpoint instead")
  arguments = parser.parse_args()
  start = time.monotonic()
  outcomes = run(arguments.count, arguments.others, arguments.seed, arguments.bundle)
  for missed in (outcome for outcome in outcomes if outcome.missed):
    print(f"missed: {missed.kind}, {missed.what}: {missed.messages}", file=sys.stderr)
  total = collections.Counter(outcome.kind for outcome in outcomes)
  for kind, number in total.items():
    found = {
      check: sum(bool(one.messages[check]) for one in outcomes if one.kind == kind)
      for check in CHECKS
    }
    print(f"{kind}: {number}; found by " + ", ".join(f"{c} {n}" for c, n in found.items()))
  missed = sum(outcome.missed for outcome in outcomes)
  print(f"{missed} of {len(outcomes)} missed, seed {arguments.seed}, "
        f"{time.monotonic() - start:.0f} s")  # fmt: skip
  return int(missed > 0)


if __name__ == "__main__":
  sys.exit(main())
