"""A process that reads images, one at a time: its death costs that image alone."""

import contextlib
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.batch.fetch import File
from sam3_jax.batch.loading import Image, load
from sam3_jax.utils.grain_workers import exit_with_parent
from sam3_jax.utils.identity import FileIdentity

START = 300.0  # seconds in which a process must have started
POLL = 0.1  # seconds between two looks at whether to stop
_starting = threading.Lock()  # multiprocessing's own lists of processes know no threads


class DiedError(Exception):
  """The process is gone.

  Attributes:
    code: exit status, or minus the signal.
    identity: of the file that it had read by then; None if it had not.
  """

  def __init__(self, code: int | None, identity: FileIdentity | None):
    super().__init__(code)
    self.code, self.identity = code, identity

  @property
  def told(self) -> bool:
    """Whether somebody ended it, rather than the image."""
    return self.code in (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)

  def __str__(self) -> str:
    if self.code is None or self.code >= 0:
      return f"exit status {self.code}"
    return f"signal {-self.code}"


class Child:
  """A process that reads images. It ends with the process that started it.

  Attributes:
    ready: whether it has started.
  """

  def __init__(self, side: int, max_pixels: int, memory: int | None = None):
    """Starts it, and does not wait.

    Args:
      side: of the model's square.
      max_pixels: larger images are refused.
      memory: bytes that reading may take; None for no limit.
    """
    context = multiprocessing.get_context("spawn")
    self._side, self._began, self.ready = side, time.monotonic(), False
    with _starting:
      self._pipe, theirs = context.Pipe()
      arguments = (theirs, side, max_pixels, memory)
      self._process = context.Process(target=_serve, args=arguments, daemon=True)
      self._process.start()
      theirs.close()

  def read(
    self,
    file: File,
    fetched: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
  ) -> Image:
    """Reads an image.

    Args:
      file: where it is.
      fetched: called when its bytes are there.
      check: called now and then while waiting; may raise, or kill the process.

    Raises:
      DiedError: the process is gone.
      OSError: it does not start.
    """
    identity = None
    self.wait(check)
    try:
      self._pipe.send(file)
      kind, value = self._receive(check)
      if kind == "fetched":
        identity = value
        fetched()
        kind, value = self._receive(check)
      if value.size == (0, 0) or value.reason:
        return value
      data = self._pipe.recv_bytes()
      pixels = np.frombuffer(data, np.uint8).reshape(self._side, self._side, 3)
      return value._replace(pixels=pixels)
    except (EOFError, OSError):
      raise DiedError(self._code(), identity) from None

  def wait(self, check: Callable[[], None] = lambda: None) -> None:
    """Waits until it has started.

    Raises:
      OSError: it does not start.
    """
    try:
      if not self.ready:
        self._receive(check)
        self.ready = True
    except (EOFError, OSError) as error:
      raise OSError(
        f"a process to read images in does not start ({DiedError(self._code(), None)}); check the "
        "memory of this machine and rerun with fewer --workers."
      ) from error

  def kill(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._process.kill()

  def close(self) -> None:
    """Ends it; one that hangs in the kernel is left to the kernel."""
    self.kill()
    self._code()
    with contextlib.suppress(OSError):
      self._pipe.close()

  def _receive(self, check: Callable[[], None]) -> Any:
    while not self._pipe.poll(POLL):
      check()
      if not self.ready and time.monotonic() - self._began > START:
        self.kill()
    return self._pipe.recv()

  def _code(self) -> int | None:
    with _starting:
      self._process.join(1.0)
      return self._process.exitcode


def _serve(pipe: Any, side: int, max_pixels: int, memory: int | None) -> None:
  """The process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # for the process that started it
  exit_with_parent()
  if memory is not None:
    _limit_memory(memory)
  pipe.send(("ready", None))
  while True:
    try:
      file = pipe.recv()
    except (EOFError, OSError):
      return
    image = load(file, side, max_pixels, lambda identity: pipe.send(("fetched", identity)))
    pipe.send(("image", image._replace(pixels=np.zeros((0, 0, 3), np.uint8))))
    if image.size != (0, 0) and not image.reason:
      pipe.send_bytes(image.pixels.data.cast("B"))


def _limit_memory(more: int) -> None:
  with contextlib.suppress(OSError, ValueError):  # where there is no /proc
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
