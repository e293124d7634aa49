"""Checkpoints, training data and evaluation data in buckets: equal to local ones.

The servers are local, see object_servers.py.
"""

import json
import pickle
from pathlib import Path

import evaluation_data
import numpy as np
import object_servers
import pytest
from evaluation_data import perfect, write_json

from sam3_jax.checkpoint.mirror import mirror
from sam3_jax.cli.main import main
from sam3_jax.datasets import annotations
from sam3_jax.evaluation import predictions
from sam3_jax.inputs.preprocess import displayed_size, read_image
from sam3_jax.registry import find_checkpoint
from sam3_jax.storage.objects import ObjectPath
from sam3_jax.training.run_data import RunData, identify_data
from sam3_jax.training.sources import PairSource

folder, bucket = evaluation_data.folder, object_servers.bucket


@pytest.fixture
def data(folder, bucket):
  """The bucket, with the files of the working directory below `data`."""
  for path in folder.rglob("*"):
    if path.is_file():
      bucket.put(f"data/{path.relative_to(folder)}", path.read_bytes(), {})
  return bucket


def test_images(data, folder):
  for name in ("a.png", "sub/c.png"):
    url = f"gs://bucket/data/{name}"
    for given in (url, Path(url)):
      assert (read_image(given) == read_image(folder / name)).all()
      assert displayed_size(given) == displayed_size(folder / name)
  with pytest.raises(FileNotFoundError, match=r"there is no image gs://bucket/data/none.png: c"):
    read_image("gs://bucket/data/none.png")
  data.put("data/bad.png", b"bad", {})
  with pytest.raises(ValueError, match=r"gs://bucket/data/bad.png"):
    read_image(Path("gs://bucket/data/bad.png"))
  data.denied = ("data/b",)
  with pytest.raises(ValueError, match=r"gs://bucket/data/b.png cannot be read \(permission is"):
    read_image("gs://bucket/data/b.png")


def test_annotations(data):
  wanted = annotations.read_checked("data.json", ".")
  assert annotations.read_checked("gs://bucket/data/data.json", "gs://bucket/data") == wanted
  del data.objects["data/sub/c.png"]
  data.put("data/b.png", data.objects["data/a.png"][1], {})
  with pytest.raises(ValueError) as error:
    annotations.read_checked(Path("gs://bucket/data/data.json"), Path("gs://bucket/data"))
  assert "gs://bucket/data/sub/c.png: there is no such image" in str(error.value)
  assert "gs://bucket/data/b.png is displayed as 60 x 40" in str(error.value)
  with pytest.raises(FileNotFoundError, match=r"no annotation file gs://bucket/data/none.json: ch"):
    annotations.read("gs://bucket/data/none.json")


def test_evaluate(data, folder, capsys):
  pairs = annotations.read("data.json")
  write_json("found.json", predictions.to_coco(perfect(pairs), pairs))
  options = ["--predictions", "found.json", "--quiet", "--out"]
  assert main(["evaluate", "--data", "data.json", *options, "local.json"]) == 0
  assert main(["evaluate", "--data", "gs://bucket/data/data.json", *options, "bucket.json"]) == 0
  assert Path("bucket.json").read_bytes() == Path("local.json").read_bytes()
  assert main(["evaluate", "--data", "gs://other/data.json", *options, "x.json"]) == 2
  assert "gs://other/data.json: there is no bucket other" in capsys.readouterr().err


def test_training_data(data):
  batches = []
  for root in (".", "gs://bucket/data"):
    source = PairSource(annotations.read_checked(f"{root}/data.json", root), root)
    source = pickle.loads(pickle.dumps(source))  # as for workers
    batches.append([source[i] for i in range(len(source))])
  for local, remote in zip(*batches, strict=True):
    assert (local.image == remote.image).all()
    assert local.pairs == remote.pairs


def test_changed_training_data_are_named(data, tmp_path):
  def now():
    images = ("gs://bucket/data", ["a.png", "sub/c.png", "none.png"])
    return identify_data(["gs://bucket/data/data.json"], [images])

  before = now()
  before.write(tmp_path)
  assert now().fault(tmp_path) == ""
  assert now().digest() == before.digest() != RunData().digest()
  assert before.images["gs://bucket/data/none.png"] is None
  data.put("data/sub/c.png", data.objects["data/sub/c.png"][1], {})
  assert "images: 1 file modified (gs://bucket/data/sub/c.png)" in now().fault(tmp_path)
  data.put("data/data.json", b"{}", {})
  assert "annotations: 1 file modified (gs://bucket/data/data.json)" in now().fault(tmp_path)


def test_checkpoints_are_copied_once(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  content = {"manifest.json": b"{}", "params/d/0": bytes(range(256)) * 999, "params/empty": b""}
  for name, data in content.items():
    bucket.put(f"checkpoints/tiny/{name}", data, {})
  copy = mirror("gs://bucket/checkpoints/tiny")
  found = {str(path.relative_to(copy)): path for path in copy.rglob("*") if path.is_file()}
  assert {name: path.read_bytes() for name, path in found.items()} == content
  made = copy.stat().st_mtime_ns
  assert mirror("gs://bucket/checkpoints/tiny/") == copy
  assert copy.stat().st_mtime_ns == made
  bucket.put("checkpoints/tiny/manifest.json", b"{ }", {})
  assert mirror("gs://bucket/checkpoints/tiny") != copy
  assert not list(copy.parent.glob(".*"))
  bucket.put("checkpoints/tiny/../x", b"", {})
  with pytest.raises(ValueError, match=r"has a file '../x'; remove it from the checkpoint"):
    mirror("gs://bucket/checkpoints/tiny")
  for url, message in (
    ("gs://bucket/checkpoints", "manifest.json is missing"),
    ("gs://bucket/none", "there is no checkpoint at gs://bucket/none; check the address"),
  ):
    with pytest.raises(FileNotFoundError, match=message):
      mirror(url)
  with pytest.raises(ValueError, match="there is no bucket other; check its name; check the addre"):
    mirror("gs://other/tiny")


def test_damaged_copies_do_not_appear(bucket, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for name in ("manifest.json", "params/a"):
    bucket.put(f"tiny/{name}", b"a" * 10, {})
  bucket.denied = ("tiny/params",)
  with pytest.raises(ValueError, match=r"gs://bucket/tiny/params/a cannot be copied .*permission"):
    mirror("gs://bucket/tiny")
  assert not any(path.is_dir() for path in (tmp_path / "cache" / "sam3-jax" / "buckets").iterdir())


def test_objects_can_be_pickled(bucket):
  bucket.put("a/b.json", json.dumps({"a": 1}).encode(), {})
  path = pickle.loads(pickle.dumps(ObjectPath("gs://bucket/a/b.json")))
  assert np.array_equal(list(path.read_bytes()), list(b'{"a": 1}'))


def test_missing_package(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"needs the package s3fs: pip install 'sam3-jax\[s3\]'"):
    find_checkpoint("s3://bucket/tiny")
