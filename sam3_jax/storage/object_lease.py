"""Leases that are objects: created and replaced only under a condition on their version.

They follow the rules of `utils.lease`. The holder rewrites the object every `RENEWED` seconds, each
time with other content, so that its ETag changes too. The age of an object is measured by the clock
of the server. A process that was suspended for so long that another took the lease over notices
that the version is no longer the one that it wrote.
"""

import contextlib
import dataclasses
import json
import threading
from pathlib import Path

from sam3_jax.storage.faults import ChangedError
from sam3_jax.storage.objects import ObjectPath, object_path
from sam3_jax.utils.lease import STALE, Holder, Lease, has_ended, renewals


class ObjectLease:
  """A lease, represented by an object."""

  def __init__(self, path: ObjectPath):
    """Does not acquire the lease yet."""
    self.path = path
    self._lock = threading.Lock()
    self._mine: Holder | None = None
    self._version, self._renewed = "", 0

  def acquire(self) -> bool:
    """Acquires the lease if it is free or stale; returns False if a running process holds it.

    Raises:
      OSError: the object cannot be written.
    """
    if self._mine is not None:
      return True
    mine, self._renewed = Holder.this_process(), 0
    try:
      version = self.path.create(self._content(mine))
    except ChangedError:
      version = self._take_over(mine)
    if version is None:
      return False
    self._mine, self._version = mine, version
    renewals.add(self)
    return True

  def release(self) -> None:
    """Releases the lease; does nothing if it is not held."""
    renewals.remove(self)
    with self._lock:
      mine, self._mine = self._mine, None
      if mine is not None:
        with contextlib.suppress(OSError):
          self.path.unlink(version=self._version)

  @property
  def held(self) -> bool:
    """Whether this process has acquired the lease and no other process has taken it over since."""
    with self._lock:
      entry = None if self._mine is None else self.path.entry()
      return entry is not None and entry.version == self._version

  def renew(self) -> None:
    """Rewrites the object; a thread calls this every `RENEWED` seconds."""
    with self._lock, contextlib.suppress(OSError):  # also if another process has taken it over
      if self._mine is not None:
        self._renewed += 1
        self._version = self.path.write(self._content(self._mine), self._version)

  def _take_over(self, mine: Holder) -> str | None:
    """Replaces a stale lease; returns its version, or None if the lease is not stale."""
    try:
      data, version = self.path.read_versioned()
      ended = has_ended(_holder(data))
      if ended is None:
        entry = self.path.entry()
        ended = entry is not None and entry.version == version and (entry.age or 0) > STALE
      return self.path.write(self._content(mine), version) if ended else None
    except (FileNotFoundError, ChangedError):  # another process was faster
      return None

  def _content(self, holder: Holder) -> bytes:
    values = dataclasses.asdict(holder) | {"renewed": self._renewed}
    return json.dumps(values).encode() + b"\n"


def open_lease(path: Path) -> Lease | ObjectLease:
  """The lease for a local path or an object; does not acquire it yet."""
  remote = object_path(path)
  return Lease(path) if remote is None else ObjectLease(remote)


def _holder(data: bytes) -> Holder | None:
  """The holder of a lease; None if the object is damaged."""
  try:
    values = json.loads(data)
    del values["renewed"]
    return Holder(**values)
  except (ValueError, TypeError, KeyError):
    return None
