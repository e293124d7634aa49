"""The files of a job: its description (job.json), how it is cut into parts, and finished parts.

`sam3_jax.batch` lists the files and their contents.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.batch.files import Draft, in_parallel, read_json
from sam3_jax.batch.part_files import (
  PARTS,
  check_job,
  manifest_path,
  part_number,
  read_begun,
  records_path,
)
from sam3_jax.utils.identity import digest

JOB, ERRORS = "job.json", "errors.jsonl"
# What messages call the values of job.json that determine the results.
_OPTIONS = {
  "part_size": "--part-size",
  "checkpoint_identity": "the checkpoint",
  "max_detections": "--max-detections",
  "max_pixels": "--max-pixels",
  "threshold": "--threshold",
  "dtype": "--dtype",
  "tile": "--tile",
  "overlap": "--overlap",
}
_NOT_COMPARED = {"checkpoint"}  # its name and origin; `checkpoint_identity` tells its content


def differences(description: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
  """Differences between the description of a job and the current settings, in words."""
  if description.get("format_version") != settings["format_version"]:
    return ["it was begun by another version of sam3-jax"]
  if (noun := noun_of(description)) != noun_of(settings):
    return [f"it is a job of {noun}s"]
  return [
    f"{_OPTIONS.get(key, key)}: {description.get(key)!s:.20} then, {settings[key]!s:.20} now"
    for key in settings
    if key not in _NOT_COMPARED and description.get(key) != settings[key]
  ]


def other_job_error(out: Path, changed: Sequence[str], remedy: str = "") -> ValueError:
  """The error for a directory with the results of another job; says what differs."""
  remedy = remedy or "rerun with the settings of that job, or choose another --out."
  return ValueError(f"{out} holds the results of another job ({'; '.join(changed)}); {remedy}")


def noun_of(job: Mapping[str, Any]) -> str:
  """What the inputs of a job are called: "image" or "video"."""
  return job.get("noun", "image")


def read_job(out: Path) -> dict[str, Any]:
  """The description of the job in a directory, with all extensions.

  Raises:
    FileNotFoundError: there is no job.
  """
  job = read_json(out / JOB)
  if job is None:
    raise FileNotFoundError(f"there are no results in {out}; run batch with this --out first.")
  while (extended := read_json(next_job_path(out, job))) is not None:
    job = extended
  return job


def next_job_path(out: Path, job: Mapping[str, Any]) -> Path:
  """The file of the description that extends a job."""
  return out / f"job.{len(segments(job)) + 1}.json"


def segments(job: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The input lists of a job, each with its number of `inputs` and its `sha256`: the first list,
  and those that --add appended. No part has inputs of two lists. Jobs of version 1 have one."""
  return job.get("segments") or [{"inputs": job["inputs"], "sha256": None}]


def part_range(part: int, job: Mapping[str, Any]) -> range:
  """Indices of the inputs of a part."""
  size, first_part, first = job["part_size"], 0, 0
  for segment in segments(job):
    parts, stop = -(-segment["inputs"] // size), first + segment["inputs"]
    if part < first_part + parts:
      start = first + (part - first_part) * size
      return range(start, min(start + size, stop))
    first_part, first = first_part + parts, stop
  return range(first, first)


def part_count(job: Mapping[str, Any]) -> int:
  """The number of parts."""
  return sum(-(-segment["inputs"] // job["part_size"]) for segment in segments(job))


def part_of(index: int, job: Mapping[str, Any]) -> int:
  """The part of an input."""
  size, first_part, first = job["part_size"], 0, 0
  for segment in segments(job):
    if index < first + segment["inputs"]:
      return first_part + (index - first) // size
    first_part, first = first_part - (-segment["inputs"] // size), first + segment["inputs"]
  raise IndexError(index)


def job_digest(job: Mapping[str, Any], part: int) -> str:
  """Digest of everything that determines a part: settings, its list, and the lists before it."""
  size, lists, parts = job["part_size"], [], 0
  for segment in segments(job):
    lists.append([segment["inputs"], segment["sha256"]])
    parts -= -segment["inputs"] // size
    if part < parts:
      break
  others = {*_NOT_COMPARED, "inputs", "segments"}
  return digest([{key: value for key, value in job.items() if key not in others}, lists])


def finished_parts(out: Path) -> set[int]:
  """The parts that are done; some stores list new objects late, see `is_finished`."""
  folder = out / PARTS
  names = (re.fullmatch(r"part-(\d+)\.json", path.name) for path in folder.glob("part-*.json"))
  return {int(name[1]) for name in names if name}


def is_finished(out: Path, part: int) -> bool:
  """Whether a part is done, without listing."""
  return manifest_path(out, part).exists()


def read_manifest(out: Path, part: int) -> dict[str, Any]:
  """The manifest of a finished part.

  Raises:
    ValueError: the part is not finished, or the manifest is damaged.
  """
  values, path = find_manifest(out, part), manifest_path(out, part)
  if values is None:
    raise ValueError(f"{path} is not the manifest of a part; remove it and run batch again.")
  return values


def read_records(out: Path, part: int, job: str | None = None) -> Iterator[dict[str, Any]]:
  """The records of a finished part; the checksum is verified after the last one.

  Args:
    out: output directory.
    part: its number.
    job: digest of the job to which the part must belong; see `job_digest`.

  Raises:
    ValueError: the records are damaged, or belong to another job.
  """
  manifest = read_manifest(out, part)
  path = records_path(manifest_path(out, part), manifest)
  check_job(manifest, job, out, part)
  damaged = f"{path} is damaged; remove {manifest_path(out, part)} and run batch again."
  sha256 = hashlib.sha256()
  try:
    with path.open("rb") as file:
      for line in file:
        sha256.update(line)
        yield json.loads(line)
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{damaged} ({error})") from error
  if sha256.hexdigest() != manifest["sha256"]:
    raise ValueError(damaged)


def write_errors(out: Path, known: Iterable[int] = ()) -> int:
  """Collects the failures of all parts, finished or unfinished, in errors.jsonl.

  Other processes may finish parts in the meantime; the last process to finish, or `--merge`, writes
  the complete list.

  Args:
    out: output directory.
    known: parts that are done, also if the store does not list them yet.

  Returns:
    The number of failures.
  """
  failures: list[dict[str, Any]] = []
  finished = finished_parts(out).union(known)
  begun = {part_number(path.name) for path in (out / PARTS).glob("part-*.begun.json")} - {None}

  def read(part: int) -> dict[str, Any] | None:
    manifest = find_manifest(out, part) if part in finished else None
    return read_begun(out, part) if manifest is None else manifest

  parts = sorted(finished.union(part for part in begun if part is not None))
  for manifest in in_parallel(out, read, parts):
    failures += [] if manifest is None else manifest["failed"]
  with Draft(out / ERRORS) as draft:
    for failure in failures:
      shown = {key: failure[key] for key in ("input", "image", "video", "reason") if key in failure}
      draft.write(json.dumps(shown).encode() + b"\n")
    draft.commit()
  return len(failures)


def find_manifest(out: Path, part: int) -> dict[str, Any] | None:
  """The manifest of a finished part; None if the part is not finished.

  Raises:
    ValueError: the manifest is damaged.
  """
  path = manifest_path(out, part)
  values = read_json(path)
  if values is not None and (
    values.get("part") != part or not isinstance(values.get("failed"), list)
  ):
    raise ValueError(f"{path} is not the manifest of a part; remove it and run batch again.")
  return values
