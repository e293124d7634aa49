"""The depthwise convolution of CPUs against XLA's own, with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close

from sam3_jax.ops import depthwise


@pytest.mark.parametrize(
  ("size", "shape"), [(7, (2, 9, 6, 8)), (3, (1, 1, 1, 4)), (1, (1, 3, 2, 4))]
)
@pytest.mark.slow
def test_equal_to_the_convolution(size, shape):
  rng = np.random.default_rng(0)
  maps = jnp.asarray(rng.standard_normal(shape), jnp.float32)
  kernel = jnp.asarray(rng.standard_normal((size, size, 1, shape[-1])), jnp.float32)

  def outcome(function):
    return jax.value_and_grad(lambda *x: jnp.sin(function(*x)).sum(), argnums=(0, 1))(maps, kernel)

  assert_close(depthwise._shifted(maps, kernel), depthwise._convolved(maps, kernel), rel=1e-6)
  assert_close(outcome(depthwise._shifted), outcome(depthwise._convolved), rel=2e-6)


def test_bfloat16_is_summed_in_float32():
  maps, kernel = jnp.ones((1, 9, 9, 2), jnp.bfloat16), jnp.ones((7, 7, 1, 2), jnp.bfloat16)
  found = depthwise.depthwise_conv(maps.at[0, 4, 4].set(256), kernel)
  assert found.dtype == jnp.bfloat16
  assert found[0, 4, 4, 0] == 304
