"""Maps as blocks of cells equal the same maps cell by cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import difference

from sam3_jax.model.video.memory_encoder import MaskDownsampler, _in_blocks
from sam3_jax.ops.blocks import channel_mean, halve, to_blocks


def normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize(("side", "channels", "features"), [(16, 1, 4), (4, 3, 5), (2, 6, 7)])
def test_halve_is_a_convolution_of_stride_2(side, channels, features):
  maps, kernel = normal(0, 2, 3 * side, 2 * side, channels), normal(1, 3, 3, channels, features)
  wanted = jax.lax.conv_general_dilated(
    maps, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  got = halve(to_blocks(maps, side), kernel, side)
  assert difference(got, to_blocks(wanted, side // 2)) <= 5e-6  # measured 9e-7


def test_channel_mean():
  maps = normal(0, 1, 4, 6, 3)
  wanted = jnp.broadcast_to(maps.mean(axis=-1, keepdims=True), maps.shape)
  assert difference(channel_mean(to_blocks(maps, 2), 3), to_blocks(wanted, 2)) <= 1e-6


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_the_mask_downsampler_of_tpus_equals_the_other(dtype, error):
  """Values and gradients."""
  module, mask = MaskDownsampler((2, 4, 8), 8, jnp.dtype(dtype)), 10 * normal(0, 2, 24, 16)
  variables = module.init(jax.random.key(0), mask)
  variables = jax.tree.map(lambda x: x + 0.3 * normal(1, *x.shape), variables)

  def plain(variables, mask):
    return module.apply(variables, mask)

  def blocks(variables, mask):
    return _in_blocks(variables, mask, jnp.dtype(dtype))

  got, want = blocks(variables, mask), plain(variables, mask)
  assert got.dtype == want.dtype
  assert difference(got, want) <= error
  pull = normal(2, *want.shape)
  got, want = (
    jax.grad(lambda *args, f=f: (f(*args).astype(jnp.float32) * pull).sum(), (0, 1))(
      variables, mask
    )
    for f in (blocks, plain)
  )
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert difference(one, other) <= 10 * error
