"""Concepts on the command line: `concept`, `segment --concept` and `batch --concept`."""

import dataclasses
import json
import types

import batches
import command_runs
import numpy as np
import pytest
from batches import write_images
from command_runs import CHECKPOINT

from sam3_jax import Concept, Prompt
from sam3_jax.batch import pipeline
from sam3_jax.cli.main import main
from sam3_jax.inference.predictor import Sam3
from sam3_jax.utils.identity import Origin

model = command_runs.model
folder = command_runs.folder
ready = command_runs.ready
fails = command_runs.fails

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

BOX = ["--box", "10,20,90,80"]
ORIGIN = Origin("0", "stub")


def concept(origin, width=128, text=None) -> Concept:
  rng = np.random.default_rng(0)
  tokens = rng.standard_normal((2, width), np.float32)
  return Concept(tokens, np.array([True, False]), text, origin)


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    ([], "a concept needs exemplars: give --box X0,Y0,X1,Y1"),
    (["--box", "1,2,3"], "'1,2,3' must be four numbers"),
    (["--box", "500,2,600,40"], "is completely outside the 200 x 120 image"),
    ([*BOX, "--text", " "], "the phrase is empty"),
    ([*BOX, "--out", "photo.png"], "--out photo.png must be a file other than the image"),
    ([*BOX, "--out", "."], "--out . must be a file"),
    ([*BOX, "--out", "photo.png/x"], "cannot write to photo.png"),
    ([*BOX, "--join", "none"], "there is no file of a concept none"),
    ([*BOX, "--join", "photo.png"], "photo.png is not a file that Concept.save wrote"),
    ([*BOX, "--checkpoint", "nowhere"], "sam3-jax convert"),
  ],
)
def test_wrong_arguments(ready, fails, monkeypatch, typed, message):
  monkeypatch.setattr(Sam3, "encode", lambda *_, **__: embedding())
  assert message in fails("concept", "photo.png", "--out", "a.safetensors", *typed)
  assert "there is no image none.png" in fails("concept", "none.png", *BOX, "--out", "a")
  assert "s3://b/a.png: the image of the" in fails("concept", "s3://b/a.png", *BOX, "--out", "a")


def embedding():
  """Of an image of 200 x 120, without its maps."""
  from sam3_jax import ImageEmbedding

  maps = (np.zeros((1, n, n, 128), np.float32) for n in (96, 48, 24, 24))
  return ImageEmbedding(*maps, np.array([[120, 200]]))


def test_concepts_that_segment_refuses(ready, fails, model):
  concept(Origin("0123456789abcdef", "other")).save("other.safetensors")
  concept(model.origin).save("own.safetensors")
  line = fails("segment", "photo.png", "--concept", "other.safetensors")
  assert "the concept was made by another checkpoint, other (0123456789ab), than" in line
  line = fails("concept", "photo.png", *BOX, "--join", "other.safetensors", "--out", "x")
  assert "the concept was made by another checkpoint" in line
  assert "no file of a concept none" in fails("segment", "photo.png", "--concept", "none")
  for typed in (["--everything"], ["--point", "1,2"], [*BOX, "--visual"]):
    line = fails("segment", "photo.png", "--concept", "own.safetensors", *typed)
    assert "--concept cannot be combined with" in line


@pytest.mark.slow
def test_concept_and_segment(ready, model, capsys):
  """The files of a concept, joined, and the instances that it finds."""
  assert main(["concept", "photo.png", *BOX, "--out", "a/one.safetensors"]) == 0
  box = ["--box", "10,20,90,80,0", "--text", "cat"]
  join = ["--join", "a/one.safetensors", "--out", "two.safetensors"]
  assert main(["concept", "turned.jpg", *box, *join]) == 0
  assert capsys.readouterr().out.splitlines() == [
    "a/one.safetensors: 1 exemplar, 0 negative",
    "two.safetensors: 2 exemplars, 1 negative, phrase 'cat'",
  ]
  embedding = model.encode(["photo.png", "turned.jpg"])
  first = model.concept(embedding, Prompt(boxes=[[10, 20, 90, 80]]), 0)
  second = model.concept(embedding, Prompt("cat", boxes=[[10, 20, 90, 80]], box_labels=[0]), 1)
  want = Concept.join([first, second])
  got = Concept.load("two.safetensors")
  np.testing.assert_allclose(got.tokens, want.tokens, atol=1e-5)
  files = ["--concept", "a/one.safetensors", "--concept", "two.safetensors"]
  files += ["--concept", "./two.safetensors"]  # the same content and name: used once
  assert main(["segment", "turned.jpg", "--text", "cat", *files, "--threshold", "0.01"]) == 0
  record = json.loads((ready / "out" / "turned.sam3.json").read_text())
  assert [one["name"] for one in record["categories"]] == ["cat", "one", "cat (2)"]
  assert [one.get("concept") for one in record["info"]["prompts"]] == [
    None, "one.safetensors", "two.safetensors",
  ]  # fmt: skip
  found = model.decode(model.encode("turned.jpg"), ["cat", Concept.load("a/one.safetensors"), got])
  counts = [len(one) for one in found.instances(0.01)]
  assert sum(counts) > 3
  categories = [one["category_id"] for one in record["annotations"]]
  assert [categories.count(number) for number in (1, 2, 3)] == counts


@pytest.fixture
def job(tmp_path, monkeypatch):
  """Where a batch runs with an engine without a model."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  config = types.SimpleNamespace(**vars(batches.MODEL.config), width=4)
  stub = types.SimpleNamespace(**vars(batches.MODEL) | {"origin": ORIGIN, "config": config})
  monkeypatch.setattr(Sam3, "from_checkpoint", lambda *_, **__: stub)
  write_images(tmp_path / "images", 7)
  concept(ORIGIN, 4).save("cells.safetensors")
  concept(ORIGIN, 4, "lion").save("cat.safetensors")
  return tmp_path


BATCH = ["batch", "--images", "images", "--checkpoint", str(CHECKPOINT), "--quiet"]


def test_batch(job, capsys):
  files = ["--concept", "cells.safetensors", "--concept", "cat.safetensors"]
  assert main([*BATCH, *files, "--prompts", "dog", "--out", "out"]) == 0
  assert main(["batch", "--merge", "--out", "out", "--quiet"]) == 0
  merged = json.loads((job / "out" / "annotations.json").read_text())
  assert [one["name"] for one in merged["categories"]] == ["dog", "cells", "lion"]
  assert {one["category_id"] for one in merged["annotations"]} == {1, 2, 3}
  assert main([*BATCH, *files, "--prompts", "dog", "--out", "out"]) == 0  # nothing remains


def test_a_changed_concept_is_another_job(job, capsys):
  typed = [*BATCH, "--concept", "cells.safetensors", "--out", "out"]
  assert main(typed) == 0
  before = {path: path.read_bytes() for path in (job / "out").rglob("*") if path.is_file()}
  changed = concept(ORIGIN, 4)
  dataclasses.replace(changed, tokens=changed.tokens + 1).save("cells.safetensors")
  assert main(typed) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert "prompts" in err
  assert {path: path.read_bytes() for path in (job / "out").rglob("*") if path.is_file()} == before


def test_concepts_that_batch_refuses(job, fails):
  concept(Origin("abc", "other"), 4).save("other.safetensors")
  line = fails(*BATCH, "--concept", "other.safetensors", "--out", "out")
  assert "the concept was made by another checkpoint, other (abc), than this model's, stub" in line
  assert "no file of a concept none" in fails(*BATCH, "--concept", "none", "--out", "out")
  line = fails(*BATCH, "--out", "out")
  assert "and none of --prompts, --text and --concept is given" in line
