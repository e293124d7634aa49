"""Checks that a job has the same results with 1, 2 and 4 processes, and on 1, 4 and 8 devices.

  python benchmarks/batch_equal.py --scenes 200 --out benchmarks/results      # with sam3-tiny

The processes of a job are connected by `jax.distributed` and have two devices each, which XLA
emulates on the CPU. Their merged files must be byte-equal. Different numbers of devices
change the order of summation: scores may differ by 1e-5, a mask in 1 of 10,000 pixels of its
image, and an instance may be missing if its score is within 1e-5 of the threshold. Otherwise the
exit status is 1.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import batch_scenes
import numpy as np
from pycocotools import mask as coco
from timing import machine

SCORE, PIXELS = 1e-5, 1e-4
Annotations = dict[tuple[int, int, int], dict[str, Any]]


class Difference(NamedTuple):
  """Differences between two merged files.

  Attributes:
    score: largest difference of a score.
    pixels: largest fraction of the pixels of an image in which a mask differs.
    missing: number of instances in only one of the files that are not at the threshold.
    compared: number of instances in both files.
  """

  score: float
  pixels: float
  missing: int
  compared: int


def compare(one: Annotations, other: Annotations, threshold: float) -> Difference:
  """Compares instances with the same image, category and identity."""
  alone = [one.get(key) or other[key] for key in one.keys() ^ other.keys()]
  both = one.keys() & other.keys()
  scores = [abs(one[key]["score"] - other[key]["score"]) for key in both]
  pixels = [_changed(one[key]["segmentation"], other[key]["segmentation"]) for key in both]
  return Difference(
    score=max(scores, default=0.0),
    pixels=max(pixels, default=0.0),
    missing=sum(x["score"] > threshold + SCORE for x in alone),
    compared=len(both),
  )


def _changed(one: dict[str, Any], other: dict[str, Any]) -> float:
  if one == other:
    return 0.0
  return float(np.mean(coco.decode(one) != coco.decode(other)))  # pyright: ignore


def read(data: bytes) -> Annotations:
  entries = json.loads(data)["annotations"]
  return {(x["image_id"], x["category_id"], x["identity"]): x for x in entries}


class Jobs:
  """Runs one job in a directory, each time with another `--out`."""

  def __init__(self, folder: Path, arguments: argparse.Namespace):
    self._folder, self._arguments = folder, arguments
    self._list = batch_scenes.write(folder / "scenes", arguments.scenes)

  def merged(self, processes: int, devices: int) -> bytes:
    """The merged file of a number of processes, with a number of devices each."""
    given, out = self._arguments, f"out-{processes}-{devices}"
    typed = ["batch", "--images", str(self._list), "--out", out]
    typed += ["--checkpoint", given.checkpoint, "--threshold", str(given.threshold)]
    typed += ["--part-size", "16", "--device", "cpu", "--quiet"]
    options = [[]]
    if processes > 1:
      with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
      options = [
        ["--coordinator", address, "--processes", str(processes), "--process", str(i)]
        for i in reversed(range(processes))
      ]
    started = [self._start([*typed, *option], devices) for option in options]
    states = [process.wait() for process in started]
    if any(states):
      raise RuntimeError(f"{out}: a process failed")
    self._call("batch", "--merge", "--out", out, "--quiet")
    return (self._folder / out / "annotations.json").read_bytes()

  def _call(self, *typed: str) -> None:
    if self._start([*typed], 1).wait():
      raise RuntimeError(f"{' '.join(typed)}: failed")

  def _start(self, typed: list[str], devices: int) -> subprocess.Popen:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {
      "XLA_FLAGS": flags,
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
    }
    command = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()", *typed]
    return subprocess.Popen(command, cwd=self._folder, env=environment)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--checkpoint", default="sam3-tiny", help="directory or name")
  parser.add_argument("--scenes", type=int, default=200, help="number of images")
  parser.add_argument("--threshold", type=float, default=0.5)
  parser.add_argument(
    "--processes",
    type=int,
    nargs="*",
    default=[1, 2, 4],
    help="numbers of processes with two devices",
  )
  parser.add_argument(
    "--devices", type=int, nargs="*", default=[1, 4, 8], help="numbers of devices of one process"
  )
  parser.add_argument("--out", type=Path, help="output directory, for batch-equal.md")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    jobs = Jobs(Path(temporary), arguments)
    files = [jobs.merged(count, 2) for count in arguments.processes]
    apart = [read(jobs.merged(1, count)) for count in arguments.devices]
  same = len(set(files)) <= 1
  lines = [
    f"{arguments.scenes} scenes, {arguments.checkpoint}, two phrases each; {machine()}.",
    "",
    f"{', '.join(map(str, arguments.processes))} processes of two devices: "
    f"{'byte-equal' if same else 'NOT equal'}, {len(files[0]) if files else 0:,} bytes.",
    "",
    "| devices | instances in both | largest difference of a score | largest difference of a mask, "
    "as a fraction of its image | missing |",
    "|---|---|---|---|---|",
  ]
  for count, found in zip(arguments.devices[1:], apart[1:], strict=True):
    off = compare(apart[0], found, arguments.threshold)
    same = same and off.score <= SCORE and off.pixels <= PIXELS and not off.missing
    lines.append(
      f"| {count} compared with {arguments.devices[0]} | {off.compared:,} | {off.score:.1e} "
      f"| {off.pixels:.1e} | {off.missing} |"
    )
  print("\n".join(lines))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "batch-equal.md").write_text("\n".join(lines) + "\n")
  return int(not same)


if __name__ == "__main__":
  sys.exit(main())
