"""The identities of a run's data files, saved with its configuration.

A run that is resumed with changed annotations, images or starting checkpoint would mix two runs.
Annotation files are identified by their content, images by size and modification time (in a bucket
by size and version), and the checkpoint by its own identity.
"""

import dataclasses
import hashlib
import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sam3_jax.storage.find import find_objects
from sam3_jax.storage.objects import read_file
from sam3_jax.storage.urls import is_object, join
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.identity import FileIdentity, changes, digest, identify
from sam3_jax.utils.json_text import parse

RUN_DATA_FILE = "run-data.json"
_Files = dict[str, FileIdentity | None]


@dataclasses.dataclass(frozen=True)
class RunData:
  """The data of a run.

  Attributes:
    annotations: identities of the annotation files by path, with their content.
    images: identities of the images by path, without their content.
    checkpoint: identity of the starting checkpoint; "" for none.
  """

  annotations: _Files = dataclasses.field(default_factory=dict)
  images: _Files = dataclasses.field(default_factory=dict)
  checkpoint: str = ""

  def digest(self) -> str:
    """A digest that is equal on all hosts, where copies of images may have other modification
    times."""
    sums = {path: None if one is None else one.sha256 for path, one in self.annotations.items()}
    sizes = {path: None if one is None else one.size for path, one in self.images.items()}
    return digest([sorted(sums.values(), key=str), sizes, self.checkpoint])

  def write(self, out: Path) -> None:
    """Writes the identities to the directory of a run.

    Raises:
      OSError: it cannot be written.
    """
    values = {
      "annotations": _plain(self.annotations),
      "images": _plain(self.images),
      "checkpoint": self.checkpoint,
    }
    write_json(out / RUN_DATA_FILE, values)

  def fault(self, out: Path) -> str:
    """How the data differ from those that the run in `out` was started with, in one line.

    It is empty if they are the same, or if the run has no such file.
    """
    file = out / RUN_DATA_FILE
    if not file.exists():
      return ""
    try:
      before = parse(file.read_bytes(), "it")
      then = RunData(_identities(before["annotations"]), _identities(before["images"]))
      checkpoint = before["checkpoint"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
      return f"{file} is damaged ({error!r:.100}); give another --out."
    found = []
    if checkpoint != self.checkpoint:
      found.append("the starting checkpoint differs")
    for kind, old, new in (
      ("annotations", then.annotations, self.annotations),
      ("images", then.images, self.images),
    ):
      found += [f"{kind}: {clause}" for clause in changes(old, new)]
    if not found:
      return ""
    return (
      f"{out} has a run that was started with other data: {'; '.join(found)}. Restore these data "
      "(copy images with their times, `cp -p` or `rsync -t`), or give another --out to train on "
      "the new data."
    )


def identify_data(
  annotations: Iterable[str], images: Iterable[tuple[str, Iterable[str]]], checkpoint: str = ""
) -> RunData:
  """Identifies the current data of a run.

  Args:
    annotations: paths of annotation files.
    images: directories, each with the file names of images below it.
    checkpoint: identity of the starting checkpoint.
  """
  found: _Files = {}
  for directory, names in images:
    found |= _identify_images(directory, sorted(set(names)))
  return RunData({path: _identify_content(path) for path in annotations}, found, checkpoint)


def _identify_images(directory: str, names: Iterable[str]) -> _Files:
  if not is_object(directory):
    return {str(Path(directory) / name): identify(Path(directory) / name) for name in names}
  listed = {one.name: one.entry for one in find_objects(directory).objects}
  entries = {name: listed.get(posixpath.normpath(name)) for name in names}
  return {
    join(directory, name): None if one is None else FileIdentity(one.size, 0, "", one.version)
    for name, one in entries.items()
  }


def _identify_content(path: str) -> FileIdentity | None:
  if not is_object(path):
    return identify(path, content=True)
  try:
    data = read_file(path)
  except FileNotFoundError:
    return None
  return FileIdentity(len(data), 0, hashlib.sha256(data).hexdigest())


def _plain(files: _Files) -> dict[str, Any]:
  return {
    path: None
    if one is None
    else [one.size, one.modified, one.sha256, *filter(None, [one.version])]
    for path, one in files.items()
  }


def _identities(values: dict[str, Any]) -> _Files:
  return {
    path: None if one is None else FileIdentity(int(one[0]), int(one[1]), *map(str, one[2:]))
    for path, one in values.items()
  }
