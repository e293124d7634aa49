"""The drawings of scenes: 78 concepts, each drawn by four artists, from one image (sheet.webp).

It also has three `new_concepts`, which scenes show only on request. make_sheet.py creates the
sheet; NOTICE.md has sources and licences.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from sam3_jax.inputs.image_file import open_image
from sam3_jax.inputs.preprocess import read_image

HERE = Path(__file__).parent
STYLES = ("noto", "noto-v1", "fluent", "twemoji")
TRAINING = STYLES[:3]  # the other style is used only in evaluation, as an artist never seen
MARGIN = 8  # empty pixels around a drawing, for smooth edges and outlines
OPAQUE = 128  # minimal alpha of pixels that belong to the object
_LEVELS = 4


@dataclasses.dataclass(frozen=True)
class Concept:
  """A concept and its phrases.

  Attributes:
    name: of the icon in the artists' sets.
    phrases: phrases used in evaluation, the most usual first.
    synonyms: more phrases for training.
    unseen: more phrases, never used in training.
    any_color: whether it may have any color, so that no phrase names a color.
  """

  name: str
  phrases: tuple[str, ...]
  synonyms: tuple[str, ...]
  unseen: tuple[str, ...]
  any_color: bool


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A concept drawn by one artist.

  Attributes:
    levels: RGBA images with straight alpha and a margin; each has half the size of the previous
      one. The longer side of the drawing has 128 pixels in the first.
    outline: xy of points on the first level; their convex hull contains all opaque pixels.
    center: xy center of the bounding box of the opaque pixels.
  """

  levels: tuple[Image.Image, ...]
  outline: Float[np.ndarray, "N 2"]
  center: Float[np.ndarray, " 2"]


@functools.cache
def concepts() -> tuple[Concept, ...]:
  """The concepts of scenes, in the order of their indices."""
  return _read(HERE / "concepts.tsv")


@functools.cache
def new_concepts() -> tuple[Concept, ...]:
  """Concepts that scenes show only on request, for fine-tuning on a new concept."""
  return _read(HERE / "new.tsv")


@functools.cache
def all_concepts() -> tuple[Concept, ...]:
  """`concepts` followed by `new_concepts`, in the order of their indices."""
  return (*concepts(), *new_concepts())


@functools.cache
def drawings(style: str) -> tuple[Drawing, ...]:
  """The drawings of an artist, in the order of `all_concepts`."""
  if style not in STYLES:
    raise ValueError(f"there is no style {style!r}; choose from {', '.join(STYLES)}.")
  drawn, before = [], 0  # number of earlier cells of the sheet
  for part in (_index(), _index()["new"]):
    first = before + list(part["sizes"]).index(style) * len(part["concepts"])
    sizes = part["sizes"][style]
    drawn += [_drawing(_cell(first + number, size)) for number, size in enumerate(sizes)]
    before += len(part["sizes"]) * len(part["concepts"])
  return tuple(drawn)


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
  """RGB images that show none of the concepts."""
  images = []
  for file in sorted((HERE / "photographs").glob("*.jpg")):
    images.append(Image.fromarray(read_image(file)))
  return tuple(images)


def _read(file: Path) -> tuple[Concept, ...]:
  lines = file.read_text(encoding="utf-8").splitlines()
  rows = [line.split("\t") for line in lines if not line.startswith("#")]
  return tuple(
    Concept(name, _several(phrases), _several(synonyms), _several(unseen), any_color == "yes")
    for name, phrases, synonyms, unseen, any_color in rows
  )


def _several(field: str) -> tuple[str, ...]:
  return tuple(field.split("|")) if field else ()


@functools.cache
def _index() -> dict:
  return json.loads((HERE / "sheet.json").read_text())


@functools.cache
def _sheet() -> Image.Image:
  with open_image(HERE / "sheet.webp") as sheet:
    return sheet.image.convert("RGBA")


def _cell(number: int, size: tuple[int, int]) -> Image.Image:
  cell, columns = _index()["cell"], _index()["columns"]
  left, top = number % columns * cell, number // columns * cell
  return _sheet().crop((left, top, left + size[0], top + size[1]))


def _drawing(drawn: Image.Image) -> Drawing:
  multiple = 2 ** (_LEVELS - 1)
  sides = [-(-(side + 2 * MARGIN) // multiple) * multiple for side in drawn.size]
  padded = Image.new("RGBA", (sides[0], sides[1]))
  padded.paste(drawn, (MARGIN, MARGIN))
  levels = tuple(padded.reduce(2**level) if level else padded for level in range(_LEVELS))
  rows, columns = np.nonzero(np.asarray(padded)[..., 3] >= OPAQUE)
  ends = [(x, y) for y in np.unique(rows) for x in _span(columns[rows == y])]
  outline = np.array([(x, y + below) for x, y in ends for below in (0, 1)], np.float64)
  return Drawing(levels, outline, (outline.min(0) + outline.max(0)) / 2)


def _span(columns: np.ndarray) -> tuple[int, int]:
  return int(columns.min()), int(columns.max()) + 1
