"""Measures time and memory of checking a synthetic annotation file of COCO's size.

  python benchmarks/annotation_check.py --images 118000 --polygons 860000

Writes a random file in COCO's layout (polygons have 6 to 46 vertices, 26 on average, as in COCO).
A subprocess reads and checks it, without images. Prints seconds and peak memory.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CATEGORIES = 80
BLOCK = 10_000  # polygons written at a time


def write(path: Path, images: int, polygons: int, seed: int) -> None:
  """Writes a file with images and polygons: wavy circles with their bounding boxes."""
  rng = np.random.default_rng(seed)
  width, height = rng.integers(300, 641, (2, images))
  owner = rng.integers(0, images, polygons)
  with path.open("w") as file:
    rows = (
      json.dumps({"id": i + 1, "file_name": f"{i:012d}.jpg", "width": int(w), "height": int(h)})
      for i, (w, h) in enumerate(zip(width, height, strict=True))
    )
    names = [{"id": i, "name": f"object {i}"} for i in range(1, CATEGORIES + 1)]
    file.write('{"images": [' + ",".join(rows) + f'], "categories": {json.dumps(names)}')
    file.write(', "annotations": [')
    for start in range(0, polygons, BLOCK):
      several = owner[start : start + BLOCK]
      rows = _annotations(rng, start + 1, several, width[several], height[several])
      file.write(("," if start else "") + ",".join(rows))
    file.write("]}")


def _annotations(rng, first, owner, width, height):
  for i, (image, w, h) in enumerate(zip(owner, width, height, strict=True), start=first):
    vertices = int(rng.integers(6, 47))
    radius = rng.uniform(5, min(w, h) / 2 - 1)
    x, y = rng.uniform(radius, w - radius), rng.uniform(radius, h - radius)
    angles = np.linspace(0, 2 * np.pi, vertices, endpoint=False)
    reach = radius * rng.uniform(0.8, 1, vertices)
    points = np.stack([x + reach * np.cos(angles), y + reach * np.sin(angles)], axis=1).round(2)
    low, extent = points.min(axis=0), np.ptp(points, axis=0)
    yield json.dumps(
      {"id": i, "image_id": int(image) + 1, "category_id": int(rng.integers(1, CATEGORIES + 1)),
       "iscrowd": 0, "area": 100.0, "bbox": [*low.tolist(), *extent.round(2).tolist()],
       "segmentation": [points.ravel().tolist()]}
    )  # fmt: skip


def check(path: Path) -> None:
  """Reads and checks a file; runs in the subprocess."""
  from sam3_jax.datasets import annotations

  start, worked = time.perf_counter(), time.process_time()
  pairs = annotations.read(path)
  faults = annotations.check(pairs, None)
  seconds, worked = time.perf_counter() - start, time.process_time() - worked
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  took = f"{seconds:.1f} s ({worked:.1f} s of CPU), peak {peak:.2f} GiB"
  print(f"{len(pairs):,} pairs, {len(faults)} faults: {took}")


def main() -> int:
  if sys.argv[1:2] == ["--check"]:
    check(Path(sys.argv[2]))
    return 0
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=int, default=118_000, help="images in the file")
  parser.add_argument("--polygons", type=int, default=860_000, help="polygons in the file")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--file", type=Path, help="path of the file; an existing file is used")
  parser.add_argument(
    "--python", default=sys.executable, help="interpreter with the version of sam3-jax to measure"
  )
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    path = arguments.file or Path(temporary) / "annotations.json"
    if not path.exists():
      write(path, arguments.images, arguments.polygons, arguments.seed)
    print(f"{path.stat().st_size / 2**20:,.0f} MiB, {arguments.polygons:,} polygons")
    return subprocess.run(
      [arguments.python, __file__, "--check", str(path)], check=False
    ).returncode


if __name__ == "__main__":
  sys.exit(main())
