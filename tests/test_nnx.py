"""examples/nnx_bridge.py: the detector as a Flax NNX module gives the same numbers."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import sam3_jax

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
SCENE = ROOT / "docs" / "scene.jpg"


@pytest.fixture(scope="module")
def example():
  spec = importlib.util.spec_from_file_location("nnx_bridge", ROOT / "examples" / "nnx_bridge.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def model():
  return sam3_jax.Sam3.from_checkpoint("sam3-tiny")


@pytest.fixture(scope="module")
def module(example, model):
  return example.to_nnx(model)


def test_parameters_are_nnx_state(module, model):
  state = nnx.state(module, nnx.Param)
  leaves = jax.tree.leaves(model.params)
  assert sum(x.size for x in jax.tree.leaves(state)) == sum(x.size for x in leaves)


@pytest.mark.slow
def test_results_equal_those_of_decode(example, module, model):
  found = example.detect(model, module, SCENE, "lion")
  expected = model.decode(model.encode(SCENE), "lion")
  for name in ("scores", "boxes", "mask_logits"):
    got, wanted = np.asarray(getattr(found, name)), np.asarray(getattr(expected, name))
    np.testing.assert_allclose(got, wanted, atol=1e-5, err_msg=name)  # measured 0
