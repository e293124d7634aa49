"""Measures a checkpoint, and the peers beside it, all sides in turns.

Each side is a process of its own (`client`, `server`), with one dtype after the other, and stays
loaded through all cases of it. For each case the sides take turns, A B A B, so that whatever else
the machine does disturbs all alike.
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
# The module of each side, and the layout of weights that it reads.
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
  """What to measure.

  Attributes:
    checkpoint: folder of a bundle, or None for seeded weights of `size`.
    size: one of `config.SIZES`.
    dtypes: of each side, one after the other: those of several would not fit the memory.
    only: of `cases.CHOICES`.
    most: no more images, prompts or masks in a call; None for no limit.
    peers: name of each, and its Python.
    repeats: timed calls after the first.
    threads: cores of each side; None for all.
    device: cpu, gpu, tpu; None for JAX's own choice.
    image: a file; it is brought to 1500 x 2000.
    work: folder for what the sides read.
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
  """The report: what JSON and tables hold."""
  skipped = [
    {"what": name, "why": f"not asked for: --only {name}"}
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
    progress("the command, with nothing compiled and again", 1)
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
  """Facts of each side and rows of each case, in one dtype; adds to `skipped`."""
  sides, rows, cases = [], [], chosen(job.only, job.most)
  with contextlib.ExitStack() as stack:
    for name, python in [(OURS, sys.executable), *job.peers]:
      progress(f"starting {name} {dtype}", 0)
      try:
        sides.append(stack.enter_context(_open(job, material, name, python, dtype)))
      except (Unable, ValueError, ImportError) as error:  # the latter of the converters
        skipped.append({"what": f"{name} {dtype}", "why": str(error)})
    for i, case in enumerate(cases):
      progress(f"{label(*case)}, {dtype}", i / len(cases))
      rows += take_turns(sides, *case, job.repeats, skipped)
    return [{"name": side.name, **side.facts} for side in sides], rows


def take_turns(
  sides: Sequence[Side], case: str, count: int, repeats: int, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
  """A row for each side that can: its first call, then `repeats` calls in turns with the others."""
  answers: dict[Side, list[dict[str, float]]] = {}
  for turn in range(1 + repeats):  # in the first one after the other: compiling takes all cores
    for side in list(answers if turn else sides):
      try:
        answers.setdefault(side, []).append(side.call(case, count))
      except Unable as error:
        answers.pop(side, None)
        skipped.append({"what": f"{side.name}: {label(case, count)}", "why": str(error)})
  return [
    {"case": case, "count": count, "side": side.name} | figures(found)
    for side, found in answers.items()
  ]


def figures(answers: Sequence[dict[str, float]]) -> dict[str, Any]:
  """Seconds of the first call and of the later ones, if there are any; the peak of memory."""
  later = answers[1:] or answers
  seconds = [answer["first"] for answer in later]
  return {
    "first": answers[0]["first"],
    "seconds": seconds,
    "median": statistics.median(seconds),
    "processor": statistics.median(answer["processor"] for answer in later),
    "memory": max(answer["memory"] for answer in answers),
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
