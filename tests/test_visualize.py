"""Drawing instances: positions, colors, labels, legend and size of the drawing."""

import itertools
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sam3_jax.outputs.colors import color, ink
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.visualize import FILL, MAX_SIDE, MIN_SIDE, canvas, overlay


def found(boxes, size, ids=None, scores=None, grid=64) -> Instances:
  """Instances whose masks fill their boxes, on an image of a height and width."""
  boxes = np.asarray(boxes, np.float32).reshape(-1, 4)
  cells = (np.arange(grid) + 0.5) / grid
  x0, y0, x1, y1 = (boxes / [size[1], size[0], size[1], size[0]]).T[..., None]
  down, across = (cells > y0) & (cells < y1), (cells > x0) & (cells < x1)
  logits = np.where(down[:, :, None] & across[:, None, :], 5, -5).astype(np.float32)
  count = len(boxes)
  return Instances(
    np.arange(1, count + 1) if ids is None else np.array(ids),
    np.linspace(0.9, 0.6, count, dtype=np.float32) if scores is None else np.array(scores),
    boxes,
    Masks(logits, size),
  )


def gray(height: int, width: int) -> np.ndarray:
  return np.full((height, width, 3), 120, np.uint8)


@pytest.fixture
def labels(monkeypatch) -> list[tuple]:
  """Records the rectangles of the labels."""
  rects: list[tuple] = []
  draw = ImageDraw.ImageDraw.rounded_rectangle

  def record(self, xy, *args, **kwargs):
    rects.append(tuple(xy))
    return draw(self, xy, *args, **kwargs)

  monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", record)
  return rects


class TestCanvas:
  @pytest.mark.parametrize(
    ("size", "expected"),
    [
      ((1, 1), (MIN_SIDE, MIN_SIDE)),
      ((1, 300), (3, MIN_SIDE)),
      ((400, 600), (533, MIN_SIDE)),
      ((1000, 900), (1000, 900)),
      ((1500, MAX_SIDE), (1500, MAX_SIDE)),
      ((3000, 4000), (1536, MAX_SIDE)),
      ((20_000, 3), (MAX_SIDE, 1)),
    ],
  )
  def test_size(self, size, expected):
    image = canvas(gray(*size))
    assert (image.height, image.width) == expected
    assert np.all(np.asarray(image) == 120)

  def test_huge_image_is_reduced_evenly(self):
    image = np.full((4500, 6200, 3), 77, np.uint8)
    image[..., 0] = np.linspace(0, 255, 6200)
    image[..., 1] = np.linspace(0, 255, 4500)[:, None]
    small = np.asarray(canvas(image)).astype(float)
    assert small.shape == (1486, MAX_SIDE, 3)
    # Measured 1.1: the array is truncated to integers, the copy rounded.
    assert np.abs(small[..., 0] - np.linspace(0, 255, MAX_SIDE)).max() < 2
    assert np.abs(small[..., 1] - np.linspace(0, 255, 1486)[:, None]).max() < 2
    assert np.all(small[..., 2] == 77)

  @pytest.mark.parametrize(
    "image", [np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)]
  )
  def test_invalid_arrays_are_rejected(self, image):
    with pytest.raises(ValueError, match=r"must be uint8 \[h, w, 3\]; got"):
      canvas(image)


class TestOverlay:
  def test_only_the_inside_is_tinted(self):
    image = gray(1000, 1000)
    drawn = np.asarray(overlay(image, [found([[200, 300, 600, 800]], (1000, 1000))], ["cat"]))
    tint = 120 + FILL * (np.array(color(0)) - 120)
    assert np.abs(drawn[400:700, 300:500] - tint).max() < 1.5  # measured 1: opacity has 256 levels
    far = np.ones((1000, 1000), bool)
    far[250:830, 170:630] = False  # the mask with its halo, the box, the label above it
    assert np.all(drawn[far] == 120)
    assert np.all(image == 120)

  def test_outline_and_box_have_the_full_color(self):
    logits = np.full((1, 100, 100), -5, np.float32)
    logits[:, :, :50] = 5  # the left half; the box is elsewhere
    one = Instances(
      np.array([1]),
      np.array([0.8]),
      np.array([[700.0, 700, 900, 900]]),
      Masks(logits, (1000, 1000)),
    )
    drawn = np.asarray(overlay(gray(1000, 1000), [one], [""])).astype(int)
    off = np.abs(drawn - color(0)).max(axis=-1)
    assert off[300, 499:501].max() == 0
    assert off[700:900, 700].max() == 0
    assert off[900, 750:850].max() == 0

  def test_drawing_is_deterministic(self):
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    results = [found([[20, 30, 200, 250], [100, 100, 480, 290]], (300, 500))]
    first, second = (overlay(image, results, ["cat"]).tobytes() for _ in range(2))
    assert first == second

  def test_no_instances_leave_the_image_unchanged(self):
    image = np.random.default_rng(0).integers(0, 256, (900, 850, 3), np.uint8)
    drawn = overlay(image, [found([], (900, 850))], ["cat"])
    assert np.array_equal(np.asarray(drawn), image)
    assert overlay(image, [], []).size == (850, 900)

  def test_empty_mask_has_box_and_label(self, labels):
    one = found([[100, 100, 300, 300]], (900, 900))
    one = Instances(one.ids, one.scores, one.boxes, Masks(one.masks.logits - 100, (900, 900)))
    drawn = np.asarray(overlay(gray(900, 900), [one], ["cat"]))
    assert len(labels) == 1
    assert np.all(drawn[105:295, 105:295] == 120)
    assert tuple(drawn[200, 100]) == color(0)

  @pytest.mark.parametrize("box", [[-50, -80, 2000, 3000], [900, 900, 950, 950], [40, 40, 40, 40]])
  @pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (500, 700)])
  def test_boxes_outside_the_image(self, box, size, labels):
    drawn = overlay(gray(*size), [found([box], size)], ["a phrase of some length"])
    assert drawn.size == canvas(gray(*size)).size
    for x0, y0, x1, y1 in labels:
      assert 0 <= x0 < x1 < drawn.width
      assert 0 <= y0 < y1 < drawn.height

  def test_reduced_copy_of_a_huge_image(self):
    """Masks have the size of the drawing: a single one of 20,000 x 15,000 would take 300 MB."""
    boxes = [[1000, 1000, 9000, 9000], [5000, 4000, 19_000, 14_000]]
    results = [found(boxes, (15_000, 20_000))]
    tracemalloc.start()
    drawn = overlay(gray(1536, 2048), results, ["cat"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6  # measured 16 MB
    small = [found(np.array(boxes) / 10, (1500, 2000))]
    assert drawn.tobytes() == overlay(gray(1536, 2048), small, ["cat"]).tobytes()

  def test_unequal_numbers_of_instances_and_phrases(self):
    with pytest.raises(ValueError, match="a phrase for each of the 1 entries of instances; got 2"):
      overlay(gray(10, 10), [found([], (10, 10))], ["cat", "dog"])
    with pytest.raises(ValueError, match="must be uint8"):
      overlay(np.zeros((10, 10, 3)), [found([], (10, 10))], ["cat"])


class TestLabels:
  def test_labels_are_inside_and_do_not_overlap(self, labels):
    corners = itertools.product((0, 200, 400, 600), (0, 150, 300, 450))
    boxes = [[x, y, x + 190, y + 140] for x, y in corners]
    overlay(gray(600, 800), [found(boxes, (600, 800))], ["coin"])
    assert len(labels) == 16
    for a, b in itertools.combinations(labels, 2):
      assert min(a[2], b[2]) <= max(a[0], b[0]) or min(a[3], b[3]) <= max(a[1], b[1])
    for x0, y0, x1, y1 in labels:
      assert 0 <= x0 < x1 < 800
      assert 0 <= y0 < y1 < 600

  def test_crowded_labels_have_only_the_score(self, labels):
    boxes = [[300 + i, 300 + i, 400 + i, 330 + i] for i in range(12)]
    overlay(gray(800, 800), [found(boxes, (800, 800))], ["a rather long phrase"])
    widths = [x1 - x0 for x0, _, x1, _ in labels]
    assert len(labels) == 12
    assert widths[0] > 2 * min(widths)

  def test_long_phrase_is_shortened(self, labels):
    overlay(gray(800, 800), [found([[100, 100, 200, 200]], (800, 800))], ["word " * 100])
    assert labels[0][2] - labels[0][0] < 0.5 * 800

  @pytest.mark.parametrize(
    ("phrase", "plain"),
    [("café crème", "cafe creme"), ("猫", "#1"), ("黄色 猫", "#1"), ("猫 cat", "? cat")],
  )
  def test_characters_missing_in_the_font(self, phrase, plain):
    results = [found([[100, 100, 400, 400]], (800, 800))]
    drawn = [overlay(gray(800, 800), results, [text]).tobytes() for text in (phrase, plain)]
    assert drawn[0] == drawn[1]

  def test_phrases_missing_in_the_font_are_numbered(self):
    results = [found([box], (800, 800)) for box in ([100, 100, 300, 300], [400, 400, 700, 700])]
    drawn = [overlay(gray(800, 800), results, two) for two in (["猫", "犬"], ["#1", "#2"])]
    assert drawn[0].tobytes() == drawn[1].tobytes()


class TestLegend:
  def test_legend_only_for_several_phrases(self):
    image, results = gray(600, 800), found([[100, 100, 400, 400]], (600, 800))
    assert overlay(image, [results], ["cat"]).size == (800, 600)
    both = overlay(image, [results, found([], (600, 800))], ["cat", "dog"])
    assert both.width == 800
    assert 600 < both.height < 650
    alone = overlay(image, [results], ["cat"])
    assert np.array_equal(np.asarray(both)[:600], np.asarray(alone))
    assert np.any(np.all(np.asarray(both)[600:] == color(0), axis=-1))  # the color of the cat

  def test_many_phrases_take_several_lines(self):
    image, none = gray(600, 800), found([], (600, 800))
    phrases = [f"phrase number {i}" for i in range(20)]
    drawn = overlay(image, [none] * 20, phrases)
    assert drawn.width == 800
    assert 650 < drawn.height < 900

  @pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1)])
  def test_legend_of_a_tiny_image(self, size):
    one = found([[0, 0, size[1], size[0]]], size)
    drawn = overlay(gray(*size), [one, one], ["a phrase", "another"])
    assert drawn.width == canvas(gray(*size)).width


class TestColors:
  def test_colors_follow_ids(self):
    boxes = [[100, 100, 300, 300], [500, 500, 700, 700]]
    image = overlay(gray(900, 900), [found(boxes, (900, 900), ids=[207, 5])], [""])
    assert image.getpixel((100, 200)) == color(1)
    assert image.getpixel((500, 600)) == color(0)
    swapped = [found([box], (900, 900), ids=[i]) for box, i in zip(boxes, (207, 5), strict=True)]
    image = overlay(gray(900, 900), swapped, ["", ""])
    assert image.getpixel((100, 200)) == color(1)
    assert image.getpixel((500, 600)) == color(0)

  def test_neighboring_colors_differ(self):
    """CIE76 distance above 25 between colors up to four apart; 2.3 is just noticeable."""
    profile = Image.new("RGB", (60, 1))
    profile.putdata([color(i) for i in range(60)])
    linear = np.asarray(profile)[0] / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = linear @ np.array(to_xyz).T / [0.9505, 1, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    lab = np.stack(
      [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )
    for apart in range(1, 5):
      distance = np.linalg.norm(lab[apart:] - lab[:-apart], axis=1)
      assert distance.min() > 25, apart

  def test_ink_is_readable(self):
    """WCAG 2.1 requires a contrast of 4.5."""
    for i in range(300):
      light, dark = sorted((_luminance(color(i)), _luminance(ink(color(i)))), reverse=True)
      assert (light + 0.05) / (dark + 0.05) > 4.5


def _luminance(rgb: tuple[int, int, int]) -> float:
  linear = [
    c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb
  ]
  return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))
