"""The images that a process is reading: if it dies, one of them may be the reason."""

import contextlib
import os
import threading
from pathlib import Path


class Journal:
  """A file beside the lease of a part that names each image before and after it is read.

  The file is not synced: it must survive the process, not the machine.

  Attributes:
    suspects: inputs that the previous process was reading when it died.
  """

  def __init__(self, path: Path):
    """Raises OSError if the file cannot be written."""
    self._path, self._lock = path, threading.Lock()
    self.suspects = _unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

  def begin(self, index: int) -> None:
    self._append(f"+{index}\n")

  def end(self, index: int) -> None:
    self.suspects.discard(index)
    self._append(f"-{index}\n")

  def close(self) -> None:
    """Ends all reads; suspects that were not read remain suspects."""
    with self._lock, contextlib.suppress(OSError):
      if self._file is None:
        return
      os.close(self._file)
      self._file = None
      if self.suspects:
        self._path.write_text("".join(f"+{index}\n" for index in sorted(self.suspects)))
      else:
        self._path.unlink()

  def _append(self, line: str) -> None:
    # A full disk is reported elsewhere. A reader may be late and call this after `close`.
    with self._lock, contextlib.suppress(OSError):
      if self._file is not None:
        os.write(self._file, line.encode())


def _unfinished(path: Path) -> set[int]:
  """Inputs whose reading began and did not end."""
  found: set[int] = set()
  try:
    lines = path.read_text(errors="replace").splitlines()
  except OSError:
    return found
  for line in lines:
    sign, index = line[:1], line[1:]
    if index.isdigit():  # the last line may be incomplete
      (found.add if sign == "+" else found.discard)(int(index))
  return found
