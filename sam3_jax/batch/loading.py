"""One image: from a file to what the model takes, or to why not.

There are two kinds of failures. An image that is unreadable may be read later: the mount is away,
the disk has an error, the file is being replaced. An image that is undecodable was read, and stays
what it is.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from sam3_jax.batch.fetch import File, NotAFileError, fetch
from sam3_jax.inputs.preprocess import read_image, resize
from sam3_jax.utils.identity import FileIdentity
from sam3_jax.utils.os_errors import error_text

NO_PIXELS = np.zeros((0, 0, 3), np.uint8)


class Image(NamedTuple):
  """An image as the model takes it, or why there is none.

  Attributes:
    pixels: resized to the model's square.
    size: height and width of the source, upright.
    reason: one line; empty if all is well.
    seconds: that reading took.
    identity: of the file that was read; None if none could be.
    unreadable: whether another try may read it.
    suspect: whether it is to be read in a process of its own, with a limit of memory.
  """

  pixels: UInt8[np.ndarray, "Hi Wi 3"]
  size: tuple[int, int]
  reason: str
  seconds: float
  identity: FileIdentity | None = None
  unreadable: bool = False
  suspect: bool = False


def load(
  file: File,
  side: int,
  max_pixels: int,
  fetched: Callable[[FileIdentity], object] = lambda _: None,
) -> Image:
  """Reads, decodes and resizes an image.

  Args:
    file: where it is.
    side: of the model's square.
    max_pixels: larger images are refused.
    fetched: called with the identity once the bytes are there.
  """
  start = time.perf_counter()
  identity, size, pixels, reason = None, (0, 0), NO_PIXELS, ""
  unreadable = suspect = False
  try:
    data, identity = fetch(file)
  except NotAFileError as error:
    identity, reason = error.identity, reason_of(error)
  except OSError as error:
    reason, unreadable = _why_unreadable(file, error), True
  except MemoryError as error:
    reason, suspect = reason_of(error), True
  else:
    fetched(identity)
    try:
      image = read_image(data, max_pixels=max_pixels)
      del data
      pixels, size = resize(image, side), (image.shape[0], image.shape[1])
    except Exception as error:  # whatever a decoder makes of a broken file
      reason = reason_of(error).replace("the bytes given as an image", file.name)
      suspect = isinstance(error, MemoryError)
  seconds = time.perf_counter() - start
  return Image(pixels, size, reason, seconds, identity, unreadable, suspect)


def reason_of(error: Exception) -> str:
  """Why an image cannot be used, in one line."""
  if isinstance(error, MemoryError):
    return "it takes more memory than there is; refuse such images with --max-pixels."
  return " ".join(str(error).split()) or type(error).__name__


def _why_unreadable(file: File, error: OSError) -> str:
  if isinstance(error, FileNotFoundError | NotADirectoryError):
    return f"there is no image {file.path}"
  return f"{file.path} cannot be read ({error_text(error)})"
