"""Decodes a video in a process of its own, to find out whether it ends the process.

A video that a killed process was tracking is checked before it is tracked again: it may have
crashed the decoder. Otherwise it would crash each process that does its part.
"""

import multiprocessing
import signal
from collections.abc import Callable
from pathlib import Path

from sam3_jax.batch.prefetch import SUSPECT_MEMORY, StoppedError
from sam3_jax.batch.reader_process import ReaderDiedError, limit_memory
from sam3_jax.inputs.video import open_video
from sam3_jax.utils.grain_workers import exit_with_parent

_POLL_INTERVAL = 0.1  # seconds between two checks whether to stop
_NO_MEMORY = 3  # exit status


def check_decoding(path: Path, stopping: Callable[[], bool]) -> None:
  """Decodes all frames of a video in another process. Errors are left to the next who opens it.

  Args:
    path: of a local video.
    stopping: whether to end the process and raise StoppedError.

  Raises:
    ValueError: the video ends the process, or needs more memory than images may need.
    StoppedError: told to stop.
  """
  process = multiprocessing.get_context("spawn").Process(
    target=_decode, args=(str(path),), daemon=True
  )
  process.start()
  try:
    while process.exitcode is None:
      process.join(_POLL_INTERVAL)
      if stopping():
        raise StoppedError
  finally:
    process.kill()
    process.join()
  died = ReaderDiedError(process.exitcode, None)
  if died.was_terminated:
    raise StoppedError
  if process.exitcode == _NO_MEMORY:
    raise ValueError(
      f"{path} needs more than {SUSPECT_MEMORY >> 30} GB of memory to decode: reduce its size."
    )
  if process.exitcode:
    raise ValueError(f"{path} ends the process that decodes it ({died}): convert it to H.264.")


def _decode(path: str) -> None:
  """Runs in the process."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
  exit_with_parent()
  limit_memory(SUSPECT_MEMORY)
  try:
    with open_video(path, note=lambda _: None) as source:
      for _ in source:
        pass
  except MemoryError:
    raise SystemExit(_NO_MEMORY) from None
  except (OSError, ValueError):
    return
