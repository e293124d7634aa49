"""Products whose precision follows their dtype.

Left to themselves, TPUs compute a float32 product in one pass of bfloat16, and GPUs in TF32: three
decimal digits of seven. So every product of float32 operands asks for `Precision.HIGHEST`, which
CPUs always compute. Products with a bfloat16 operand ask for nothing: JAX's default suits them.

All products of the package are computed by these functions, or take `precision_of` from here.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def precision_of(*dtypes: DTypeLike) -> jax.lax.Precision | None:
  """Precision of a product whose operands have these dtypes."""
  wide = all(jnp.dtype(dtype).itemsize >= 4 for dtype in dtypes)
  return jax.lax.Precision.HIGHEST if wide else None


def einsum(subscripts: str, *operands: Array, **settings: Any) -> Array:
  """`jnp.einsum`; `settings` are its other arguments."""
  chosen = precision_of(*(x.dtype for x in operands))
  return jnp.einsum(subscripts, *operands, precision=chosen, **settings)


def matmul(a: Array, b: Array, **settings: Any) -> Array:
  """`jnp.matmul`; `settings` are its other arguments."""
  return jnp.matmul(a, b, precision=precision_of(a.dtype, b.dtype), **settings)


def convolve(x: Array, kernel: Array, padding: str) -> Array:
  """Convolution of stride 1 over maps [B, H, W, C] with a kernel [h, w, C, D]."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision_of(x.dtype, kernel.dtype),
  )  # fmt: skip
