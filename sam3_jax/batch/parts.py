"""A job on disk: its description, and its parts as far as they are there.

`sam3_jax.batch` shows the files and what is in them.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.files import Draft, read_json
from sam3_jax.batch.part_files import (
  PARTS,
  Failure,
  PartWriter,
  begun_failures,
  check_job,
  manifest_path,
  number,
)
from sam3_jax.utils.identity import digest

__all__ = ["PARTS", "Failure", "PartWriter"]  # beside what is defined here

JOB, ERRORS = "job.json", "errors.jsonl"
# What a value of job.json is called where it decides the results.
_CALLED = {
  "part_size": "--part-size",
  "checkpoint_identity": "the checkpoint",
  "max_detections": "--max-detections",
  "max_pixels": "--max-pixels",
  "threshold": "--threshold",
  "dtype": "--dtype",
}
_NOT_SETTINGS = {"checkpoint"}  # a name that says nothing about the content


def differences(there: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
  """What differs between a job's description and the settings now, in words."""
  if there.get("format_version") != settings["format_version"]:
    return ["it was begun by another version of sam3-jax"]
  return [
    f"{_CALLED.get(key, key)}: {there.get(key)!s:.20} then, {settings[key]!s:.20} now"
    for key in settings
    if key not in _NOT_SETTINGS and there.get(key) != settings[key]
  ]


def other_job(out: Path, changed: Sequence[str], remedy: str = "") -> ValueError:
  """The error about a directory with other results, and what differs."""
  remedy = remedy or "rerun with what was given then, or choose another --out."
  return ValueError(f"{out} holds the results of another job ({'; '.join(changed)}); {remedy}")


def read_job(out: Path) -> dict[str, Any]:
  """The job of a directory, with all that was added to it.

  Raises:
    FileNotFoundError: it is none.
  """
  job = read_json(out / JOB)
  if job is None:
    raise FileNotFoundError(f"there are no results in {out}; run batch with this --out first.")
  while (extended := read_json(addition(out, job))) is not None:
    job = extended
  return job


def addition(out: Path, job: Mapping[str, Any]) -> Path:
  """The description that extends another one."""
  return out / f"job.{len(segments(job)) + 1}.json"


def segments(job: Mapping[str, Any]) -> list[dict[str, Any]]:
  """The lists that a job consists of, each with the number of its `inputs` and its `sha256`: the
  first one, and those added later. No part holds inputs of two. Jobs of version 1 have one."""
  return job.get("segments") or [{"inputs": job["inputs"], "sha256": None}]


def bounds(part: int, job: Mapping[str, Any]) -> range:
  """Indices of a part's inputs in the list."""
  size, first_part, first = job["part_size"], 0, 0
  for segment in segments(job):
    parts, stop = -(-segment["inputs"] // size), first + segment["inputs"]
    if part < first_part + parts:
      start = first + (part - first_part) * size
      return range(start, min(start + size, stop))
    first_part, first = first_part + parts, stop
  return range(first, first)


def count(job: Mapping[str, Any]) -> int:
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
  """Digest of all that decides a part: settings, its list, and the lists before it."""
  size, lists, parts = job["part_size"], [], 0
  for segment in segments(job):
    lists.append([segment["inputs"], segment["sha256"]])
    parts -= -segment["inputs"] // size
    if part < parts:
      break
  others = {*_NOT_SETTINGS, "inputs", "segments"}
  return digest([{key: value for key, value in job.items() if key not in others}, lists])


def done(out: Path) -> set[int]:
  """Parts that are done."""
  folder = out / PARTS
  names = (re.fullmatch(r"part-(\d+)\.json", path.name) for path in folder.glob("part-*.json"))
  return {int(name[1]) for name in names if name}


def manifest(out: Path, part: int) -> dict[str, Any]:
  """Of a part that is done.

  Raises:
    ValueError: it is not, or the manifest is damaged.
  """
  values, path = _manifest(out, part), manifest_path(out, part)
  if values is None:
    raise ValueError(f"{path} is no part's manifest; remove it and run batch again.")
  return values


def lines(out: Path, part: int, job: str | None = None) -> Iterator[dict[str, Any]]:
  """The records of a part that is done, checked against its manifest at the end.

  Args:
    out: output directory.
    part: its number.
    job: digest of the job that it must be of, see `job_digest`.

  Raises:
    ValueError: they are not what was written, or are another job's.
  """
  entry, path = manifest(out, part), manifest_path(out, part).with_suffix(".jsonl")
  check_job(entry, job, out, part)
  damaged = f"{path} is damaged; remove {path.with_suffix('.json')} and run batch again."
  found = hashlib.sha256()
  try:
    with path.open("rb") as file:
      for line in file:
        found.update(line)
        yield json.loads(line)
  except (OSError, ValueError, RecursionError) as error:
    raise ValueError(f"{damaged} ({error})") from error
  if found.hexdigest() != entry["sha256"]:
    raise ValueError(damaged)


class Counts(NamedTuple):
  """Inputs that are done, and that failed."""

  done: int
  failed: int


def write_errors(out: Path) -> int:
  """Collects the failures of all parts that are there now, done or begun, in errors.jsonl.

  Other processes may end parts meanwhile; whoever ends last, or merges, has all of them.

  Returns:
    Their number.
  """
  failed: list[dict[str, Any]] = []
  finished = done(out)
  begun = {number(path.name) for path in (out / PARTS).glob("part-*.begun.json")} - {None}
  for part in sorted(finished.union(part for part in begun if part is not None)):
    entry = _manifest(out, part) if part in finished else None
    failed += entry["failed"] if entry is not None else begun_failures(out, part)
  with Draft(out / ERRORS) as draft:
    for one in failed:
      shown = {key: one.get(key) for key in ("input", "image", "reason")}
      draft.write(json.dumps(shown).encode() + b"\n")
    draft.commit()
  return len(failed)


def _manifest(out: Path, part: int) -> dict[str, Any] | None:
  """None if there is none, as where a part was opened again meanwhile."""
  path = manifest_path(out, part)
  values = read_json(path)
  if values is not None and (
    values.get("part") != part or not isinstance(values.get("failed"), list)
  ):
    raise ValueError(f"{path} is no part's manifest; remove it and run batch again.")
  return values
