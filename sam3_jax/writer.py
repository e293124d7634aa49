"""Writes a checkpoint, or another folder, so that it appears only when it is complete."""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sam3_jax.config import Config
from sam3_jax.items import read_array, read_item, save_item
from sam3_jax.places import exists, file_sizes, is_remote, place, require_local
from sam3_jax.trees import flatten, raise_faults

FORMAT_VERSION = 1
OWN_ITEM = 256 * 2**20  # bytes from which on a part is an item, so that small bundles are few files
REST = "rest"  # the item of all parts that are none
_PARTIAL = ".partial"


class NewFolder:
  """A folder that is filled under another name, `temporary`, until it is complete.

  with NewFolder(path) as folder:
    with folder.under_its_name():
      ...  # write into folder.temporary
      folder.appear()

  Leaving without `appear` leaves nothing behind, and a killed process nothing under that name.

  In a bucket, where nothing can be renamed, it is filled under its own name, and what is written
  last says that it is complete: only `in_bucket` allows that.
  """

  def __init__(self, path: str | Path, *, in_bucket: bool = False):
    if not in_bucket:
      require_local(path, "what is written")
    self._path, self._appeared = place(path), False
    if exists(self._path) and not (self._path.is_dir() and not any(self._path.iterdir())):
      raise ValueError(f"{self._path} exists already; give another path, or remove it first.")
    if is_remote(self._path):
      self.temporary = self._path
      return
    parent, name = self._path.parent, self._path.name
    try:
      parent.mkdir(parents=True, exist_ok=True)
      _remove_leftovers(parent, name)
      self.temporary = Path(tempfile.mkdtemp(_PARTIAL, f".{name}.{os.getpid()}.", parent))
    except OSError as error:
      raise ValueError(f"cannot write to {parent}: {error.strerror}.") from error

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    if is_remote(self._path):
      if not self._appeared and self._path.exists():
        rmtree: Any = self._path
        rmtree.rmtree(missing_ok=True)
      return
    for _ in range(100):
      if not self.temporary.exists():
        return
      shutil.rmtree(self.temporary, ignore_errors=True)
      time.sleep(0.1)  # Orbax's threads write on for a while after one of them has failed

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
    self.temporary.chmod(0o755)  # mkdtemp's are for the owner alone
    os.rename(self.temporary, self._path)

  @contextlib.contextmanager
  def under_its_name(self):
    """Turns errors into one line that names the folder rather than the temporary one."""
    try:
      yield
    except OSError as error:
      raise ValueError(f"cannot write {self._path}: {error.strerror}.") from error
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
    self._parameters |= {name: _describe(array) for name, array in flat.items()}
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
    files = {item: file_sizes(params / item) for item in self._items}
    manifest = {
      "format_version": FORMAT_VERSION,
      "items": self._items,
      "parameters": self._parameters,
      "fits": fit(config, {name: entry["shape"] for name, entry in self._parameters.items()}),
      "unread": {
        name: {**_describe(array), "reason": reasons.get(name, "")}
        for name, array in (unread or {}).items()
      },
      "dropped": dropped or {},
      "source_tensors": source_tensors or {},
      "files": files,
      "checksums": {
        item: {name: file_checksum(params / item / name) for name in sizes}
        for item, sizes in files.items()
      },
    }
    settings = {
      "format_version": FORMAT_VERSION,
      "info": dict(info),
      "model": config.to_dict(),
    }
    with self.under_its_name():
      (self.temporary / "tokenizer.model").write_bytes(tokenizer)
      _write_json(self.temporary / "config.json", settings)
      _write_json(self.temporary / "manifest.json", manifest)
      if verify:
        compare_checksums(self.temporary, manifest)
      if run:
        run(self.temporary)
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


def file_checksum(path: Path) -> str:
  """SHA-256 of a file."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def compare_checksums(path: Path, manifest: Mapping[str, Any]) -> None:
  """Reads every stored tensor; ValueError names those that differ from their checksums."""
  faults = find_damage(path, manifest)
  if not faults:
    for folder, entries in _folders(path, manifest):
      faults += _different(flatten(read_item(folder)), entries)
  raise_faults(faults, f"{path} is damaged")


def find_damage(path: Path, manifest: Mapping[str, Any]) -> list[str]:
  """The parameters' files that differ from their checksums, and the tensors that these spoil.

  It finds what no tensor shows: an index in which a bit was flipped, or bytes that nothing uses. An
  item that Orbax has written again has files of other names, and is left to its tensors.
  """
  tensors, files = [], []
  items = manifest["items"]
  for item, wanted in manifest.get("checksums", {}).items():
    folder = path / "params" / item
    known = item in items and re.fullmatch(r"\w+", item)
    if not known or file_sizes(folder).keys() != wanted.keys():
      continue
    differing = find_differing(folder, wanted)
    files += differing
    for name, entry in manifest["parameters"].items() if differing else ():
      part = name.partition("/")[0]
      if item == (part if part in items else REST):
        array = read_array(folder, name)
        if array is None or _describe(array)["sha256"] != entry.get("sha256"):
          tensors.append(f"{name} differs from its checksum")
  return files + tensors


def find_differing(folder: Path, wanted: Mapping[str, str]) -> list[str]:
  """What is wrong with a folder's files, by their checksums."""
  faults = []
  for name, checksum in wanted.items():
    try:
      if file_checksum(folder / name) != checksum:
        faults.append(f"{folder / name} differs from its checksum")
    except OSError as error:
      faults.append(f"{folder / name} cannot be read: {error.strerror}")
  return faults


def read_compared(folder: Path, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of an Orbax item by path; ValueError names those that differ."""
  arrays = flatten(read_item(folder))
  raise_faults(_different(arrays, entries), f"{folder} is damaged")
  return arrays


def _folders(path: Path, manifest: Mapping[str, Any]) -> list[tuple[Path, Mapping[str, Any]]]:
  folders = [(path / "params" / item, manifest["parameters"]) for item in manifest["items"]]
  return [*folders, (path / "unread", manifest["unread"])] if manifest["unread"] else folders


def _different(arrays: Mapping[str, np.ndarray], entries: Mapping[str, Any]) -> list[str]:
  return [
    f"{name} differs from its checksum"
    for name, array in arrays.items()
    if name not in entries or _describe(array)["sha256"] != entries[name].get("sha256")
  ]


def _describe(array: np.ndarray) -> dict[str, Any]:
  data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
  return {
    "shape": list(array.shape),
    "dtype": str(array.dtype),
    "sha256": hashlib.sha256(data.data).hexdigest(),
  }


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
  path.write_text(json.dumps(values, indent=1) + "\n")


def _remove_leftovers(parent: Path, name: str) -> None:
  """Removes what killed processes left of the same checkpoint."""
  for folder in parent.glob(f".{glob.escape(name)}.*{_PARTIAL}"):
    process = re.match(r"\d+", folder.name.removeprefix(f".{name}."))
    if process and not _alive(int(process[0])):
      shutil.rmtree(folder, ignore_errors=True)


def _alive(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    return True
  return True


def _sync(folder: Path) -> None:
  """Makes a folder's files safe from a power cut."""
  for path in [*folder.rglob("*"), folder]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
