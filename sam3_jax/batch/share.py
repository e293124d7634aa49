"""A part in work: leased, so that no other process does it at the same time."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.batch import parts
from sam3_jax.batch.job import Job
from sam3_jax.batch.journal import Journal
from sam3_jax.batch.part_files import (
  Failure,
  PartWriter,
  journal_path,
  lease_path,
  manifest_path,
  reopen,
)
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.lease import Lease
from sam3_jax.utils.malloc import trim

PATIENCE = 0.5  # seconds to wait for a thread that is writing, before the process ends


class Share:
  """A part that is to be done.

  Attributes:
    inputs: indices of all its inputs.
    left: of those that are to be done, while it is claimed.
    finished: whether it is done.
    held: whether another process has it.
    journal: of its images in flight, while it is claimed.
    resumed: how many inputs were done, and how many had failed, when it was first claimed.
  """

  def __init__(
    self, job: Job, part: int, described: Mapping[str, Any], drafts: Sequence[Path] = ()
  ):
    """Claims nothing yet.

    Args:
      job: what it is a part of.
      part: its number.
      described: the job as it is on disk.
      drafts: files that processes before left of this part.
    """
    self._job, self._part, self._drafts = job, part, drafts
    self._digest = parts.job_digest(described, part)
    self.inputs = parts.bounds(part, described)
    self._retry_failed = job.retry_failed
    self._lease = Lease(lease_path(job.out, part))
    self._lock = threading.Lock()
    self._writer: PartWriter | None = None
    self._reset()
    self.finished = self.held = False
    self.resumed: tuple[int, int] | None = None

  def _reset(self) -> None:
    self.left: list[int] = []
    self.journal: Journal | None = None

  def claim(self) -> bool:
    """Takes the part, unless it is done or another process has it; false if there is nothing to do.

    Raises:
      ValueError: what is there of it is another job's, or damaged.
      OSError: it cannot be written.
    """
    with self._lock:
      self.held = not self._lease.acquire()
      if self.held:
        return False
      try:
        return self._open()
      except BaseException:
        self._release()
        raise

  def _open(self) -> bool:
    out, part = self._job.out, self._part
    for draft in self._drafts:  # whoever wrote them had the lease
      draft.unlink(missing_ok=True)
    self._drafts = ()
    if manifest_path(out, part).exists():
      entry = parts.manifest(out, part)
      if not (self._retry_failed and entry["failed"]):
        self.finished = True
        self.resumed = self.resumed or (entry["done"], len(entry["failed"]))
        self._release()
        return False
      reopen(out, part)
    self.journal = Journal(journal_path(out, part))
    writer = PartWriter(out, part, self.inputs, self._digest, retry_failed=self._retry_failed)
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
    records: Sequence[bytes],
    failures: Sequence[Failure],
    inputs: Sequence[int],
    identities: Mapping[int, FileIdentity | None],
  ) -> None:
    """Takes what came of inputs. A part of which none is left is done."""
    with self._lock:
      if self._writer is None:  # closed meanwhile
        return
      try:
        self._writer.add(records, failures, inputs, identities)
        if not self._writer.pending:
          self._finish()
          trim()
      except BaseException:  # perhaps there is half a record
        self._writer.discard()
        self._release()
        raise

  def close(self) -> None:
    """Keeps what there is of the part, and gives it back."""
    if not self._lock.acquire(timeout=PATIENCE):  # a thread hangs while it writes
      self._lease.release()
      return
    try:
      if self._writer is not None and self._lease.held:
        self._writer.pause()
      elif self._writer is not None:
        self._lose()
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
        self._lose()
    self._release()

  def _lose(self) -> None:
    """This process was suspended for so long that another one took the part over."""
    if self._writer is not None:
      self._writer.discard()
    self.held = True

  def _release(self) -> None:
    self._writer = None
    if self.journal is not None:
      self.journal.close()
    self._reset()
    self._lease.release()
