"""A part that this process works on, under a lease, so that no other process does the same."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.batch.job import BatchJob
from sam3_jax.batch.job_files import find_manifest, job_digest, part_range
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.part_files import (
  Failure,
  journal_path,
  lease_path,
  reopen_part,
)
from sam3_jax.batch.part_writer import PartWriter, Record
from sam3_jax.storage.object_lease import open_lease
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.malloc import trim

CLOSE_TIMEOUT = 0.5  # seconds to wait for a thread that is writing, before the process ends


class LeasedPart:
  """A part of this process that is not done.

  Attributes:
    number: of the part.
    inputs: indices of all its inputs.
    left: inputs that are still to do, while the lease is held.
    finished: whether the part is done.
    leased_elsewhere: whether another process holds the lease.
    journal: of the inputs being read, while the lease is held.
    resumed: number of inputs that were done, and that had failed, when the part was first acquired.
  """

  def __init__(
    self, job: BatchJob, part: int, description: Mapping[str, Any], drafts: Sequence[Path] = ()
  ):
    """Does not acquire the lease yet.

    Args:
      job: to which the part belongs.
      part: its number.
      description: the job as it is on disk.
      drafts: files of this part that earlier processes did not commit.
    """
    self._job, self.number, self._drafts = job, part, drafts
    self._digest = job_digest(description, part)
    self.inputs = part_range(part, description)
    self._retry_failed = job.retry_failed
    self._lease = open_lease(lease_path(job.out, part))
    self._lock = threading.Lock()
    self._writer: PartWriter | None = None
    self._reset()
    self.finished = self.leased_elsewhere = False
    self.resumed: tuple[int, int] | None = None

  def _reset(self) -> None:
    self.left: list[int] = []
    self.journal: Journal | None = None

  def acquire(self) -> bool:
    """Acquires the lease; false if the part is done or another process holds the lease.

    Raises:
      ValueError: the files of the part belong to another job, or are damaged.
      OSError: the part cannot be written.
    """
    with self._lock:
      self.leased_elsewhere = not self._lease.acquire()
      if self.leased_elsewhere:
        return False
      try:
        return self._open()
      except BaseException:
        self._release()
        raise

  def _open(self) -> bool:
    out, part = self._job.out, self.number
    for draft in self._drafts:  # their writers held this lease and no longer do
      draft.unlink(missing_ok=True)
    self._drafts = ()
    if (manifest := find_manifest(out, part)) is not None:
      if not (self._retry_failed and manifest["failed"]):
        self.finished = True
        self.resumed = self.resumed or (manifest["done"], len(manifest["failed"]))
        self._release()
        return False
      reopen_part(out, part)
    self.journal = Journal(journal_path(out, part))
    writer = PartWriter(
      out, part, self.inputs, self._digest, noun=self._job.noun, retry_failed=self._retry_failed
    )
    self._writer, self._retry_failed = writer, False
    self.left = writer.pending
    self.journal.suspects.intersection_update(self.left)
    if self.resumed is None:
      self.resumed = writer.resumed
    if not self.left:
      self._finish()
      return False
    return True

  def add(
    self,
    records: Sequence[Record],
    failures: Sequence[Failure],
    inputs: Sequence[int],
    identities: Mapping[int, FileIdentity | None],
  ) -> None:
    """Adds the outcome of inputs; see `PartWriter.add`. Finishes the part if no input is left."""
    with self._lock:
      if self._writer is None:  # it was closed in the meantime
        return
      try:
        self._writer.add(records, failures, inputs, identities)
        if not self._writer.pending:
          self._finish()
          trim()
      except BaseException:  # the draft may end in half a record
        self._writer.discard()
        self._release()
        raise

  def close(self) -> None:
    """Saves the unfinished part, and releases the lease."""
    if not self._lock.acquire(timeout=CLOSE_TIMEOUT):  # a thread hangs while writing
      self._lease.release()
      return
    try:
      if self._writer is not None and self._lease.held:
        self._writer.pause()
      elif self._writer is not None:
        self._give_up()
    except BaseException:
      if self._writer is not None:
        self._writer.discard()
      raise
    finally:
      self._release()
      self._lock.release()

  def _finish(self) -> None:
    if self._writer is not None:
      if self._lease.held:
        self._writer.finish()
        self.finished = True
      else:
        self._give_up()
    self._release()

  def _give_up(self) -> None:
    """Discards the draft: this process was suspended so long that another took the lease over."""
    if self._writer is not None:
      self._writer.discard()
    self.leased_elsewhere = True

  def _release(self) -> None:
    self._writer = None
    if self.journal is not None:
      self.journal.close()
    self._reset()
    self._lease.release()
