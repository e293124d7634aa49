"""Parameter trees: paths, comparison, and reports of faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam3_jax.utils.param_tree import compare, flatten, nest, not_finite, raise_faults


def test_flatten_and_nest():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
  assert nest(flatten(tree)) == tree
  assert flatten({}) == nest({}) == {}


def test_compare_names_every_difference():
  wanted = {"a": (1,), "b": (2, 3), "c": ()}
  assert compare(wanted, wanted) == []
  assert compare({"a": (1,), "b": [2, 3], "c": ()}, wanted) == []
  assert compare({"b": (3, 2), "c": (), "d": (1,)}, wanted) == [
    "a is missing",
    "d is unknown",
    "b is [3, 2], expected [2, 3]",
  ]


def test_not_finite_looks_at_every_shard():
  sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
  good = jax.device_put(jnp.ones(16), sharding)
  bad = jax.device_put(jnp.ones(16).at[13].set(jnp.nan), sharding)
  flat = {"good": good, "bad": bad, "empty": np.ones(0), "half": np.array([np.inf], jnp.bfloat16)}
  assert not_finite(flat) == [
    f"{name} holds values that are not finite" for name in ("bad", "half")
  ]


def test_raise_faults():
  raise_faults([], "nothing")
  with pytest.raises(ValueError, match=r"^x, 1 fault: a\. Do y\.$"):
    raise_faults(["a"], "x", "Do y.")
  with pytest.raises(ValueError, match=r"^x, 22 faults: 0; 1; 2; .*18; 19; and 2 more\. Do y\.$"):
    raise_faults([str(i) for i in range(22)], "x", "Do y.")
