"""Copies and pickles of a model."""

import copy
import multiprocessing
import pickle

import jax
import numpy as np
import pytest
import training_model

from sam3_jax import Sam3
from sam3_jax.compat.keras_hub import SAM3PromptableConceptImageSegmenter
from sam3_jax.inference import sharding

PHRASES = ["ear", "a red cat"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = training_model.save(tmp_path_factory.mktemp("bundles") / "toy", visual=True)
  return Sam3.from_checkpoint(folder, dtype="float32")


def encoded(model):
  return np.asarray(model.encode_text(PHRASES).features)


def answer(model, queue):
  """Runs in a spawned process."""
  queue.put((model.identity, str(model.device), encoded(model)))


def by_cloudpickle(model):
  cloudpickle = pytest.importorskip("cloudpickle")
  return cloudpickle.loads(cloudpickle.dumps(model))


WAYS = {
  "pickle": lambda model: pickle.loads(pickle.dumps(model)),
  "cloudpickle": by_cloudpickle,
  "copy": copy.copy,
  "deepcopy": copy.deepcopy,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_copies_give_the_same_results(model, way, tmp_path):
  again = WAYS[way](model)
  assert again.identity == model.identity
  assert (again.config, again.info, again.dtype) == (model.config, model.info, model.dtype)
  np.testing.assert_array_equal(again.tokenizer(PHRASES), model.tokenizer(PHRASES))
  for one, two in zip(jax.tree.leaves(again.params), jax.tree.leaves(model.params), strict=True):
    assert one.dtype == two.dtype
    np.testing.assert_array_equal(one, two)
  np.testing.assert_array_equal(encoded(again), encoded(model))
  again.info["name"], again.params = "mine", {}
  assert model.info["name"] == "toy"
  assert model.params


def test_a_copy_saves_unread_tensors(model, tmp_path):
  pickle.loads(pickle.dumps(model)).save(tmp_path / "again")
  assert Sam3.from_checkpoint(tmp_path / "again", dtype="float32").identity == model.identity


@pytest.mark.slow
def test_pickle_to_a_spawned_process(model):
  context = multiprocessing.get_context("spawn")
  queue = context.Queue()
  process = context.Process(target=answer, args=(model, queue))
  process.start()
  identity, device, features = queue.get(timeout=200)
  process.join(60)
  assert (process.exitcode, identity) == (0, model.identity)
  assert device == str(jax.devices()[0])
  np.testing.assert_allclose(features, encoded(model), atol=1e-6)


def test_pickles_hold_the_platform_and_not_the_device(model):
  third = Sam3(model.config, model.params, model.tokenizer, device="cpu:3")
  assert pickle.loads(pickle.dumps(third)).device == jax.devices("cpu")[0]
  assert copy.copy(third).device == jax.devices()[3]
  state = third.__getstate__() | {"device": "tpu"}  # that the receiving process has not
  again = Sam3.__new__(Sam3)
  again.__setstate__(state)
  assert again.device == jax.devices()[0]


def test_bfloat16_and_keras_hub_class(model):
  half = Sam3(model.config, model.params, model.tokenizer, dtype="bfloat16")
  again = pickle.loads(pickle.dumps(SAM3PromptableConceptImageSegmenter(half))).model
  assert again.dtype == half.dtype
  assert again.identity == half.identity


def test_model_with_a_mesh_is_refused(model):
  mesh = sharding.make_mesh(jax.devices()[:2])
  whole = Sam3(model.config, model.params, model.tokenizer, mesh=mesh)
  with pytest.raises(
    TypeError, match=r"with a mesh cannot be pickled, .*from_checkpoint\(path, me"
  ):
    pickle.dumps(whole)
  assert copy.copy(whole).mesh is mesh
