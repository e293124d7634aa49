"""Which data a run was started with: the identities of its files, kept beside its configuration.

A run that is resumed with corrected annotations, other images under the same names or another
checkpoint would mix two runs in one result. Annotation files go by their content, images by size
and modification time, the checkpoint by its own identity.
"""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sam3_jax.utils.identity import FileIdentity, changes, digest, identify
from sam3_jax.utils.json_text import parse

FILE = "run-data.json"
_Files = dict[str, FileIdentity | None]


@dataclasses.dataclass(frozen=True)
class RunData:
  """The data of a run.

  Attributes:
    annotations: identities of the annotation files, by path as configured, with their content.
    images: likewise of the images, without their content.
    checkpoint: identity of the checkpoint that it starts from; "" for none.
  """

  annotations: _Files = dataclasses.field(default_factory=dict)
  images: _Files = dataclasses.field(default_factory=dict)
  checkpoint: str = ""

  def digest(self) -> str:
    """Tells data apart on every host: copies of the images may have other modification times."""
    sums = {path: None if one is None else one.sha256 for path, one in self.annotations.items()}
    sizes = {path: None if one is None else one.size for path, one in self.images.items()}
    return digest([sorted(sums.values(), key=str), sizes, self.checkpoint])

  def write(self, out: Path) -> None:
    """Keeps it in the directory of a run.

    Raises:
      OSError: it cannot be written.
    """
    values = {
      "annotations": _plain(self.annotations),
      "images": _plain(self.images),
      "checkpoint": self.checkpoint,
    }
    partial = out / f"{FILE}.partial"
    partial.write_text(json.dumps(values) + "\n")
    os.replace(partial, out / FILE)

  def fault(self, out: Path) -> str:
    """How it differs from what the run in `out` was started with, in one line; "" if it does not.

    Runs of earlier versions say nothing of it, and are resumed.
    """
    file = out / FILE
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
      found.append("the starting checkpoint is another one")
    for kind, old, new in (
      ("annotations", then.annotations, self.annotations),
      ("images", then.images, self.images),
    ):
      found += [f"{kind}: {clause}" for clause in changes(old, new)]
    if not found:
      return ""
    return (
      f"{out} holds a run that was started with other data: {'; '.join(found)}. Put back what it "
      "was started with (copy images with their times, `cp -p` or `rsync -t`), or give another "
      "--out to train on the new data."
    )


def identify_data(
  annotations: Iterable[str], images: Iterable[tuple[str, Iterable[str]]], checkpoint: str = ""
) -> RunData:
  """The data of a run as it is now.

  Args:
    annotations: paths of annotation files.
    images: directories, each with the file names of images below it.
    checkpoint: identity of the checkpoint.
  """
  return RunData(
    {path: identify(path, content=True) for path in annotations},
    {
      str(Path(folder) / name): identify(Path(folder) / name)
      for folder, names in images
      for name in sorted(set(names))
    },
    checkpoint,
  )


def _plain(files: _Files) -> dict[str, Any]:
  return {
    path: None if one is None else [one.size, one.modified, one.sha256]
    for path, one in files.items()
  }


def _identities(values: dict[str, Any]) -> _Files:
  return {
    path: None if one is None else FileIdentity(int(one[0]), int(one[1]), str(one[2]))
    for path, one in values.items()
  }
