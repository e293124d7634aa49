"""Writes two small datasets of cell nuclei in COCO's format, for fine-tuning on real masks.

  pip install --no-deps stardist              # for its example image
  python benchmarks/nuclei.py nuclei          # nuclei/train and nuclei/score
  python benchmarks/nuclei.py mine --image cells.tif --labels labels.tif

The image is a fluorescence micrograph of 512 x 512 pixels with 125 nuclei, of the 2018 Data
Science Bowl (Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7). The package stardist contains it
with a label for each pixel. Tiles of the left half are for training, tiles of the right half for
scoring; no pixel is in both. Training tiles overlap and are rotated by 0, 90, 180 and 270 degrees.
"""

import argparse
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from pycocotools import mask as coco

TILE = 128  # pixels: up to 16 nuclei, and the model has 24 queries
SMALLEST = 20  # pixels; smaller fragments at the border of a tile are not recognizable
BRIGHT = 99  # percentile that becomes white: dividing cells are much brighter than the others
# All names but the first are in no image, and become negative phrases.
CATEGORIES = ("cell nucleus", "cat", "hot dog", "balloon", "bicycle", "red apple", "key", "crab")
NUCLEUS = 1  # id of the first category


class Tile(NamedTuple):
  """A part of the image, and the number of the nucleus at each pixel, 0 for none."""

  pixels: np.ndarray
  labels: np.ndarray


def main() -> None:
  arguments = _arguments()
  image, labels = arguments.image, arguments.labels
  if image is None:
    image, labels = shipped("img2d.tif"), shipped("mask2d.tif")
  pixels, labels = read(image), np.asarray(Image.open(labels))
  for name, tiles in halves(pixels, labels, arguments.tile).items():
    images, objects = write(arguments.out / name, tiles)
    print(f"{arguments.out / name / 'annotations.json'}: {images} images, {objects} nuclei")


def shipped(file: str) -> Path:
  """A file of the package stardist, which need not be importable."""
  found = importlib.util.find_spec("stardist")
  if found is None or found.origin is None:
    raise SystemExit("stardist is not installed: pip install --no-deps stardist")
  return Path(found.origin).parent / "data" / "images" / file


def read(path: Path) -> np.ndarray:
  """A grayscale image of any bit depth, scaled to 0..255."""
  values = np.asarray(Image.open(path)).astype(np.float64)
  white = max(np.percentile(values, BRIGHT), 1)
  return np.rint(np.minimum(values / white, 1) * 255).astype(np.uint8)


def halves(pixels: np.ndarray, labels: np.ndarray, tile: int) -> dict[str, list[Tile]]:
  """Tiles for training, from the left half, and for scoring, from the right half."""
  if pixels.shape != labels.shape or min(pixels.shape[0], pixels.shape[1] // 2) < tile:
    raise SystemExit(
      f"image and labels must have the same size, with halves of at least {tile} x {tile}; "
      f"got {pixels.shape} and {labels.shape}."
    )
  middle = pixels.shape[1] // 2
  train = list(_tiles(pixels[:, :middle], labels[:, :middle], tile, tile // 2))
  return {
    "train": [Tile(np.rot90(a, n), np.rot90(b, n)) for a, b in train for n in range(4)],
    "score": list(_tiles(pixels[:, middle:], labels[:, middle:], tile, tile)),
  }


def write(out: Path, tiles: list[Tile]) -> tuple[int, int]:
  """Writes images and annotations.json in COCO's format; returns how many images and objects."""
  (out / "images").mkdir(parents=True, exist_ok=True)
  record: dict[str, Any] = {
    "images": [],
    "annotations": [],
    "categories": [{"id": n, "name": name} for n, name in enumerate(CATEGORIES, start=NUCLEUS)],
  }
  for number, (pixels, labels) in enumerate(tiles):
    height, width = pixels.shape
    file = f"images/{number:03d}.png"
    Image.fromarray(np.ascontiguousarray(pixels)).save(out / file)
    size = {"width": width, "height": height}
    record["images"].append({"id": number, "file_name": file, **size})
    for one in objects(labels):
      fixed = {"id": len(record["annotations"]), "image_id": number, "category_id": NUCLEUS}
      record["annotations"].append({**fixed, **one})
  (out / "annotations.json").write_text(json.dumps(record) + "\n")
  return len(tiles), len(record["annotations"])


def objects(labels: np.ndarray) -> Iterator[dict[str, Any]]:
  """Mask, box in pixels and area of each nucleus of at least `SMALLEST` pixels."""
  api: Any = coco
  numbers, areas = np.unique(labels[labels > 0], return_counts=True)
  for number, area in zip(numbers, areas, strict=True):
    if area >= SMALLEST:
      rle = api.encode(np.asfortranarray(labels == number, np.uint8))
      yield {
        "iscrowd": 0,
        "area": int(area),
        "bbox": api.toBbox(rle).tolist(),
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
      }


def _tiles(pixels: np.ndarray, labels: np.ndarray, tile: int, step: int) -> Iterator[Tile]:
  """Tiles in row-major order; incomplete tiles at the end are left out."""
  height, width = pixels.shape
  for top in range(0, height - tile + 1, step):
    for left in range(0, width - tile + 1, step):
      part = slice(top, top + tile), slice(left, left + tile)
      yield Tile(pixels[part], labels[part])


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("out", type=Path, help="directory for train/ and score/")
  parser.add_argument("--image", type=Path, help="another grayscale image")
  parser.add_argument(
    "--labels", type=Path, help="its labels: a number for each object, 0 for the background"
  )
  parser.add_argument("--tile", type=int, default=TILE, help="side of a tile in pixels")
  arguments = parser.parse_args()
  if (arguments.image is None) != (arguments.labels is None):
    parser.error("--image and --labels must be given together")
  return arguments


if __name__ == "__main__":
  main()
