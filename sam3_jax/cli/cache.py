"""JAX's compilation cache, used by the command `sam3-jax` but not by `import sam3_jax`."""

import os
from pathlib import Path

from sam3_jax.utils.paths import user_cache


def directory() -> Path | None:
  """The default cache directory; None without a home directory, as in some containers."""
  try:
    return user_cache() / "programs"
  except RuntimeError:
    return None


def use() -> None:
  """Caches all compiled programs, including those that compile fast, as there are many of them. The
  directory is JAX_COMPILATION_CACHE_DIR if that is set, else `directory()`."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (path := directory()):
    jax.config.update("jax_compilation_cache_dir", str(path))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def switch_off() -> None:
  """Disables the compilation cache."""
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
