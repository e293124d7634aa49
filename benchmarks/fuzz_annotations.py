"""Fuzzes the readers of annotation files: no mutated file may crash, hang or exhaust memory.

  python benchmarks/fuzz_annotations.py --count 500 --seed 0

Each file is one of four kinds (COCO with polygons, COCO with run lengths, SA-Co, predictions), with
one to three mutations: values of other types, missing fields, huge and non-finite numbers, swapped
ids, nesting, duplicate entries, truncated text, flipped bits. Subprocesses with limits of memory
and time read the files with `annotations.read_checked` or `evaluation.predictions.read`; a few also
go through the commands `train --check` and `evaluate --predictions`. Success and a one-line
ValueError or FileNotFoundError are allowed. Exits with 1 otherwise.
"""

import argparse
import copy
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

MEMORY = 1500 * 2**20  # bytes that a subprocess may map in addition to those at its start
SECONDS = 30  # limit for a file
CHUNK = 50  # files per subprocess
COMMAND = "from sam3_jax.cli.main import entry; entry()"
KINDS = ("polygons", "runs", "sa-co", "predictions")
WIDTH, HEIGHT = 80, 60
VALUES = (
  None, True, False, 0, -1, 1, 1.0, 1.5, 1e9, -1e9, 1e300, 2**31, 2**63, 10**400, float("nan"),
  float("inf"), "", "0", "1", "cat", "visual", "a\nb", "\x1b[31m", "\x00", "../a.png", [], {}, [[]],
  [None], ["1"], {"size": [60, 80], "counts": "oooooooo"}, {"size": [10**9] * 2, "counts": [1]},
  [[0, 0, 79, 59] * 50_000], [[1e9, 1, -1e9, 2, 3, 1e9]], [10, 10, 30, 30], "x" * 100_000,
)  # fmt: skip


def base(kind: str, generator: random.Random) -> Any:
  """A valid file of a kind."""
  from sam3_jax.outputs.rle import encode

  images, objects = [], []
  for number in range(1, 4):
    images.append({"id": number, "file_name": "a.png" if number == 1 else f"{number}.png",
                   "width": WIDTH, "height": HEIGHT})  # fmt: skip
    for category in (1, 2):
      x, y = generator.randrange(40), generator.randrange(30)
      w, h = generator.randrange(3, 30), generator.randrange(3, 25)
      mask = np.zeros((HEIGHT, WIDTH), bool)
      mask[y : y + h, x : x + w] = True
      polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
      objects.append(
        {"id": len(objects) + 1, "image_id": number, "category_id": category, "iscrowd": 0,
         "bbox": [x, y, w, h], "segmentation": polygon if kind == "polygons" else encode(mask)}
      )  # fmt: skip
  if kind == "predictions":
    return [one | {"score": 0.5} for one in objects]
  content: dict[str, Any] = {"images": images, "annotations": objects}
  if kind == "sa-co":
    for image, phrase in zip(images, ("cat", "dog", "owl"), strict=True):
      image["text_input"] = phrase
  else:
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
  return content


def mutate(values: Any, generator: random.Random) -> None:
  """Changes one value of a file."""
  positions = list(_positions(values))
  holder, key = generator.choice(positions)
  match generator.randrange(6):
    case 0 if isinstance(holder, dict):
      del holder[key]
    case 1:
      other, at = generator.choice(positions)
      holder[key], other[at] = copy.deepcopy(other[at]), copy.deepcopy(holder[key])
    case 2 if isinstance(holder, list):
      holder.append(copy.deepcopy(holder[key]))
    case 3 if isinstance(holder[key], int | float):
      holder[key] *= generator.choice((-1, 0.01, 1.001, 3, 1e6, 1e15))
    case 4:
      holder[key] = [holder[key]]
    case _:
      holder[key] = copy.deepcopy(generator.choice(VALUES))


def write(path: Path, kind: str, generator: random.Random) -> None:
  """Writes a mutated file."""
  values = base(kind, generator)
  for _ in range(generator.randrange(4)):
    mutate(values, generator)
  data = bytearray(json.dumps(values).encode())
  match generator.randrange(8):
    case 0:
      del data[generator.randrange(len(data)) :]
    case 1:
      for _ in range(generator.randrange(1, 6)):
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
    case 2:
      at = generator.randrange(len(data))
      data[at:at] = b"[" * 100_000
  path.write_bytes(data)


def read_all(folder: Path, names: list[str]) -> int:
  """Reads files in a subprocess; prints a line of JSON for each."""
  from sam3_jax.datasets import annotations
  from sam3_jax.evaluation import predictions
  from sam3_jax.inputs.tokenizer import Tokenizer
  from sam3_jax.utils.notes import Notes

  tokenizer = Tokenizer(_checkpoint() / "tokenizer.model")
  truth = annotations.read(folder / "truth.json")
  mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
  resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
  for name in names:
    start, path, message = time.perf_counter(), folder / name, ""
    try:
      if name.startswith("predictions"):
        predictions.read(path, truth, Notes())
      else:
        annotations.read_checked(path, folder, tokenizer, notes=Notes())
    except (ValueError, FileNotFoundError) as error:
      message = str(error)
    except BaseException as error:
      message = f"FAULT {type(error).__name__}: {error}\n"
    seconds = time.perf_counter() - start
    print(json.dumps({"name": name, "message": message, "seconds": seconds}), flush=True)
  return 0


def faults_of(folder: Path, names: list[str]) -> tuple[list[str], int, float]:
  """Reads files in a subprocess; returns faults, number of rejected files and longest time."""
  command = [sys.executable, __file__, "--read", str(folder), *names]
  run = subprocess.run(
    command, capture_output=True, text=True, timeout=SECONDS * len(names), check=False
  )
  rows = [json.loads(line) for line in run.stdout.splitlines()]
  faults = [f"{row['name']}: {row['message'][:200]!r}" for row in rows if "\n" in row["message"]]
  faults += [f"{row['name']}: {row['seconds']:.0f} s" for row in rows if row["seconds"] > SECONDS]
  if len(rows) < len(names):
    faults.append(
      f"{names[len(rows)]}: the subprocess ended with {run.returncode}: {run.stderr[-300:]}"
    )
  slowest = max((row["seconds"] for row in rows), default=0)
  return faults, sum(bool(row["message"]) for row in rows), slowest


def command_faults(folder: Path, names: list[str]) -> list[str]:
  """Passes files to the commands `train --check` and `evaluate`; returns the faults."""
  faults = []
  for name in names:
    typed = ["train", "--check", "--checkpoint", str(_checkpoint()), "--data", str(folder / name)]
    if name.startswith("predictions"):
      typed = ["evaluate", "--data", str(folder / "truth.json"), "--predictions",
               str(folder / name), "--out", str(folder / "metrics.json")]  # fmt: skip
    run = subprocess.run(
      [sys.executable, "-c", COMMAND, *typed], capture_output=True, text=True, check=False
    )
    lines = [line for line in run.stderr.splitlines() if not line.startswith("note: ")]
    sound = run.returncode == 0 and not lines
    refused = run.returncode == 2 and len(lines) == 1 and lines[0].startswith("sam3-jax: error: ")
    if not sound and not refused:
      faults.append(f"{name}: {typed[0]} ended with {run.returncode}: {run.stderr[-300:]!r}")
  return faults


def main() -> int:
  if sys.argv[1:2] == ["--read"]:
    return read_all(Path(sys.argv[2]), sys.argv[3:])
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--count", type=int, default=500, help="number of mutated files")
  parser.add_argument(
    "--commands", type=int, default=12, help="how many of them the commands also read"
  )
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  generator = random.Random(arguments.seed)
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    for name in ("a", "2", "3"):
      Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"{name}.png")
    (folder / "truth.json").write_text(json.dumps(base("polygons", random.Random(0))))
    names = [f"{KINDS[i % len(KINDS)]}-{i}.json" for i in range(arguments.count)]
    for name in names:
      write(folder / name, name.rpartition("-")[0], generator)
    faults, refused, slowest = [], 0, 0.0
    for start in range(0, len(names), CHUNK):
      more, count, seconds = faults_of(folder, names[start : start + CHUNK])
      faults, refused, slowest = faults + more, refused + count, max(slowest, seconds)
    faults += command_faults(folder, names[: arguments.commands])
  print(
    f"{len(names)} mutated files: {refused} rejected with one line, {len(names) - refused} read, "
    f"the slowest in {slowest:.1f} s; {arguments.commands} also read by the commands; "
    f"{len(faults)} faults"
  )
  for fault in faults:
    print(" ", fault)
  return int(bool(faults))


def _positions(values: Any) -> Any:
  """All containers and keys in nested values."""
  items = values.items() if isinstance(values, dict) else enumerate(values)
  for key, value in list(items):
    yield values, key
    if isinstance(value, dict | list):
      yield from _positions(value)


def _checkpoint() -> Path:
  from sam3_jax.registry import find_checkpoint

  return find_checkpoint("sam3-tiny")


if __name__ == "__main__":
  sys.exit(main())
