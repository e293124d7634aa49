"""Writing a checkpoint is all or nothing: refusals, failures, and concurrent writers."""

import contextlib
import errno
import os
import shutil
import threading
import time

import bundle_files
import jax
import numpy as np
import pytest
from bundle_files import SCALE, TOKENIZER
from golden_model import CONFIG, parameters, visual_parameters

from sam3_jax.checkpoint import bundle, checksums, writer
from sam3_jax.utils.param_tree import flatten, nest

saved = bundle_files.saved


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda flat: flat.pop(SCALE), f"{SCALE} is missing"),
    (lambda flat: flat.update(x=np.ones(3, np.float32)), "x is unknown"),
    (
      lambda flat: flat.update({SCALE: np.ones((64, 1), np.float32)}),
      r"\[64, 1\], expected \[64\]",
    ),
    (lambda flat: flat.update({SCALE: np.ones(64)}), f"{SCALE} is float64; expected one of"),
    (lambda flat: flat.update({SCALE: np.full(64, np.nan, np.float32)}), "not finite"),
  ],
)
def test_save_refuses_parameters_that_do_not_fit(tmp_path, change, match):
  flat = flatten(parameters())
  change(flat)
  with pytest.raises(ValueError, match=match):
    bundle.save(tmp_path / "x", nest(flat), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", [b"", b"junk", bytes(1000)])
def test_save_refuses_invalid_tokenizer(tmp_path, model):
  with pytest.raises(ValueError, match="the given bytes is not a SentencePiece model") as caught:
    bundle.save(tmp_path / "x", parameters(), CONFIG, model)
  assert "\n" not in str(caught.value)
  assert not any(tmp_path.iterdir())


def test_save_to_existing_or_unwritable_path(saved, tmp_path):
  before = sorted(saved.rglob("*"))
  with pytest.raises(ValueError, match="exists already; give another path"):
    bundle.save(saved, parameters(), CONFIG, TOKENIZER)
  assert sorted(saved.rglob("*")) == before
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "x"):
    with pytest.raises(ValueError, match=r"exists already|cannot write to"):
      bundle.save(path, parameters(), CONFIG, TOKENIZER)
  (tmp_path / "empty").mkdir()
  bundle.save(tmp_path / "empty", parameters(), CONFIG, TOKENIZER)
  bundle.save(tmp_path / "deep" / "er", parameters(), CONFIG, TOKENIZER)
  assert bundle.load(tmp_path / "deep" / "er").config == CONFIG


def test_unfinished_writer_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), writer.Writer(tmp_path / "x") as unfinished:  # noqa: PT012
    unfinished.add("trunk", {"a": np.ones(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] != ["x"]
    raise KeyError
  assert not any(tmp_path.iterdir())


def test_too_little_disk_space(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
  monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
  needed = sum(x.nbytes for x in jax.tree.leaves(parameters())) // 1_000_000 + 1
  with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: {needed} MB needed, 10 MB f"):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


def test_failed_write_leaves_nothing_and_names_the_checkpoint(tmp_path, monkeypatch):
  def late(folder):
    for i in range(20):
      folder.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):
        (folder / str(i)).write_text("late")
      time.sleep(0.02)

  def save_item(folder, tree):
    threading.Thread(target=late, args=[folder]).start()
    raise ValueError(f"{folder} cannot be written")

  monkeypatch.setattr(writer, "save_item", save_item)
  with pytest.raises(ValueError, match=f"^{tmp_path}/x/params/rest cannot be written$"):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())
  time.sleep(0.5)
  assert not any(tmp_path.iterdir())


def test_full_disk_at_the_last_files(tmp_path, monkeypatch):
  def full(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

  monkeypatch.setattr(checksums, "write", full)
  with pytest.raises(
    ValueError, match=f"^cannot write {tmp_path}/x: No space left on device; free some space.$"
  ):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path):
  """Keeps other folders, and what an earlier version is writing without a lease."""
  token = "01234567-1-2-89abcdef"
  names = f".x.{token}.partial", ".x.1.abcdefgh.partial", ".x.2.abcdefgh.partial"
  others = f".y.{token}.partial", f".x.y.{token}.partial", ".x.partial"
  for name in (*names, *others):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
  for path in (tmp_path / names[1], tmp_path / names[1] / "config.json"):
    os.utime(path, (0, 0))
  with writer.Writer(tmp_path / "x"):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[2], *others])


def test_only_one_process_writes_a_folder(tmp_path):
  with writer.NewFolder(tmp_path / "x") as first:
    with pytest.raises(
      ValueError, match=f"x is being written by process {os.getpid()} on .*; wait"
    ):
      writer.NewFolder(tmp_path / "x")
    writer.NewFolder(tmp_path / "y").__exit__()
    (first.temporary / "a").write_text("1")
    first.appear()
  assert [path.name for path in tmp_path.rglob("*")] == ["x", "a"]


def test_stale_lease_of_another_host_is_taken_over(tmp_path):
  slow = writer.NewFolder(tmp_path / "x")
  lease = tmp_path / ".x.lease"
  lease.write_text(lease.read_text().replace('"system": "', '"system": "elsewhere '))
  os.utime(lease, (0, 0))
  with writer.NewFolder(tmp_path / "x") as fast:
    assert not slow.temporary.exists()
    fast.appear()
  slow.temporary.mkdir()
  with pytest.raises(ValueError, match=r"another process took over writing .*x"):
    slow.appear()
  slow.__exit__()
  assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_another_process_created_the_folder(tmp_path):
  with writer.NewFolder(tmp_path / "x") as folder:
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another process wrote .*x"):
      folder.appear()
  assert [path.name for path in tmp_path.rglob("*")] == ["x", "y"]


@pytest.mark.slow
def test_incomplete_head_for_visual_prompts(tmp_path):
  half = {name: x for name, x in visual_parameters().items() if name != "no_memory"}
  with pytest.raises(ValueError, match=r"1 fault: visual/no_memory is missing\."):
    bundle.save(tmp_path / "x", parameters() | {"visual": half}, CONFIG, TOKENIZER)
  assert not list(tmp_path.iterdir())
