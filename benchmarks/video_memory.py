"""Tracks objects through an endless stream and measures memory.

`python benchmarks/video_memory.py` tracks 8 objects through 10,000 frames of moving squares and
writes resident memory at frame 1,000 and at the end, compilations, and frames per second. The model
is sam3-tiny with a tracker of seeded parameters, so the masks mean nothing. `--frames 200` is a
short form.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from timing import machine

from sam3_jax import Sam3, VisualPrompt
from sam3_jax.config import VideoConfig
from sam3_jax.model.video import tracker

VIDEO = VideoConfig(
  memory_channels=32, memories=5, layers=2, mlp_width=512, mask_widths=(4, 8, 16, 32)
)
HEIGHT, WIDTH, SIDE = 360, 640, 60
RESULTS = Path(__file__).parent / "results" / "video-memory.json"


def stream(count: int, objects: int) -> Iterator[np.ndarray]:
  """Squares that move on lines, each in a color of its own."""
  rng = np.random.default_rng(0)
  colors = rng.integers(60, 255, (objects, 3))
  for t in range(count):
    frame = np.full((HEIGHT, WIDTH, 3), 40, np.uint8)
    for (x, y), color in zip(corners(t, objects), colors, strict=True):
      frame[y : y + SIDE, x : x + SIDE] = color
    yield frame


def corners(t: int, objects: int) -> list[tuple[int, int]]:
  """The upper left corner of each square on a frame."""
  columns = WIDTH // max(1, objects)
  return [
    (i * columns + (t + 7 * i) % 10, (3 * t + 40 * i) % (HEIGHT - SIDE)) for i in range(objects)
  ]


def resident() -> int:
  """Bytes of resident memory of this process (Linux)."""
  pages = int(Path("/proc/self/statm").read_text().split()[1])
  return pages * 4096


def video_model() -> Sam3:
  """sam3-tiny with a tracker of seeded parameters."""
  model = Sam3.from_checkpoint("sam3-tiny")
  config = dataclasses.replace(model.config, video=VIDEO)
  params = dict(model.params) | {"video": tracker.init(config, jax.random.key(0))}
  return Sam3(config, params, model.tokenizer, info=model.info, dtype=model.dtype)


def measure(model: Sam3, frames: int, objects: int, early: int) -> dict:
  """Tracks, and returns the figures.

  Args:
    model: with a tracker.
    frames: of the stream.
    objects: clicked on the first frame.
    early: the frame whose resident memory the last one's is compared with.
  """
  half = SIDE / 2
  prompts = [VisualPrompt(points=[[x + half, y + half]]) for x, y in corners(0, objects)]
  memory, start = {}, time.perf_counter()
  for frame in model.track(stream(frames, objects), prompts):
    if frame.index in (early, frames - 1):
      memory[frame.index] = resident()
    if frame.index == early:
      start = time.perf_counter()
  seconds = time.perf_counter() - start
  return {
    "frames": frames,
    "objects": objects,
    "resident": memory,
    "growth": memory[frames - 1] / memory[early] - 1,
    "fps": (frames - 1 - early) / seconds,
    "compilations": model.video_programs.compilations,
    "machine": machine(),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--frames", type=int, default=10_000)
  parser.add_argument("--objects", type=int, default=8)
  parser.add_argument("--out", type=Path, default=RESULTS)
  options = parser.parse_args()
  if options.frames < 20:
    parser.error(f"--frames must be 20 or more; got {options.frames}.")
  early = min(1000, options.frames // 2)
  found = measure(video_model(), options.frames, options.objects, early)
  options.out.parent.mkdir(parents=True, exist_ok=True)
  options.out.write_text(json.dumps(found, indent=2) + "\n")
  print(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
