"""Whether a bundle's files are those that were written: no bit flipped, none cut, lost or swapped.

`SHA256SUMS` has the checksum of every file, manifest.json the sizes of those of Orbax and the
checksum of every tensor. Opening a bundle compares all small files, and the sizes and names of all;
`verify` compares all files.

Bundles of earlier versions have no SHA256SUMS: their manifest has checksums of the files in
params/, and nothing has any of config.json, tokenizer.model and unread/.

Plain Orbax may write an item again, which renames all its data files. Such an item is left to the
checksums of its tensors.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import checksums
from sam3_jax.checkpoint.orbax_items import REST, read_array, read_item
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.param_tree import describe, flatten, raise_faults
from sam3_jax.utils.paths import file_sizes

OWN = ("config.json", "manifest.json", "tokenizer.model")  # read whole whenever a bundle is opened
FINGERPRINT = "fingerprint.json"
INDEX = 2**20  # bytes below which a file may be an index of Orbax's, and is compared before use
ADD = "--add-checksums"  # of `sam3-jax inspect`
_ARRAYS = ("params/", "unread/")


@dataclasses.dataclass(frozen=True)
class OwnFiles:
  """What was read of a bundle before its arrays.

  Attributes:
    data: the content of each of `OWN`, compared with its checksum if there is one.
    sums: the checksums of SHA256SUMS by path; None if there is no such file.
  """

  data: dict[str, bytes]
  sums: dict[str, str] | None

  def json(self, path: Path, name: str) -> dict[str, Any]:
    """An object; ValueError if the file holds something else."""
    try:
      values = parse(self.data[name], "it", allow_nan=True)  # figures in `info` may be NaN
    except ValueError as error:
      raise ValueError(
        f"{path / name} is not readable JSON ({error!s:.200}); convert the weights again."
      ) from error
    if not isinstance(values, dict):
      raise ValueError(f"{path / name} must hold an object; convert the weights again.")
    return values


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What became of a bundle's checksums.

  Attributes:
    files: files that have one.
    compared: how many of them were compared.
    tensors: how many tensors were compared.
    missing: files of the bundle that have none; folders beside it end with a stroke.
    rewritten: items that Orbax has written again.
  """

  files: int
  compared: int
  tensors: int
  missing: tuple[str, ...]
  rewritten: tuple[str, ...]


def read_own(path: Path, *, trust: bool = False) -> OwnFiles:
  """Reads the files that say what a bundle is, each once, and compares them.

  Args:
    path: the bundle's folder, in which they exist.
    trust: take them as they are, whatever SHA256SUMS says.

  Raises:
    ValueError: a file cannot be read or differs from its checksum, or SHA256SUMS is damaged.
  """
  data, faults = {}, []
  for name in OWN:
    try:
      data[name] = (path / name).read_bytes()
    except OSError as error:
      faults.append(f"{path / name} cannot be read: {error_text(error)}")
  raise_faults(faults, f"{path} cannot be read")
  if trust:
    return OwnFiles(data, None)
  try:
    sums = checksums.read(path)
  except ValueError as error:
    raise ValueError(f"{error} {_remedy(path)}") from error
  for name, content in data.items() if sums is not None else ():
    if sums and name in sums:
      if hashlib.sha256(content).hexdigest() != sums[name]:
        faults.append(f"{path / name} differs from its checksum")
    else:
      faults.append(f"{checksums.FILE} does not list {name}")
  raise_faults(faults, f"{path} is damaged", _remedy(path))
  return OwnFiles(data, sums)


def compare(
  path: Path,
  own: OwnFiles,
  manifest: Mapping[str, Any],
  *,
  verify: bool = False,
  tensors: bool = False,
  progress: Callable[[float], None] | None = None,
) -> Comparison:
  """Compares a bundle's files with what was written.

  Args:
    path: the bundle's folder.
    own: as `read_own` returned it.
    manifest: of the bundle, checked.
    verify: compare all files, and the tensors of those that have no checksum; otherwise those alone
      that are read whole, or are small.
    tensors: compare all tensors too.
    progress: is told which fraction of the files' bytes was read.

  Raises:
    ValueError: one differs, is missing, or was added; the message names all, and the tensors that a
      damaged file spoils.
  """
  if own.sums is None and "checksums_file" in manifest:
    raise ValueError(f"{path} is damaged: {checksums.FILE} is missing. {_remedy(path)}")
  complete = own.sums is not None
  sums = own.sums if own.sums is not None else _of_manifest(manifest, "checksums")
  found, sizes = _array_files(path), _of_manifest(manifest, "files")
  sizes |= {f"unread/{name}": size for name, size in manifest.get("unread_files", {}).items()}
  rewritten = _find_rewritten(sums, found)
  kept = {name: size for name, size in found.items() if _root(name) not in rewritten}
  wanted = {name for name in {*sums, *sizes} if name.startswith(_ARRAYS)}
  wanted = {name for name in wanted if _root(name) not in rewritten}
  faults = [f"{path / name} is missing" for name in sorted(wanted - kept.keys())]
  faults += [
    f"{path / name} has {size:,} bytes, expected {sizes[name]:,}"
    for name, size in kept.items()
    if size != sizes.get(name, size)
  ]
  raise_faults(faults, f"{path} is only part of what was written", _remedy(path))
  if complete:
    faults = [f"{path / name} was added" for name in kept if name not in sums]
    raise_faults(faults, f"{path} is damaged", _remedy(path))
  names = [name for name in kept if name in sums and (verify or kept[name] < INDEX)]
  names += [name for name in sums if _beside(name) and (verify or name == FINGERPRINT)]
  faults = checksums.compare(path, {name: sums[name] for name in names}, progress)
  if faults and verify:
    faults += _find_spoiled(path, manifest, faults)
  raise_faults(faults, f"{path} is damaged", _remedy(path))
  roots = {_root(f"params/{item}/") for item in manifest["items"]}
  roots |= {"unread"} if manifest["unread"] else set()
  if not tensors:
    roots = (rewritten if complete else roots) if verify else set()
  compared = compare_tensors(path, manifest, roots)
  read = len(names) + (len(OWN) if complete else 0)
  files = sum(name in OWN or _beside(name) or name in kept for name in sums)
  return Comparison(files, read, compared, _without(path, own, kept), tuple(sorted(rewritten)))


def compare_tensors(
  path: Path, manifest: Mapping[str, Any], folders: set[str] | None = None
) -> int:
  """Reads the tensors in Orbax's folders, all if None are given; ValueError names those that differ
  from their checksums. Returns their number."""
  faults, count = [], 0
  unread = set(manifest["unread"])  # missing parameters are found when the checkpoint is opened
  for folder, entries in _folders(manifest):
    if folders is None or folder in folders:
      arrays = flatten(read_item(path / folder))
      faults += _different(arrays, entries)
      if folder == "unread":
        faults += [f"{name} is missing" for name in sorted(unread - arrays.keys())]
      count += len(arrays)
  raise_faults(faults, f"{path} is damaged")
  return count


def read_compared(folder: Path, entries: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """The arrays of an Orbax item by path; ValueError names those that differ."""
  arrays = flatten(read_item(folder))
  raise_faults(_different(arrays, entries), f"{folder} is damaged")
  return arrays


def _remedy(path: Path) -> str:
  return (
    "Convert or copy the checkpoint again; if you changed it on purpose, run "
    f"`sam3-jax inspect {path} {ADD}`."
  )


def _folders(manifest: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
  folders = [(f"params/{item}", manifest["parameters"]) for item in manifest["items"]]
  return [*folders, ("unread", manifest["unread"])] if manifest["unread"] else folders


def _different(arrays: Mapping[str, np.ndarray], entries: Mapping[str, Any]) -> list[str]:
  return [
    f"{name} differs from its checksum"
    for name, array in arrays.items()
    if name not in entries or describe(array)["sha256"] != entries[name].get("sha256")
  ]


def _array_files(path: Path) -> dict[str, int]:
  """Sizes of the files that Orbax wrote, by their paths from the bundle."""
  return {
    f"{folder}{name}": size
    for folder in _ARRAYS
    for name, size in file_sizes(path / folder).items()
  }


def _of_manifest(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
  """What the manifest says of the files of each item, by their paths from the bundle."""
  return {
    f"params/{item}/{name}": value
    for item, values in manifest.get(key, {}).items()
    for name, value in values.items()
  }


def _root(name: str) -> str:
  """The folder of Orbax's that a file is in."""
  return "/".join(name.split("/")[: 2 if name.startswith("params/") else 1])


def _beside(name: str) -> bool:
  return name not in OWN and not name.startswith(_ARRAYS)


def _find_rewritten(sums: Mapping[str, str], found: Mapping[str, int]) -> set[str]:
  """The folders that Orbax has written again: all their data files have other names."""

  def data_files(names: Mapping[str, Any]) -> dict[str, set[str]]:
    folders: dict[str, set[str]] = {}
    for name in names:
      if name.startswith(_ARRAYS) and name.split("/")[-2] == "d":
        folders.setdefault(_root(name), set()).add(name)
    return folders

  listed, there = data_files(sums), data_files(found)
  return {root for root in listed.keys() & there.keys() if not listed[root] & there[root]}


def _find_spoiled(path: Path, manifest: Mapping[str, Any], faults: list[str]) -> list[str]:
  """The tensors that damaged files spoil, read one by one: Orbax would stop at the first.

  A damaged file may spoil none: an index that Orbax does not need, or bytes that nothing uses.
  """
  items, spoiled = manifest["items"], []
  for item in items:
    folder = path / "params" / item
    if not any(fault.startswith(f"{folder}/") for fault in faults):
      continue
    for name, entry in manifest["parameters"].items():
      part = name.partition("/")[0]
      if item == (part if part in items else REST):
        array = read_array(folder, name)
        if array is None or describe(array)["sha256"] != entry["sha256"]:
          spoiled.append(f"{name} differs from its checksum")
  return spoiled


def _without(path: Path, own: OwnFiles, kept: Mapping[str, int]) -> tuple[str, ...]:
  """What has no checksum."""
  listed = own.sums if own.sums is not None else {}
  names = [name for name in kept if name not in listed and own.sums is not None]
  names += [name for name in OWN if name not in listed]
  for one in path.iterdir():
    if one.name.startswith("."):
      continue
    if one.is_dir():
      if f"{one.name}/" not in _ARRAYS and not any(n.startswith(f"{one.name}/") for n in listed):
        names.append(f"{one.name}/")
    elif one.name not in (*OWN, checksums.FILE) and one.name not in listed:
      names.append(one.name)
  return tuple(sorted(names))
