"""Products whose precision follows from their dtype.

By default, TPUs compute a float32 product in one bfloat16 pass, and GPUs in TF32: three of seven
decimal digits. So products of float32 operands request `Precision.HIGHEST`, which CPUs always use.
Products with a bfloat16 operand use JAX's default.

All products of the package use these functions or `precision_of`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array


def precision_of(*dtypes: DTypeLike) -> jax.lax.Precision | None:
  """The precision of a product with operands of these dtypes."""
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
  """Convolves maps [B, H, W, C] with a kernel [h, w, C, D]; stride 1."""
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=precision_of(x.dtype, kernel.dtype),
  )  # fmt: skip
