"""The files of one part: how they are called, and how they come to be.

A part is written into a draft. If its process has to stop, or inputs could not be read, the draft
becomes the part's beginning (`.begun.`), which is resumed later; inputs that were left out are
then sorted in. When no input is left, the part is done: its lines are in the list's order whatever
happened on the way, so its bytes do not tell.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.files import Draft, read_json, write_json
from sam3_jax.utils.identity import FileIdentity, digest
from sam3_jax.utils.lease import sync_directory

FORMAT_VERSION = 2
PARTS, LEASES = "parts", "leases"


class Failure(NamedTuple):
  """An input that no results can be made of, and why, in one line.

  Attributes:
    identity: of the file that was read; None if none could be read.
  """

  input: int
  image: str
  reason: str
  identity: FileIdentity | None = None


class Resolved(NamedTuple):
  """The inputs of a part that are done or failed, and the files that were read for them.

  Attributes:
    retried: inputs that had failed, and are pending again.
  """

  done: dict[int, FileIdentity | None]
  failed: dict[int, FileIdentity | None]
  retried: set[int]


def manifest_path(out: Path, part: int) -> Path:
  return out / PARTS / f"part-{part:06}.json"


def begun_path(out: Path, part: int) -> Path:
  """The manifest of a part's beginning; its records end in .jsonl."""
  return out / PARTS / f"part-{part:06}.begun.json"


def lease_path(out: Path, part: int) -> Path:
  return out / LEASES / f"part-{part:06}.lease"


def journal_path(out: Path, part: int) -> Path:
  return out / LEASES / f"part-{part:06}.journal"


def number(name: str) -> int | None:
  """The part that a file is of, by its name."""
  found = re.match(r"part-(\d+)\.", name)
  return int(found[1]) if found else None


def identity_json(identity: FileIdentity | None) -> dict[str, Any] | None:
  """A file's identity as plain values."""
  if identity is None:
    return None
  return {"size": identity.size, "modified": identity.modified, "sha256": identity.sha256}


def identity_from_json(values: Any) -> FileIdentity | None:
  if not isinstance(values, dict):
    return None
  return FileIdentity(values["size"], values["modified"], values["sha256"])


class PartWriter:
  """One part that is not done, from where the process before left it.

  Attributes:
    resumed: how many inputs were done, and how many had failed, when it was taken up.
  """

  def __init__(
    self,
    out: Path,
    part: int,
    inputs: range,
    job: str | None = None,
    *,
    retry_failed: bool = False,
  ):
    """Opens a draft.

    Args:
      out: output directory.
      part: its number.
      inputs: all inputs of the part.
      job: digest of the job that it is a part of.
      retry_failed: forget which inputs failed, so that they are pending.

    Raises:
      ValueError: the beginning is of another job.
    """
    self._out, self._part, self._inputs, self._job = out, part, inputs, job
    self._places: dict[int, tuple[int, int]] = {}  # offset and size in the draft, by input
    self._files: dict[int, Any] = {}
    self._failed: dict[int, dict[str, Any]] = {}
    self._retried: set[int] = set()
    self._size, self._changed = 0, False
    self._draft = Draft(manifest_path(out, part).with_suffix(".jsonl"))
    try:
      self._resume(retry_failed)
    except BaseException:
      self.discard()
      raise
    self.resumed = len(self._places), len(self._failed)

  @property
  def pending(self) -> list[int]:
    """Inputs that are neither done nor failed."""
    return [i for i in self._inputs if i not in self._places and i not in self._failed]

  def add(
    self,
    records: Iterable[bytes],
    failures: Iterable[Failure],
    inputs: Iterable[int],
    identities: Mapping[int, FileIdentity | None] | None = None,
  ) -> None:
    """Takes the records and failures of inputs.

    Args:
      records: of those that did not fail, in their order.
      failures: those that did.
      inputs: all of them.
      identities: of the files that the records were made of.
    """
    failed = {failure.input: failure for failure in failures}
    done = [i for i in inputs if i not in failed]
    for i in (*done, *failed):
      if i in self._places or i in self._failed:
        raise RuntimeError(f"input {i} is in part {self._part} already.")
    self._changed = True
    for i, record in zip(done, records, strict=False):
      self._write(i, record, identity_json((identities or {}).get(i)))
    for i, failure in failed.items():
      identity = identity_json(failure.identity)
      self._failed[i] = {**failure._asdict(), "identity": identity}
      self._files[i] = identity

  def finish(self) -> None:
    """The part is done."""
    values = self._manifest(in_order=True)
    self._draft.commit()
    write_json(manifest_path(self._out, self._part), values)
    begun = begun_path(self._out, self._part)
    begun.unlink(missing_ok=True)
    begun.with_suffix(".jsonl").unlink(missing_ok=True)

  def pause(self) -> None:
    """Keeps what there is of the part, for whoever resumes it."""
    if not self._changed:
      self.discard()
      return
    values, begun = self._manifest(in_order=False), begun_path(self._out, self._part)
    values["retried"] = sorted(self._retried.intersection(self.pending))
    self._draft.path = begun.with_suffix(".jsonl")
    self._draft.commit()
    write_json(begun, values)

  def discard(self) -> None:
    self._draft.discard()

  def _write(self, i: int, record: bytes, identity: Any) -> None:
    self._draft.write(record)
    self._places[i] = self._size, len(record)
    self._size += len(record)
    self._files[i] = identity

  def _manifest(self, *, in_order: bool) -> dict[str, Any]:
    if in_order and list(self._places) != sorted(self._places):
      self._sort()
    return {
      "format_version": FORMAT_VERSION,
      "job": self._job,
      "part": self._part,
      "first": self._inputs.start,
      "inputs": len(self._places) + len(self._failed),
      "done": len(self._places),
      "failed": [self._failed[i] for i in sorted(self._failed)],
      "files_sha256": digest(sorted(self._files.items())),
      "bytes": self._size,
      "sha256": self._draft.sha256(),
    }

  def _sort(self) -> None:
    """Puts the inputs that were left out, and came later, into the order of the list."""
    draft, places = self._draft, self._places
    self._draft, self._places, self._size = Draft(draft.path), {}, 0
    try:
      for i in sorted(places):
        self._write(i, draft.read(*places[i]), self._files[i])
    finally:
      draft.discard()

  def _resume(self, retry_failed: bool) -> None:
    values = _read_begun(self._out, self._part)
    if values is None:
      return
    check_job(values, self._job, self._out, self._part)
    records = begun_path(self._out, self._part).with_suffix(".jsonl")
    for i, line, record in numbered(records, self._inputs.start):
      self._write(i, line, record.get("file"))
    self._retried.update(values.get("retried", ()))
    if retry_failed:
      self._retried.update(failure["input"] for failure in values["failed"])
      self._changed = bool(values["failed"])
      return
    for failure in values["failed"]:
      self._failed[failure["input"]] = failure
      self._files[failure["input"]] = failure.get("identity")


def check_job(manifest: Mapping[str, Any], job: str | None, out: Path, part: int) -> None:
  """Raises ValueError if a part is of another job than the directory's."""
  if job is not None and manifest.get("job", job) not in (None, job):
    raise ValueError(
      f"part {part} in {out} is of another job than {out / 'job.json'}: two jobs wrote into the "
      "same directory. Choose another --out and run batch again."
    )


def reopen(out: Path, part: int) -> None:
  """Makes a part that is done a begun one, in which the inputs that failed are pending.

  A process that is killed on the way leaves a part that is done, or one that is begun.
  """
  path, begun = manifest_path(out, part), begun_path(out, part)
  values = read_json(path)
  if values is None:
    return
  with Draft(begun.with_suffix(".jsonl")) as draft:
    draft.copy(path.with_suffix(".jsonl"))
    draft.commit()
  retried = [failure["input"] for failure in values["failed"]]
  write_json(begun, values | {"failed": [], "inputs": values["done"], "retried": retried})
  path.unlink()
  sync_directory(path.parent)
  path.with_suffix(".jsonl").unlink(missing_ok=True)


def resolved(out: Path, part: int, inputs: range) -> Resolved:
  """What was read for the inputs of a part so far, done or begun."""
  path = manifest_path(out, part)
  values, records = read_json(path), path.with_suffix(".jsonl")
  if values is None:
    values, records = _read_begun(out, part), begun_path(out, part).with_suffix(".jsonl")
  if values is None:
    return Resolved({}, {}, set())
  rows = numbered(records, inputs.start)
  done = {i: identity_from_json(record.get("file")) for i, _, record in rows}
  failed = {one["input"]: identity_from_json(one.get("identity")) for one in values["failed"]}
  return Resolved(done, failed, set(values.get("retried", ())))


def begun_failures(out: Path, part: int) -> list[dict[str, Any]]:
  """The failures in a part's beginning."""
  values = _read_begun(out, part)
  return [] if values is None else values["failed"]


def numbered(records: Path, first: int) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
  """The lines of a part: number of the input, the line, and what is in it."""
  with records.open("rb") as file:
    for index, line in enumerate(file, start=first):
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(
          f"{records} is damaged; remove {records.with_suffix('.json')} and run batch again."
        ) from error
      yield record.get("input", index), line, record


def _read_begun(out: Path, part: int) -> dict[str, Any] | None:
  """The manifest of a part's beginning, if there is a whole one."""
  path = begun_path(out, part)
  values, records = read_json(path), path.with_suffix(".jsonl")
  if values is None or not records.is_file():
    return None
  with records.open("rb") as file:
    found = hashlib.file_digest(file, "sha256").hexdigest()
  return values if found == values["sha256"] else None
