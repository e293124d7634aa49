"""Loads one image: from a file to the model's input, or to the reason why it cannot be used.

There are two kinds of failures. An unreadable image may be readable later: the mount is not
available, the disk reports an error, the file is being replaced. An undecodable image was read and
will not change.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.batch.image_bytes import ImageFile, UnusableFileError, read_image_bytes
from sam3_jax.inputs.preprocess import read_image, resize
from sam3_jax.storage import retries
from sam3_jax.storage.urls import redact
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.os_errors import error_text

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


class LoadedImage(NamedTuple):
  """An image as the model takes it, or the reason why there is none.

  Attributes:
    pixels: resized to the model's square, or of the source.
    size: height and width of the source, upright.
    reason: one line; empty if the image is usable.
    seconds: time to load it.
    identity: of the file that was read; None if none could be read.
    unreadable: whether another attempt may succeed.
    suspect: whether to read it again in an isolated process with a memory limit.
    requests: number of requests to a store, and how many of them were repetitions.
  """

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  reason: str
  seconds: float
  identity: FileIdentity | None = None
  unreadable: bool = False
  suspect: bool = False
  requests: tuple[int, int] = (0, 0)


def load_image(
  file: ImageFile,
  side: int | None,
  max_pixels: int,
  on_read: Callable[[FileIdentity], object] = lambda _: None,
) -> LoadedImage:
  """Reads and decodes an image, and resizes it.

  Args:
    file: where it is.
    side: of the model's square; None to keep the size of the source.
    max_pixels: larger images are refused.
    on_read: called with the identity once the bytes are read.
  """
  start, before = time.perf_counter(), retries.counted()
  identity, size, pixels, reason = None, (0, 0), NO_PIXELS, ""
  unreadable = suspect = False
  try:
    data, identity = read_image_bytes(file)
  except UnusableFileError as error:
    identity, reason = error.identity, error_reason(error)
  except OSError as error:
    reason, unreadable = _read_error(file, error), True
  except MemoryError as error:
    reason, suspect = error_reason(error), True
  else:
    on_read(identity)
    try:
      image = read_image(data, max_pixels=max_pixels)
      del data
      size = image.shape[0], image.shape[1]
      pixels = image if side is None else resize(image, side)
    except Exception as error:  # decoders raise any exception on a broken file
      reason = error_reason(error).replace("the bytes given as an image", file.name)
      suspect = isinstance(error, MemoryError)
  seconds = time.perf_counter() - start
  requests = (retries.counted()[0] - before[0], retries.counted()[1] - before[1])
  return LoadedImage(pixels, size, reason, seconds, identity, unreadable, suspect, requests)


def error_reason(error: Exception) -> str:
  """Why an image cannot be used, in one line."""
  if isinstance(error, MemoryError):
    return "it needs more memory than there is; refuse such images with --max-pixels."
  return " ".join(str(error).split()) or type(error).__name__


def _read_error(file: ImageFile, error: OSError) -> str:
  if isinstance(error, FileNotFoundError | NotADirectoryError):
    return f"there is no image {redact(file.path)}"
  return f"{redact(file.path)} cannot be read ({error_text(error)})"
