"""Checkpoints by name: folders, packaged checkpoints, and repositories on the hub."""

import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

import sam3_jax
from sam3_jax import registry
from sam3_jax.checkpoint import bundle
from sam3_jax.cli import arguments


def test_search_order(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path / "root"))
  here, root = tmp_path / "checkpoints" / "sam3-pcs", tmp_path / "root" / "sam3-pcs"
  here.mkdir(parents=True)
  assert registry.find_checkpoint("sam3_pcs").samefile(here)
  root.mkdir(parents=True)
  assert registry.find_checkpoint("sam3_pcs").samefile(root)
  (tmp_path / "sam3_pcs").mkdir()
  assert registry.find_checkpoint("sam3_pcs").samefile(tmp_path / "sam3_pcs")
  assert (registry.find_checkpoint("sam3_tiny") / "config.json").is_file()


def test_unknown_name_lists_searched_folders(tmp_path, monkeypatch):
  monkeypatch.setenv("SAM3_JAX_CHECKPOINTS", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="sam3-jax convert SOURCE") as caught:
    sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam9")
  message = str(caught.value)
  assert str(tmp_path / "sam9") in message
  assert "checkpoints/sam9" in message
  assert "\n" not in message


def test_every_entry_point_resolves_names():
  """`Sam3.from_checkpoint`, `from_preset` and the command line share `find_checkpoint`."""
  small = sam3_jax.Sam3.from_checkpoint("sam3_tiny")
  preset = sam3_jax.SAM3PromptableConceptImageSegmenter.from_preset("sam3-tiny").model
  found = arguments.find("sam3-tiny", quiet=True)
  assert small.info["name"] == preset.info["name"] == "sam3-tiny"
  assert small.identity == preset.identity == bundle.inspect(found).identity


def test_from_checkpoint_converts_a_repository(fake, monkeypatch):
  monkeypatch.setattr(fake, "source", registry.find_checkpoint("sam3-tiny"))
  model = sam3_jax.Sam3.from_checkpoint("hf://org/name", dtype="float32")
  assert model.info["name"] == "sam3-tiny"
  assert fake.downloads == [f"hf://org/name@{A}"]


def test_empty_name():
  with pytest.raises(ValueError, match="the checkpoint's name is empty"):
    registry.find_checkpoint("")


def test_hub_without_huggingface_hub(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[hub\]'"):
    registry.find_checkpoint("hf://facebook/sam3")


class FakeHub:
  """Stands for `hf_hub` and `convert`, with a commit for each revision."""

  def __init__(self, cache, monkeypatch):
    self.cache, self.commits, self.downloads = cache, {None: A}, []
    self.source = None  # a checkpoint that every repository becomes
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
    if self.source:
      shutil.copytree(self.source, target)
      return
    target.mkdir(parents=True)
    (target / "made_of").write_text(source.name)

  def find(self, name, **options):
    return (registry.find_checkpoint(f"hf://{name}", **options) / "made_of").read_text()


A, B = "a" * 40, "b" * 40


@pytest.fixture
def fake(tmp_path, monkeypatch):
  return FakeHub(tmp_path, monkeypatch)


def test_each_commit_is_converted_once(fake):
  steps = []
  assert fake.find("org/name", progress=lambda *step: steps.append(step)) == A
  assert steps == [("downloading hf://org/name", 0.0), ("trunk", 0.5)]
  fake.commits["v1"] = A
  assert fake.find("org/name") == fake.find("org/name@v1") == fake.find(f"org/name@{A}") == A
  assert fake.downloads == [f"hf://org/name@{A}"]
  assert registry.find_checkpoint("hf://org/name").parent == fake.cache / "sam3-jax/hub/org--name"


def test_revisions_have_separate_entries(fake):
  """Not even when replacing slashes by hyphens makes their names equal."""
  fake.commits |= {"refs/pr/1": A, "refs-pr-1": B}
  assert (fake.find("org/name@refs/pr/1"), fake.find("org/name@refs-pr-1")) == (A, B)
  assert fake.find("org/name") == A
  fake.commits[None] = B  # the branch has moved
  assert fake.find("org/name") == B
  assert len(fake.downloads) == 2


def test_offline_uses_the_last_commit_with_a_note(fake):
  fake.find(f"org/name@{B}")
  fake.find("org/name")
  fake.commits = {}
  notes = []
  assert fake.find("org/name", note=notes.append) == A
  assert notes == [
    "cannot get the current commit of hf://org/name from the hub (no route to host); using "
    "aaaaaaaaaaaa."
  ]
  with pytest.warns(UserWarning, match="using aaaaaaaaaaaa"):
    fake.find("org/name")
  assert fake.find(f"org/name@{B}", note=notes.append) == B
  assert len(notes) == 1
  assert fake.find("org/name@new") == "new"  # the client may have it, or says why not
  assert fake.downloads[-1] == "hf://org/name@new"


def test_new_conversion_version_makes_a_new_entry(fake, monkeypatch):
  fake.find("org/name")
  monkeypatch.setattr(registry, "CONVERSION", 99)
  fake.find("org/name")
  assert len(fake.downloads) == 2
  assert len(list((fake.cache / "sam3-jax/hub/org--name").glob(f"{A}-*"))) == 2


def test_entry_of_an_earlier_version_is_noted(fake):
  old = fake.cache / "sam3-jax" / "org--name"
  old.mkdir(parents=True)
  (old / "manifest.json").write_text("{}")
  notes = []
  fake.find("org/name", note=notes.append)
  assert notes == [
    f"{old} was made by an earlier version from an unknown commit; it is no longer used and may be "
    "removed."
  ]


def test_one_process_converts_and_the_others_wait(fake, monkeypatch):
  monkeypatch.setattr(registry, "POLL_SECONDS", 0.01)
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
  assert all("waiting for process" in line and "to convert hf://org/name" in line for line in notes)
  assert not list(fake.cache.rglob("*.lease"))


def test_unwritable_cache_is_one_line(fake):
  (fake.cache / "sam3-jax").write_text("")
  with pytest.raises(ValueError, match=r"^cannot write to .*/hub/org--name: .*set XDG_CACHE_HOME"):
    fake.find("org/name")


def test_file_is_not_a_checkpoint(tmp_path):
  (tmp_path / "sam3.pt").write_text("")
  with pytest.raises(ValueError, match=r"sam3.pt is a file, but .*`sam3-jax convert .*sam3.pt OUT"):
    registry.find_checkpoint(tmp_path / "sam3.pt")


def test_download_without_home_directory_is_one_line(monkeypatch):
  def fail():
    raise RuntimeError("Could not determine home directory.")

  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setattr(Path, "home", fail)
  with pytest.raises(ValueError, match=r"no home directory to cache hf://a/b in; set XDG"):
    registry.find_checkpoint("hf://a/b")
