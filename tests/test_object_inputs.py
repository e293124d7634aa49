"""Inputs in buckets, in datasets of the hub and on web servers give the same records as local ones.

The servers are local, see object_servers.py.
"""

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import object_servers
import pytest
import record_files
from batches import load_images, write_images

from sam3_jax.batch.input_list import PrefixInputs
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.record_files import open_files
from sam3_jax.inputs.concept import Concept, ConceptFile
from sam3_jax.storage.urls import is_url
from sam3_jax.utils.notes import ListingNotes

bucket, faults, web = object_servers.bucket, object_servers.faults, object_servers.web


@pytest.fixture
def images(tmp_path, monkeypatch):
  """A directory of images, tar files and lists; the working directory is above it."""
  monkeypatch.chdir(tmp_path)
  folder = write_images(tmp_path / "images", 6)
  (folder / "below").mkdir()
  (folder / "000.png").rename(folder / "below" / "x y.png")
  (folder / "notes.txt").write_text("no image")
  lines = ['{"image": "below/x y.png", "prompts": ["cat"]}', '{"image": "./002.png"}']
  (folder / "list.jsonl").write_text("\n".join(lines))
  for number in range(2):
    with tarfile.open(folder / f"{number}.tar", "w") as shard:
      for name in (f"00{number + 1}.png", f"00{number + 3}.png"):
        shard.add(folder / name, name)
      prompts = tarfile.TarInfo(f"00{number + 1}.json")
      prompts.size = 24
      shard.addfile(prompts, io.BytesIO(b'{"prompts": ["red cat"]}'))
  examples = [
    record_files.example(image=[(folder / f"00{number}.png").read_bytes()]) for number in (1, 2)
  ]
  record_files.write_tf_record(folder / "a.tfrecord-00000-of-00001", examples)
  return folder


def upload(bucket, folder: Path, prefix="images") -> None:
  for path in folder.rglob("*"):
    if path.is_file():
      name = f"{prefix}/{path.relative_to(folder)}"
      bucket.put(name, path.read_bytes(), {})


def test_a_concept_in_a_bucket(bucket, tmp_path):
  concept = Concept(np.ones((1, 4), np.float32), np.array([True]), "lion")
  concept.save(tmp_path / "a b.safetensors")
  bucket.put("concepts/a b.safetensors", (tmp_path / "a b.safetensors").read_bytes(), {})
  bucket.put("concepts/bad", b"x" * 99, {})
  found = ConceptFile.read("gs://bucket/concepts/a b.safetensors")
  assert found == ConceptFile.read(tmp_path / "a b.safetensors")
  assert found.concept.text == "lion"
  with pytest.raises(
    ValueError, match=r"^gs://bucket/concepts/bad is not a file that Concept\.save"
  ):
    ConceptFile.read("gs://bucket/concepts/bad")
  with pytest.raises(FileNotFoundError, match="no file of a concept gs://bucket/none; check"):
    ConceptFile.read("gs://bucket/none")
  with pytest.raises(ValueError, match=r"^https://host/a is on a web server; download it"):
    ConceptFile.read("https://host/a?key=secret")


def compare(local: str, remote: str, **options) -> None:
  """Compares the lists and the pixels of local and remote inputs."""
  notes = ListingNotes(), ListingNotes()
  wanted = list_inputs(local, "cat, dog", notes[0])
  found = list_inputs(remote, "cat, dog", notes[1], **options)
  root = remote.partition("images")[0]
  assert [one.name.removeprefix(root) for one in found] == [one.name for one in wanted]
  assert [one.prompts for one in found] == [one.prompts for one in wanted]
  assert [one.span for one in found] == [one.span for one in wanted]
  assert notes[0].line() == notes[1].line()
  for one, other in zip(load_images(found), load_images(wanted), strict=True):
    assert not one.reason
    assert (one.pixels == other.pixels).all()
    assert one.identity.sha256 == other.identity.sha256
    assert one.requests == (1, 0)
    assert other.requests == (0, 0)
  assert all(is_url(one.path) and one.identity.version for one in found)


@pytest.mark.parametrize(
  "given",
  [
    "images",
    "images/*.png",
    "images/**/*.png",
    "images/*.tar",
    "images/*.tfrecord-*",
    "images/002.png",
  ],
)
def test_buckets(given, images, bucket):
  upload(bucket, images)
  compare(given, f"gs://bucket/{given}")


def test_lists_in_buckets(images, bucket):
  upload(bucket, images)
  wanted, found = (list_inputs(f"{root}images/list.jsonl", "dog") for root in ("", "gs://bucket/"))
  assert [one.name for one in found] == ["below/x y.png", "./002.png"]
  assert [one.path for one in found] == [
    "gs://bucket/images/below/x y.png", "gs://bucket/images/002.png",
  ]  # fmt: skip
  assert [one.prompts for one in found] == [one.prompts for one in wanted]
  assert all(one.identity.version for one in found)


def test_local_lists_of_objects(images, bucket, tmp_path):
  upload(bucket, images)
  lines = '{"image": "gs://bucket/images/001.png"}\n{"image": "gs://bucket/images/none.png"}\n'
  (tmp_path / "list.jsonl").write_text(lines + '{"image": "images/002.png"}\n')
  notes = ListingNotes()
  found = list_inputs("list.jsonl", "cat", notes)
  assert [bool(one.identity) for one in found] == [True, False, True]
  assert notes.line() == "1 image does not exist (gs://bucket/images/none.png)"
  first, second, third = load_images(found)
  assert first.reason == third.reason == ""
  assert second.reason == "there is no image gs://bucket/images/none.png"
  assert second.unreadable


def test_datasets_of_the_hub(images, web, monkeypatch):
  for path in images.rglob("*"):
    if path.is_file():
      web.files[f"/data/images/{path.relative_to(images)}"] = path.read_bytes()
  monkeypatch.setenv("HF_TOKEN", "hf_secret")
  compare("images", "hf://datasets/org/data/images")
  (one,) = list_inputs("hf://datasets/org/data/images/002.png", "cat")
  assert {login for _, login in web.seen} == {"Bearer hf_secret"}
  assert all("/org/data/" in path for path, _ in web.seen)  # no request that is not counted
  assert one.path == f"hf://datasets/org/data@{web.commit}/images/002.png"


def test_web_servers_are_asked_only_if_allowed(images, web, tmp_path):
  web.files["/images/002.png"] = (images / "002.png").read_bytes()
  url = f"{web.address}/images/002.png"
  lines = tmp_path / "list.jsonl"
  lines.write_text(f'{{"image": "{url}?signature=abc"}}\n')
  for given in (url, str(lines)):
    with pytest.raises(ValueError, match="is on a web server; add --allow-https to read it"):
      list_inputs(given, "cat")
  compare("images/002.png", url, allow_https=True)
  (one,) = list_inputs(str(lines), "cat", allow_https=True)
  assert one.name == url
  assert not load_images([one])[0].reason
  web.files.clear()
  assert load_images([one])[0].reason == f"there is no image {url}"  # without the signature


def test_changed_objects_are_not_read(images, bucket):
  upload(bucket, images)
  found = list_inputs("gs://bucket/images/00*.png", "cat")
  bucket.put("images/002.png", b"other", {})
  _, changed, *_ = load_images(found)
  assert "images/002.png has changed since it was listed" in changed.reason
  assert changed.unreadable


def test_faults_while_images_are_read(images, faults):
  upload(faults.server, images)
  faults.paths = "alt=media"
  faults.plan.extend(["503", "cut", "drop"])
  found = list_inputs("gs://bucket/images", "cat")
  loaded = load_images(found)
  assert not any(one.reason for one in loaded)
  assert sum(one.requests[1] for one in loaded) == 3
  faults.plan.extend(["500"] * 99)
  (one,) = load_images(found[:1])
  assert one.unreadable
  assert one.reason.endswith("cannot be read (the server failed (HTTP 500); try again later, "
                             "with fewer processes (5 attempts))")  # fmt: skip


def test_nothing_is_listed_twice(images, faults):
  upload(faults.server, images)
  found = list_inputs("gs://bucket/images", "cat")
  assert faults.requests == 2
  again = list_inputs("gs://bucket/images", "cat")
  assert [dataclasses.asdict(one) for one in found] == [dataclasses.asdict(one) for one in again]


def test_parquet(tmp_path, bucket):
  """Ranges of one version of the object are read."""
  pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  made = record_files.make_scenes(tmp_path)
  path = record_files.write_parquet(tmp_path / "a.parquet", record_files.table(made))
  bucket.put("images/a.parquet", path.read_bytes(), {})
  options = {"columns": record_files.ALL}
  local, remote = (
    list_inputs(str(path), **options),
    list_inputs("gs://bucket/images/a.parquet", **options),
  )
  assert [(one.name, one.prompts, one.record) for one in remote] == [
    (one.name, one.prompts, one.record) for one in local
  ]
  for one, other in zip(load_images(remote), load_images(local), strict=True):
    assert one.reason == other.reason
    assert (one.pixels == other.pixels).all()
    assert one.identity.sha256 == other.identity.sha256
  bucket.put("images/a.parquet", path.read_bytes(), {})  # another version
  open_files._open_files.clear()
  (image,) = load_images(remote[:1])
  assert image.unreadable
  assert "has changed since it was listed" in image.reason


def test_formats_that_only_local_disks_have(bucket):
  for name in ("a.arrow", "a.array_record"):
    bucket.put(f"images/{name}", b"", {})
    with pytest.raises(ValueError, match=f"{name}: such files are read from local disks only"):
      list_inputs(f"gs://bucket/images/{name}", "cat")


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ("gs://bucket/none", "there is no object or prefix gs://bucket/none; check the spelling."),
    ("gs://other/images", "gs://other/images: there is no bucket other; check its name"),
    ("gs://bucket/secret", "there is no object or prefix gs://bucket/secret"),
    ("gs://bucket/images/none*", "there is no image in gs://bucket/images/none*"),
    ("gs://bucket/images/a.tgz", "gs://bucket/images/a.tgz is compressed; unpack it"),
    ("gs://bucket/images/bad.tar", "gs://bucket/images/bad.tar is not a tar file"),
    ("gs://bucket/images/bad.jsonl", "gs://bucket/images/bad.jsonl"),
    ("az://bucket/x", "az://bucket/x has an unsupported scheme"),
  ],
)
def test_faulty_locations(given, message, bucket):
  for name in ("a.tgz", "bad.tar", "bad.jsonl"):
    bucket.put(f"images/{name}", b"bad", {})
  with pytest.raises((ValueError, FileNotFoundError)) as error:
    list_inputs(given, "cat")
  assert message in str(error.value)
  assert "\n" not in str(error.value).removeprefix(f"{given}:\n")


def test_lists_of_prefixes_are_sequences(images, bucket):
  upload(bucket, images)
  found = list_inputs("gs://bucket/images", "cat")
  assert isinstance(found, PrefixInputs)
  assert list(found) == [found[i] for i in range(len(found))]
  assert found[-1] == list(found)[-1] == found[-2:][1]
  assert found[1:3] == list(found)[1:3]
  for index in (len(found), -len(found) - 1):
    with pytest.raises(IndexError):
      found[index]
