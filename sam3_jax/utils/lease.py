"""Leases: locks between processes that share only a directory, such as a network mount.

A lease is a small file. It is created exclusively, so only one process gets it. The holder renews
its modification time, so that others can tell a slow holder from a lost one, and deletes it at the
end.

A lease is stale, and may be taken over, if

- its holder ran on this machine since the last boot, and that process has ended; or
- its holder runs elsewhere (another host or container), and has not renewed the file for `STALE`
  seconds by the clock of the file system.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import socket
import threading
from pathlib import Path
from typing import Any, Protocol, Self

RENEWED = 15.0  # seconds between two renewals
STALE = 120.0  # seconds without renewal after which a holder elsewhere counts as lost
PARTIAL = ".partial"  # suffix of temporary files

_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV}


class LeaseHeldError(OSError):
  """A living process holds the lease."""


@dataclasses.dataclass(frozen=True)
class Holder:
  """A process that holds or requests a lease.

  Attributes:
    host: host name, for messages only, since it need not be unique.
    system: identifies the machine since its last boot and the process namespace (container), within
      which `pid` is unique.
    pid: process id.
    started: start time of the process in clock ticks of the system; 0 if unknown.
    token: random and unique for each lease.
  """

  host: str
  system: str
  pid: int
  started: int
  token: str

  @classmethod
  def this_process(cls) -> Self:
    pid = os.getpid()
    return cls(socket.gethostname(), _system(), pid, _start_time(pid) or 0, secrets.token_hex(8))

  def __str__(self) -> str:
    return f"process {self.pid} on {self.host}"


class Lease:
  """A lease, represented by a file.

  As a context manager, it acquires the lease or raises `LeaseHeldError`.
  """

  def __init__(self, path: str | Path):
    """Does not acquire the lease yet.

    Args:
      path: of the lease file; its directory is created when the lease is acquired.
    """
    self.path = Path(path)
    self._mine: Holder | None = None

  def acquire(self) -> bool:
    """Acquires the lease if it is free or stale; returns False if a running process holds it.

    Raises:
      OSError: the file cannot be written.
    """
    if self._mine is not None:
      return True
    self.path.parent.mkdir(parents=True, exist_ok=True)
    mine = Holder.this_process()
    data = json.dumps(dataclasses.asdict(mine)).encode() + b"\n"
    if not (create_exclusively(self.path, data) or self._take_over(data)):
      return False
    self._mine = mine
    renewals.add(self)
    return True

  def release(self) -> None:
    """Releases the lease; does nothing if it is not held."""
    if self._mine is None:
      return
    held, self._mine = self.held, None
    renewals.remove(self)
    if held:
      with contextlib.suppress(OSError):
        self.path.unlink()

  @property
  def held(self) -> bool:
    """Whether this object has acquired the lease and no other process has taken it over since."""
    return self._mine is not None and _read(self.path) == self._mine

  def holder(self) -> Holder | None:
    """The holder of the lease, running or not; None if there is none or the file is damaged."""
    return _read(self.path)

  def renew(self) -> None:
    """Renews the modification time; a thread calls this every `RENEWED` seconds."""
    with contextlib.suppress(OSError):
      if self.held:
        os.utime(self.path)

  def __enter__(self) -> Self:
    if not self.acquire():
      raise LeaseHeldError(
        f"{self.holder() or 'another process'} is working on it ({self.path}); wait for it to "
        "end, or stop it."
      )
    return self

  def __exit__(self, *_: object) -> None:
    self.release()

  def _is_stale(self, holder: Holder | None) -> bool:
    ended = has_ended(holder)
    if ended is not None:
      return ended
    age = _age(self.path)
    return age is not None and age > STALE

  def _take_over(self, data: bytes) -> bool:
    """Replaces a stale lease.

    Only one process at a time may do so, or else the slower of two could replace the lease that
    the faster one has just acquired.
    """
    stale = _read(self.path)
    if not self._is_stale(stale):
      return False
    guard = self.path.with_name(f"{self.path.name}.takeover")
    if not create_exclusively(guard, data):
      if (_age(guard) or 0) > STALE:  # its process was killed while taking over
        guard.unlink(missing_ok=True)
      return False
    draft = _draft(self.path, data)
    try:
      if _read(self.path) != stale or not self._is_stale(stale):
        return False
      draft.replace(self.path)
      return True
    finally:
      draft.unlink(missing_ok=True)
      guard.unlink(missing_ok=True)


def has_ended(holder: Holder | None) -> bool | None:
  """Whether the process of a holder has ended; None if it ran elsewhere or is unknown."""
  if holder is None or holder.system != _system():
    return None
  return not _is_alive(holder.pid, holder.started)


def create_exclusively(path: Path, data: bytes) -> bool:
  """Creates a file with its content atomically; returns False if the file exists.

  Raises:
    OSError: the file cannot be written.
  """
  draft = _draft(path, data)
  try:
    os.link(draft, path)
  except FileExistsError:
    return False
  except OSError as error:
    if error.errno not in _NO_LINKS:
      raise
    return _create_in_place(path, data)
  finally:
    draft.unlink(missing_ok=True)
  sync_directory(path.parent)
  return True


def sync_directory(directory: Path) -> None:
  """Syncs a directory to disk; ignores file systems that do not support it (gcsfuse)."""
  descriptor = os.open(directory, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):
      os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _create_in_place(path: Path, data: bytes) -> bool:
  """For file systems without hard links; a reader may see the file before its content."""
  try:
    with path.open("xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
  except FileExistsError:
    return False
  sync_directory(path.parent)
  return True


def draft_path(path: Path) -> Path:
  """A hidden, unique name beside `path` for a file or directory that will be renamed to `path`.

  It identifies the process that writes it, see `is_abandoned`.
  """
  pid = os.getpid()
  tag = f"{_system_digest()}-{pid}-{_start_time(pid) or 0}-{secrets.token_hex(4)}"
  name = os.fsdecode(os.fsencode(path.name)[:150])  # names have at most 255 bytes
  return path.with_name(f".{name}.{tag}{PARTIAL}")


def is_abandoned(draft: Path) -> bool:
  """Whether the process that was writing a draft is lost, by the same rules as for leases."""
  found = re.search(r"\.([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{8}\.partial$", draft.name)
  if found and found[1] == _system_digest():
    return not _is_alive(int(found[2]), int(found[3]))
  age = _age(draft)
  return age is not None and age > STALE


def _draft(path: Path, data: bytes) -> Path:
  draft = draft_path(path)
  try:
    with draft.open("xb") as file:
      file.write(data)
      file.flush()
      os.fsync(file.fileno())
  except BaseException:
    draft.unlink(missing_ok=True)
    raise
  return draft


def _read(path: Path) -> Holder | None:
  try:
    values: dict[str, Any] = json.loads(path.read_bytes())
    return Holder(**values)
  except (OSError, ValueError, TypeError):
    return None


def _age(path: Path) -> float | None:
  """Seconds since a file was modified, by the file system's clock; None if it does not exist."""
  now = _draft(path, b"")
  try:
    return now.stat().st_mtime - path.stat().st_mtime
  except FileNotFoundError:
    return None
  finally:
    now.unlink(missing_ok=True)


@functools.cache
def _system() -> str:
  with contextlib.suppress(OSError):
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"
  return socket.gethostname()


@functools.cache
def _system_digest() -> str:
  return hashlib.sha256(_system().encode()).hexdigest()[:8]


def _is_alive(pid: int, started: int) -> bool:
  """Whether a process of this system is running; zombies do not count."""
  now = _start_time(pid)
  if now is not None:
    return now == started
  if started:  # it was in /proc and is no longer
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except OSError:
    pass  # it belongs to another user
  return True


def _start_time(pid: int) -> int | None:
  """Start time of a process in clock ticks since boot (proc(5)); None if it is not running."""
  try:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return None if fields[0] in "ZX" else int(fields[19])
  except (OSError, ValueError, IndexError):
    return None


class Renewable(Protocol):
  """A lease that must be renewed while it is held."""

  def renew(self) -> None: ...


class _Renewals:
  """One thread that renews all leases of this process."""

  def __init__(self):
    self._lock, self._leases = threading.Lock(), set[Renewable]()
    self._wake = threading.Event()
    self._pid = 0

  def add(self, lease: Renewable) -> None:
    with self._lock:
      self._leases.add(lease)
      if self._pid != os.getpid():  # the first one, or the first after a fork
        self._pid = os.getpid()
        threading.Thread(target=self._run, name="leases", daemon=True).start()

  def remove(self, lease: Renewable) -> None:
    with self._lock:
      self._leases.discard(lease)

  def _run(self) -> None:
    while True:
      self._wake.wait(RENEWED)
      with self._lock:
        leases = list(self._leases)
      for lease in leases:
        lease.renew()


renewals = _Renewals()
