"""Large images in windows: a model that finds the connected regions of a color, so that the exact
result is known, and sam3-tiny."""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from color_model import SIDE, ColorModel, scene
from PIL import Image

import sam3_jax
from sam3_jax import Prompt
from sam3_jax.cli import segment_images
from sam3_jax.cli.main import main
from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.scenes import compose
from sam3_jax.inference.seams import Part, merge
from sam3_jax.inputs.tiling import Tiling, Window
from sam3_jax.inputs.windows import open_windows
from sam3_jax.outputs.column_runs import ColumnRuns
from sam3_jax.outputs.rle import decode
from sam3_jax.outputs.visualize import overlay


def as_set(masks):
  return {np.asarray(mask, bool).tobytes() for mask in masks}


class TestTiling:
  @pytest.mark.parametrize("height", [1, 63, 64, 65, 200, 511])
  @pytest.mark.parametrize("overlap", [0, 0.25, 0.5, 0.75])
  def test_windows_cover_the_image_and_overlap(self, height, overlap):
    windows = Tiling(64, overlap).windows(height, 100)
    covered = np.zeros((height, 100), int)
    for window in windows:
      covered[window.y0 : window.y1, window.x0 : window.x1] += 1
    assert covered.min() >= 1
    assert {window.size for window in windows} == {(min(64, height), 64)}
    tops = sorted({window.y0 for window in windows})
    assert all(64 - (b - a) >= 64 * overlap - 1e-9 for a, b in itertools.pairwise(tops))

  def test_small_objects_are_whole_in_a_window(self):
    windows = Tiling(64, 0.3).windows(300, 500)
    for x, y in np.random.default_rng(0).uniform(0, (500 - 19, 300 - 19), (200, 2)):
      assert any(w.x0 <= x and x + 19 <= w.x1 and w.y0 <= y and y + 19 <= w.y1 for w in windows)

  def test_a_window_around_a_box(self):
    tiling = Tiling(64)
    assert tiling.around((100, 100, 110, 120), 300, 500) == Window(73, 78, 137, 142)
    assert tiling.around((0, 290, 10, 300), 300, 500) == Window(0, 236, 64, 300)
    assert tiling.around((0, 0, 100, 20), 300, 500) == Window(0, 0, 100, 100)
    assert tiling.around((0, 0, 100, 20), 30, 500) == Window(0, 0, 100, 30)

  @pytest.mark.parametrize(
    "options", [(0,), (31,), (64.5,), ("64",), (64, -0.1), (64, 0.9), (64, float("nan"))]
  )
  def test_options_out_of_range(self, options):
    with pytest.raises(ValueError, match=r"^(tile|overlap) must be .*; got .*\. \S.*\.$"):
      Tiling(*options)


class TestSegmentTiled:
  @pytest.mark.parametrize("seed", range(3))
  @pytest.mark.parametrize("overlap", [0.35, 0.6])
  def test_objects_that_fit_the_overlap_are_exact(self, seed, overlap):
    image, masks = scene((210, 333), 40, seed)
    [found] = ColorModel().segment_tiled(image, "red", tile=SIDE, overlap=overlap)
    assert as_set(found.masks) == as_set(masks)
    assert len(found) == len(masks)
    assert found.ids.tolist() == list(range(1, 41))
    assert (np.diff(found.scores) <= 0).all()

  @pytest.mark.parametrize("seed", range(3))
  def test_larger_objects_are_joined_across_seams(self, seed):
    image, masks = scene((210, 333), 12, seed, largest=60)
    [found] = ColorModel().segment_tiled(image, "red", tile=SIDE, overlap=0.25, whole=False)
    assert as_set(found.masks) == as_set(masks)

  def test_an_object_that_is_larger_than_a_window(self):
    image = np.zeros((200, 300, 3), np.uint8)
    image[20:180, 30:270, 0] = 255
    for whole in (True, False):
      [found] = ColorModel().segment_tiled(image, "red", tile=SIDE, whole=whole)
      assert as_set(found.masks) == as_set([image[..., 0] > 0])
      assert found.masks.rle(0)["size"] == [200, 300]

  def test_an_object_that_only_the_whole_image_shows(self):
    class Whole(ColorModel):
      def _regions(self, pixels, prompt):  # in a window, the object fills everything
        return [] if (pixels[..., 0] > 127).mean() > 0.6 else super()._regions(pixels, prompt)

    image = np.zeros((256, 256, 3), np.uint8)
    image[40:216, 48:208, 0] = 255
    [found] = Whole().segment_tiled(image, "red", tile=SIDE, overlap=0)
    truth = image[..., 0] > 0
    assert (found.masks[0] & truth).sum() > 0.99 * (found.masks[0] | truth).sum()  # round corners
    assert found.masks.rle(0)["size"] == [256, 256]

  def test_several_prompts_have_ids_of_their_own(self):
    image, red = scene((100, 150), 5)
    more, green = scene((100, 150), 4, seed=5, color=1)
    image[..., 1] = more[..., 1]
    found = ColorModel().segment_tiled(image, ["red", "green", "red"], tile=SIDE, overlap=0.4)
    assert [len(one) for one in found] == [5, 4, 5]
    assert as_set(found[1].masks) == as_set(green)
    assert as_set(found[0].masks) == as_set(found[2].masks) == as_set(red)
    assert sorted(np.concatenate([one.ids for one in found])) == list(range(1, 15))

  def test_a_single_window_is_not_merged(self):
    image, masks = scene((50, 64), 4)
    image = np.pad(image, ((0, 14), (0, 0), (0, 0)))
    model = ColorModel()
    [found] = model.segment_tiled(image, "red", tile=SIDE)
    assert model.windows == [[64, 64]]
    assert len(found) == len(masks)

  def test_max_detections_keeps_the_best(self):
    image, _ = scene((210, 333), 30)
    [every] = ColorModel().segment_tiled(image, "red", tile=SIDE, overlap=0.4)
    [best] = ColorModel().segment_tiled(image, "red", tile=SIDE, overlap=0.4, max_detections=7)
    assert as_set(best.masks) == as_set(every[:7].masks)

  def test_exemplar_boxes_are_asked_of_all_windows(self):
    image, _ = scene((210, 333), 5)
    more, green = scene((210, 333), 20, seed=5, color=1)
    image[..., 1] = more[..., 1]
    rows, columns = np.nonzero(green[3])
    box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    model = ColorModel()
    [found] = model.segment_tiled(image, Prompt(boxes=[box]), tile=SIDE, overlap=0.4)
    assert as_set(found.masks) == as_set(green)
    [asked] = model.concepts
    assert np.ptp(asked.boxes[0][::2]) == np.ptp(box[::2])  # moved, not scaled
    with pytest.raises(ValueError, match="completely outside the 333 x 210 image"):
      model.segment_tiled(image, Prompt(boxes=[[400, 0, 410, 5]]), tile=SIDE)

  def test_sources(self, tmp_path):
    image, masks = scene((100, 150), 5)
    Image.fromarray(image).save(tmp_path / "image.png")
    on_disk = np.lib.format.open_memmap(
      tmp_path / "image.npy", mode="w+", dtype=np.uint8, shape=image.shape
    )
    on_disk[:] = image
    for source in (tmp_path / "image.png", on_disk, Image.fromarray(image)):
      [found] = ColorModel().segment_tiled(source, "red", tile=SIDE, overlap=0.4)
      assert as_set(found.masks) == as_set(masks)
    with pytest.raises(ValueError, match="more than 14,999"):
      ColorModel().segment_tiled(image, "red", tile=SIDE, max_pixels=14_999)

  def test_progress(self):
    seen = []
    ColorModel().segment_tiled(
      np.full((200, 64, 3), 9, np.uint8), "red", tile=SIDE, progress=seen.append
    )
    assert seen[0] == 0
    assert seen[-1] == 1
    assert seen == sorted(seen)

  @pytest.mark.parametrize("options", [{"tile": 0}, {"tile": 64, "threshold": 2}])
  def test_wrong_options(self, options):
    with pytest.raises(ValueError, match=r"^(tile|threshold) must be .*; got"):
      ColorModel().segment_tiled(np.zeros((9, 9, 3), np.uint8), "red", **options)

  def test_a_reader_can_be_drawn(self):
    image, _ = scene((100, 150), 5)
    found = ColorModel().segment_tiled(image, "red", tile=SIDE, overlap=0.4)
    with open_windows(image) as reader:
      drawn = overlay(reader, found, ["red"])
    assert drawn.tobytes() == overlay(image, found, ["red"]).tobytes()


class TestMerge:
  """Two windows side by side, 100 x 100, that share 40 columns; all masks are rectangles."""

  WINDOWS = (Window(0, 0, 100, 100), Window(60, 0, 160, 100))

  def part(self, box, score=0.8, window=0, cut=False):
    x0, y0, x1, y1 = box
    runs = ColumnRuns.of_mask(np.ones((y1 - y0, x1 - x0), bool), (100, 160), (x0, y0))
    return Part(runs, score, box, window, cut)

  def boxes(self, parts, coarse=()):
    return [part.runs.box for part in merge(parts, self.WINDOWS, coarse)]

  def test_the_best_whole_mask_is_kept(self):
    one, two = self.part((65, 10, 95, 40), 0.7), self.part((66, 10, 95, 40), 0.9, window=1)
    cut = self.part((60, 10, 95, 40), 0.95, window=1, cut=True)
    assert self.boxes([one, two]) == [(66, 10, 95, 40)]
    assert self.boxes([one, cut]) == [(65, 10, 95, 40)]

  def test_neighbors_at_a_seam_stay_apart(self):
    """A poor mask that touches both does not join them."""
    one = self.part((70, 10, 100, 30), 0.9, cut=True)
    other = self.part((70, 30, 90, 50), 0.9)
    both = self.part((60, 22, 140, 48), 0.51, window=1, cut=True)
    right = self.part((70, 10, 130, 30), 0.9, window=1)
    found = self.boxes([one, other, both, right])
    assert (70, 10, 130, 30) in found
    assert (70, 30, 90, 50) in found

  def test_legs_of_one_object(self):
    """The seat is in the left window; the right one shows two legs."""
    seat = ColumnRuns.of_mask(
      np.pad(np.ones((50, 20), bool), ((0, 0), (0, 60))), (100, 160), (20, 20)
    )
    legs = [ColumnRuns.of_mask(np.ones((10, 80), bool), (100, 160), (40, y)) for y in (20, 60)]
    left = dataclasses.replace(self.part((20, 20, 100, 70), cut=True), runs=seat)
    whole = dataclasses.replace(
      left, runs=ColumnRuns.of_mask(np.maximum.reduce([x.to_mask() for x in (seat, *legs)]))
    )
    left = dataclasses.replace(left, runs=whole.runs.crop((0, 0, 100, 100)))
    right = [Part(leg.crop((60, 0, 160, 100)), 0.8, (60, 0, 120, 9), 1, True) for leg in legs]
    [found] = merge([left, *right], self.WINDOWS, [])
    assert found.runs.area == whole.runs.area

  def test_two_objects_of_one_window_are_never_joined(self):
    parts = [self.part((62, 10, 80, 40)), self.part((80, 10, 98, 40))]
    blob = self.part((62, 10, 98, 40), 0.6, window=1)
    assert sorted(self.boxes([*parts, blob]))[-1] == (80, 10, 98, 40)
    assert len(self.boxes([*parts, blob])) <= 2

  def test_coarse_duplicates_are_dropped(self):
    fine = self.part((65, 10, 95, 40))
    coarse = self.part((60, 8, 99, 44), 0.99, window=None)
    assert self.boxes([fine], [coarse]) == [(65, 10, 95, 40)]
    crowd = [self.part((x, 10, x + 18, 40)) for x in (0, 20, 40)]
    assert len(self.boxes(crowd, [self.part((0, 8, 60, 44), 0.99, window=None)])) == 3

  def test_parts_of_a_large_object_are_dropped(self):
    pieces = [self.part((30, 10, 100, 40), cut=True), self.part((60, 50, 130, 90), window=1)]
    pieces[1] = dataclasses.replace(pieces[1], cut=True)
    coarse = self.part((20, 5, 150, 95), 0.6, window=None)
    [found] = merge(pieces, self.WINDOWS, [coarse])
    assert found.runs.box == (20, 5, 150, 95)
    assert found.score == 0.8

  def test_order_of_parts_does_not_matter(self):
    rng = np.random.default_rng(3)
    parts = []
    for score in rng.uniform(0.5, 1, 30):
      window = int(rng.integers(2))
      x, y = rng.integers(60 * window, 60 * window + 70), rng.integers(0, 70)
      parts.append(self.part((x, y, x + 30, y + 25), float(score), window, bool(rng.integers(2))))
    shuffled = [parts[i] for i in rng.permutation(30)]
    assert self.boxes(parts) == self.boxes(shuffled)


def test_the_command(tmp_path, monkeypatch, capsys):
  image, masks = scene((210, 333), 9)
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(segment_images.Sam3, "from_checkpoint", lambda *_, **__: ColorModel())
  Image.fromarray(image).save("image.png")
  (tmp_path / "bad.png").write_bytes(b"no image")
  typed = ["segment", "image.png", "bad.png", "--text", "red", "--tile", str(SIDE)]
  assert main([*typed, "--overlap", "0.4"]) == 2
  assert "bad.png is not an image" in capsys.readouterr().err
  record = json.loads((tmp_path / "out" / "image.sam3.json").read_text())
  assert record["info"]["tiling"] == {"tile": SIDE, "overlap": 0.4}
  found = [decode(one["segmentation"]) for one in record["annotations"]]
  assert as_set(found) == as_set(masks)
  with Image.open(tmp_path / "out" / "image.sam3.png") as drawing:
    assert drawing.size == (800, 505)


@pytest.fixture(scope="module")
def model():
  return sam3_jax.Sam3.from_checkpoint("sam3-tiny")


@pytest.mark.slow
class TestSam3Tiny:
  def test_a_single_window_equals_decode(self, model):
    rng = np.random.default_rng(5)
    image = compose(rng, size=(360, 360)).image
    [found] = model.segment_tiled(image, "red apple", tile=360)
    [expected] = model.decode(model.encode(image), "red apple").instances()
    assert [found.masks.rle(i) for i in range(len(found))] == [
      expected.masks.rle(i) for i in range(len(expected))
    ]
    np.testing.assert_array_equal(found.scores, expected.scores)

  def test_exemplar_boxes_find_the_same_in_other_windows(self, model):
    rng = np.random.default_rng(7)
    scenes = [compose(rng, size=(360, 400)) for _ in range(6)]
    rows = [np.concatenate([one.image for one in scenes[i : i + 3]], axis=1) for i in (0, 3)]
    names = [concept.name for concept in drawings.concepts()]
    masks = []
    for i, one in enumerate(scenes):
      for item in one.objects:
        if names[item.concept] == "police-car":
          mask = np.zeros((720, 1200), bool)
          y, x = i // 3 * 360, i % 3 * 400
          mask[y : y + 360, x : x + 400] = item.mask
          masks.append(mask)
    largest = max(masks, key=np.sum)
    x0, y0, x1, y1 = ColumnRuns.of_mask(largest).box
    prompts = [Prompt("police car"), Prompt("police car", [[x0, y0, x1, y1]])]
    found = model.segment_tiled(np.concatenate(rows), prompts, tile=400, overlap=0.5)
    counts = [
      sum(any((one & mask).sum() > 0.5 * (one | mask).sum() for one in masks) for mask in own.masks)
      for own in found
    ]
    assert len(masks) == 8
    assert min(counts) >= 4  # measured 5 with the phrase alone, 6 with the box

  def test_the_benchmark(self, tmp_path):
    """A short form: a mosaic of 12 scenes."""
    typed = ["--columns", "4", "--rows", "3", "--phrases", "3", "--work", str(tmp_path)]
    program = Path(__file__).parents[1] / "benchmarks" / "tiles.py"
    done = subprocess.run(
      [sys.executable, program, *typed, "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "tiles.json").read_text())
    objects = record["objects"]
    assert record["windows"] == 35
    assert objects["duplicates"] == 0
    assert objects["one_identity_on_seams_once_in_scene"] == 100
    assert abs(objects["mean_iou"] - objects["mean_iou_single"]) < 8
    assert record["peak_memory_mb"] < 1500
