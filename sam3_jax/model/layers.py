"""Shared layers: dense with float32 accumulation, attention, MLP, two transformer blocks.

Parameter names are an interface: checkpoints, sharding rules and learning rates refer to them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from sam3_jax.model.norms import LayerNorm
from sam3_jax.model.rope import rope_table, rotate
from sam3_jax.ops.attention import attention
from sam3_jax.ops.precision import precision_of

VMEM = 2**26  # bytes: half of the VMEM of a TPU v5e or v6e


def gelu(x: Array) -> Array:
  """Exact GELU with `erf`. Same numbers as `jax.nn.gelu(approximate=False)`, but 2.6 times as fast
  on a TPU v6e (compiler's estimate), where `erfc` in JAX's version is slow."""
  wide = x.astype(jnp.float32)
  return (0.5 * wide * (1 + jax.lax.erf(wide / math.sqrt(2)))).astype(x.dtype)


def unfused_gelu(x: Array) -> Array:
  """`gelu` between two products, not fused with them. On a TPU the fused step takes a fifth longer,
  but only if the activations fit into VMEM, as those of one image do."""
  x = gelu(x)
  return jax.lax.optimization_barrier(x) if x.size * x.dtype.itemsize <= VMEM else x


def float32_sums(lhs, rhs, dimension_numbers, precision=None, preferred_element_type=None) -> Array:
  """The product of `nn.Dense`, accumulated in float32 for any operands; returns their dtype.

  Ignores `precision`, which follows from the dtypes. Flattens the leading axes, as XLA:CPU computes
  the kernel's gradient twice as fast from two axes as from three.
  """
  rows = lhs.reshape(-1, lhs.shape[-1])
  chosen = precision_of(lhs.dtype, rhs.dtype)
  out = jax.lax.dot(rows, rhs, precision=chosen, preferred_element_type=jnp.float32)
  return out.reshape(*lhs.shape[:-1], rhs.shape[-1]).astype(preferred_element_type or lhs.dtype)


def dense(features: int, dtype: DTypeLike, name: str | None, **settings: Any) -> nn.Dense:
  return nn.Dense(features, dtype=dtype, dot_general=float32_sums, name=name, **settings)


def conv(features: int, size: int, dtype: DTypeLike, name: str | None, **settings: Any) -> nn.Conv:
  """Square convolution; pads with zeros to keep the map's size, unless `settings` override it."""
  chosen = precision_of(dtype)
  return nn.Conv(features, (size, size), dtype=dtype, precision=chosen, name=name, **settings)


def interleaved(cells: list[list[Float[Array, "B H W C"]]]) -> Float[Array, "B H2 W2 C"]:
  """Interleaves n x n maps: `cells[i][j]` provides rows i, i + n, ... and columns j, j + n, ...

  Sums zero-dilated maps, which moves less data on a TPU than stacking the maps.
  """
  side, zero = len(cells), jnp.zeros((), cells[0][0].dtype)

  def spread(cell: Array, row: int, column: int) -> Array:
    dilated = [(offset, side - 1 - offset, side - 1) for offset in (row, column)]
    return jax.lax.pad(cell, zero, ((0, 0, 0), *dilated, (0, 0, 0)))

  maps = [spread(cell, i, j) for i, row in enumerate(cells) for j, cell in enumerate(row)]
  return functools.reduce(jnp.add, maps)


class Mlp(nn.Module):
  """Dense layers fc1 .. fcN with an activation, then dropout, between them."""

  widths: tuple[int, ...]
  dtype: DTypeLike = jnp.float32
  activation: Callable[[Array], Array] = nn.relu
  dropout: float = 0.0
  train: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "*rows C"]) -> Float[Array, "*rows C2"]:
    for i, width in enumerate(self.widths, start=1):
      x = dense(width, self.dtype, f"fc{i}")(x)
      if i < len(self.widths):
        x = self.activation(x)
        x = nn.Dropout(self.dropout, deterministic=not self.train)(x)
    return x


class Attention(nn.Module):
  """Multi-head attention with biased projections and separate inputs for query, key and value.

  Attributes:
    rope: side and scale of the grid whose cells are the tokens (see `rope_table`); None for no
      rotary positions.
    inner: channels of all heads together; None for those of the query.
  """

  heads: int
  dtype: DTypeLike = jnp.float32
  causal: bool = False
  rope: tuple[int, float] | None = None
  dropout: float = 0.0
  train: bool = False
  inner: int | None = None

  @nn.compact
  def __call__(
    self,
    query: Float[Array, "A I C"],
    key: Float[Array, "A2 J C"],
    value: Float[Array, "A2 J C"],
    *,
    bias: tuple[Float[Array, "A3 Heads I Y"], Float[Array, "A3 Heads I X"]] | None = None,
    valid: Bool[Array, "A3 J"] | None = None,
  ) -> Float[Array, "A3 I C"]:
    """A query, or key and value, with a single row broadcasts; A3 is the larger of A and A2."""
    width, rows = query.shape[-1], max(len(query), len(key))
    inner = self.inner or width

    def project(x, name):
      out = dense(inner, self.dtype, name)(x)
      out = out.reshape(*out.shape[:-1], self.heads, inner // self.heads)
      return jnp.broadcast_to(out, (rows, *out.shape[1:]))

    q, k, v = project(query, "query"), project(key, "key"), project(value, "value")
    if self.rope is not None:
      table = rope_table(*self.rope, channels=inner // self.heads)
      q, k = rotate(q, table), rotate(k, table)
    if self.is_initializing():  # only the parameters of `out` remain to be created
      return dense(width, self.dtype, "out")(q.reshape(*q.shape[:2], inner))
    drops = self.train and self.dropout > 0
    out = attention(
      q, k, v, bias=bias, valid=valid, causal=self.causal,
      dropout=self.dropout, dropout_key=self.make_rng("dropout") if drops else None,
    )  # fmt: skip
    return dense(width, self.dtype, "out")(out.reshape(*out.shape[:2], inner))


class Block(nn.Module):
  """Pre-norm transformer block with GELU, of the trunk and the text encoder.

  With `windows` > 1, the tokens come window by window, and attend within their window.
  """

  heads: int
  mlp_width: int
  dtype: DTypeLike = jnp.float32
  causal: bool = False
  windows: int = 1
  rope: tuple[int, float] | None = None
  train: bool = False

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B I C"],
    drop_path: Float[Array, ""] | float = 0.0,
    valid: Bool[Array, "B I"] | None = None,
  ) -> tuple[Float[Array, "B I C"], None]:
    """`drop_path` is the rate of stochastic depth in training. `valid` is False on tokens to which
    nothing attends (without windows only). Returns None as the output that `nn.scan` stacks."""
    y = LayerNorm(dtype=self.dtype, name="norm1")(x)
    y = y.reshape(len(x) * self.windows, -1, x.shape[-1])
    attend = Attention(self.heads, self.dtype, causal=self.causal, rope=self.rope, name="attn")
    x = x + self._drop_path(attend(y, y, y, valid=valid).reshape(x.shape), drop_path)
    y = LayerNorm(dtype=self.dtype, name="norm2")(x)
    y = Mlp((self.mlp_width, x.shape[-1]), self.dtype, unfused_gelu, name="mlp")(y)
    return x + self._drop_path(y, drop_path), None

  def _drop_path(self, branch: Array, rate: Array | float) -> Array:
    """Stochastic depth (Huang et al. 2016, arXiv:1603.09382), drawn for each row."""
    if not self.train:
      return branch
    kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - rate, (len(branch), 1, 1))
    scaled = branch.astype(jnp.float32) / (1 - rate)
    return jnp.where(kept, scaled, 0).astype(branch.dtype)


class ContextLayer(nn.Module):
  """Pre-norm layer with self-attention, cross-attention to a context, and a ReLU MLP (DETR's
  encoder layer with cross-attention), of the geometry encoder and the fusion encoder.

  `axis` is None, or the axis of a mesh whose devices split the tokens (`local_slice`). They
  all-gather the normed tokens for self-attention, and nothing else.
  """

  width: int
  heads: int
  mlp_width: int
  dtype: DTypeLike = jnp.float32
  dropout: float = 0.0
  train: bool = False
  axis: str | None = None

  def setup(self):
    options: dict[str, Any] = {"dropout": self.dropout, "train": self.train}
    self.norm1, self.norm2, self.norm3 = (LayerNorm(dtype=self.dtype) for _ in range(3))
    self.self_attn = Attention(self.heads, self.dtype, **options)
    self.cross_attn = Attention(self.heads, self.dtype, **options)
    self.mlp = Mlp((self.mlp_width, self.width), self.dtype, **options)
    # Separate modules, so that they draw different noise.
    self.drop1, self.drop2, self.drop3 = (
      nn.Dropout(self.dropout, deterministic=not self.train) for _ in range(3)
    )

  def __call__(
    self,
    x: Float[Array, "P I D"],
    position: Float[Array, "Itotal D"] | None,
    valid: Bool[Array, "P Itotal"] | None,
    context_keys: Float[Array, "P J D"],
    context: Float[Array, "P J D"],
    context_valid: Bool[Array, "P J"] | None,
    attended: Bool[Array, ""] | None = None,
  ) -> tuple[Float[Array, "P I D"], None]:
    """`attended` tells whether `x` is after self-attention already; None for no."""
    if attended is None or self.is_initializing():
      x = self.attend(x, position, valid)
    else:
      x = nn.cond(
        attended,
        lambda layer, x: x,
        lambda layer, x: layer.attend(x, position, valid),
        self, x, variables="params",
      )  # fmt: skip
    y = self.cross_attn(self.norm2(x), context_keys, context, valid=context_valid)
    x = x + self.drop2(y)
    return x + self.drop3(self.mlp(self.norm3(x))), None

  def attend(
    self,
    x: Float[Array, "P I D"],
    position: Float[Array, "Itotal D"] | None,
    valid: Bool[Array, "P Itotal"] | None = None,
  ) -> Float[Array, "P I D"]:
    """The first part of the layer, self-attention."""
    y = gather(self.norm1(x), self.axis, 1)
    keys = y if position is None else y + position.astype(y.dtype)
    queries = local_slice(keys, self.axis, 1)
    return x + self.drop1(self.self_attn(queries, keys, y, valid=valid))


def local_slice(x: Array, axis: str | None, dimension: int) -> Array:
  """This device's slice of an array that is replicated over a mesh's axis; x itself if that is
  None.

  Raises:
    ValueError: the devices cannot have equal slices.
  """
  if axis is None:
    return x
  devices, length = jax.lax.axis_size(axis), x.shape[dimension]
  if length % devices:
    raise ValueError(
      f"{length} tokens cannot be split over {devices} devices; make the size of the mesh's axis "
      f"{axis!r} a divisor of {length}."
    )
  size = length // devices
  start = jax.lax.axis_index(axis) * size
  return jax.lax.dynamic_slice_in_dim(x, start, size, dimension)


def gather(x: Array, axis: str | None, dimension: int) -> Array:
  """Inverse of `local_slice`."""
  return x if axis is None else jax.lax.all_gather(x, axis, axis=dimension, tiled=True)


@dataclasses.dataclass(frozen=True)
class Layering:
  """How layers run in training; affects results only by rounding.

  Attributes:
    remat: recompute a layer's activations in the backward pass instead of keeping them.
    gather: applied to a layer's parameters, a pytree, just before the layer runs, for example to
      all-gather sharded ones. None leaves them as they are.
  """

  remat: bool = False
  gather: Callable[[Any], Any] | None = None

  def __call__(self, layer: Any) -> Any:
    """Wraps `layer`, a module class or a function of a module."""
    if self.gather is not None:
      layer = nn.map_variables(layer, "params", trans_in_fn=self.gather)
    return nn.remat(layer, prevent_cse=False) if self.remat else layer


PLAIN = Layering()


def stacked(
  layer: Any, length: int, in_axes: Any = nn.broadcast, layering: Layering = PLAIN
) -> Any:
  """Repeats `layer`, a module class or a function of a module, `length` times with `nn.scan`;
  stacks its parameters along a new first axis."""
  return nn.scan(
    layering(layer),
    variable_axes={"params": 0, "intermediates": 0},
    split_rngs={"params": True, "dropout": True},
    in_axes=in_axes,
    length=length,
  )
