"""Settings made before other imports: eight CPU devices, run-time checks of shapes, and a
compilation cache that is deleted after the tests, unless the environment names one.

Shapes in the signatures of sam3_jax.model and sam3_jax.ops are checked at run time. Those of the
struct dataclasses in types.py are not, as JAX's transformations put other objects into them.
"""

import os
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
if "PYTEST_XDIST_WORKER" not in os.environ:  # the workers and all subprocesses share it
  if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # .ci/run shares one between its steps
    PROGRAMS = tempfile.TemporaryDirectory(prefix="sam3-jax-programs-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = PROGRAMS.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
  os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)  # a limit makes JAX lock its files

import jaxtyping
import pytest

jaxtyping.install_import_hook(
  ["sam3_jax.model", "sam3_jax.ops", "sam3_jax.model.visual", "sam3_jax.model.video"],
  "beartype.beartype",
)


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
  """CLIP's vocabulary."""
  return Path(__file__).parent / "goldens" / "tokenizer.model"
