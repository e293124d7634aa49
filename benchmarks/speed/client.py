"""The other end of `server`: a side's process, asked and answered over pipes."""

import contextlib
import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from speed.server import Unable

FOLDER = Path(__file__).parents[1]  # where the modules that a side imports lie
# A first call compiles, whatever the user's habits.
NO_CACHE = {"JAX_ENABLE_COMPILATION_CACHE": "0"}


class Side:
  """A running side; a context manager that ends it.

  Attributes:
    name: such as "sam3-jax float32".
    facts: what it said of itself at its start.
  """

  def __init__(self, name: str, command: list[str], settings: dict[str, Any]):
    """Starts the process; raises Unable if it does not come to answer."""
    self.name, self._command, self._settings = name, command, settings
    self._start()

  def _start(self) -> None:
    self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - until __exit__
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
    environment = os.environ | NO_CACHE
    try:
      self._process = subprocess.Popen(
        self._command, **pipes, text=True, cwd=FOLDER, env=environment
      )
    except OSError as error:
      self._errors.close()
      raise Unable(f"{self._command[0]} cannot be run: {error.strerror}") from error
    try:
      self.facts = self._ask(self._settings)
    except BaseException:
      self.__exit__()
      raise

  def __enter__(self) -> "Side":
    return self

  def __exit__(self, *_: object) -> None:
    self._process.kill()  # it has nothing to finish
    self._process.wait()
    for file in (self._process.stdin, self._process.stdout, self._errors):
      with contextlib.suppress(OSError):  # what could not be sent any more
        file.close()

  def call(self, case: str, count: int) -> dict[str, float]:
    """Seconds, processor seconds and peak memory of one call; raises Unable. A process that an
    earlier case has ended, such as for its memory, is started anew."""
    if self._process.poll() is not None:
      self.__exit__()
      self._start()
    return self._ask({"case": case, "count": count})

  def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
    line, (asks, answers) = "", (self._process.stdin, self._process.stdout)
    try:
      print(json.dumps(question), file=asks, flush=True)
      line = answers.readline()  # pyright: ignore[reportOptionalMemberAccess]
    except OSError:  # it has ended
      pass
    if not line:
      status = self._process.wait()
      raise Unable(f"its process ended with status {status}: {self._last_words()}")
    answer = json.loads(line)
    if "unable" in answer:
      raise Unable(answer["unable"])
    return answer

  def _last_words(self) -> str:
    self._errors.seek(0)
    lines = [line.strip() for line in self._errors.read().splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
