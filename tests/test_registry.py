"""Checkpoints by name, and the model card's call."""

import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import sam3_jax
from sam3_jax.checkpoint import registry


@pytest.fixture(scope="module")
def segmenter():
  return sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam3_tiny")


def card(batch=2, size=128):
  """The input of the card's example."""
  return {
    "images": np.ones((batch, size, size, 3), dtype="float32"),
    "prompts": ["ear", "head"],
    "boxes": np.ones((batch, 1, 4), dtype="float32"),
    "box_labels": np.ones((batch, 1), dtype="int32"),
  }


def test_the_card_as_printed(segmenter):
  outputs = segmenter.predict(card())
  config = segmenter.model.config
  queries, size = config.queries, config.mask_size
  assert outputs["scores"].shape == (2, queries)
  assert outputs["boxes"].shape == (2, queries, 4)
  assert outputs["masks"].shape == (2, queries, size, size)
  assert all(type(x) is np.ndarray and np.isfinite(x).all() for x in outputs.values())
  assert ((outputs["masks"] >= 0) & (outputs["masks"] <= 1)).all()


def test_equals_decode(segmenter):
  """The adapter against the API that it adapts."""
  inputs = card() | {"boxes": np.array([[[5, 6, 50, 60]], [[0, 0, 128, 64]]], np.float32)}
  inputs["images"] = np.random.default_rng(0).uniform(0, 255, (2, 128, 128, 3)).astype("float32")
  outputs = segmenter.predict(inputs)
  model = segmenter.model
  embedding = model.encode(list(np.rint(inputs["images"]).astype(np.uint8)))
  prompts = [
    sam3_jax.Prompt(text, boxes)
    for text, boxes in zip(inputs["prompts"], inputs["boxes"], strict=True)
  ]
  found = model.decode(embedding, prompts, [0, 1])
  np.testing.assert_allclose(outputs["scores"], found.scores, atol=1e-6)
  np.testing.assert_allclose(outputs["boxes"], found.boxes, atol=1e-6)
  with np.errstate(over="ignore"):
    masks = 1 / (1 + np.exp(-np.asarray(found.mask_logits, np.float64)))
  np.testing.assert_allclose(outputs["masks"], masks, atol=1e-6)


@pytest.mark.parametrize("left_out", [("boxes", "box_labels"), ("box_labels",), ("prompts",)])
def test_keys_may_be_left_out(segmenter, left_out):
  inputs = {key: value for key, value in card().items() if key not in left_out}
  assert segmenter.predict(inputs)["scores"].shape[0] == 2


def test_padding_boxes_are_no_boxes(segmenter):
  inputs = card() | {"box_labels": np.full((2, 1), -10)}
  text_only = {key: inputs[key] for key in ("images", "prompts")}
  np.testing.assert_allclose(
    segmenter.predict(inputs)["scores"], segmenter.predict(text_only)["scores"], atol=1e-6
  )


def test_one_image_without_a_batch(segmenter):
  inputs = {
    "images": np.zeros((30, 20, 3), np.uint8),
    "prompts": "ear",
    "boxes": np.array([[1, 2, 3, 4]]),
    "box_labels": np.array([1]),
  }
  assert segmenter.predict(inputs)["scores"].shape[0] == 1


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"images": np.full((2, 8, 8, 3), 256.0)}, "must have values 0..255; got 256.0 to 256.0"),
    ({"images": np.full((2, 8, 8, 3), -1)}, "must have values 0..255"),
    ({"images": np.full((2, 8, 8, 3), np.nan)}, "must have values 0..255"),
    ({"images": np.zeros((2, 8, 8, 4))}, r"images must be \[B, h, w, 3\]"),
    ({"images": None}, "inputs need images"),
    ({"prompts": ["ear"]}, "2 images need as many prompts"),
    ({"boxes": np.ones((2, 4))}, r"boxes must be \[B, N, 4\]"),
    ({"boxes": np.ones((2, 1, 3))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.ones((2, 2))}, r"boxes must be \[B, N, 4\]"),
    ({"box_labels": np.full((2, 1), 7)}, "box labels are 1"),
    ({"prompts": None, "boxes": None, "box_labels": None}, "needs a phrase or a box"),
    ({"prompts": None, "box_labels": np.full((2, 1), -10)}, "needs a phrase or a box"),
    ({"points": 1}, "unknown inputs"),
  ],
)
def test_faults_are_one_line(segmenter, change, message):
  with pytest.raises(ValueError, match=message) as caught:
    segmenter.predict(card() | change)
  assert "\n" not in str(caught.value)


def test_where_checkpoints_are_looked_for(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path / "shelf"))
  here, shelf = tmp_path / "checkpoints" / "sam3-pcs", tmp_path / "shelf" / "sam3-pcs"
  here.mkdir(parents=True)
  assert registry.find_checkpoint("sam3_pcs").samefile(here)
  shelf.mkdir(parents=True)
  assert registry.find_checkpoint("sam3_pcs").samefile(shelf)
  (tmp_path / "sam3_pcs").mkdir()
  assert registry.find_checkpoint("sam3_pcs").samefile(tmp_path / "sam3_pcs")
  assert (registry.find_checkpoint("sam3_tiny") / "config.json").is_file()


def test_an_unknown_preset_says_where_it_looked(tmp_path, monkeypatch):
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="sam3-jax convert SOURCE") as caught:
    sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam9")
  message = str(caught.value)
  assert str(tmp_path / "sam9") in message
  assert "checkpoints/sam9" in message
  assert "\n" not in message


def test_an_empty_name():
  with pytest.raises(ValueError, match="the checkpoint's name is empty"):
    registry.find_checkpoint("")


def test_predict_takes_a_mapping(segmenter):
  with pytest.raises(TypeError, match="predict takes a mapping"):
    segmenter.predict(np.zeros((1, 8, 8, 3)))


def test_the_hub_without_its_package(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[hub\]'"):
    registry.find_checkpoint("hf://facebook/sam3")


class FakeHub:
  """`snapshots` and `convert`, with a commit for each revision."""

  def __init__(self, cache, monkeypatch):
    self.cache, self.commits, self.downloads = cache, {None: A}, []
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr("sam3_jax.checkpoint.hf_hub.resolve", self.resolve)
    monkeypatch.setattr("sam3_jax.checkpoint.hf_hub.download", self.download)
    monkeypatch.setattr("sam3_jax.converters.convert", self.convert)

  def resolve(self, repository, revision):
    assert repository == "org/name"
    commit = self.commits.get(revision, revision if revision in (A, B) else None)
    return commit, "" if commit else "no route to host"

  def download(self, name):
    self.downloads.append(name)
    folder = self.cache / "client" / "snapshots" / (name.partition("@")[2] or B)
    folder.mkdir(parents=True, exist_ok=True)
    return folder

  def convert(self, source, target, progress):
    if progress:
      progress("trunk", 0.5)
    target.mkdir(parents=True)
    (target / "made_of").write_text(source.name)

  def find(self, name, **options):
    return (registry.find_checkpoint(f"hf://{name}", **options) / "made_of").read_text()


A, B = "a" * 40, "b" * 40


@pytest.fixture
def fake(tmp_path, monkeypatch):
  return FakeHub(tmp_path, monkeypatch)


def test_a_commit_is_converted_once(fake):
  told = []
  assert fake.find("org/name", progress=lambda *step: told.append(step)) == A
  assert told == [("downloading hf://org/name", 0.0), ("trunk", 0.5)]
  fake.commits["v1"] = A
  assert fake.find("org/name") == fake.find("org/name@v1") == fake.find(f"org/name@{A}") == A
  assert fake.downloads == [f"hf://org/name@{A}"]
  assert registry.find_checkpoint("hf://org/name").parent == fake.cache / "sam3-jax/hub/org--name"


def test_revisions_do_not_share_an_entry(fake):
  """Nor those whose names become one when a stroke becomes a hyphen."""
  fake.commits |= {"refs/pr/1": A, "refs-pr-1": B}
  assert (fake.find("org/name@refs/pr/1"), fake.find("org/name@refs-pr-1")) == (A, B)
  assert fake.find("org/name") == A
  fake.commits[None] = B  # the branch has moved
  assert fake.find("org/name") == B
  assert len(fake.downloads) == 2


def test_without_the_hub_the_last_known_commit_is_used_with_a_note(fake):
  fake.find(f"org/name@{B}")
  fake.find("org/name")
  fake.commits = {}
  notes = []
  assert fake.find("org/name", note=notes.append) == A
  assert notes == [
    "the hub does not say what hf://org/name is now (no route to host); commit aaaaaaaaaaaa is "
    "used."
  ]
  with pytest.warns(UserWarning, match="commit aaaaaaaaaaaa is used"):
    fake.find("org/name")
  assert fake.find(f"org/name@{B}", note=notes.append) == B
  assert len(notes) == 1
  assert fake.find("org/name@new") == "new"  # the client may have it, or says why not
  assert fake.downloads[-1] == "hf://org/name@new"


def test_another_version_of_the_conversion_is_another_entry(fake, monkeypatch):
  fake.find("org/name")
  monkeypatch.setattr(registry, "CONVERSION", 99)
  fake.find("org/name")
  assert len(fake.downloads) == 2
  assert len(list((fake.cache / "sam3-jax/hub/org--name").glob(f"{A}-*"))) == 2


def test_an_entry_of_an_earlier_version_is_explained(fake):
  old = fake.cache / "sam3-jax" / "org--name"
  old.mkdir(parents=True)
  (old / "manifest.json").write_text("{}")
  notes = []
  fake.find("org/name", note=notes.append)
  assert notes == [
    f"{old} was made by an earlier version, of a commit that it does not name; it is not used any "
    "more and may be removed."
  ]


def test_one_process_converts_and_the_others_wait(fake, monkeypatch):
  monkeypatch.setattr(registry, "WAIT", 0.01)
  convert, notes, found = fake.convert, [], []

  def slowly(source, target, progress):
    time.sleep(0.3)
    convert(source, target, progress)

  monkeypatch.setattr("sam3_jax.converters.convert", slowly)
  threads = [
    threading.Thread(target=lambda: found.append(fake.find("org/name", note=notes.append)))
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert (found, len(fake.downloads)) == ([A] * 4, 1)
  assert len(notes) == 3
  assert all("waiting for process" in line and "converts hf://org/name" in line for line in notes)
  assert not list(fake.cache.rglob("*.lease"))


def test_a_cache_that_cannot_be_written_is_one_line(fake):
  (fake.cache / "sam3-jax").write_text("")
  with pytest.raises(ValueError, match=r"^cannot write to .*/hub/org--name: .*set XDG_CACHE_HOME"):
    fake.find("org/name")


def test_a_file_is_no_checkpoint(tmp_path):
  (tmp_path / "sam3.pt").write_text("")
  with pytest.raises(ValueError, match=r"sam3.pt is a file, but .*`sam3-jax convert .*sam3.pt OUT"):
    registry.find_checkpoint(tmp_path / "sam3.pt")


def test_a_download_without_a_home_is_one_line(monkeypatch):
  def fail():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(Path, "home", fail)
  with pytest.raises(ValueError, match=r"no home to keep hf://a/b in; set XDG_CACHE_HOME\.$"):
    registry.find_checkpoint("hf://a/b")
