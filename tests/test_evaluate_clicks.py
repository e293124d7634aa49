"""Evaluation of clicks, boxes and mask generation, with a fake model."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import training_model
from PIL import Image

from sam3_jax.cli.main import main
from sam3_jax.datasets import annotations
from sam3_jax.evaluation import clicks, mask_generation
from sam3_jax.evaluation.clicks import corrective_click, deepest_point
from sam3_jax.evaluation.mask_generation import greedy_matches
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.ops.masks import mask_iou
from sam3_jax.outputs.detections import VisualMasks
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import bounds, encode

SIZE = 40, 60


def rectangle(x0, y0, x1, y1):
  mask = np.zeros(SIZE, bool)
  mask[y0:y1, x0:x1] = True
  return mask


FIRST, SECOND = rectangle(5, 5, 25, 15), rectangle(30, 20, 50, 40)


@pytest.fixture
def data(tmp_path):
  """An image with two objects; two phrases name the first."""
  Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "a.png")
  Image.fromarray(np.zeros((*SIZE, 3), np.uint8)).save(tmp_path / "empty.png")
  images, found = [], []
  for number, (name, phrase, masks) in enumerate(
    (("a.png", "both", (FIRST, SECOND)), ("a.png", "one", (FIRST,)), ("empty.png", "none", ()))
  ):
    images.append(
      {
        "id": number, "file_name": name, "text_input": phrase, "height": SIZE[0],
        "width": SIZE[1], "is_instance_exhaustive": 1,
      }
    )  # fmt: skip
    for mask in masks:
      rle = encode(mask)
      found.append(
        {
          "id": len(found) + 1, "image_id": number, "category_id": 1, "segmentation": rle,
          "bbox": list(bounds(rle)), "area": int(mask.sum()), "iscrowd": 0,
        }
      )  # fmt: skip
  content = {"images": images, "annotations": found, "categories": [{"id": 1, "name": "visual"}]}
  (tmp_path / "data.json").write_text(json.dumps(content))
  return annotations.read(tmp_path / "data.json"), tmp_path


class FakeModel:
  """Returns the object of a prompt: all of it for a box; for clicks, its part left of the rightmost
  click. A mask has one cell per pixel."""

  def __init__(self):
    self.prompts = []

  def encode(self, image, visual):
    assert visual
    assert image.shape == (*SIZE, 3)
    return "embedding"

  def decode_visual(self, embedding, prompts, *, multimask=True):
    assert embedding == "embedding"
    self.prompts += prompts
    logits = [self._masks(prompt, multimask) for prompt in prompts]
    iou = np.tile([0.5, 0.9, 0.1], (len(prompts), 1))[:, : len(logits[0])]
    count = len(prompts)
    return VisualMasks(
      jnp.asarray(np.array(logits, np.float32)), jnp.asarray(iou), jnp.zeros(count),
      jnp.zeros(count, jnp.int32), jnp.tile(jnp.array(SIZE), (count, 1)),
    )  # fmt: skip

  def _masks(self, prompt, multimask):
    if prompt.box is not None:
      return [20.0 * rectangle(*map(int, prompt.box)) - 10]
    whole = next(one for one in (FIRST, SECOND) if one[self._cell(prompt.points[0])])
    edge = max(column for _, column in map(self._cell, prompt.points))
    left = whole & (np.arange(SIZE[1]) <= edge)
    masks = [np.zeros(SIZE, bool), left, whole] if multimask else [left]
    return [20.0 * mask - 10 for mask in masks]

  @staticmethod
  def _cell(point):
    return int(point[1]), int(point[0])

  def generate_masks(self, image, options):
    self.options = options
    found = [FIRST, rectangle(0, 0, 3, 3), SECOND | rectangle(28, 18, 52, 40), FIRST]

    class Segments:
      masks = RleMasks([encode(mask) for mask in found], SIZE)

      def __len__(self):
        return len(found)

    return Segments()


def test_clicks_and_boxes_for_each_object(data):
  pairs, folder = data
  model, steps = FakeModel(), []
  figures = clicks.evaluate(model, pairs, folder, progress=lambda *args: steps.append(args))
  assert steps == [("a.png", 0)]
  assert figures["objects"] == 2
  assert figures["box"] == figures["click_best"] == pytest.approx(100)
  edges, expected = [], []
  for mask in (FIRST, SECOND):
    columns = np.flatnonzero(mask.any(0))
    edge = int(deepest_point(mask).x)
    expected.append((edge - columns[0] + 1) / len(columns))
    for _ in range(2):
      edge = int(corrective_click(mask & (np.arange(SIZE[1]) <= edge), mask)[0][0])
    edges.append((edge - columns[0] + 1) / len(columns))
  assert figures["click"] == pytest.approx(100 * np.mean(expected))
  assert figures["three_clicks"] == pytest.approx(100 * np.mean(edges))
  assert figures["click"] < figures["three_clicks"]
  assert [len(prompt.points) for prompt in model.prompts] == [1, 1, 2, 2, 3, 3, 0, 0]
  assert all((prompt.mask is None) == (len(prompt.points) < 2) for prompt in model.prompts)
  assert model.prompts[-1].box == (30, 20, 50, 40)


def test_mask_generation_counts_found_objects_and_false_masks(data):
  pairs, folder = data
  figures = mask_generation.evaluate(FakeModel(), pairs, folder, "options")
  # Of four masks, one has no object, and one has an object that is already matched.
  assert figures == {"found": 100, "false": 50, "objects": 2, "masks": 4}


def test_pairs_without_objects_are_refused(data):
  pairs, folder = data
  with pytest.raises(ValueError, match="none of the 1 pairs has an object to segment"):
    clicks.evaluate(FakeModel(), pairs[2:], folder)


def test_deepest_points():
  assert deepest_point(rectangle(10, 10, 15, 15)) == (12.5, 12.5, 3)
  x, _, depth = deepest_point(rectangle(0, 0, 3, 40))  # the border of the image counts as an edge
  assert (x, depth) == (1.5, 2)
  assert deepest_point(np.zeros(SIZE, bool)).depth == 0
  assert deepest_point(np.ones((1, 1), bool)) == (0.5, 0.5, 1)


def test_corrective_clicks():
  assert corrective_click(FIRST, FIRST) == (tuple(deepest_point(FIRST)[:2]), 1)
  (x, y), label = corrective_click(FIRST | rectangle(30, 0, 50, 20), FIRST)
  assert label == 0
  assert rectangle(30, 0, 50, 20)[int(y), int(x)]
  (x, y), label = corrective_click(np.zeros(SIZE, bool), SECOND)
  assert label == 1
  assert SECOND[int(y), int(x)]


@pytest.mark.parametrize(
  ("ious", "matches"),
  [
    ([[0.6, 0.9], [0.8, 0.7]], [(0, 1), (1, 0)]),
    ([[0.6], [0.5], [0.4]], [(0, 0)]),
    ([[0.49]], []),
  ],
)
def test_matching_is_one_to_one(ious, matches):
  assert greedy_matches(np.array(ious)) == matches
  assert greedy_matches(np.zeros((0, 3))) == greedy_matches(np.zeros((3, 0))) == []


def test_mask_iou():
  assert mask_iou(FIRST, FIRST) == 1
  assert mask_iou(FIRST, SECOND) == 0
  assert mask_iou(np.zeros(SIZE, bool), np.zeros(SIZE, bool)) == 0


class TestCommand:
  @pytest.mark.slow
  @pytest.mark.parametrize(
    ("prompt", "figures"),
    [
      ("click", {"click", "click_best", "three_clicks", "box", "objects"}),
      ("everything", {"found", "false", "objects", "masks"}),
    ],
  )
  def test_a_model(self, data, capsys, prompt, figures):
    _, folder = data
    model, out = training_model.save(folder / "toy", visual=True), folder / "figures.json"
    typed = ["evaluate", "--data", str(folder / "data.json"), "--checkpoint", str(model)]
    assert main([*typed, "--prompt", prompt, "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found.keys() == figures
    assert found["objects"] == 2
    assert str(out) in capsys.readouterr().out.split("\n")
    assert [path.name for path in folder.glob("*predictions*")] == []

  @pytest.mark.slow
  def test_options_are_only_for_the_mask_generator(self, data, capsys, monkeypatch):
    options = []
    monkeypatch.setattr(
      mask_generation, "evaluate", lambda *args, progress: options.append(args[3]) or {"found": 1.0}
    )
    model, out = training_model.save(data[1] / "optional", visual=True), data[1] / "optional.json"
    typed = ["evaluate", "--data", str(data[1] / "data.json"), "--checkpoint", str(model)]
    typed += ["--out", str(out), "--option", "points_per_side=3"]
    assert main([*typed, "--prompt", "everything"]) == 0
    assert options == [MaskGeneration(points_per_side=3)]
    capsys.readouterr()
    assert main([*typed, "--prompt", "click"]) == 2
    assert "needs --prompt everything" in capsys.readouterr().err

  @pytest.mark.parametrize("more", [["--worst", "3"], ["--predictions", "x.json"]])
  def test_conflicting_options(self, data, capsys, more):
    typed = ["evaluate", "--data", str(data[1] / "data.json"), "--prompt", "click", *more]
    assert main(typed) == 2
    assert "leave out --predictions and --worst" in " ".join(capsys.readouterr().err.split())
