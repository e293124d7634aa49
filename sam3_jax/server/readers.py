"""Decodes uploaded images in processes of their own, so that a hostile file harms only itself.

`batch` reads images in the same way. A process has a limit of memory, and is ended and replaced
when an image takes too long or crashes it.
"""

import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sam3_jax.batch.image_bytes import ImageFile
from sam3_jax.batch.load_image import LoadedImage, load_image
from sam3_jax.batch.prefetch import BYTES_PER_PIXEL, SUSPECT_MEMORY
from sam3_jax.batch.reader_process import ReaderDiedError, ReaderProcess
from sam3_jax.server.errors import ApiError
from sam3_jax.server.settings import Settings

NAME = "the uploaded file"  # of an image in messages


class Readers:
  """Processes that decode images, each used by one thread at a time."""

  def __init__(self, side: int, settings: Settings):
    """Starts the first process without waiting for it.

    Args:
      side: of the model's square.
      settings: of the server.
    """
    self._count = settings.readers
    self._side, self._max_pixels = side, settings.max_pixels
    self._seconds, self._isolated = settings.decode_seconds, settings.readers > 0
    self._memory = SUSPECT_MEMORY + BYTES_PER_PIXEL * settings.max_pixels
    self._pool = ThreadPoolExecutor(max(1, settings.readers), "sam3-read")
    self._processes: queue.SimpleQueue[ReaderProcess] = queue.SimpleQueue()
    self._all: set[ReaderProcess] = set()
    self._lock, self._closed = threading.Lock(), False
    if settings.readers:
      self._processes.put(self._start())

  @property
  def pool(self) -> ThreadPoolExecutor:
    """Where to call `read`: it has as many threads as there are processes."""
    return self._pool

  @property
  def is_closed(self) -> bool:
    return self._closed

  def read(self, path: Path) -> LoadedImage:
    """Decodes an image and resizes it to the model's square.

    Raises:
      ApiError: it is not an image in a supported format, is damaged, too large, or takes too much
        time or memory.
    """
    file = ImageFile(NAME, str(path))
    if self._isolated:
      image = self._read_isolated(file)
    else:
      image = load_image(file, self._side, self._max_pixels)
    if image.reason:
      large = "pixels, more than" in image.reason
      raise ApiError(
        "too_many_pixels" if large else "unsupported_image",
        image.reason.partition(" Allow more with")[0] if large else image.reason,
      )
    return image

  def close(self) -> None:
    """Ends the processes."""
    with self._lock:
      self._closed = True
      processes = list(self._all)
    for process in processes:
      process.close()
    self._pool.shutdown(wait=False, cancel_futures=True)

  def _read_isolated(self, file: ImageFile) -> LoadedImage:
    process = self._processes.get()
    try:
      process.wait()
      end = time.monotonic() + self._seconds

      def check() -> None:
        if time.monotonic() > end:
          process.kill()

      return process.read(file, check=check)
    except (ReaderDiedError, OSError):
      late = time.monotonic() > end
      process = self._replace(process)
      why = (
        f"takes longer than {self._seconds:g} s" if late else "ended the process that decoded it"
      )
      raise ApiError("unsupported_image", f"{NAME} {why}; save it again as JPEG or PNG.") from None
    finally:
      self._processes.put(process)

  def start_rest(self) -> None:
    """Starts the other processes, each when the one before has started, as that takes a core."""
    with contextlib.suppress(OSError):
      for process in (self._start() for _ in range(self._count - 1) if not self._closed):
        process.wait()
        self._processes.put(process)

  def _start(self) -> ReaderProcess:
    process = ReaderProcess(self._side, self._max_pixels, self._memory)
    with self._lock:
      self._all.add(process)
      closed = self._closed
    if closed:
      process.close()
    return process

  def _replace(self, process: ReaderProcess) -> ReaderProcess:
    with contextlib.suppress(OSError):
      process.close()
    with self._lock:
      self._all.discard(process)
    return process if self._closed else self._start()
