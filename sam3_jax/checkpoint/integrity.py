"""Checks that the files of a bundle are unchanged: no flipped bit, no truncated or missing file.

SHA256SUMS has the checksum of every file. manifest.json has the sizes of Orbax's files and the
checksum of every tensor. Opening a bundle compares the names and sizes of all files, and the
checksums of small ones. `verify` compares all checksums.

Bundles of earlier versions have no SHA256SUMS. Their manifest has checksums of the files in
params/, but config.json, tokenizer.model and unread/ have none.

Rewriting an item with plain Orbax renames all its data files. Such an item is checked by the
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

OWN = ("config.json", "manifest.json", "tokenizer.model")  # read whenever a bundle is opened
FINGERPRINT = "fingerprint.json"
INDEX = 2**20  # bytes: smaller files may be an index of Orbax's, and are compared before use
ADD = "--add-checksums"  # of `sam3-jax inspect`
_ARRAYS = ("params/", "unread/")


@dataclasses.dataclass(frozen=True)
class OwnFiles:
  """The files of a bundle that are read before its arrays.

  Attributes:
    data: content of each of `OWN`, compared with its checksum if there is one.
    sums: checksums of SHA256SUMS by path; None if there is no such file.
  """

  data: dict[str, bytes]
  sums: dict[str, str] | None

  def json(self, path: Path, name: str) -> dict[str, Any]:
    """Parses a file as a JSON object; ValueError if it is something else."""
    try:
      values = parse(self.data[name], "it", allow_nan=True)  # metrics in `info` may be NaN
    except ValueError as error:
      raise ValueError(
        f"{path / name} is not readable JSON ({error!s:.200}); convert the weights again."
      ) from error
    if not isinstance(values, dict):
      raise ValueError(f"{path / name} must hold an object; convert the weights again.")
    return values


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Which checksums of a bundle were compared.

  Attributes:
    files: number of files with a checksum.
    compared: number of files compared.
    tensors: number of tensors compared.
    missing: files without a checksum; additional directories end with a slash.
    rewritten: items that were rewritten with plain Orbax.
  """

  files: int
  compared: int
  tensors: int
  missing: tuple[str, ...]
  rewritten: tuple[str, ...]


def read_own(path: Path, *, trust: bool = False) -> OwnFiles:
  """Reads the files `OWN`, each once, and compares their checksums.

  Args:
    path: the bundle's directory, in which they exist.
    trust: ignores SHA256SUMS.

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
  """Compares a bundle's files with SHA256SUMS and the manifest.

  Args:
    path: the bundle's directory.
    own: the result of `read_own`.
    manifest: of the bundle, checked.
    verify: compares all files, and the tensors of files without a checksum; otherwise only small
      files.
    tensors: also compares all tensors.
    progress: called with the fraction of the files' bytes that were read.

  Raises:
    ValueError: a file differs, is missing, or was added. The message names all of them, and the
      damaged tensors.
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
  raise_faults(faults, f"{path} is incomplete or damaged", _remedy(path))
  if complete:
    faults = [f"{path / name} was added" for name in kept if name not in sums]
    raise_faults(faults, f"{path} is damaged", _remedy(path))
  names = [name for name in kept if name in sums and (verify or kept[name] < INDEX)]
  names += [name for name in sums if _beside(name) and (verify or name == FINGERPRINT)]
  faults = checksums.compare(path, {name: sums[name] for name in names}, progress)
  if faults and verify:
    faults += _damaged_tensors(path, manifest, faults)
  raise_faults(faults, f"{path} is damaged", _remedy(path))
  roots = {_root(f"params/{item}/") for item in manifest["items"]}
  roots |= {"unread"} if manifest["unread"] else set()
  if not tensors:
    roots = (rewritten if complete else roots) if verify else set()
  compared = compare_tensors(path, manifest, roots)
  read = len(names) + (len(OWN) if complete else 0)
  files = sum(name in OWN or _beside(name) or name in kept for name in sums)
  return Comparison(
    files, read, compared, _without_checksum(path, own, kept), tuple(sorted(rewritten))
  )


def compare_tensors(
  path: Path, manifest: Mapping[str, Any], folders: set[str] | None = None
) -> int:
  """Compares the checksums of tensors; returns the number of tensors.

  Args:
    path: the bundle's directory.
    manifest: of the bundle, checked.
    folders: Orbax's folders to read; None for all.

  Raises:
    ValueError: tensors differ; the message names them.
  """
  faults, count = [], 0
  unread = set(manifest["unread"])  # `open_checkpoint` finds missing parameters
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
  """Reads the arrays of an Orbax item by path; raises ValueError if their checksums differ."""
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
  """Sizes of Orbax's files, by their paths from the bundle."""
  return {
    f"{folder}{name}": size
    for folder in _ARRAYS
    for name, size in file_sizes(path / folder).items()
  }


def _of_manifest(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
  """The manifest's values for the files of each item, by their paths from the bundle."""
  return {
    f"params/{item}/{name}": value
    for item, values in manifest.get(key, {}).items()
    for name, value in values.items()
  }


def _root(name: str) -> str:
  """The directory of the Orbax item that a file is in."""
  return "/".join(name.split("/")[: 2 if name.startswith("params/") else 1])


def _beside(name: str) -> bool:
  return name not in OWN and not name.startswith(_ARRAYS)


def _find_rewritten(sums: Mapping[str, str], found: Mapping[str, int]) -> set[str]:
  """The directories that were rewritten with plain Orbax: all their data files have other names."""

  def data_files(names: Mapping[str, Any]) -> dict[str, set[str]]:
    folders: dict[str, set[str]] = {}
    for name in names:
      if name.startswith(_ARRAYS) and name.split("/")[-2] == "d":
        folders.setdefault(_root(name), set()).add(name)
    return folders

  listed, present = data_files(sums), data_files(found)
  common = listed.keys() & present.keys()
  return {root for root in common if not listed[root] & present[root]}


def _damaged_tensors(path: Path, manifest: Mapping[str, Any], faults: list[str]) -> list[str]:
  """The damaged tensors, read one by one, as Orbax would stop at the first.

  A damaged file may damage no tensor: an index that Orbax does not need, or unused bytes.
  """
  items, damaged = manifest["items"], []
  for item in items:
    folder = path / "params" / item
    if not any(fault.startswith(f"{folder}/") for fault in faults):
      continue
    for name, entry in manifest["parameters"].items():
      part = name.partition("/")[0]
      if item == (part if part in items else REST):
        array = read_array(folder, name)
        if array is None or describe(array)["sha256"] != entry["sha256"]:
          damaged.append(f"{name} differs from its checksum")
  return damaged


def _without_checksum(path: Path, own: OwnFiles, kept: Mapping[str, int]) -> tuple[str, ...]:
  """Files and directories without a checksum."""
  listed = own.sums if own.sums is not None else {}
  names = [name for name in kept if name not in listed and own.sums is not None]
  names += [name for name in OWN if name not in listed]
  for child in path.iterdir():
    if child.name.startswith("."):
      continue
    if child.is_dir():
      if f"{child.name}/" not in _ARRAYS and not any(
        n.startswith(f"{child.name}/") for n in listed
      ):
        names.append(f"{child.name}/")
    elif child.name not in (*OWN, checksums.FILE) and child.name not in listed:
      names.append(child.name)
  return tuple(sorted(names))
