"""The record of a tracking job, NAME.track.json: what its results were computed from.

The same command resumes the job. Another one is refused, with what differs.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.cli.track_prompts import FramePrompt
from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.inputs.visual_prompts import visual_as_json
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.identity import SHORT, FileIdentity, changes, identify, named
from sam3_jax.utils.json_text import parse

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """What determines the results of a job.

  Attributes:
    files: identities of the files of the video, by name.
    options: values of --start, --stop, --every, --direction and --dtype.
    prompts: of each object on each frame, by a name such as "object 1 on frame 0".
    checkpoint: its name and its identity.
    frames: lines of the file of tracks once all frames are tracked; None before.
  """

  files: dict[str, FileIdentity]
  options: dict[str, Any]
  prompts: dict[str, Any]
  checkpoint: tuple[str, str]
  frames: int | None = None

  def write(self, path: Path) -> None:
    """Writes the record; raises OSError."""
    values = dataclasses.asdict(self) | {"format": FORMAT}
    values["files"] = {name: dataclasses.astuple(one) for name, one in self.files.items()}
    write_json(path, values, indent=1)

  @classmethod
  def read(cls, path: Path) -> "Record | None":
    """Reads a record; None if there is none.

    Raises:
      ValueError: it is damaged, or of another version.
      OSError: it cannot be read.
    """
    try:
      values = parse(path.read_bytes(), str(path))
    except FileNotFoundError:
      return None
    try:
      if values.pop("format") != FORMAT:
        raise ValueError(f"it has another format than {FORMAT}")
      values["files"] = {name: FileIdentity(*one) for name, one in values["files"].items()}
      values["checkpoint"] = tuple(values["checkpoint"])
      return cls(**values)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
      raise ValueError(
        f"{path} is not a record of this version's `sam3-jax track` ({error}): remove it to start "
        "again, or choose another --out."
      ) from error

  def differences(self, other: "Record") -> list[str]:
    """What differs in another record, in clauses."""
    found = [f"the video has {clause}" for clause in changes(self.files, other.files)]
    found += [
      f"--{name} was {_text(value)} and is {_text(other.options.get(name))}"
      for name, value in self.options.items()
      if value != other.options.get(name)
    ]
    before, after = self.prompts, other.prompts
    kinds = (
      ("added", after.keys() - before.keys()),
      ("removed", before.keys() - after.keys()),
      ("changed", {key for key in before.keys() & after.keys() if before[key] != after[key]}),
    )
    found += [
      named(f"prompt was {kind}", f"prompts were {kind}", sorted(keys))
      for kind, keys in kinds
      if keys
    ]
    if self.checkpoint[1] != other.checkpoint[1]:
      was, now = (f"{name} ({identity[:SHORT]})" for name, identity in
                  (self.checkpoint, other.checkpoint))  # fmt: skip
      found.append(f"the checkpoint was {was} and is {now}")
    return found


def record_of(
  source: VideoSource, options: dict[str, Any], prompts: Sequence[FramePrompt], model: Any,
  checkpoint: str,
) -> Record:  # fmt: skip
  """The record of a new job; reads the files of the video for their digests.

  Args:
    source: the video.
    options: as in `Record`.
    prompts: from `track_prompts.frame_prompts`.
    model: a `Sam3`.
    checkpoint: its name.
  """
  files = {os.path.basename(path): identify(path, content=True) for path in source.paths}
  options = {name: getattr(value, "value", value) for name, value in options.items()}
  return Record(
    files={name: one for name, one in files.items() if one is not None},
    options=json.loads(json.dumps(options)) | {"dtype": model.dtype.name},
    prompts={f"object {one.identity} on frame {one.frame}": _values(one) for one in prompts},
    checkpoint=(checkpoint, model.identity),
  )


def _values(one: FramePrompt) -> dict[str, Any]:
  """A prompt as JSON values; a mask as its digest."""
  if one.mask is not None:
    digest = hashlib.sha256(np.packbits(one.mask).tobytes()).hexdigest()
    return {"mask": digest, "file": os.path.basename(one.file)}
  return {} if one.prompt is None else visual_as_json(one.prompt)


def _text(value: Any) -> str:
  return "not given" if value is None else str(value)
