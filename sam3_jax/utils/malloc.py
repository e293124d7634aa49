"""Returns freed memory to the operating system.

glibc's malloc keeps freed pages. In a long job whose threads allocate buffers of many sizes, this
unused memory keeps growing.
"""

import contextlib
import ctypes


def trim() -> None:
  """Returns free pages to the operating system; does nothing without glibc."""
  with contextlib.suppress(OSError, AttributeError):  # no such library or function
    ctypes.CDLL(None).malloc_trim(0)
