"""Products are as precise as their dtype says, on every platform: float32 ones are float32."""

import programs
import pytest
from jax.lax import Precision

EXACT = (Precision.HIGHEST, Precision.HIGHEST)
PRODUCTS = ("dot_general", "conv_general_dilated")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_product(dtype):
  wrong = []
  for name, traced in programs.everything(dtype):
    found = 0
    for equation in programs.equations(traced.jaxpr.jaxpr):
      if equation.primitive.name not in PRODUCTS:
        continue
      found += 1
      operands = [x.aval.dtype.name for x in equation.invars]
      wanted = EXACT if operands == ["float32", "float32"] else None
      if equation.params["precision"] != wanted:
        wrong.append(f"{name}: {equation.source_info.name_stack} {operands}")
    assert found, name
  assert not wrong, "\n".join(wrong)
