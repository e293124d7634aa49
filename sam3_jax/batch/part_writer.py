"""Writes a part.

A part is written into a draft. If the process has to stop, or inputs could not be read, the draft
is committed as an unfinished part (`.begun.`), which is resumed later. Inputs that were left out
are then sorted in. A part without pending inputs is finished. Its lines are in the order of the
list, so its bytes do not depend on interruptions.

In a bucket, records are objects named by their content, which are never replaced. The manifest of a
finished part is created only if there is none. So a process that was suspended, and whose lease
another has taken over, cannot damage the part.

The record of an image is one line. That of a video is several lines, which begin with the same
`input`; they are copied in pieces, as a video may have more of them than fit into memory.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sam3_jax.batch.files import Draft, create_json, write_json
from sam3_jax.batch.part_files import (
  FORMAT_VERSION,
  Failure,
  begun_path,
  check_job,
  identity_to_json,
  manifest_path,
  read_begun,
  read_lines,
  records_path,
)
from sam3_jax.storage.objects import object_path
from sam3_jax.utils.identity import FileIdentity, digest

Record: TypeAlias = bytes | Iterable[bytes]  # complete lines, or pieces of them


class PartWriter:
  """Writes one unfinished part, starting where the previous process stopped.

  Attributes:
    resumed: number of inputs that were done, and that had failed, when the part was opened.
  """

  def __init__(
    self,
    out: Path,
    part: int,
    inputs: range,
    job: str | None = None,
    *,
    noun: str = "image",
    retry_failed: bool = False,
  ):
    """Opens a draft.

    Args:
      out: output directory.
      part: number of the part.
      inputs: all inputs of the part.
      job: digest of the job to which the part belongs.
      noun: what an input is called.
      retry_failed: make failed inputs pending.

    Raises:
      ValueError: the unfinished part on disk belongs to another job.
    """
    self._out, self._part, self._inputs, self._job = out, part, inputs, job
    self._noun = noun
    self._spans: dict[int, tuple[int, int]] = {}  # offset and size in the draft, by input
    self._files: dict[int, Any] = {}
    self._failed: dict[int, dict[str, Any]] = {}
    self._retried: set[int] = set()
    self._size, self._changed = 0, False
    self._resumed: Path | None = None  # records in a bucket that this process has read
    self._draft = Draft(manifest_path(out, part).with_suffix(".jsonl"))
    try:
      self._resume(retry_failed)
    except BaseException:
      self.discard()
      raise
    self.resumed = len(self._spans), len(self._failed)

  @property
  def pending(self) -> list[int]:
    """Inputs that are neither done nor failed."""
    return [i for i in self._inputs if i not in self._spans and i not in self._failed]

  def add(
    self,
    records: Iterable[Record],
    failures: Iterable[Failure],
    inputs: Iterable[int],
    identities: Mapping[int, FileIdentity | None] | None = None,
  ) -> None:
    """Adds the records and failures of inputs.

    Args:
      records: of the inputs that did not fail, in their order.
      failures: of the others.
      inputs: all of them.
      identities: of the files from which the records were made.
    """
    failed = {failure.input: failure for failure in failures}
    done = [i for i in inputs if i not in failed]
    for i in (*done, *failed):
      if i in self._spans or i in self._failed:
        raise RuntimeError(f"input {i} is in part {self._part} already.")
    self._changed = True
    for i, record in zip(done, records, strict=False):
      self._write(i, record, identity_to_json((identities or {}).get(i)))
    for i, failure in failed.items():
      self._failed[i] = failure.to_json(self._noun)
      self._files[i] = self._failed[i]["identity"]

  def finish(self) -> None:
    """Commits the finished part."""
    values, path = self._manifest(in_order=True), manifest_path(self._out, self._part)
    begun = begun_path(self._out, self._part)
    if object_path(self._out) is not None:
      if create_json(path, self._commit_object(path, values)):
        self._remove_resumed()
      begun.unlink(missing_ok=True)
      return
    self._draft.commit()
    write_json(path, values)
    begun.unlink(missing_ok=True)
    begun.with_suffix(".jsonl").unlink(missing_ok=True)

  def pause(self) -> None:
    """Commits the unfinished part, to be resumed later."""
    if not self._changed:
      self.discard()
      return
    values, begun = self._manifest(in_order=False), begun_path(self._out, self._part)
    values["retried"] = sorted(self._retried.intersection(self.pending))
    if object_path(self._out) is not None:
      write_json(begun, self._commit_object(begun, values))
      if self._resumed is not None and ".begun." in self._resumed.name:
        self._remove_resumed()
      return
    self._draft.path = begun.with_suffix(".jsonl")
    self._draft.commit()
    write_json(begun, values)

  def discard(self) -> None:
    self._draft.discard()

  def _commit_object(self, manifest: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Writes the records into an object named by their content; returns the manifest's values."""
    self._draft.path = manifest.with_suffix(f".{values['sha256'][:16]}.jsonl")
    self._draft.commit()
    return values | {"records": self._draft.path.name}

  def _remove_resumed(self) -> None:
    """Removes the records that this process has resumed and replaced."""
    if self._resumed is not None and self._resumed.name != self._draft.path.name:
      self._resumed.unlink(missing_ok=True)

  def _write(self, i: int, record: Record, identity: Any) -> None:
    start = self._size
    for piece in [record] if isinstance(record, bytes) else record:
      self._draft.write(piece)
      self._size += len(piece)
    self._spans[i] = start, self._size - start
    self._files[i] = identity

  def _manifest(self, *, in_order: bool) -> dict[str, Any]:
    if in_order and list(self._spans) != sorted(self._spans):
      self._sort()
    return {
      "format_version": FORMAT_VERSION,
      "job": self._job,
      "part": self._part,
      "first": self._inputs.start,
      "inputs": len(self._spans) + len(self._failed),
      "done": len(self._spans),
      "failed": [self._failed[i] for i in sorted(self._failed)],
      "files_sha256": digest(sorted(self._files.items())),
      "bytes": self._size,
      "sha256": self._draft.sha256(),
    }

  def _sort(self) -> None:
    """Rewrites the draft in the order of the list."""
    draft, spans = self._draft, self._spans
    self._draft, self._spans, self._size = Draft(draft.path), {}, 0
    try:
      for i in sorted(spans):
        self._write(i, draft.pieces(*spans[i]), self._files[i])
    finally:
      draft.discard()

  def _resume(self, retry_failed: bool) -> None:
    values = read_begun(self._out, self._part)
    if values is None:
      return
    check_job(values, self._job, self._out, self._part)
    records = records_path(begun_path(self._out, self._part), values)
    self._resumed = records if object_path(self._out) is not None else None
    for i, line, record in read_lines(records, self._inputs.start):
      if i not in self._spans:
        self._write(i, line, record.get("file"))
      else:  # a further line of the same record
        self._draft.write(line)
        self._size += len(line)
        self._spans[i] = self._spans[i][0], self._size - self._spans[i][0]
    self._retried.update(values.get("retried", ()))
    if retry_failed:
      self._retried.update(failure["input"] for failure in values["failed"])
      self._changed = bool(values["failed"])
      return
    for failure in values["failed"]:
      self._failed[failure["input"]] = failure
      self._files[failure["input"]] = failure.get("identity")
