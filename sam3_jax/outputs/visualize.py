"""Draws instances over their image: filled, outlined, boxed and labelled, each in its own color.

Uses Pillow and its built-in font and draws one mask at a time. The result is deterministic, and
memory does not grow with the size of the image or the number of instances.
"""

import dataclasses
import functools
import math
import statistics
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from sam3_jax.outputs.colors import Color, color, ink
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import LazyMasks

MAX_SIDE = 2048  # of the drawing's longer side in pixels, which bounds memory and time
MIN_SIDE = 800  # of the drawing's longer side, so that labels are readable on small images

FILL = 0.45  # opacity of the inside of an instance
HALO = 0.55  # opacity of the dark rim around outlines, which separates them from the background
PAPER, INK, FAINT = (22, 22, 26), (240, 240, 240), (150, 150, 155)  # colors of the legend

Rect = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the drawing


@dataclasses.dataclass(frozen=True)
class Item:
  """An instance on the drawing.

  Attributes:
    label: with the score behind it, if `scored`.
    score: instances with higher scores are drawn and labelled first.
    color: of mask, box and label.
    box: on the drawing.
    masks: over the drawing.
    index: of its mask in `masks`.
    scored: whether the label shows the score.
  """

  label: str
  score: float
  color: Color
  box: Rect
  masks: LazyMasks
  index: int
  scored: bool = True


def overlay(
  image: UInt8[np.ndarray, "h w 3"], instances: Sequence[Instances], phrases: Sequence[str]
) -> Image.Image:
  """Draws instances over their image.

  Images with a longer side of more than 2,048 or less than 800 pixels are resized to that limit;
  masks are computed in this size. Several phrases get a legend below the image. The built-in font
  only has ASCII: accents are removed, other characters become question marks, and a phrase without
  ASCII characters becomes its number, "#1".

  Args:
    image: the image, or a smaller copy of it, such as the result of `canvas`.
    instances: the results, one entry for each phrase. Boxes are clipped to the image.
    phrases: the label of each entry.

  Returns:
    An RGB image. Colors are assigned in the order of ids.

  Raises:
    ValueError: `instances` and `phrases` differ in length, or `image` is not uint8 [h, w, 3].
  """
  if len(instances) != len(phrases):
    raise ValueError(
      f"there must be a phrase for each of the {len(instances)} entries of instances; "
      f"got {len(phrases)} phrases."
    )
  drawing = canvas(image)
  labels = [_drawable(phrase, number) for number, phrase in enumerate(phrases, start=1)]
  groups = list(_items(instances, labels, drawing.size))
  items = [item for group in groups for item in group]

  font = draw(drawing, items)
  return drawing if len(phrases) < 2 else _with_legend(drawing, labels, groups, font)


def draw(drawing: Image.Image, items: Sequence[Item]) -> Any:
  """Draws instances on an image in place; returns the font of the labels."""
  line = max(1.0, math.sqrt(drawing.width * drawing.height) / 700)
  for item in sorted(items, key=lambda item: -_area(item.box)):  # small instances on top
    _draw_mask(drawing, item.masks[item.index], item.color, line)
  for item in sorted(items, key=lambda item: item.score):
    _draw_box(drawing, item.box, item.color, line)
  font = ImageFont.load_default(size=max(13, round(11.5 * line)))
  _draw_labels(drawing, sorted(items, key=lambda item: -item.score), font)
  return font


def canvas(image: UInt8[np.ndarray, "h w 3"]) -> Image.Image:
  """A copy of the image in the size of the drawing: the longer side has 800 to 2,048 pixels."""
  if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
    raise ValueError(f"image must be uint8 [h, w, 3]; got {image.dtype} {list(image.shape)}.")
  longest = max(image.shape[:2])
  scale = min(MAX_SIDE, max(MIN_SIDE, longest)) / longest
  if factor := longest // (2 * MAX_SIDE):  # in strips, as Pillow's images take 4 bytes per pixel
    strips = [image[y : y + 64 * factor] for y in range(0, len(image), 64 * factor)]
    small = [Image.fromarray(strip).reduce(factor) for strip in strips]
    copy = Image.fromarray(np.concatenate([np.asarray(strip) for strip in small]))
  else:
    copy = Image.fromarray(np.asarray(image))
  height, width = (max(1, round(side * scale)) for side in image.shape[:2])
  if copy.size == (width, height):
    return copy
  return copy.resize((width, height), Image.Resampling.LANCZOS)


def _items(
  instances: Sequence[Instances], labels: Sequence[str], size: tuple[int, int]
) -> Iterator[list[Item]]:
  """Yields the instances of each phrase, for a drawing of `size` (width and height)."""
  ids = sorted({int(identity) for found in instances for identity in found.ids})
  colors = {identity: color(rank) for rank, identity in enumerate(ids)}
  for found, label in zip(instances, labels, strict=True):
    height, width = found.masks.size
    scale = np.tile([size[0] / width, size[1] / height], 2)
    boxes = np.clip(found.boxes * scale, 0, np.tile(size, 2) - 1)
    masks = found.masks.at((size[1], size[0]))
    yield [
      Item(label, float(score), colors[int(identity)], tuple(box), masks, i)
      for i, (identity, score, box) in enumerate(
        zip(found.ids, found.scores, boxes.tolist(), strict=True)
      )
    ]


def _draw_mask(image: Image.Image, mask: Bool[np.ndarray, "h w"], color: Color, line: float):
  """Fills and outlines a mask; opacities are functions of the distance to its edge.

  A Gaussian blur turns a straight edge into the normal distribution function of the distance. Its
  inverse gives the distance, and smooth edges.
  """
  gray = Image.fromarray(np.where(mask, np.uint8(255), np.uint8(0)))
  bounds = gray.getbbox()
  if bounds is None:
    return
  margin = math.ceil(6 * line)
  x0, y0 = max(0, bounds[0] - margin), max(0, bounds[1] - margin)
  x1, y1 = min(image.width, bounds[2] + margin), min(image.height, bounds[3] + margin)
  smooth = gray.crop((x0, y0, x1, y1)).filter(ImageFilter.GaussianBlur(1.2 * line))
  halo, fill, outline = _opacities(line)
  image.paste((0, 0, 0), (x0, y0), smooth.point(halo))
  image.paste(color, (x0, y0), smooth.point(fill))
  image.paste(color, (x0, y0), smooth.point(outline))


@functools.lru_cache(maxsize=8)
def _opacities(line: float) -> tuple[list[int], list[int], list[int]]:
  """Opacity of halo, fill and outline for each of 256 gray levels of the blurred mask."""
  normal = statistics.NormalDist(sigma=1.2 * line)
  levels = np.arange(256)
  inside = np.array([normal.inv_cdf(min(max(v, 0.4), 254.6) / 255) for v in levels])
  halo = np.clip(2.1 * line + inside, 0, 1) * (inside < 0) * HALO * (levels > 0)
  fill = np.clip(inside + 0.5, 0, 1) * FILL
  outline = np.clip(line + 0.5 - np.abs(inside), 0, 1)
  halo, fill, outline = (np.rint(255 * x).astype(int).tolist() for x in (halo, fill, outline))
  return halo, fill, outline


def _draw_box(image: Image.Image, box: Rect, color: Color, line: float):
  x0, y0, x1, y1 = (round(v) for v in box)
  width = max(2, round(0.75 * line))
  draw = ImageDraw.Draw(image, "RGBA")
  halo = (0, 0, 0, round(127 * HALO))
  draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=halo, width=width + 2)
  draw.rectangle((x0, y0, x1, y1), outline=color, width=width)


def _draw_labels(image: Image.Image, items: Sequence[Item], font: Any):
  """Writes label and score at each box, where they do not overlap earlier labels.

  If there is no such position, only the score is written.
  """
  draw = ImageDraw.Draw(image)
  drawn = np.zeros((0, 4))
  for item in items:
    score = f"{item.score:.2f}"
    name = _shorten(item.label, 0.4 * image.width, font)
    texts = (f"{name} {score}".strip(), score) if item.scored else (name,)
    choices = [
      (text, rect, _overlap(rect, drawn))
      for text in texts
      for rect in _positions(item.box, _label_size(text, font), image.size)
    ]
    if not choices:  # the image has a width of only a few pixels
      continue
    free = [choice for choice in choices if choice[2] == 0]
    text, rect, _ = free[0] if free else min(choices, key=lambda choice: choice[2])
    drawn = np.vstack([drawn, rect])
    radius = (rect[3] - rect[1]) / 5
    draw.rounded_rectangle(rect, radius, fill=item.color)
    middle = ((rect[0] + rect[2]) / 2, (rect[1] + rect[3]) / 2)
    draw.text(middle, text, font=font, fill=ink(item.color), anchor="mm")


def _label_size(text: str, font: Any) -> tuple[int, int]:
  return math.ceil(font.getlength(text) + 0.7 * font.size), math.ceil(1.35 * font.size)


def _positions(box: Rect, label: tuple[int, int], size: tuple[int, int]) -> Iterator[Rect]:
  """Possible positions of a label: above the corners of the box, then inside and below them."""
  width, height = label
  if width >= size[0] or height >= size[1]:
    return
  x0, y0, x1, y1 = (round(v) for v in box)
  lefts = (x0, x1 - width)
  for top in (y0 - height, y0, y1, y1 - height):
    for left in lefts:
      x = min(max(0, left), size[0] - 1 - width)
      y = min(max(0, top), size[1] - 1 - height)
      yield x, y, x + width, y + height


def _overlap(rect: Rect, others: np.ndarray) -> float:
  """The area of the intersections of a rectangle with others."""
  wide = np.minimum(rect[2], others[:, 2]) - np.maximum(rect[0], others[:, 0])
  high = np.minimum(rect[3], others[:, 3]) - np.maximum(rect[1], others[:, 1])
  return float(np.sum(np.clip(wide, 0, None) * np.clip(high, 0, None)))


def _with_legend(
  image: Image.Image, labels: Sequence[str], groups: Sequence[Sequence[Item]], font: Any
) -> Image.Image:
  """Adds a legend below the image: each phrase, its colors, and the number of instances."""
  pad, row = round(0.6 * font.size), round(1.5 * font.size)
  dot = round(0.75 * font.size)
  entries = []
  for label, group in zip(labels, groups, strict=True):
    dots = [item.color for item in group[:5]]
    swatches = len(dots) * (dot + 2)
    available = image.width - 2 * pad - swatches - font.getlength("  (0000)")
    text = f"{_shorten(label, available, font)} ({len(group)})"
    entries.append((dots, swatches, text, swatches + pad // 2 + font.getlength(text) + 2 * pad))
  positions, x, y = [], pad, pad
  for *_, length in entries:
    if x > pad and x + length > image.width:
      x, y = pad, y + row
    positions.append((x, y))
    x += length
  strip = Image.new("RGB", (image.width, y + row + pad // 2), PAPER)
  draw = ImageDraw.Draw(strip)
  for (x, y), (dots, swatches, text, _) in zip(positions, entries, strict=True):
    middle = y + row // 2 - pad // 4
    for i, shade in enumerate(dots):
      left = x + i * (dot + 2)
      draw.rounded_rectangle((left, middle - dot // 2, left + dot - 1, middle + dot // 2), 2, shade)
    draw.text((x + swatches + pad // 2, middle), text, INK if dots else FAINT, font, anchor="lm")
  whole = Image.new("RGB", (image.width, image.height + strip.height))
  whole.paste(image)
  whole.paste(strip, (0, image.height))
  return whole


def _shorten(text: str, available: float, font: Any) -> str:
  """Shortens a text with an ellipsis if it exceeds the `available` width in pixels."""
  if font.getlength(text) <= available:
    return text
  while text and font.getlength(text + "...") > available:
    text = text[:-1]
  return text.rstrip() + "..." if text else ""


def _drawable(phrase: str, number: int) -> str:
  """The phrase in characters of the font; its number, such as "#1", if there are none."""
  plain = unicodedata.normalize("NFKD", " ".join(phrase.split()))
  plain = "".join(c for c in plain if not unicodedata.combining(c))
  if phrase.strip() and not any("!" <= c <= "~" for c in plain):
    return f"#{number}"
  return plain.encode("ascii", "replace").decode()


def _area(box: Rect) -> float:
  return (box[2] - box[0]) * (box[3] - box[1])
