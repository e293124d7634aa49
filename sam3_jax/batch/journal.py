"""Which images a process is reading: where it dies, one of them may be the reason."""

import contextlib
import os
import threading
from pathlib import Path


class Journal:
  """A file beside a part's lease, which names each image before and after it is read.

  It is not synced: it survives the process, and need not survive the machine.

  Attributes:
    suspects: inputs that the process before was reading when it died.
  """

  def __init__(self, path: Path):
    """Raises OSError if the file cannot be written."""
    self._path, self._lock = path, threading.Lock()
    self.suspects = _unfinished(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)

  def begin(self, index: int) -> None:
    self._note(f"+{index}\n")

  def end(self, index: int) -> None:
    self.suspects.discard(index)
    self._note(f"-{index}\n")

  def close(self) -> None:
    """Nothing is in flight any more; suspects that were not read stay what they are."""
    with self._lock, contextlib.suppress(OSError):
      if self._file is None:
        return
      os.close(self._file)
      self._file = None
      if self.suspects:
        self._path.write_text("".join(f"+{index}\n" for index in sorted(self.suspects)))
      else:
        self._path.unlink()

  def _note(self, line: str) -> None:
    # The disk may be full, which is for others to say; a reader may come late, after the end.
    with self._lock, contextlib.suppress(OSError):
      if self._file is not None:
        os.write(self._file, line.encode())


def _unfinished(path: Path) -> set[int]:
  found: set[int] = set()
  try:
    lines = path.read_text(errors="replace").splitlines()
  except OSError:
    return found
  for line in lines:
    sign, index = line[:1], line[1:]
    if index.isdigit():  # the last line may be cut
      (found.add if sign == "+" else found.discard)(int(index))
  return found
