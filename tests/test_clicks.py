"""Refining the instances of a concept by clicks: the API with a fake head, and the command."""

import dataclasses
import json
import types

import golden_model
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from support import visual_model

from sam3_jax import (
  Instances,
  Masks,
  Sam3,
  VisualPrompt,
  add_instance,
  refine_by_clicks,
  refine_instance,
)
from sam3_jax.cli import segment_images
from sam3_jax.cli.main import main
from sam3_jax.cli.prompt_arguments import parse_prompts
from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.outputs.detections import VisualMasks
from sam3_jax.outputs.instances import visual_instances
from sam3_jax.outputs.masks import RleMasks

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZE = 20, 40
SIDE = 10  # cells, of 4 x 2 pixels


def patch(x0, y0, x1, y1):
  """Logits of a mask that is a box of cells."""
  grid = np.full((SIDE, SIDE), -5, np.float32)
  grid[y0:y1, x0:x1] = 5
  return grid


class Head:
  """A model whose head always returns the same mask; it records its prompts."""

  def __init__(self, *grids, iou=(0.3, 0.9, 0.4)):
    self.grids, self.iou, self.calls = grids, iou, []

  def decode_visual(self, embedding, prompt, image_index=None, *, multimask=True):
    self.calls.append((prompt, image_index, multimask))
    count = 3 if multimask else 1
    grids = [self.grids[min(len(self.calls), len(self.grids)) - 1]] * count
    return VisualMasks(
      jnp.float32([grids]),
      jnp.float32([self.iou[:count]]),
      jnp.ones(1),
      jnp.zeros(1, jnp.int32),
      jnp.int32([SIZE]),
    )


@pytest.fixture
def instances():
  """A left and a right instance, and one between them whose box contains the left one's box."""
  logits = np.stack([patch(0, 0, 3, 10), patch(7, 0, 10, 10), patch(4, 2, 6, 8)])
  boxes = np.float32([[0, 0, 12, 20], [28, 0, 40, 20], [0, 0, 26, 18]])
  return Instances(np.array([7, 3, 5]), np.float32([0.9, 0.8, 0.7]), boxes, Masks(logits, SIZE))


def test_refine_changes_one_instance(instances):
  model = Head(patch(6, 1, 10, 9))
  got = refine_instance(model, None, instances, 3, VisualPrompt(points=[[26, 9]]), 2)
  [(prompt, image, multimask)] = model.calls
  assert (prompt.points, prompt.point_labels) == (((26.0, 9.0),), (1,))
  np.testing.assert_array_equal(prompt.mask, instances.masks.logits[1])
  assert (image, multimask) == (2, False)
  np.testing.assert_array_equal(got.ids, instances.ids)
  np.testing.assert_array_equal(got.scores, instances.scores)
  np.testing.assert_array_equal(got.boxes[[0, 2]], instances.boxes[[0, 2]])
  np.testing.assert_array_equal(got.masks.logits[[0, 2]], instances.masks.logits[[0, 2]])
  np.testing.assert_array_equal(got.masks.logits[1], patch(6, 1, 10, 9))
  ys, xs = np.nonzero(got.masks[1])
  assert got.boxes[1].tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
  assert instances.boxes[1].tolist() == [28, 0, 40, 20]  # what was given is as it was


def test_prompt_with_its_own_mask_and_empty_result(instances):
  own = np.zeros((SIDE, SIDE), np.float32)
  model = Head(np.full((SIDE, SIDE), -1.0))
  got = refine_instance(model, None, instances, 7, VisualPrompt(box=[0, 0, 9, 9], mask=own))
  np.testing.assert_array_equal(model.calls[0][0].mask, own)
  assert got.boxes[0].tolist() == [0, 0, 0, 0]
  assert not got.masks[0].any()


@pytest.mark.parametrize(
  ("prompt", "several"),
  [
    ({"points": [[20, 10]]}, True),
    ({"points": [[20, 10], [3, 3]], "point_labels": [1, 0]}, False),
    ({"box": [14, 4, 26, 16]}, False),
  ],
  ids=["click", "clicks", "box"],
)
def test_add_an_instance(instances, prompt, several):
  model = Head(patch(4, 2, 6, 8), iou=(0.75, 0.85, 0.1))
  got = add_instance(model, None, instances, VisualPrompt(**prompt))
  assert model.calls[0][2] == several
  score = 0.85 if several else 0.75
  assert dict(zip(got.ids.tolist(), got.scores.tolist(), strict=True)) == pytest.approx(
    {7: 0.9, 3: 0.8, 5: 0.7, 8: score}
  )
  assert (np.diff(got.scores) <= 0).all()
  (new,) = np.flatnonzero(got.ids == 8)
  np.testing.assert_array_equal(got.masks.logits[new], patch(4, 2, 6, 8))
  assert got.boxes[new].tolist() == [16, 4, 24, 16]
  for identity in (7, 3, 5):
    np.testing.assert_array_equal(
      got.masks.logits[got.ids == identity], instances.masks.logits[instances.ids == identity]
    )


def test_add_to_no_instances_and_add_an_empty_mask(instances):
  none = instances[:0]
  one = add_instance(Head(patch(0, 0, 5, 5)), None, none, VisualPrompt(points=[[1, 1]]))
  assert (one.ids.tolist(), len(one.masks)) == ([1], 1)
  named = add_instance(
    Head(patch(0, 0, 5, 5)), None, none, VisualPrompt(points=[[1, 1]]), identity=40
  )
  assert named.ids.tolist() == [40]
  empty = np.full((SIDE, SIDE), -1.0)
  same = add_instance(Head(empty), None, instances, VisualPrompt(points=[[1, 1]]))
  np.testing.assert_array_equal(same.ids, instances.ids)


@pytest.mark.parametrize(
  ("point", "label", "owner"),
  [
    ([2, 10], 1, 7),  # on its mask
    ([2, 10], 0, 7),
    ([39.9, 19.9], 1, 3),
    ([40, 20], 1, 3),  # the image's corner
    ([18, 8], 1, 5),
    ([14, 1], 1, 5),  # on no mask, in one box
    ([27, 5], 1, None),  # in no box
  ],
)
def test_a_click_applies_to_the_instance_under_it(instances, point, label, owner):
  model = Head(patch(1, 1, 4, 4))
  got = refine_by_clicks(model, None, instances, [point], [label])
  changed = [
    int(identity)
    for i, identity in enumerate(got.ids)
    if identity not in instances.ids
    or (got.masks.logits[i] != instances.masks.logits[instances.ids == identity]).any()
  ]
  assert changed == [8 if owner is None else owner]
  assert model.calls[0][0].point_labels == (label,)


def test_clicks_of_several_instances(instances):
  """Each instance gets all its clicks in one prompt; a click off all instances joins the last."""
  model = Head(patch(1, 1, 4, 4), patch(6, 6, 9, 9), patch(5, 5, 6, 6))
  points = [[2, 10], [38, 5], [27, 1], [3, 3], [27, 5], [27, 9]]
  got = refine_by_clicks(model, None, instances, points, [1, 1, 0, 0, 1, 0])
  calls = [(prompt.points, prompt.point_labels) for prompt, *_ in model.calls]
  assert calls == [
    (((2, 10), (3, 3)), (1, 0)),
    (((38, 5), (27, 1)), (1, 0)),
    (((27, 5), (27, 9)), (1, 0)),
  ]
  assert sorted(got.ids.tolist()) == [3, 5, 7, 8]


def test_errors(instances):
  model, click = Head(patch(1, 1, 4, 4)), VisualPrompt(points=[[1, 1]])
  with pytest.raises(ValueError, match=r"there is no instance 4; there are \[7, 3, 5\]"):
    refine_instance(model, None, instances, 4, click)
  with pytest.raises(ValueError, match=r"identity 5 is taken; there are \[7, 3, 5\]"):
    add_instance(model, None, instances, click, identity=5)
  with pytest.raises(ValueError, match=r"\[27, 5\] with label 0 is on no instance and follows"):
    refine_by_clicks(model, None, instances, [[27, 5]], [0])
  for points, labels, said in (
    ([[1, 1]], [1, 0], r"one label for each point: 1; got \[1, 0\]"),
    ([[np.nan, 1]], [1], r"point 0 must be finite; got \[nan, 1.0\]"),
    ([1, 1], [1, 1], "point 0 must be two numbers"),
  ):
    with pytest.raises(ValueError, match=said):
      refine_by_clicks(model, None, instances, points, labels)
  with pytest.raises(TypeError, match=r"instances must be those of one prompt.*got <class 'list'"):
    refine_instance(model, None, [instances], 7, click)
  with pytest.raises(TypeError, match=r"pass one VisualPrompt, .*; got 'a'"):
    refine_instance(model, None, instances, 7, "a")
  whole = Instances(*list(vars(instances).values())[:3], RleMasks([], SIZE))
  with pytest.raises(TypeError, match=r"these masks have no logits"):
    refine_instance(model, None, whole, 7, click)


@pytest.mark.parametrize("prompts", [0, 1, 2])
def test_visual_masks_as_instances(prompts):
  logits = np.stack([patch(0, 0, 2, 2), patch(3, 3, 5, 6), np.full((SIDE, SIDE), -1)])
  found = VisualMasks(
    np.stack([logits, logits[::-1]])[:prompts].astype(np.float32),
    np.float32([[0.1, 0.7, 0.2], [0.9, 0.3, 0.2]])[:prompts],
    np.zeros(prompts),
    np.zeros(prompts, np.int32),
    np.int32([SIZE] * prompts).reshape(-1, 2),
  )
  instances = visual_instances(found, first_id=4)
  assert len(instances) == len(found.instances()) == prompts
  if prompts:
    assert instances[0].ids.tolist() == [4]
    assert instances[0].scores.tolist() == pytest.approx([0.7])
    assert instances[0].boxes.tolist() == [[12, 6, 20, 12]]
    assert instances[0].masks.size == SIZE
  if prompts == 2:
    assert len(instances[1]) == len(instances[1].masks) == 0  # its best is empty


# The command.


@pytest.fixture(scope="module")
def model(tokenizer_path):
  return visual_model(tokenizer_path)


@pytest.fixture
def ready(tmp_path, monkeypatch, model):
  """A folder with an image; the command loads the model."""
  monkeypatch.chdir(tmp_path)
  image = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
  Image.fromarray(image).save("a.png")
  monkeypatch.setattr(segment_images.Sam3, "from_checkpoint", lambda *_, **__: model)
  return tmp_path


def record(*typed):
  assert main(["segment", "a.png", "--quiet", *typed]) == 0
  with open("out/a.sam3.json") as file:
    return json.load(file)


def same_masks(annotations, masks):
  got = [coco.decode(a["segmentation"]).astype(bool) for a in annotations]
  np.testing.assert_array_equal(got, masks)


@pytest.mark.slow
def test_clicks_from_the_command(ready, model):
  got = record("--point", "10,5", "--point", "30,15,0")
  assert [one["name"] for one in got["categories"]] == ["clicks"]
  saved = {"points": [[10, 5], [30, 15]], "point_labels": [1, 0], "box": None}
  assert got["info"]["visual_prompts"] == [saved]
  prompt = VisualPrompt(points=[[10, 5], [30, 15]], point_labels=[1, 0])
  embedding = model.encode("a.png", visual=True)
  found = model.decode_visual(embedding, prompt, multimask=False).instances()[0]
  same_masks(got["annotations"], found.masks)
  assert got["annotations"][0]["score"] == pytest.approx(float(found.scores[0]), abs=1e-5)


def test_a_box_is_an_example_or_one_thing(ready):
  assert record("--box", "5,5,20,15")["categories"][0]["name"] == "exemplar box"
  got = record("--visual", "--box", "5,5,20,15", "--box", "0,0,9,9")
  assert [one["name"] for one in got["categories"]] == ["box 1", "box 2"]
  assert got["info"]["visual_prompts"][1]["box"] == [0, 0, 9, 9]


def test_phrase_and_clicks(ready, model):
  plain = record("--text", "ear", "--threshold", "0")
  assert len(plain["annotations"]) > 1
  x, y, width, height = plain["annotations"][0]["bbox"]
  click = f"{x + width / 2},{y + height / 2}"
  refined = record("--text", "ear", "--threshold", "0", "--point", click)
  before, after = ({a["id"]: a for a in one["annotations"]} for one in (plain, refined))
  new = after.keys() - before.keys()
  changed = {i for i in before if before[i]["segmentation"] != after[i]["segmentation"]}
  assert before.keys() <= after.keys()
  assert len(new) + len(changed) == 1
  added = record("--text", "ear", "--threshold", "0", "--visual", "--box", "1,1,30,18")
  assert len(added["annotations"]) == len(plain["annotations"]) + 1


def test_mask_generator_from_the_command(ready, model, monkeypatch):
  calls = []

  def generate(image, options, *, max_pixels):
    calls.append((image.shape, options, max_pixels))
    return Instances(
      np.array([1, 2]), np.float32([0.9, 0.8]), np.zeros((2, 4), np.float32),
      Masks(np.stack([patch(0, 0, 2, 2)] * 2), SIZE),
    )  # fmt: skip

  monkeypatch.setattr(model, "generate_masks", generate)
  got = record("--everything", "--max-detections", "1", "--max-pixels", "4000")
  assert calls == [((*SIZE, 3), MaskGeneration(), 4000)]
  assert [one["name"] for one in got["categories"]] == ["everything"]
  assert len(got["annotations"]) == 1
  record("--everything", "--threshold", "0.3")
  assert calls[1][1] == MaskGeneration(pred_iou_thresh=0.3)
  named = "points_per_side=16", "multimask_output=false", "box_nms_thresh=0.5"
  got = record("--everything", *(f"--option={one}" for one in named))
  wanted = MaskGeneration(points_per_side=16, multimask_output=False, box_nms_thresh=0.5)
  assert calls[2][1] == wanted
  assert got["info"]["everything"] == dataclasses.asdict(wanted)
  assert got["info"]["threshold"] == wanted.pred_iou_thresh


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    (["--everything", "--text", "a"], "--everything cannot be combined with --text"),
    (
      ["--everything", "--option", "points=3"],
      "--option 'points=3' must be NAME=VALUE; names are p",
    ),
    (["--everything", "--option", "points_per_side"], "'points_per_side' must be a whole number"),
    (["--everything", "--option", "points_per_side=0"], "a whole number from 1 to 1024; got 0"),
    (["--everything", "--option", "multimask_output=3"], "'multimask_output=3' must be true or"),
    (
      ["--everything", "--option", "crop_nms_thresh=nan"],
      "crop_nms_thresh must be a finite number; got nan",
    ),
    (
      ["--everything", "--threshold", "0.5", "--option", "pred_iou_thresh=0.5"],
      "--option pred_iou_thresh is given twice",
    ),
    (["--point", "1,1", "--option", "points_per_side=3"], "needs --everything; add it"),
    (["--visual"], "--visual needs --box X0,Y0,X1,Y1 or --point"),
    (["--visual", "--text", "a"], "--visual needs --box X0,Y0,X1,Y1 or"),
    (["--point", "1,1", "--box", "1,1,2,2"], "--point and --box are ambiguous: add --visual"),
    (["--point", "1,1", "--text", "a", "--text", "b"], "with 2 --text is ambiguous"),
    (["--visual", "--box", "1,1,2,2,0"], "is the box around one object and cannot be negative"),
    (["--visual", "--point=1,1", "--box=1,1,2,2", "--box=1,1,2,2"], "2 --box with --visual are"),
    (["--point", "1"], "--point '1' must be two numbers in pixels, X,Y"),
    (["--point", "1,2,3"], "--point '1,2,3' must end in ,1"),
    (["--point", "a,b"], "--point 'a,b' must be two numbers"),
    (["--point", "nan,1"], "point 0 must be finite"),
    (["--point", "50,1"], "point [50, 1] is outside the 40 x 20 image"),
    (["--visual", "--box", "50,1,60,2"], "completely outside the 40 x 20 image"),
    ([], "give --text PHRASE, --box X0,Y0,X1,Y1, --point X,Y, --concept FILE or --everything"),
    (["--point", "1,1", "--threshold", "2"], "--threshold must be between 0 and 1"),
  ],
)
def test_invalid_commands(ready, capsys, typed, message):
  assert main(["segment", "a.png", *typed]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count("\n") == 1
  assert not (ready / "out").exists()


def test_checkpoint_without_the_head(ready, capsys, model, monkeypatch):
  bare = Sam3(model.config, golden_model.parameters(), model.tokenizer, dtype="float32")
  monkeypatch.setattr(segment_images.Sam3, "from_checkpoint", lambda *_, **__: bare)
  for typed in (["--point", "1,1"], ["--everything"]):
    assert main(["segment", "a.png", *typed]) == 2
    err = capsys.readouterr().err
    assert "no head for visual prompts" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_prompts_of_the_options():
  parsed = parse_prompts(["cat"], [], ["1,2", "3,4,0"], False, False)
  assert [prompt.text for prompt in parsed.prompts] == ["cat"]
  assert parsed.visual[0].point_labels == (1, 0)
  both = parse_prompts([], ["1,1,9,9"], ["1,2"], True, False)
  assert both.prompts == []
  assert (both.visual[0].box, both.visual[0].points) == ((1, 1, 9, 9), ((1, 2),))
  assert parse_prompts([], [], [], False, True) == ([], [])
  job = types.SimpleNamespace(mask_generation=None, prompts=[], visual=both.visual)
  assert segment_images.Job.phrases.fget(job) == ["click"]
