"""Writes checkpoints and other directories that appear only when they are complete."""

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
OWN_ITEM = 256 * 2**20  # bytes: a part of this size or more is an item; the others share one


class NewFolder:
  """A directory that is written under a temporary name until it is complete.

  with NewFolder(path) as folder:
    with folder.under_its_name():
      ...  # write into folder.temporary
      folder.appear()

  Leaving the context without `appear` removes the directory. A killed process leaves nothing under
  the final name. A lease lets one process at a time write a directory, on any host; other temporary
  directories of the same name are leftovers of killed processes, and are removed.

  In a bucket nothing can be renamed. With `in_bucket`, the directory is written under its own name,
  and the file written last marks it as complete.

  Attributes:
    temporary: the directory to write into.
  """

  def __init__(self, path: str | Path, *, in_bucket: bool = False):
    if not in_bucket:
      require_local(path, "the output")
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

  def check_space(self, needed: int) -> None:
    """Raises ValueError unless `needed` bytes are free."""
    if is_remote(self._path):
      return
    free = shutil.disk_usage(self.temporary).free
    if needed > free:
      raise ValueError(
        f"cannot write to {self._path.parent}: {math.ceil(needed / 1e6):,} MB needed, "
        f"{math.floor(free / 1e6):,} MB free; free some space, or give a path on another disk."
      )

  def appear(self) -> None:
    """Syncs the directory to disk and renames it to its final name."""
    self._appeared = True
    if is_remote(self._path):
      return
    _sync(self.temporary)
    if not self._lease.held:
      raise ValueError(
        f"{self._lease.holder() or 'another process'} took over writing {self._path} while this "
        "process did not respond; wait for it to end, or give another path."
      )
    try:
      os.rename(self.temporary, self._path)
    except OSError as error:
      if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        raise
      raise ValueError(f"another process wrote {self._path}; give another path.") from error
    sync_directory(self._path.parent)

  @contextlib.contextmanager
  def under_its_name(self):
    """Replaces the temporary name in error messages by the final one."""
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

  Leaving the context without `finish` removes it. A killed process leaves nothing that loads.
  """

  def __init__(self, path: str | Path):
    super().__init__(path, in_bucket=True)
    self._parameters: dict[str, Any] = {}
    self._items: list[str] = []
    self._rest: dict[str, Any] = {}

  def add(self, part: str, tree: Mapping[str, Any]) -> None:
    """Adds a top-level part of the tree, of NumPy arrays; writes a large one at once."""
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
    """Writes the rest of the checkpoint and makes it appear.

    Args:
      config: sizes of the model; the caller has compared the parameters with it.
      tokenizer: bytes of a SentencePiece model.
      info: metadata; see `bundle.save`.
      unread: tensors to keep beside the parameters, by name.
      unread_reasons: why the model does not read them.
      dropped: shape, dtype and reason of the source's tensors that are not kept.
      source_tensors: see `inspection.Summary`.
      verify: reads all tensors back first and compares the checksums.
      run: called with the complete checkpoint before it appears; may add a file.
    """
    if self._rest:
      self._save(REST, self._rest)
    if unread:
      self._write("unread", dict(unread))
    manifest = self._manifest(config, unread or {}, unread_reasons or {})
    manifest |= {"dropped": dropped or {}, "source_tensors": source_tensors or {}}
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

  def _manifest(
    self, config: Config, unread: Mapping[str, np.ndarray], reasons: Mapping[str, str]
  ) -> dict[str, Any]:
    """The manifest, except for the source's tensors."""
    params = self.temporary / "params"
    return {
      "format_version": FORMAT_VERSION,
      "items": self._items,
      "parameters": self._parameters,
      "fits": seal(config, {name: entry["shape"] for name, entry in self._parameters.items()}),
      "unread": {
        name: {**describe(array), "reason": reasons.get(name, "")} for name, array in unread.items()
      },
      "dropped": {},
      "source_tensors": {},
      "files": {item: file_sizes(params / item) for item in self._items},
      "unread_files": file_sizes(self.temporary / "unread"),
      "checksums_file": checksums.FILE,
    }

  def _save(self, item: str, tree: dict[str, Any]) -> None:
    self._write(f"params/{item}", tree)
    self._items.append(item)

  def _write(self, folder: str, tree: dict[str, Any]) -> None:
    """Writes an Orbax item after checking the space, as Orbax fails in many threads otherwise."""
    needed = sum(array.nbytes for array in flatten(tree).values())
    with self.under_its_name():
      self.check_space(needed)
      save_item(self.temporary / folder, tree)


def seal(config: Config, shapes: Mapping[str, Sequence[int]]) -> str:
  """A digest that marks shapes as compared with the model.

  It saves a reader the second that tracing the model for its shapes takes.
  """
  text = json.dumps([config.to_dict(), sorted((name, list(shapes[name])) for name in shapes)])
  return hashlib.sha256(text.encode()).hexdigest()


def _remove_leftovers(parent: Path, name: str, now: float) -> None:
  """Removes temporary directories of killed processes; the caller holds the lease.

  Versions without leases named such directories after their process. Those are removed if they were
  not modified for a while before `now`, by the file system's clock.
  """
  tag = r"([0-9a-f]{8}-\d+-\d+-[0-9a-f]{8}|\d+\.\w{8})"
  ours = re.compile(re.escape(f".{name}.") + tag + re.escape(PARTIAL))
  for folder in parent.glob(f".{glob.escape(name)}.*{PARTIAL}"):
    match = ours.fullmatch(folder.name)
    if match and folder.is_dir() and ("." not in match[1] or _age(folder, now) > STALE):
      shutil.rmtree(folder, ignore_errors=True)


def _age(folder: Path, now: float) -> float:
  """Seconds since anything in a directory was modified."""
  try:
    return now - max(path.lstat().st_mtime for path in [folder, *folder.rglob("*")])
  except OSError:  # another process changes it
    return 0.0


def _sync(folder: Path) -> None:
  """Syncs all files of a directory to disk."""
  for path in folder.rglob("*"):
    if path.is_file():
      with path.open("rb") as file:
        sync(file.fileno())
    else:
      sync_directory(path)
  sync_directory(folder)
