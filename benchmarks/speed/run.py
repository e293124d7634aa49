"""Measures a checkpoint with this package and with others (the sides), in turns.

Each side is a process of its own (`client`, `server`) for each dtype, which stays loaded through
all cases. For each case the sides take turns, A B A B, so that other load on the machine affects
all sides equally.
"""

import contextlib
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timing import machine

from speed import start
from speed.cases import CHOICES, START, chosen, label
from speed.client import Side
from speed.growth import fits
from speed.material import IMAGE_SIZE, Material
from speed.server import Unable

OURS = "sam3-jax"
# The module of each side, and the layout of its weights.
MODULES = {
  OURS: ("speed.side_ours", None),
  "transformers": ("speed.side_transformers", "huggingface"),
  "meta": ("speed.side_meta", "meta"),
  "keras-hub": ("speed.side_keras_hub", None),
}
PEERS = tuple(name for name in MODULES if name != OURS)

Progress = Callable[[str, float], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The arguments of a benchmark.

  Attributes:
    checkpoint: directory of a checkpoint, or None for seeded weights of `size`.
    size: a key of `config.SIZES`.
    dtypes: measured one after the other, as the models of several may not fit into memory.
    only: names in `cases.CHOICES`.
    most: at most N images, prompts or masks per call; None for no limit.
    peers: name and Python interpreter of each other package.
    repeats: timed calls after the first.
    threads: CPU cores for each side; None for all.
    device: cpu, gpu or tpu; None for JAX's default.
    image: a file, which is resized to 1500 x 2000.
    work: directory for the files that the sides read.
  """

  checkpoint: Path | None
  size: str | None
  dtypes: Sequence[str]
  only: Sequence[str]
  most: int | None = None
  peers: Sequence[tuple[str, str]] = ()
  repeats: int = 5
  threads: int | None = None
  device: str | None = None
  image: Path
  work: Path


def run(job: Job, progress: Progress) -> dict[str, Any]:
  """Runs the benchmark and returns the report, for JSON and for the tables."""
  skipped = [
    {"what": name, "why": f"not selected: --only {name}"}
    for name in CHOICES
    if name not in job.only
  ]
  before = os.getloadavg()[0]
  progress("weights and image", 0)
  material = Material(job.checkpoint, job.size, job.image, job.work)
  sides, rows = [], []
  for dtype in job.dtypes if chosen(job.only, job.most) else ():
    facts, measured = _measure(job, material, dtype, progress, skipped)
    sides += facts
    rows += measured
  if START in job.only:
    progress("the command, without and with compiled programs", 1)
    try:
      runs = start.segment(material.bundle, job.image, job.device, job.repeats)
    except Unable as error:
      skipped.append({"what": START, "why": str(error)})
    else:
      rows += [{"case": name, "count": 1, "side": OURS} | figures(runs[name]) for name in runs]
  return {
    "machine": machine(),
    "cores": job.threads or "all",
    "load": [before, os.getloadavg()[0]],
    "checkpoint": material.name,
    "image": list(IMAGE_SIZE),
    "repeats": job.repeats,
    "sides": sides,
    "rows": rows,
    "growth": fits(rows),
    "skipped": skipped,
  }


def _measure(
  job: Job, material: Material, dtype: str, progress: Progress, skipped: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The facts of each side and the rows of each case for one dtype; adds to `skipped`."""
  sides, rows, cases = [], [], chosen(job.only, job.most)
  with contextlib.ExitStack() as stack:
    for name, python in [(OURS, sys.executable), *job.peers]:
      progress(f"starting {name} {dtype}", 0)
      try:
        sides.append(stack.enter_context(_open(job, material, name, python, dtype)))
      except (Unable, ValueError, ImportError) as error:  # ImportError: from the converters
        skipped.append({"what": f"{name} {dtype}", "why": str(error)})
    for i, case in enumerate(cases):
      progress(f"{label(*case)}, {dtype}", i / len(cases))
      rows += take_turns(sides, *case, job.repeats, skipped)
    return [{"name": side.name, **side.facts} for side in sides], rows


def take_turns(
  sides: Sequence[Side], case: str, count: int, repeats: int, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """A row for each side that supports the case: its first call, then `repeats` calls in turns."""
  responses: dict[Side, list[dict[str, float]]] = {}
  for turn in range(1 + repeats):  # the first call compiles
    for side in list(responses if turn else sides):
      try:
        responses.setdefault(side, []).append(side.call(case, count))
      except Unable as error:
        responses.pop(side, None)
        skipped.append({"what": f"{side.name}: {label(case, count)}", "why": str(error)})
  return [
    {"case": case, "count": count, "side": side.name} | figures(found)
    for side, found in responses.items()
  ]


def figures(responses: Sequence[dict[str, float]]) -> dict[str, Any]:
  """Seconds of the first call and of the later calls, if any, and the peak memory."""
  later = responses[1:] or responses
  seconds = [response["first"] for response in later]
  return {
    "first": responses[0]["first"],
    "seconds": seconds,
    "median": statistics.median(seconds),
    "processor": statistics.median(response["processor"] for response in later),
    "memory": max(response["memory"] for response in responses),
  }


def _open(job: Job, material: Material, name: str, python: str, dtype: str) -> Side:
  module, layout = MODULES[name]
  if name != OURS:
    material.check_peers()
  settings = {
    "checkpoint": str(material.bundle if layout is None else material.in_layout(layout)),
    "config": material.config.to_dict(),
    "tokens": material.tokens,
    "image": str(material.image),
    "dtype": dtype,
    "threads": job.threads,
    "device": job.device,
  }
  return Side(f"{name} {dtype}", [python, "-m", module], settings)
