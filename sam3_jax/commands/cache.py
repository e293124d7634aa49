"""JAX's cache of compiled programs: the program `sam3-jax` uses it, `import sam3_jax` does not."""

import os
from pathlib import Path


def folder() -> Path:
  """In the user's cache folder; JAX's own variable JAX_COMPILATION_CACHE_DIR names another."""
  cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
  return cache / "sam3-jax" / "programs"


def use() -> None:
  """Keeps every compiled program, also those that compile fast, as there are many of them."""
  import jax

  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    jax.config.update("jax_compilation_cache_dir", str(folder()))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def switch_off() -> None:
  import jax

  jax.config.update("jax_enable_compilation_cache", False)
