"""Reads and decodes pictures ahead of their turn, by Grain: in threads, or in worker processes.

A picture that cannot be used is a row with a reason in place of pixels: one broken file in a
million must not stop the others.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.batch.inputs import Input
from sam3_jax.preprocess import read_image, resize
from sam3_jax.workers import end, leave_with_parent, lost_ones_named, parse_flags


class Picture(NamedTuple):
  """A picture as the model takes it, or why there is none.

  Attributes:
    pixels: resized to the model's square.
    size: height and width of the source, upright.
    reason: one line; empty if all is well.
    seconds: that reading took.
  """

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  reason: str
  seconds: float


class Source:
  """Pictures by place in a list; can be pickled, for workers."""

  def __init__(self, inputs: Sequence[Input], side: int, max_pixels: int):
    self._files = [(one.path, one.span, one.name) for one in inputs]
    self._side, self._max_pixels = side, max_pixels

  def __setstate__(self, state: dict[str, Any]) -> None:
    vars(self).update(state)
    leave_with_parent()

  def __len__(self) -> int:
    return len(self._files)

  def __getitem__(self, index: Any) -> Picture:
    start, reason, (path, span, name) = time.perf_counter(), "", self._files[int(index)]
    pixels, size = np.zeros((0, 0, 3), np.uint8), (0, 0)
    try:
      image = read_image(_content(path, span), max_pixels=self._max_pixels)
      pixels, size = resize(image, self._side), (image.shape[0], image.shape[1])
    except Exception as error:  # whatever a decoder makes of a broken file
      reason = reason_of(error).replace("the bytes given as an image", name)
    return Picture(pixels, size, reason, time.perf_counter() - start)


def reason_of(error: Exception) -> str:
  """Why a picture cannot be used, in one line."""
  if isinstance(error, MemoryError):
    return "it takes more memory than there is; refuse such pictures with --max-pixels."
  return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def reading(source: Source, *, workers: int, threads: int, ahead: int) -> Iterator[Any]:
  """An iterator over all `Picture`s of a source, in order.

  Args:
    source: what to read.
    workers: processes; 0 for threads of this one.
    threads: if there are no workers.
    ahead: pictures that are kept ready, about.
  """
  import grain

  pictures = grain.MapDataset.source(source)
  if workers:
    parse_flags()
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    options = grain.MultiprocessingOptions(
      num_workers=workers, per_worker_buffer_size=max(1, ahead // workers)
    )
    dataset = pictures.to_iter_dataset(one_by_one).mp_prefetch(options)
  else:
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(threads, ahead))
    dataset = pictures.to_iter_dataset(options)
  running: list[Any] = [iter(dataset)] if len(source) else []
  try:
    yield _pictures(running[0]) if running else iter(())
  finally:
    end(running)


def _pictures(rows: Iterator[Any]) -> Iterator[Picture]:
  with lost_ones_named():
    for row in rows:
      yield Picture(*row)


def _content(path: str, span: tuple[int, int] | None) -> str | bytes:
  if span is None:
    return path
  offset, size = span
  try:
    with open(path, "rb") as file:
      file.seek(offset)
      return file.read(size)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no file {path} any more.") from None
  except OSError as error:
    raise ValueError(f"{path} cannot be read ({error.strerror}).") from error
