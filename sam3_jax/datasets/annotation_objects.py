"""Collects the objects of an annotation file and checks that masks and boxes agree."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from sam3_jax.datasets import agreement
from sam3_jax.datasets.annotation_checks import SLACK
from sam3_jax.datasets.annotation_file import AnnotationFile
from sam3_jax.datasets.annotation_schema import AnnotationEntry, Object
from sam3_jax.outputs.rle import bounds
from sam3_jax.outputs.segmentations import Compressed, compress_all
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import are_finite


class ObjectCollector:
  """Collects the valid objects of an annotation file by image and phrase.

  Attributes:
    found: the objects by image id and phrase, without duplicates of the same mask.
    unfinished: image ids and phrases with an instance that has no mask.
  """

  def __init__(self, file: AnnotationFile):
    self.found: dict[tuple[int, str], list[Object]] = defaultdict(list)
    self.unfinished: set[tuple[int, str]] = set()
    self._file = file
    self._seen: dict[tuple[int, str], set[tuple[str, bool]]] = defaultdict(set)
    self._listed: dict[tuple[int, str], dict[int, set[str]]] = {}  # by image_id, if several
    self._contradictions: list[tuple[AnnotationEntry, np.ndarray, np.ndarray]] = []
    self._drawn = self._empty = 0  # number of masks by annotators, and of empty ones among them
    self._empties: dict[str, None] = {}
    # Largest coordinate of polygons, and whether any coordinate is not an integer.
    self._largest, self._fractional = 0.0, False

  @np.errstate(over="ignore", invalid="ignore")  # boxes may have any size
  def add(self, chunk: Sequence[AnnotationEntry]) -> None:
    """Adds a chunk of annotations."""
    sizes = [(one.image.height, one.image.width) for one in chunk]
    masks = compress_all([one.segmentation for one in chunk], sizes)
    boxes = self._boxes(chunk, masks)
    wrong, empty = self._contradicting(chunk, boxes, masks), masks.empty
    lost: Any = np.isnan(boxes).any(axis=1)
    drawn = [isinstance(one.segmentation, list) for one in chunk]
    polygons = [i for i, rle in enumerate(masks.rles) if rle is not None and drawn[i]]
    corners = masks.extents[polygons, :2] + masks.extents[polygons, 2:]
    self._largest = max(self._largest, corners.max(initial=0))
    self._fractional |= bool((corners % 1).any())
    for i, one in enumerate(chunk):
      rle, box = masks.rles[i], boxes[i]
      if rle is None:
        self._file.faults.append(f"{one.name}: {masks.faults[i]}")
      elif lost[i]:
        got = shown(one.box, 60)
        self._file.faults.append(f"{one.name}: its bbox must be [x, y, width, height]; got {got}")
      elif empty[i]:
        self._add_empty(one)
      elif wrong[i]:
        self._contradictions.append((one, box, masks.bounds[i]))
      else:
        self._add(one, Object(rle, tuple(box.tolist()), one.crowd))

  @np.errstate(over="ignore", invalid="ignore")
  def finish(self) -> None:
    """Adds the faults that depend on all annotations."""
    faults, images = self._file.faults, self._file.images
    for one, box, bound in self._contradictions:
      faults.append(f"{one.name}: {self._contradiction(one, box, bound)}")
    size = max((min(image.width, image.height) for image in images), default=0)
    if self._fractional and self._largest <= 1 and size > 2:
      faults.append("no coordinate of its polygons is over 1: they must be pixels, not fractions")
    elif 2 * self._empty > self._drawn:
      faults.append(
        f"{self._empty:,} of {self._drawn:,} masks are empty, for instance that of "
        f"{next(iter(self._empties))}; polygons and runs must be in pixels of the image"
      )
    for (number, phrase), by_id in self._listed.items():
      if len(by_id) > 1 and len({frozenset(masks) for masks in by_id.values()}) > 1:
        ids = " and ".join(map(str, by_id))
        faults.append(
          f"images {ids} are the same file, and each has instances of {phrase!r:.60}: annotate "
          f"them under one id (image {number})"
        )

  def _boxes(self, chunk: Sequence[AnnotationEntry], masks: Compressed) -> Float[np.ndarray, "n 4"]:
    """Boxes in pixels; the mask's bounds if there is no box, NaN if it is invalid."""
    invalid = [np.nan] * 4
    given = [
      one.box
      if isinstance(one.box, list) and len(one.box) == 4 and are_finite(one.box)
      else invalid
      for one in chunk
    ]
    boxes = np.array(given, np.float64).reshape(-1, 4)
    if self._file.fractions:
      boxes *= [[one.image.width, one.image.height] * 2 for one in chunk] or 1
    missing = [i for i, one in enumerate(chunk) if one.box is None]
    boxes[missing] = masks.bounds[missing]
    return boxes

  def _contradicting(
    self, chunk: Sequence[AnnotationEntry], boxes: Float[np.ndarray, "n 4"], masks: Compressed
  ) -> np.ndarray:
    """Which boxes contradict their masks.

    Boxes that are only imprecise, or that a model predicted, are replaced by the masks' bounds.
    """
    extent = np.array([[one.image.width, one.image.height] * 2 for one in chunk]).reshape(-1, 4)
    exact = agreement.agree(boxes, masks.bounds, masks.extents)
    crowd = np.array([one.crowd for one in chunk], bool)
    scored = np.array([one.scored for one in chunk], bool)
    judged = ~exact & ~crowd & ~masks.empty & ~np.isnan(boxes).any(axis=1)
    loose = judged & (scored | (agreement.overlaps(boxes, masks.bounds) >= agreement.MIN_IOU))
    leaving = (boxes[:, :2] < -SLACK) | (boxes[:, :2] + boxes[:, 2:] > extent[:, :2] + SLACK)
    clipped = exact & masks.outside & leaving.any(axis=1)
    boxes[loose | clipped] = masks.bounds[loose | clipped]
    for i in np.flatnonzero(loose).tolist():
      self._file.notes.add("boxes unlike their masks, replaced by the masks' bounds", chunk[i].name)
    for i in np.flatnonzero(masks.outside & ~masks.empty).tolist():
      what = "polygons that extend beyond their image, clipped at its border"
      self._file.notes.add(what, chunk[i].name)
    self._drawn += int((~scored).sum())
    return judged & ~loose

  def _add(self, one: AnnotationEntry, added: Object) -> None:
    key, counts = (one.image.id, one.phrase), added.rle["counts"]
    if one.image_id != one.image.id or key in self._listed:
      known = {one.image.id: {mask for mask, _ in self._seen[key]}} if self._seen[key] else {}
      self._listed.setdefault(key, known).setdefault(one.image_id, set()).add(counts)
    if (counts, added.crowd) in self._seen[key]:
      self._file.notes.add("instances with the mask of another one, left out", one.name)
      return
    self._seen[key].add((counts, added.crowd))
    self.found[key].append(added)

  def _add_empty(self, one: AnnotationEntry) -> None:
    self._file.notes.add("instances without a pixel, left out", one.name)
    self.unfinished.add((one.image.id, one.phrase))
    if not one.scored:
      self._empty += 1
      self._empties.setdefault(one.name)

  def _contradiction(self, one: AnnotationEntry, box: np.ndarray, bound: np.ndarray) -> str:
    width, height = one.image.width, one.image.height
    looks = agreement.describe(box, bound, width, height) or self._other(one, box)
    own, wanted = (", ".join(f"{value:g}" for value in values) for values in (box, bound))
    shown = f"its box {own} (x, y, width, height)"
    x, y, w, h = box
    if w <= 0 or h <= 0:
      return f"{shown} has no area{looks}; the bounds of its mask are {wanted}"
    if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
      size = f"{width} x {height}"
      return f"{shown} extends beyond the {size} image{looks}; that of its mask is {wanted}"
    return f"{shown} is not that of its mask, {wanted}{looks}"

  def _other(self, one: AnnotationEntry, box: np.ndarray) -> str:
    """Says if the box is that of another object in the image; "" otherwise."""
    for phrase in self._file.phrases or [one.phrase]:
      for other in self.found.get((one.image.id, phrase), ()):
        if agreement.agree(box[None], np.array([bounds(other.rle)]))[0]:
          return f" (it looks like that of another object, {phrase!r:.60})"
    return ""
