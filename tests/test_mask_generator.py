"""The mask generator, on a fake model with known masks and on the tiny model."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from pycocotools import mask as coco
from support import visual_model

from sam3_jax import MaskGeneration, VisualPrompt
from sam3_jax.inference.mask_generator import (
  Segments,
  _crops,
  _measure,
  clean,
  generate_masks,
  segment_embedding,
  suppress,
)
from sam3_jax.outputs.coco_json import coco as coco_record
from sam3_jax.outputs.detections import VisualMasks
from sam3_jax.outputs.visualize import overlay

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
GRID = 64


class Discs:
  """A model that finds, for each click, the disc under it.

  A disc is (x, y, radius, quality, softness). Of the three multimask outputs of a click, the first
  has quality 0, the second is the disc, and the third is its right half with a low quality.
  """

  def __init__(self, *discs):
    self.discs = discs
    self.seen = []

  @staticmethod
  def image(height, width):
    """Pixels that encode their coordinates, so that crops do, too."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8)

  def encode(self, pixels, *, visual, max_pixels):
    assert visual
    assert max_pixels >= pixels.shape[0] * pixels.shape[1]
    self.seen.append(tuple(int(n) for n in (*pixels[0, 0, :2], *pixels[-1, -1, :2] + 1)))
    return pixels

  def decode_visual(self, pixels, prompts, *, multimask):
    height, width = pixels.shape[:2]
    corner = pixels[0, 0, :2].astype(float)
    rows, qualities = [], []
    for prompt in prompts:
      (point,) = prompt.points
      at = np.array(point) + corner
      under = [d for d in self.discs if np.hypot(*(at - d[:2])) <= d[2]]
      x, y, radius, quality, softness = under[0] if under else (0, 0, -9, 0, 1)
      cells_y, cells_x = (np.indices((GRID, GRID)) + 0.5) / GRID
      away = np.hypot(cells_x * width + corner[0] - x, cells_y * height + corner[1] - y)
      whole = (radius - away) / softness
      half = np.where(cells_x * width + corner[0] > x, whole, -9)
      rows.append([np.full_like(whole, 9), whole, half])
      qualities.append([0.1, quality, 0.6 * quality])
    keep = slice(None) if multimask else slice(1, 2)
    return VisualMasks(
      jnp.float32(rows)[:, keep],
      jnp.float32(qualities)[:, keep],
      jnp.ones(len(rows)),
      jnp.zeros(len(rows), jnp.int32),
      jnp.tile(jnp.int32([height, width]), (len(rows), 1)),
    )


THREE = ((40, 30, 18, 0.95, 0.02), (120, 40, 25, 0.9, 0.02), (60.7, 80.9, 9, 0.99, 0.02))


def truth(disc, size):
  y, x = np.indices(size) + 0.5
  return np.hypot(x - disc[0], y - disc[1]) < disc[2]


def overlap(one, other):
  return (one & other).sum() / (one | other).sum()


def test_each_object_is_found_once():
  found = generate_masks(Discs(*THREE), Discs.image(100, 160), MaskGeneration(points_per_side=16))
  assert found.ids.tolist() == [1, 2, 3]
  np.testing.assert_allclose(found.scores, [0.99, 0.95, 0.9], rtol=1e-6)
  assert (found.stability > 0.95).all()
  assert found.masks.size == (100, 160)
  for i, disc in enumerate((THREE[2], THREE[0], THREE[1])):
    x, y, radius = disc[:3]
    mask = found.masks[i]
    assert overlap(mask, truth(disc, (100, 160))) > 0.93  # a cell is 2.5 x 1.6 pixels
    rows, columns = np.nonzero(mask)
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert found.boxes[i].tolist() == box
    np.testing.assert_allclose(box, [x - radius, y - radius, x + radius, y + radius], atol=1.6)
    assert np.hypot(*(found.points[i] - disc[:2])) <= radius
    assert found.masks.rle(i)["counts"].encode() == coco.encode(np.asfortranarray(mask))["counts"]
  assert found.crops.tolist() == [[0, 0, 160, 100]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
  ("options", "count"),
  [
    ({"pred_iou_thresh": 0.94}, 2),
    ({"pred_iou_thresh": 1.0}, 0),
    ({"multimask_output": False}, 3),
    ({"points_per_batch": 7}, 3),
    ({"points_per_side": 1}, 0),  # in the middle, where nothing is
    ({"point_grids": [np.array([[0.25, 0.3], [0.25, 0.31]])]}, 1),
    ({"stability_score_offset": 60.0}, 0),
  ],
  ids=str,
)
def test_options(options, count):
  options = MaskGeneration(**({"points_per_side": 16} | options))
  found = generate_masks(Discs(*THREE), Discs.image(100, 160), options)
  assert len(found) == count
  assert np.asarray(found.masks).shape == (count, 100, 160)


def test_soft_masks_are_unstable():
  soft = (120, 40, 25, 0.9, 10.0)  # 10 pixels farther out, a logit less
  for threshold, count in ((0.95, 1), (0.1, 2)):
    options = MaskGeneration(points_per_side=16, stability_score_thresh=threshold)
    assert len(generate_masks(Discs(THREE[0], soft), Discs.image(100, 160), options)) == count


def test_lower_pred_iou_thresh_finds_parts():
  options = MaskGeneration(points_per_side=16, pred_iou_thresh=0.5)
  found = generate_masks(Discs(THREE[0]), Discs.image(100, 160), options)
  np.testing.assert_allclose(found.scores, [0.95, 0.57], rtol=1e-6)
  assert (found.masks[1] <= found.masks[0]).all()


def test_crops_find_small_objects():
  """Less than three pixels across, and between the cells of the whole image's grid."""
  size, small, large = (200, 250), (31.2, 31.2, 1.4, 0.9, 0.02), (125, 100, 60, 0.9, 0.1)
  image, model = Discs.image(*size), Discs(small, large)
  clicks = np.array([small[:2], large[:2], (5, 5)])
  grids = [clicks / [250, 200], clicks / [159, 134]]  # crops share 68 of the 200 pixels
  without = generate_masks(model, image, MaskGeneration(point_grids=grids))
  assert len(without) == 1
  assert overlap(without.masks[0], truth(large, size)) > 0.95
  found = generate_masks(model, image, MaskGeneration(point_grids=grids, crop_n_layers=1))
  # In each crop the large one is cut off by an inner edge: it is found once, whole.
  crops = found.crops[np.argsort(found.boxes[:, 2])]
  assert crops.tolist() == [[0, 0, 159, 134], [0, 0, 250, 200]]
  masks = found.masks[np.argsort(found.boxes[:, 2])]
  assert overlap(masks[0], truth(small, size)) > 0.3
  np.testing.assert_array_equal(masks[1], without.masks[0])
  assert model.seen[1:] == [
    (0, 0, 250, 200), (0, 0, 159, 134), (91, 0, 250, 134), (0, 66, 159, 200), (91, 66, 250, 200)
  ]  # fmt: skip


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (200, 250), (255, 30)])
@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("ratio", [0.0, 512 / 1500])
def test_crops_cover_the_image(size, layers, ratio):
  crops = list(_crops(*size, MaskGeneration(crop_n_layers=layers, crop_overlap_ratio=ratio)))
  assert [layer for layer, _ in crops] == [n for n in range(layers + 1) for _ in range(4**n)]
  for layer in range(layers + 1):
    seen = np.zeros(size, int)
    for _, (x0, y0, x1, y1) in (crop for crop in crops if crop[0] == layer):
      assert 0 <= x0 < x1 <= size[1]
      assert 0 <= y0 < y1 <= size[0]
      seen[y0:y1, x0:x1] += 1
    assert (seen > 0).all()


def test_grids():
  np.testing.assert_allclose(MaskGeneration(points_per_side=1).grid(0), [[0.5, 0.5]])
  four = [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]
  np.testing.assert_allclose(MaskGeneration(points_per_side=2).grid(0), four)
  smaller = MaskGeneration(points_per_side=8, crop_n_points_downscale_factor=2)
  assert [len(smaller.grid(layer)) for layer in range(5)] == [64, 16, 4, 1, 1]


@pytest.mark.parametrize("count", [0, 1, 2, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_suppress_equals_a_loop(count, threshold):
  rng = np.random.default_rng(count)
  corners = rng.integers(0, 20, (count, 2))
  boxes = np.concatenate([corners, corners + rng.integers(1, 12, (count, 2))], axis=1)
  scores = rng.integers(0, 9, count) / 9
  kept = []
  for i in sorted(range(count), key=lambda i: (-scores[i], i)):
    cells = np.zeros((32, 32), bool)
    cells[boxes[i, 1] : boxes[i, 3], boxes[i, 0] : boxes[i, 2]] = True
    if all(overlap(cells, other) <= threshold for _, other in kept):
      kept.append((i, cells))
  assert suppress(boxes, scores, threshold).tolist() == [i for i, _ in kept]


def regions(mask):
  """Connected sets of cells, by sides or corners, by flood fill."""
  left, found = set(map(tuple, np.argwhere(mask))), []
  while left:
    region, edge = set(), [left.pop()]
    while edge:
      y, x = edge.pop()
      region.add((y, x))
      near = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
      left -= near
      edge += near
    found.append(region)
  return found


@pytest.mark.parametrize("area", [0, 1, 2, 5, 1000])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 1.0])
def test_clean_equals_flood_fill(area, share):
  mask = np.random.default_rng(area).random((14, 17)) < share
  want = mask.copy()
  for hole in regions(~mask):
    if len(hole) < area:
      want[tuple(zip(*hole, strict=True))] = True
  islands = regions(want)
  for island in islands:
    if len(island) < area and len(island) < max(map(len, islands)):
      want[tuple(zip(*island, strict=True))] = False
  got = clean(mask, area)
  if [len(r) for r in islands if len(r) == max(map(len, islands))][1:] and area == 1000:
    assert got.sum() == max(map(len, islands))  # of several largest ones, any
  else:
    np.testing.assert_array_equal(got, want)


def test_small_regions_are_cleaned():
  options = MaskGeneration(points_per_side=16, min_mask_region_area=2000)
  found = generate_masks(Discs(*THREE), Discs.image(100, 160), options)
  assert len(found) == 3  # the only island of each stays
  plain = generate_masks(Discs(*THREE), Discs.image(100, 160), MaskGeneration(points_per_side=16))
  for i in range(3):
    np.testing.assert_array_equal(found.masks[i], plain.masks[i])


@pytest.mark.parametrize("offset", [0.0, 0.5, 9.0])
def test_measures_equal_loops(offset):
  logits = np.random.default_rng(0).standard_normal((2, 3, 5, 7)).astype(np.float32) - 1
  logits[0, 0] = -20
  logits[0, 1] = 20
  logits[1, 1] = -1
  logits[1, 1, 2, 6] = 1
  stability, boxes = _measure(jnp.asarray(logits), offset)
  for p, k in np.ndindex(2, 3):
    outer = (logits[p, k] > -offset).sum()
    want = (logits[p, k] > offset).sum() / outer if outer else 0
    assert stability[p, k] == pytest.approx(want, abs=1e-6)
    ys, xs = np.nonzero(logits[p, k] > 0)
    box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] if len(xs) else [0] * 4
    assert boxes[p, k].tolist() == box


def test_results_are_instances():
  """Slicing, drawing and JSON work as for a concept's instances."""
  image = Discs.image(100, 160)
  found = generate_masks(Discs(*THREE), image, MaskGeneration(points_per_side=16))
  assert isinstance(found[1:], Segments)
  assert found[1:].ids.tolist() == [2, 3]
  assert found[np.array([True, False, True])].stability.shape == (2,)
  np.testing.assert_array_equal(found[[2]].masks[0], found.masks[2])
  with pytest.raises(TypeError, match=r"use \[1:2\]"):
    found[1]
  record = coco_record("a.png", (100, 160), [found], ["everything"], {})
  areas = [annotation["area"] for annotation in record["annotations"]]
  assert areas == [int(found.masks[i].sum()) for i in range(3)]
  assert overlay(image, [found], ["everything"]).size[0] >= 160


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("points_per_side", 0, "points_per_side must be a whole number from 1 to 1024; got 0."),
    ("points_per_side", 2.0, "a whole number from 1 to 1024; got 2.0."),
    ("points_per_batch", 0, "points_per_batch must be"),
    ("crop_n_layers", -1, "crop_n_layers must be a whole number from 0 to 8; got -1."),
    ("crop_n_points_downscale_factor", 0, "must be a whole number from 1; got 0."),
    ("pred_iou_thresh", 1.1, "pred_iou_thresh must be in [0, 1]; got 1.1."),
    ("stability_score_thresh", -0.1, "stability_score_thresh must be in [0, 1]"),
    ("box_nms_thresh", float("nan"), "box_nms_thresh must be a finite number; got nan."),
    ("crop_nms_thresh", 2, "crop_nms_thresh must be in [0, 1]"),
    ("crop_overlap_ratio", -1, "crop_overlap_ratio must be in [0, 1]"),
    (
      "stability_score_offset",
      float("inf"),
      "stability_score_offset must be a finite number; got inf.",
    ),
    ("min_mask_region_area", -1, "min_mask_region_area must be 0 or more; got -1."),
    ("points_per_side", True, "a whole number from 1 to 1024; got True."),
    ("points_per_side", 100_000, "from 1 to 1024; got 100000."),
    ("pred_iou_thresh", "a", "pred_iou_thresh must be a finite number; got 'a'."),
    ("pred_iou_thresh", None, "pred_iou_thresh must be a finite number; got None."),
    ("multimask_output", "no", "multimask_output must be True or False; got 'no'."),
    ("point_grids", [], "an array for each layer, 1; got []."),
    ("point_grids", 3, "an array for each layer, 1; got 3."),
    ("point_grids", ["a"], "point_grids[0] must be [n, 2] of x, y in [0, 1]; got 'a'."),
    ("point_grids", [[[0.5, 0.5], [0.5]]], "in [0, 1]; got [[0.5, 0.5], [0.5]]."),
  ],
)
def test_invalid_options(field, value, message):
  with pytest.raises(ValueError, match=re.escape(message)) as caught:
    MaskGeneration(**{field: value})
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  "grid", [[[0.5, 1.5]], [[0.5]], [0.5, 0.5], [[np.nan, 0]], np.zeros((0, 2))], ids=str
)
def test_invalid_grids(grid):
  with pytest.raises(ValueError, match=r"point_grids\[0\] must be \[n, 2\] of x, y in \[0, 1\]"):
    generate_masks(Discs(), Discs.image(9, 9), MaskGeneration(point_grids=[np.array(grid)]))


def test_options_of_wrong_type():
  with pytest.raises(TypeError, match=r"options must be a MaskGeneration, .*got \{'points_per"):
    generate_masks(Discs(), Discs.image(9, 9), {"points_per_side": 4})


def test_smaller_crops_need_the_image():
  with pytest.raises(ValueError, match="crop_n_layers is 1, but smaller crops need the image"):
    segment_embedding(Discs(), None, MaskGeneration(crop_n_layers=1))


@pytest.mark.slow
def test_with_a_model(tokenizer_path):
  """Each mask equals that of its point prompt."""
  model = visual_model(tokenizer_path)
  image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  options = MaskGeneration(
    points_per_side=2, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1
  )
  found = model.generate_masks(image, options)
  assert 0 < len(found) <= 12
  assert (np.diff(found.scores) <= 0).all()
  embedding = model.encode(image, visual=True)
  of_embedding = segment_embedding(model, embedding, options)
  np.testing.assert_array_equal(of_embedding.scores, found.scores)
  assert of_embedding.masks.rles == found.masks.rles
  again = model.decode_visual(
    embedding, [VisualPrompt(points=[point]) for point in options.grid(0) * [60, 40]]
  )
  for i in (0, len(found) - 1):
    (p,) = np.flatnonzero((options.grid(0) * [60, 40] == found.points[i]).all(axis=1))
    k = int(np.argmin(np.abs(np.asarray(again.iou[p]) - found.scores[i])))
    np.testing.assert_array_equal(found.masks[i], again.masks()[p][k])
