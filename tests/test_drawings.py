"""The sheet of drawings, their augmentation, and backgrounds."""

import colorsys
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_jax.datasets.synthetic import augment, backgrounds, drawings
from sam3_jax.datasets.synthetic.augment import render
from sam3_jax.datasets.synthetic.drawings import make_sheet

FOLDER = Path(drawings.__file__).parent
NAMES = [concept.name for concept in drawings.concepts()]
FIXED = Path(__file__).parent / "scenes"


def seeded(*seed: int) -> np.random.Generator:
  return np.random.default_rng(seed)


def hue(pixels: np.ndarray) -> float:
  """Hue in degrees of the mean color of saturated opaque pixels, from premultiplied RGBA."""
  flat = pixels[pixels[..., 3] == 255][:, :3].astype(float)
  spread = np.ptp(flat, axis=1)
  flat = flat[spread >= np.percentile(spread, 60)]
  return 360 * colorsys.rgb_to_hsv(*(flat.mean(0) / 255))[0]


def hue_distance(first: float, second: float) -> float:
  return abs((first - second + 180) % 360 - 180)


class TestSheet:
  def test_78_concepts_and_3_new_ones_by_four_artists(self):
    assert len(NAMES) == len(set(NAMES)) == 78
    assert {one.name for one in drawings.new_concepts()} == {"avocado", "crown", "owl"}
    assert drawings.all_concepts() == drawings.concepts() + drawings.new_concepts()
    for style in drawings.STYLES:
      assert len(drawings.drawings(style)) == 81

  def test_cells_of_the_78_concepts_are_unchanged(self):
    """Scenes of a seed never change: the digest was taken before new concepts were added."""
    with Image.open(FOLDER / "sheet.webp") as sheet:
      pixels = np.asarray(sheet.convert("RGBa"))[: 24 * 128]
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    assert digest == "99d55e873d4c15af2b36cbb41f9d5a41034a93c26f0c9b0c0abf34ca6037327b"

  def test_concepts_include_those_of_the_fixed_scenes(self):
    first = {concept.phrases[0] for concept in drawings.concepts()}
    for folder in ("known", "twemoji"):
      record = json.loads((FIXED / folder / "annotations.json").read_text())
      assert {pair["text_input"] for pair in record["images"]} <= first

  def test_twemoji_is_not_a_training_style(self):
    assert set(drawings.STYLES) - set(drawings.TRAINING) == {"twemoji"}

  def test_unknown_style(self):
    with pytest.raises(ValueError, match=r"no style 'crayon'; choose from noto, noto-v1, fluent"):
      drawings.drawings("crayon")

  def test_is_small_enough_to_commit(self):
    assert sum(file.stat().st_size for file in FOLDER.rglob("*") if file.suffix != ".pyc") < 3e6

  def test_index_matches_the_image(self):
    index = json.loads((FOLDER / "sheet.json").read_text())
    assert index["concepts"] == NAMES
    assert tuple(index["sizes"]) == tuple(index["new"]["sizes"]) == drawings.STYLES
    assert index["new"]["concepts"] == [one.name for one in drawings.new_concepts()]
    with Image.open(FOLDER / "sheet.webp") as sheet:
      assert sheet.width == index["columns"] * index["cell"]
      assert sheet.height * index["columns"] >= 4 * 81 * index["cell"]

  @pytest.mark.parametrize("style", drawings.STYLES)
  def test_drawings_are_tight_and_complete(self, style):
    """A drawing that overlaps the next cell, or is cut off, would touch the margin."""
    index = json.loads((FOLDER / "sheet.json").read_text())
    sizes = index["sizes"][style] + index["new"]["sizes"][style]
    names = [one.name for one in drawings.all_concepts()]
    for name, drawing, size in zip(names, drawings.drawings(style), sizes, strict=True):
      alpha = np.asarray(drawing.levels[0])[..., 3]
      rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
      assert max(size) == 128, name
      # An edge with alpha of at most 12 at 512 pixels may vanish at 128.
      assert rows[0] - drawings.MARGIN in (0, 1, 2), name
      assert columns[0] - drawings.MARGIN in (0, 1, 2), name
      assert size[1] - 2 <= np.ptp(rows) + 1 <= size[1], name
      assert size[0] - 2 <= np.ptp(columns) + 1 <= size[0], name
      assert (alpha >= drawings.OPAQUE).mean() > 0.05, name

  def test_levels_halve(self):
    for drawing in drawings.drawings("fluent")[::13]:
      for finer, coarser in zip(drawing.levels, drawing.levels[1:], strict=False):
        assert (coarser.width * 2, coarser.height * 2) == finer.size

  def test_outline_spans_the_opaque_pixels(self):
    drawing = drawings.drawings("noto")[NAMES.index("guitar")]
    rows, columns = np.nonzero(np.asarray(drawing.levels[0])[..., 3] >= drawings.OPAQUE)
    corners = np.stack([columns, rows], 1)[:, None] + [[0, 0], [0, 1], [1, 0], [1, 1]]
    for angle in np.linspace(0, 2 * np.pi, 24):
      way = np.array([np.cos(angle), np.sin(angle)])
      assert (drawing.outline @ way).max() == pytest.approx((corners @ way).max(), abs=1e-9)

  def test_notice_names_every_source(self):
    notice = (FOLDER / "NOTICE.md").read_text()
    for style in drawings.STYLES:
      assert f"`{style}`" in notice
    for licence in ("Apache-2.0", "MIT License", "CC BY 4.0"):
      assert licence in notice
    files = [file.name for file in (FOLDER / "photographs").iterdir()]
    assert len(files) == len(drawings.photographs()) == len(make_sheet.PHOTOGRAPHS)
    assert all(f"`{file}`" in notice for file in files)

  def test_photographs_show_none_of_the_things(self):
    """As far as names go: those of scikit-image's images that do."""
    banned = {"chelsea", "astronaut", "camera", "rocket", "horse", "hubble_deep_field"}
    assert not banned & {Path(name).stem for name in make_sheet.PHOTOGRAPHS}

  def test_reduced_crops_and_keeps_the_aspect(self):
    drawn = Image.new("RGBA", (512, 512))
    drawn.paste((200, 30, 30, 255), (100, 50, 356, 178))
    drawn.paste((0, 0, 0, make_sheet.FAINT), (0, 400, 512, 512))  # almost invisible: cropped
    small = make_sheet.reduced(drawn)
    assert small.size == (128, 64)
    assert small.getpixel((64, 32)) == (200, 30, 30, 255)


class TestRender:
  DRAWING = drawings.drawings("noto-v1")[NAMES.index("key")]

  @pytest.mark.parametrize("strength", [0.0, 1.0])
  @pytest.mark.parametrize("side", [18.0, 60.0, 170.0])
  def test_size(self, side, strength, monkeypatch):
    monkeypatch.setattr(augment, "_outlined", lambda rng, drawn, alpha: drawn)
    for seed in range(30):
      concept = seed * 2 % 78
      drawing = drawings.drawings(drawings.STYLES[seed % 4])[concept]
      mask = render(seeded(seed), drawing, concept, side, strength).mask
      box = [np.ptp(np.flatnonzero(mask.any(axis))) + 1 for axis in (0, 1)]
      # Smaller if parts are too thin to be opaque, or blurred.
      assert 0.7 * side - 2 <= max(box) <= side + 2, (NAMES[concept], seed)

  def test_unchanged_at_its_own_size(self, plain):
    box = self.DRAWING.outline
    patch = render(seeded(0), self.DRAWING, 0, float(np.ptp(box, axis=0).max()), 0.0)
    want = np.asarray(self.DRAWING.levels[0])
    opaque = want[want[..., 3] >= drawings.OPAQUE]
    got = patch.pixels[patch.mask]
    assert len(got) == len(opaque)
    assert np.abs(got.mean(0) - _premultiplied(opaque).mean(0)).max() < 0.2  # measured 0.02

  @pytest.mark.parametrize(
    ("shape", "turn"),
    [
      ([[-1, 0], [0, 1]], np.fliplr),
      ([[-1, 0], [0, -1]], lambda mask: np.rot90(mask, 2)),
      ([[0, -1], [1, 0]], lambda mask: np.rot90(mask, -1)),  # clockwise, as y points down
    ],
  )
  def test_rotations_and_mirroring(self, shape, turn, plain, monkeypatch):
    upright = render(seeded(0), self.DRAWING, 0, 80.0, 0.0).mask
    monkeypatch.setattr(augment, "_shape", lambda rng, augment: np.array(shape, float))
    turned = render(seeded(0), self.DRAWING, 0, 80.0, 0.0).mask
    assert np.array_equal(turned, turn(upright))

  def test_colors_are_premultiplied(self):
    for seed in range(20):
      patch = render(seeded(seed), self.DRAWING, NAMES.index("key"), 50.0, 1.0)
      assert (patch.pixels[..., :3] <= patch.pixels[..., 3:].astype(int) + 2).all()
      assert np.array_equal(patch.mask, patch.pixels[..., 3] >= drawings.OPAQUE)

  def test_same_generator_same_patch(self):
    first, second, other = (
      render(seeded(seed), self.DRAWING, 3, 50.0, 1.0).pixels for seed in (1, 1, 2)
    )
    assert np.array_equal(first, second)
    assert first.shape != other.shape or not np.array_equal(first, other)

  @pytest.mark.parametrize("strength", [0.0, 1.0])
  @pytest.mark.parametrize(
    "name", ["red-apple", "green-apple", "blue-book", "orange-book", "green-book", "red-heart"]
  )
  def test_named_colors_are_preserved(self, name, strength, monkeypatch):
    """The hue changes by less than half of the distance of similar concepts, 35 degrees."""
    concept = NAMES.index(name)
    for style in drawings.STYLES:
      drawing = drawings.drawings(style)[concept]
      with monkeypatch.context() as patched:
        patched.setattr(augment, "_color_matrix", lambda *_: (1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0))
        want = hue(render(seeded(0), drawing, concept, 100.0, 0.0).pixels)
      for seed in range(8):
        got = hue(render(seeded(seed), drawing, concept, 100.0, strength).pixels)
        assert hue_distance(got, want) < 17.5, (style, seed)

  def test_concepts_of_any_color_get_all_hues(self):
    concept = NAMES.index("balloon")
    drawing = drawings.drawings("noto")[concept]
    hues = [hue(render(seeded(seed), drawing, concept, 60.0, 1.0).pixels) for seed in range(60)]
    assert len({int(one // 60) for one in hues}) == 6

  def test_outline_grows_the_mask(self):
    drawn = self.DRAWING.levels[1]
    alpha = drawn.getchannel("A")
    rimmed = np.asarray(augment._outlined(seeded(0), drawn, alpha))[..., 3]
    before = np.asarray(alpha) == 255
    grown = before.copy()
    for axis in (0, 1):
      grown |= np.roll(grown, 1, axis) | np.roll(grown, -1, axis)
    assert (rimmed[grown] == 255).all()
    assert (rimmed == 255).sum() > before.sum()


class TestBackground:
  KINDS = tuple(kind for kind, _ in backgrounds._KINDS)

  @pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
  @pytest.mark.parametrize(("height", "width"), [(64, 64), (97, 401), (500, 70)])
  def test_fills_the_image(self, kind, height, width):
    images = [kind(seeded(seed), height, width) for seed in (0, 0, 1)]
    assert all(one.shape == (height, width, 3) for one in images)
    assert all(one.dtype == np.uint8 and one.flags.writeable for one in images)
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])

  def test_all_kinds_occur_by_their_weights(self, monkeypatch):
    chosen = []
    weights = [weight for _, weight in backgrounds._KINDS]
    kinds = [(lambda *_, n=n: chosen.append(n), weight) for n, weight in enumerate(weights)]
    monkeypatch.setattr(backgrounds, "_KINDS", kinds)
    for seed in range(400):
      backgrounds.background(seeded(seed), 64, 64)
    shares = np.bincount(chosen, minlength=len(kinds)) / 400
    assert np.abs(shares - np.array(weights) / sum(weights)).max() < 0.08  # 3 standard deviations

  def test_stripes_and_checks_have_two_colors(self):
    assert len(np.unique(backgrounds._checks(seeded(0), 90, 90).reshape(-1, 3), axis=0)) == 2
    ramp = np.unique(backgrounds._stripes(seeded(3), 90, 90).reshape(-1, 3).astype(int), axis=0)
    ends = ramp[[0, -1]].astype(float)
    way = (ends[1] - ends[0]) / np.linalg.norm(ends[1] - ends[0])
    off = ramp - ends[0] - np.outer((ramp - ends[0]) @ way, way)
    assert np.abs(off).max() < 2.5  # all on one line, except for rounding


@pytest.fixture
def plain(monkeypatch):
  """Disables rotation and recoloring."""
  monkeypatch.setattr(augment, "_shape", lambda rng, augment: np.eye(2))
  monkeypatch.setattr(augment, "_recolored", lambda rng, drawn, concept, augment: drawn)


def _premultiplied(pixels: np.ndarray) -> np.ndarray:
  alpha = pixels[..., 3:].astype(float)
  return np.concatenate([pixels[..., :3] * alpha / 255, alpha], -1)
