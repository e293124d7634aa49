"""Settings made before other imports: eight CPU devices, run-time checks of shapes, and no
compilation cache.

Shapes in the signatures of sam3_jax.model and sam3_jax.ops are checked at run time. Those of the
struct dataclasses in types.py are not, as JAX's transformations put other objects into them.
"""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "0"

import jaxtyping
import pytest

jaxtyping.install_import_hook(
  ["sam3_jax.model", "sam3_jax.ops", "sam3_jax.model.visual"], "beartype.beartype"
)


@pytest.fixture(scope="session")
def tokenizer_path() -> Path:
  """CLIP's vocabulary."""
  return Path(__file__).parent / "goldens" / "tokenizer.model"
