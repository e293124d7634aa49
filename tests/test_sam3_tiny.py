"""The embedded checkpoint finds what is there, and nothing else: the README's image, from the
phrase to the files."""

import json
from pathlib import Path

import moving_scene
import numpy as np
import pytest
from PIL import Image

import sam3_jax
from sam3_jax import VisualPrompt
from sam3_jax.checkpoint.bundle import expected_shapes
from sam3_jax.cli.main import main
from sam3_jax.datasets.synthetic import drawings, scenes
from sam3_jax.evaluation.clicks import deepest_point
from sam3_jax.outputs.rle import decode
from sam3_jax.utils.param_tree import compare, flatten

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "docs" / "scene.jpg"
PRESENT = {"hot dog": "hot-dog", "fire engine": "fire-engine", "lion": "lion"}
ABSENT = ("pizza", "green book", "soccer ball")
FOUND = 0.7  # IoU of a mask with the object's


@pytest.fixture(scope="module")
def truth():
  """The mask of each thing in the image, which is composed again."""
  rng = np.random.default_rng([31, 116])
  scene = scenes.compose(rng, size=(480, 640), variety=1.0)
  with Image.open(SCENE) as image:
    assert np.abs(np.asarray(image, float) - scene.image).mean() < 5  # JPEG
  names = [concept.name for concept in drawings.concepts()]
  return {names[item.concept]: item.mask for item in scene.objects}


@pytest.fixture(scope="module")
def model():
  return sam3_jax.Sam3.from_checkpoint(sam3_jax.find_checkpoint("sam3-tiny"))


@pytest.fixture(scope="module")
def embedding(model):
  return model.encode(SCENE)


@pytest.fixture(scope="module")
def pointed(model):
  return model.encode(SCENE, visual=True)


@pytest.mark.slow
def test_its_parameters_fit_the_model(model):
  """Whatever its seal says."""
  shapes = {name: array.shape for name, array in flatten(model.params).items()}
  assert compare(shapes, expected_shapes(model.config, visual=True)) == []


def iou(mask, other):
  return (mask & other).sum() / (mask | other).sum()


def box_of(mask):
  rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
  return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


@pytest.mark.slow
@pytest.mark.parametrize("phrase", PRESENT)
def test_what_is_there_is_found(phrase, model, embedding, truth):
  (found,) = model.decode(embedding, phrase).instances(threshold=0.5)
  (mask,) = found.masks
  assert iou(mask, truth[PRESENT[phrase]]) > FOUND


@pytest.mark.slow
@pytest.mark.parametrize("phrase", ABSENT)
def test_what_is_not_there_is_not(phrase, model, embedding):
  (found,) = model.decode(embedding, phrase).instances(threshold=0.5)
  assert len(found) == 0


@pytest.mark.slow
def test_an_example_box_finds_its_object(model, embedding, truth):
  mask = truth["fire-engine"]
  prompt = sam3_jax.Prompt(boxes=[box_of(mask)])
  (found,) = model.decode(embedding, prompt).instances(threshold=0.5)
  assert max(iou(one, mask) for one in found.masks) > FOUND


@pytest.mark.slow
@pytest.mark.parametrize("thing", PRESENT.values())
def test_a_click_and_a_box_find_the_thing_under_them(thing, model, pointed, truth):
  mask = truth[thing]
  x, y, _ = deepest_point(mask)
  [click] = model.decode_visual(pointed, VisualPrompt([[x, y]])).masks()
  assert max(iou(np.asarray(one), mask) for one in click) > FOUND
  [found] = model.decode_visual(pointed, VisualPrompt(box=box_of(mask)), multimask=False).masks()
  assert iou(np.asarray(found[0]), mask) > FOUND


@pytest.mark.slow
def test_the_command(tmp_path, truth):
  """The README's first command, and what its file says."""
  typed = [word for phrase in (*PRESENT, ABSENT[0]) for word in ("--text", phrase)]
  assert main(["segment", str(SCENE), *typed, "--out", str(tmp_path)]) == 0
  assert (tmp_path / "scene.sam3.png").stat().st_size > 10_000
  record = json.loads((tmp_path / "scene.sam3.json").read_text())
  names = {category["id"]: category["name"] for category in record["categories"]}
  found = [(names[one["category_id"]], one["segmentation"]) for one in record["annotations"]]
  assert sorted(name for name, _ in found) == sorted(PRESENT)  # each once
  for phrase, mask in found:
    assert iou(decode(mask), truth[PRESENT[phrase]]) > FOUND


@pytest.mark.slow
def test_the_track_command(tmp_path):
  """The README's command: both apples are found, and each keeps its id, also when it comes back
  from behind a ladybug, which hides all of it but a hundredth."""
  pytest.importorskip("av")
  video = ROOT / "docs" / "moving_scene.mp4"
  assert main(["track", str(video), "--text", "red apple", "--out", str(tmp_path)]) == 0
  assert (tmp_path / "moving_scene.sam3.mp4").stat().st_size > 10_000
  content = json.loads((ROOT / "docs" / "moving_scene.json").read_text())
  apples = [one for one in content["annotations"] if one["noun_phrase"] == "red apple"]
  lines = (tmp_path / "moving_scene.tracks.jsonl").read_text().splitlines()
  seen = {one["id"]: [] for one in apples}
  for frame, line in enumerate(lines):
    found = json.loads(line)["objects"]
    assert all(one["phrase"] == "red apple" for one in found)
    assert len(found) <= len(apples)
    for one in apples:
      if one["segmentations"][frame] is not None:
        mask = decode(one["segmentations"][frame])
        best = max(found, key=lambda x: iou(decode(x["segmentation"]), mask), default=None)
        if best is not None and iou(decode(best["segmentation"]), mask) > 0.5:
          seen[one["id"]].append(best["id"])
  assert all(len(set(ids)) == 1 for ids in seen.values()), seen
  assert all(len(ids) >= 20 for ids in seen.values()), seen


@pytest.mark.slow
def test_clicked_objects_keep_their_ids(tmp_path):
  """Each object keeps its id, behind an obstacle and another object."""
  pytest.importorskip("av")
  points = [word for point in ("157,142", "98,136", "267,153") for word in ("--point", point)]
  made, video, masks = moving_scene.scene(34), tmp_path / "scene.mp4", tmp_path / "scene.json"
  moving_scene.write_video(video, made)
  moving_scene.write_masks(masks, made, 34)
  assert main(["track", str(video), *points, "--out", str(tmp_path)]) == 0
  assert (tmp_path / "scene.sam3.mp4").stat().st_size > 10_000
  truth = json.loads(masks.read_text())["annotations"]
  lines = (tmp_path / "scene.tracks.jsonl").read_text().splitlines()
  assert len(lines) == len(truth[0]["segmentations"])
  overlaps = {one["id"]: [] for one in truth}
  for frame, line in enumerate(lines):
    found = {one["id"]: decode(one["segmentation"]) for one in json.loads(line)["objects"]}
    for one in truth:
      if one["segmentations"][frame] is not None:
        mask = decode(one["segmentations"][frame])
        overlaps[one["id"]].append(iou(found.get(one["id"], np.zeros_like(mask)), mask))
  assert all(values[-1] > 0.6 for values in overlaps.values())
  assert np.mean([np.mean(values) for values in overlaps.values()]) > 0.65  # measured 0.72
