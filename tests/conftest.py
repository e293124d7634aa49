"""Set up before anything is imported: eight CPU devices, shapes checked at run time, and a cache of
compiled programs that lasts as long as the tests.

Signatures of sam3_jax.model and ops are checked. The struct dataclasses of types.py are not: JAX
puts other objects than arrays into them during transformations.
"""

import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers and other subprocesses share it
  PROGRAMS = tempfile.TemporaryDirectory(prefix="sam3-jax-programs-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)  # a limit makes JAX lock its files

import jaxtyping
import pytest

jaxtyping.install_import_hook(
  ["sam3_jax.model", "sam3_jax.ops", "sam3_jax.model.visual"], "beartype.beartype"
)


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
  """The one copy of CLIP's vocabulary."""
  return Path(__file__).parent / "goldens" / "tokenizer.model"
