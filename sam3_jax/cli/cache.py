"""JAX's cache of compiled programs: the program `sam3-jax` uses it, `import sam3_jax` does not."""

import os
from pathlib import Path

from sam3_jax.utils.paths import user_cache


def folder() -> Path | None:
  """In the user's cache folder; None for a user who has no home, as in some containers."""
  try:
    return user_cache() / "programs"
  except RuntimeError:
    return None


def use() -> None:
  """Keeps every compiled program, also those that compile fast, as there are many of them; in
  `folder()`, unless JAX's own variable JAX_COMPILATION_CACHE_DIR names another."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and (place := folder()):
    jax.config.update("jax_compilation_cache_dir", str(place))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def switch_off() -> None:
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
