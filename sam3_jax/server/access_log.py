"""The log: one JSON line for each request and for each unexpected error."""

import json
import sys
import threading
import time
import traceback
from typing import Any, TextIO

_LONGEST = 200  # characters of a value that a client chose
_LONGEST_TRACE = 4000


class Log:
  """Writes lines to a stream. JSON in ASCII escapes all that could forge a line or a color."""

  def __init__(self, stream: TextIO | None = None, *, requests: bool = True):
    """
    Args:
      stream: where to write; None for stderr.
      requests: write a line for each request, not only for errors.
    """
    self._stream, self._requests, self._lock = stream, requests, threading.Lock()

  def request(self, **fields: Any) -> None:
    if self._requests:
      fields["seconds"] = round(fields["seconds"], 4)
      self._write("request", fields)

  def error(self, error: BaseException) -> None:
    trace = "".join(traceback.format_exception(error))[-_LONGEST_TRACE:]
    self._write("error", {"type": type(error).__name__, "trace": trace}, _LONGEST_TRACE)

  def _write(self, kind: str, fields: dict[str, Any], longest: int = _LONGEST) -> None:
    cut = {name: _cut(value, longest) for name, value in fields.items()}
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    line = json.dumps({"time": now, "event": kind} | cut)
    with self._lock:
      stream = self._stream or sys.stderr
      stream.write(line + "\n")
      stream.flush()


def _cut(value: Any, longest: int) -> Any:
  if isinstance(value, str) and len(value) > longest:
    return value[: longest - 3] + "..."
  return value
