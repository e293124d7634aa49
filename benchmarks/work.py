"""Counts the operations of a traced program exactly from its shapes, without running it."""

import math
from collections.abc import Callable
from typing import Any

import jax


def gflop(function: Callable[..., Any], *shapes: Any) -> float:
  """GFLOP of all matrix products and convolutions; a multiply-add counts as 2."""
  return _flop(jax.make_jaxpr(function)(*shapes).jaxpr, 1) / 1e9


def _flop(jaxpr: Any, loop: int) -> float:
  """FLOP of a jaxpr inside a loop of `loop` iterations."""
  total = 0.0
  for eqn in jaxpr.eqns:
    name, out = eqn.primitive.name, eqn.outvars[0].aval if eqn.outvars else None
    if name == "dot_general":
      (contracted, _), _ = eqn.params["dimension_numbers"]
      total += 2 * out.size * math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
    elif name == "conv_general_dilated":
      kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"]
      total += 2 * out.size * math.prod(kernel) / kernel[numbers.rhs_spec[0]]
    elif name == "scan":
      length = eqn.params["length"]
      total += length * _flop(eqn.params["jaxpr"].jaxpr, length)
    elif name == "cond" and eqn.params.get("branches_platforms"):
      total += min(_flop(b.jaxpr, loop) for b in eqn.params["branches"])  # one branch per platform
    elif name == "cond":  # self-attention of a layer, which the first layer of the loop skips
      total += max(_flop(b.jaxpr, 1) for b in eqn.params["branches"]) * (loop - 1) / loop
    else:
      for inner in jax.tree.leaves(
        [x for key, x in eqn.params.items() if key != "branches"], is_leaf=_is_jaxpr
      ):
        if _is_jaxpr(inner):
          total += _flop(getattr(inner, "jaxpr", inner), loop)
  return total


def _is_jaxpr(x: Any) -> bool:
  return hasattr(x, "eqns") or hasattr(x, "jaxpr")
