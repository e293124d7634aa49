"""A process that reads images, one at a time: if it dies, only that image is lost."""

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

from sam3_jax.batch.image_bytes import ImageFile
from sam3_jax.batch.load_image import LoadedImage, load_image
from sam3_jax.utils.grain_workers import exit_with_parent
from sam3_jax.utils.identity import FileIdentity

START_TIMEOUT = 300.0  # seconds until a process must have started
POLL_INTERVAL = 0.1  # seconds between two checks while waiting
_starting = threading.Lock()  # multiprocessing's list of processes is not thread-safe


class ReaderDiedError(Exception):
  """The process has ended.

  Attributes:
    code: exit status, or minus the signal.
    identity: of the file that it had read; None if it had read none.
  """

  def __init__(self, code: int | None, identity: FileIdentity | None):
    super().__init__(code)
    self.code, self.identity = code, identity

  @property
  def was_terminated(self) -> bool:
    """Whether it was ended by a user's signal, rather than by the image."""
    return self.code in (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT)

  def __str__(self) -> str:
    if self.code is None or self.code >= 0:
      return f"exit status {self.code}"
    return f"signal {-self.code}"


class ReaderProcess:
  """A process that reads images. It ends with the process that started it.

  Attributes:
    ready: whether it has started.
  """

  def __init__(self, side: int | None, max_pixels: int, memory: int | None = None):
    """Starts the process without waiting for it.

    Args:
      side: of the model's square; None to keep the sizes of the images.
      max_pixels: larger images are refused.
      memory: limit in bytes for reading; None for no limit.
    """
    context = multiprocessing.get_context("spawn")
    self._side, self._started, self.ready = side, time.monotonic(), False
    with _starting:
      self._pipe, child_pipe = context.Pipe()
      arguments = (child_pipe, side, max_pixels, memory)
      self._process = context.Process(target=_serve, args=arguments, daemon=True)
      self._process.start()
      child_pipe.close()

  def read(
    self,
    file: ImageFile,
    on_read: Callable[[], None] = lambda: None,
    check: Callable[[], None] = lambda: None,
  ) -> LoadedImage:
    """Reads an image.

    Args:
      file: where it is.
      on_read: called when its bytes are read.
      check: called repeatedly while waiting; may raise, or kill the process.

    Raises:
      ReaderDiedError: the process has ended.
      OSError: the process does not start.
    """
    identity = None
    self.wait(check)
    try:
      self._pipe.send(file)
      kind, value = self._receive(check)
      if kind == "read":
        identity = value
        on_read()
        kind, value = self._receive(check)
      if value.size == (0, 0) or value.reason:
        return value
      data = self._pipe.recv_bytes()
      height, width = value.size if self._side is None else (self._side, self._side)
      pixels = np.frombuffer(data, np.uint8).reshape(height, width, 3)
      return value._replace(pixels=pixels)
    except (EOFError, OSError):
      raise ReaderDiedError(self._exit_code(), identity) from None

  def wait(self, check: Callable[[], None] = lambda: None) -> None:
    """Waits until the process has started.

    Raises:
      OSError: it does not start.
    """
    try:
      if not self.ready:
        self._receive(check)
        self.ready = True
    except (EOFError, OSError) as error:
      raise OSError(
        f"a process that reads images does not start ({ReaderDiedError(self._exit_code(), None)}); "
        "check the memory of this machine and rerun with fewer --workers."
      ) from error

  def kill(self) -> None:
    with contextlib.suppress(OSError, ValueError):
      self._process.kill()

  def close(self) -> None:
    """Ends the process; does not wait for one that hangs in the kernel."""
    self.kill()
    self._exit_code()
    with contextlib.suppress(OSError):
      self._pipe.close()

  def _receive(self, check: Callable[[], None]) -> Any:
    while not self._pipe.poll(POLL_INTERVAL):
      check()
      if not self.ready and time.monotonic() - self._started > START_TIMEOUT:
        self.kill()
    return self._pipe.recv()

  def _exit_code(self) -> int | None:
    with _starting:
      self._process.join(1.0)
      return self._process.exitcode


def _serve(pipe: Any, side: int | None, max_pixels: int, memory: int | None) -> None:
  """Runs in the process: reads the images whose files arrive through the pipe."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
  exit_with_parent()
  if memory is not None:
    limit_memory(memory)
  pipe.send(("ready", None))
  while True:
    try:
      file = pipe.recv()
    except (EOFError, OSError):
      return
    image = load_image(file, side, max_pixels, lambda identity: pipe.send(("read", identity)))
    pipe.send(("image", image._replace(pixels=np.zeros((0, 0, 3), np.uint8))))
    if image.size != (0, 0) and not image.reason:
      pipe.send_bytes(image.pixels.data.cast("B"))


def limit_memory(limit: int) -> None:
  """Limits the memory of this process to what it uses now and `limit` bytes more."""
  with contextlib.suppress(OSError, ValueError):  # there may be no /proc
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, used + limit))
