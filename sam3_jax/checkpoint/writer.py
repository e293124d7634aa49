"""Writes a checkpoint, or another folder, so that it appears only when it is complete."""

import contextlib
import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sam3_jax.checkpoint import checksums
from sam3_jax.checkpoint.integrity import compare_tensors
from sam3_jax.checkpoint.orbax_items import REST, save_item
from sam3_jax.config import Config
from sam3_jax.utils.atomic_files import json_bytes, sync
from sam3_jax.utils.lease import PARTIAL, STALE, Lease, draft_path, sync_directory
from sam3_jax.utils.os_errors import reason
from sam3_jax.utils.param_tree import describe, flatten
from sam3_jax.utils.paths import exists, file_sizes, is_remote, require_local, resolve_path

FORMAT_VERSION = 1
OWN_ITEM = 256 * 2**20  # bytes from which on a part is an item, so that small bundles are few files


class NewFolder:
  """A folder that is filled under another name, `temporary`, until it is complete.

  with NewFolder(path) as folder:
    with folder.under_its_name():
      ...  # write into folder.temporary
      folder.appear()

  Leaving without `appear` leaves nothing behind, and a killed process nothing under that name. One
  process at a time, on whichever host, may write a folder: it holds a lease, so what else lies
  there under such names is left by processes that were killed, and is removed.

  In a bucket, where nothing can be renamed, it is filled under its own name, and what is written
  last says that it is complete: only `in_bucket` allows that.
  """

  def __init__(self, path: str | Path, *, in_bucket: bool = False):
    if not in_bucket:
      require_local(path, "what is written")
    self._path, self._appeared = resolve_path(path), False
    if exists(self._path) and not (self._path.is_dir() and not any(self._path.iterdir())):
      raise ValueError(f"{self._path} exists already; give another path, or remove it first.")
    if is_remote(self._path):
      self.temporary = self._path
      return
    parent, name = self._path.parent, self._path.name
    self._lease = Lease(parent / f".{name}.lease")
    self.temporary = draft_path(self._path)
    try:
      if not self._lease.acquire():
        holder = self._lease.holder() or "another process"
        raise ValueError(
          f"{self._path} is being written by {holder}; wait for it to end, or give another path."
        )
      try:
        now = self._lease.path.stat().st_mtime
        _remove_leftovers(parent, name, now)
        self.temporary.mkdir()
      except BaseException:
        self._lease.release()
        raise
    except OSError as error:
      raise ValueError(f"cannot write to {parent}: {reason(error)}.") from error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if is_remote(self._path):
      if not self._appeared and self._path.exists():
        rmtree: Any = self._path
        rmtree.rmtree(missing_ok=True)
      return
    try:
      for _ in range(100):
        if not self.temporary.exists():
          return
        shutil.rmtree(self.temporary, ignore_errors=True)
        time.sleep(0.1)  # Orbax's threads write on for a while after one of them has failed
    finally:
      self._lease.release()

  def check_room(self, needed: int) -> None:
    """Raises ValueError unless so many bytes are free."""
    if is_remote(self._path):
      return
    free = shutil.disk_usage(self.temporary).free
    if needed > free:
      raise ValueError(
        f"cannot write to {self._path.parent}: {math.ceil(needed / 1e6):,} MB needed, "
        f"{math.floor(free / 1e6):,} MB free; make room, or give a path on another disk."
      )

  def appear(self) -> None:
    """Makes the folder safe from a power cut, and gives it its name."""
    self._appeared = True
    if is_remote(self._path):
      return
    _sync(self.temporary)
    if not self._lease.held:
      raise ValueError(
        f"{self._path} was taken over by {self._lease.holder() or 'another process'} while this "
        "process did not respond; it is theirs to write."
      )
    try:
      os.rename(self.temporary, self._path)
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise
      raise ValueError(f"{self._path} has appeared meanwhile; give another path.") from error
    sync_directory(self._path.parent)

  @contextlib.contextmanager
  def under_its_name(self):
    """Turns errors into one line that names the folder rather than the temporary one."""
    try:
      yield
    except OSError as error:
      raise ValueError(f"cannot write {self._path}: {reason(error)}.") from error
    except ValueError as error:
      raise ValueError(str(error).replace(str(self.temporary), str(self._path))) from error


class Writer(NewFolder):
  """Writes a checkpoint part by part.

  with Writer(path) as writer:
    for part in parts:
      writer.add(part, tree)
    writer.finish(config, tokenizer, info=info)

  Leaving without `finish` leaves nothing behind, and a killed process nothing that loads.
  """

  def __init__(self, path: str | Path):
    super().__init__(path, in_bucket=True)
    self._parameters: dict[str, Any] = {}
    self._items: list[str] = []
    self._rest: dict[str, Any] = {}

  def add(self, part: str, tree: Mapping[str, Any]) -> None:
    """Takes a top-level part of the tree, NumPy arrays; a large one is written at once."""
    flat = flatten(tree, f"{part}/")
    self._parameters |= {name: describe(array) for name, array in flat.items()}
    if sum(array.nbytes for array in flat.values()) < OWN_ITEM:
      self._rest[part] = tree
    else:
      self._save(part, {part: tree})

  def finish(
    self,
    config: Config,
    tokenizer: bytes,
    *,
    info: Mapping[str, Any],
    unread: Mapping[str, np.ndarray] | None = None,
    unread_reasons: Mapping[str, str] | None = None,
    dropped: Mapping[str, Mapping[str, Any]] | None = None,
    source_tensors: Mapping[str, Any] | None = None,
    verify: bool = False,
    run: Callable[[Path], None] | None = None,
  ) -> None:
    """Writes what is left and makes the checkpoint appear.

    Args:
      config: the model's, with which the caller has compared the parameters.
      tokenizer: the bytes of a SentencePiece model.
      info: what it should say of itself; see `save`.
      unread: tensors to keep beside the parameters, by name.
      unread_reasons: why nothing reads them.
      dropped: shape, dtype and reason of the source's tensors that are not kept.
      source_tensors: see `Summary`.
      verify: read everything back and compare the checksums before that.
      run: tries the complete checkpoint before it appears, and may put a file into it.
    """
    if self._rest:
      self._save(REST, self._rest)
    if unread:
      self._write("unread", dict(unread))
    reasons, params = unread_reasons or {}, self.temporary / "params"
    manifest = {
      "format_version": FORMAT_VERSION,
      "items": self._items,
      "parameters": self._parameters,
      "fits": fit(config, {name: entry["shape"] for name, entry in self._parameters.items()}),
      "unread": {
        name: {**describe(array), "reason": reasons.get(name, "")}
        for name, array in (unread or {}).items()
      },
      "dropped": dropped or {},
      "source_tensors": source_tensors or {},
      "files": {item: file_sizes(params / item) for item in self._items},
      "unread_files": file_sizes(self.temporary / "unread"),
      "checksums_file": checksums.FILE,
    }
    settings = {
      "format_version": FORMAT_VERSION,
      "info": dict(info),
      "model": config.to_dict(),
    }
    with self.under_its_name():
      (self.temporary / "tokenizer.model").write_bytes(tokenizer)
      (self.temporary / "config.json").write_bytes(json_bytes(settings, indent=1, allow_nan=True))
      (self.temporary / "manifest.json").write_bytes(json_bytes(manifest, indent=1))
      if verify:
        compare_tensors(self.temporary, manifest)
      sums = checksums.write(self.temporary)
      if run:
        run(self.temporary)
        checksums.write(self.temporary, sums)
      self.appear()

  def _save(self, item: str, tree: dict[str, Any]) -> None:
    self._write(f"params/{item}", tree)
    self._items.append(item)

  def _write(self, folder: str, tree: dict[str, Any]) -> None:
    """Writes an Orbax item, if there is room for it: Orbax meets a full disk in many threads."""
    needed = sum(array.nbytes for array in flatten(tree).values())
    with self.under_its_name():
      self.check_room(needed)
      save_item(self.temporary / folder, tree)


def fit(config: Config, shapes: Mapping[str, Sequence[int]]) -> str:
  """A seal on parameters that were compared with their model, so that a reader that finds it
  unbroken need not trace the model again, for a second, to know what shapes they must have."""
  text = json.dumps([config.to_dict(), sorted((name, list(shapes[name])) for name in shapes)])
  return hashlib.sha256(text.encode()).hexdigest()


def _remove_leftovers(parent: Path, name: str, now: float) -> None:
  """Removes what killed processes left of the same folder; the caller holds its lease.

  Versions before leases wrote without one, into folders named after their process: those are
  removed if they were not modified for a while before `now`, by the file system's clock.
  """
  tag = r"([0-9a-f]{8}-\d+-\d+-[0-9a-f]{8}|\d+\.\w{8})"
  ours = re.compile(re.escape(f".{name}.") + tag + re.escape(PARTIAL))
  for folder in parent.glob(f".{glob.escape(name)}.*{PARTIAL}"):
    match = ours.fullmatch(folder.name)
    if match and folder.is_dir() and ("." not in match[1] or _age(folder, now) > STALE):
      shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path, now: float) -> float:
  """Seconds since anything in a folder was modified."""
  try:
    return now - max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])
  except OSError:  # someone is at work in it
    return 0.0


def _sync(folder: Path) -> None:
  """Makes a folder's files safe from a power cut."""
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        sync(file.fileno())
    else:
      sync_directory(path)
  sync_directory(folder)
