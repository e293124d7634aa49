"""Set up before anything is imported: eight CPU devices, shapes checked, and no programs kept in
the user's cache.

Signatures of sam3_jax.model, ops and visual are checked at run time. The struct dataclasses of
types.py are not: JAX puts other things than arrays into them on its way through transformations.
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
  """The one copy of CLIP's vocabulary."""
  return Path(__file__).parent / "goldens" / "tokenizer.model"
