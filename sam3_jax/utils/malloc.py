"""The C library's heap, which keeps pages of freed memory: given back, a long job's memory is flat.

Where many threads take and free buffers of all sizes, glibc's arenas have holes that only grow in
number; what is in use does not.
"""

import contextlib
import ctypes


def trim() -> None:
  """Gives the free pages of the heap back to the system; does nothing without glibc."""
  with contextlib.suppress(OSError, AttributeError):  # no such library, or no such function
    ctypes.CDLL(None).malloc_trim(0)
