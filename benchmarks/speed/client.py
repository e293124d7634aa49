"""The client of `server`: controls the process of a package over pipes."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from speed.server import Unable

DIRECTORY = Path(__file__).parents[1]  # working directory: modules are imported from here
# The first call must compile, whatever the user's settings.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "0"}


class Side:
  """The running process of a package; a context manager that ends it.

  Attributes:
    name: package and dtype, such as "sam3-jax float32".
    facts: properties that it reported when it started.
  """

  def __init__(self, name: str, command: list[str], settings: dict[str, Any]):
    """Starts the process; raises Unable if that fails."""
    self.name, self._command, self._settings = name, command, settings
    self._start()

  def _start(self) -> None:
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until __exit__
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
    environment = os.environ | NO_CACHE
    try:
      self._process = subprocess.Popen(
        self._command, **pipes, text=True, cwd=DIRECTORY, env=environment
      )
    except OSError as error:
      self._errors.close()
      raise Unable(f"{self._command[0]} cannot be run: {error.strerror}") from error
    try:
      self.facts = self._request(self._settings)
    except BaseException:
      self.__exit__()
      raise

  def __enter__(self) -> "Side":
    return self

  def __exit__(self, *_: object) -> None:
    self._process.kill()
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._errors):
      with contextlib.suppress(OSError):  # unsent data
        file.close()

  def call(self, case: str, count: int) -> dict[str, float]:
    """Measures seconds, CPU seconds and peak memory of one call; raises Unable. Restarts the
    process if an earlier case ended it, for example by running out of memory."""
    if self._process.poll() is not None:
      self.__exit__()
      self._start()
    return self._request({"case": case, "count": count})

  def _request(self, request: dict[str, Any]) -> dict[str, Any]:
    line, (requests, responses) = "", (self._process.stdin, self._process.stdout)
    try:
      print(json.dumps(request), file=requests, flush=True)
      line = responses.readline()  # pyright: ignore[reportOptionalMemberAccess]
    except OSError:  # the process has ended
      pass
    if not line:
      status = self._process.wait()
      raise Unable(f"its process ended with status {status}: {self._last_error()}")
    response = json.loads(line)
    if "unable" in response:
      raise Unable(response["unable"])
    return response

  def _last_error(self) -> str:
    self._errors.seek(0)
    lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
    return lines[-1] if lines else "it printed no error"
