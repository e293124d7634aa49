"""Real instance masks to fine-tune on: cell nuclei, as two data sets in COCO's layout.

  pip install --no-deps stardist              # for its example image
  python benchmarks/nuclei.py nuclei          # nuclei/train and nuclei/score
  python benchmarks/nuclei.py mine --image cells.tif --labels labels.tif

The image is a fluorescence micrograph of 512 x 512 pixels with 125 nuclei, of the 2018 Data
Science Bowl (Caicedo et al. 2019, doi:10.1038/s41592-019-0612-7), which the package stardist ships
with the label of each pixel. Tiles of the left half are for training, those of the right half for
scoring; no pixel is in both. Training tiles overlap and are turned to all four sides.
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
SMALLEST = 20  # pixels of a nucleus that a tile's border has cut; of less nobody could tell
BRIGHT = 99  # percent of the pixels are darker than what becomes white: dividing cells outshine all
# Names of what is in no image become phrases that find nothing.
CATEGORIES = ("cell nucleus", "cat", "hot dog", "balloon", "bicycle", "red apple", "key", "crab")
NUCLEUS = 1  # id of the first category


class Tile(NamedTuple):
  """A part of the image, and the number of the nucleus that each pixel shows, 0 for none."""

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
  """An example of the package stardist, which need not be importable."""
  found = importlib.util.find_spec("stardist")
  if found is None or found.origin is None:
    raise SystemExit("stardist is not installed: pip install --no-deps stardist")
  return Path(found.origin).parent / "data" / "images" / file


def read(path: Path) -> np.ndarray:
  """A grey image of any depth, stretched to 0..255."""
  values = np.asarray(Image.open(path)).astype(np.float64)
  white = max(np.percentile(values, BRIGHT), 1)
  return np.rint(np.minimum(values / white, 1) * 255).astype(np.uint8)


def halves(pixels: np.ndarray, labels: np.ndarray, tile: int) -> dict[str, list[Tile]]:
  """Tiles to train on, of the left half, and to score, of the right half."""
  if pixels.shape != labels.shape or min(pixels.shape[0], pixels.shape[1] // 2) < tile:
    raise SystemExit(
      f"image and labels must have one size, each half with room for a tile of {tile} x {tile}; "
      f"got {pixels.shape} and {labels.shape}."
    )
  middle = pixels.shape[1] // 2
  train = list(_tiles(pixels[:, :middle], labels[:, :middle], tile, tile // 2))
  return {
    "train": [Tile(np.rot90(a, n), np.rot90(b, n)) for a, b in train for n in range(4)],
    "score": list(_tiles(pixels[:, middle:], labels[:, middle:], tile, tile)),
  }


def write(out: Path, tiles: list[Tile]) -> tuple[int, int]:
  """Images and annotations.json in COCO's layout; returns how many images and objects."""
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
  """Mask, box in pixels and area of each nucleus that is large enough."""
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
  """Row by row; what does not fill a tile at the end is left out."""
  height, width = pixels.shape
  for top in range(0, height - tile + 1, step):
    for left in range(0, width - tile + 1, step):
      part = slice(top, top + tile), slice(left, left + tile)
      yield Tile(pixels[part], labels[part])


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("out", type=Path, help="folder for train/ and score/")
  parser.add_argument("--image", type=Path, help="a grey image of your own")
  parser.add_argument("--labels", type=Path, help="its labels: 0, and a number for each object")
  parser.add_argument("--tile", type=int, default=TILE, help="pixels a side of a tile")
  arguments = parser.parse_args()
  if (arguments.image is None) != (arguments.labels is None):
    parser.error("--image and --labels belong together")
  return arguments


if __name__ == "__main__":
  main()
