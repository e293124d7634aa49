"""The training state, and its checkpoints."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model
from training_runs import PATTERN, assert_same

from sam3_jax.training import lora, state
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer
from sam3_jax.training.train_checkpoint import TrainCheckpoints
from sam3_jax.utils.param_tree import flatten


def test_split_by_pattern():
  trained, frozen = state.split(training_model.parameters(), PATTERN)
  assert sorted(trained) == [
    "decoder/norm/bias", "decoder/norm/scale",
    "scoring/query_project/bias", "scoring/query_project/kernel",
  ]  # fmt: skip
  assert trained.keys() | frozen.keys() == training_model.parameters().keys()
  assert not trained.keys() & frozen.keys()
  with pytest.raises(ValueError, match=r"trainable 'norm' matches no parameter"):
    state.split(training_model.parameters(), "norm")


def test_ema_decay_warms_up():
  average = {"w": jnp.zeros(1)}
  for number, value in enumerate((1.0, 2.0, 3.0)):
    average = state.update_ema(average, {"w": jnp.full(1, value)}, jnp.int32(number), 0.15)
  # Kept: 1/10, then 0.15, as 2/11 and 3/12 are more.
  want = 0.15 * (0.15 * 0.9 * 1 + 0.85 * 2) + 0.85 * 3
  assert float(average["w"][0]) == pytest.approx(want, rel=1e-6)
  assert state.update_ema({}, {"w": jnp.ones(1)}, jnp.int32(0), 0.9) == {}


def test_model_parameters_merge_and_gather():
  trained, frozen = state.split(training_model.parameters(), PATTERN)
  factors = lora.adapt(
    training_model.parameters(),
    lora.LoraConfig(rank=1, kernels="masks/prompt_attn/.*"),
    jax.random.key(0),
  )
  tree = flatten(state.model_parameters(trained | factors, frozen, 1.0))
  assert_same(tree, training_model.parameters())
  gathered = []
  gather = functools.partial(lambda seen, x: seen.extend(x) or x, gathered)
  state.model_parameters(trained, frozen, 1.0, gather)
  assert "masks/norm0/scale" in gathered
  assert "trunk/groups/global/norm1/scale" not in gathered  # it is gathered when its layer runs


def small_state():
  trained = {
    "decoder/norm/scale": np.arange(3, dtype=np.float32),
    "trunk/position": np.ones((2, 2)),
  }
  optimizer = make_optimizer(
    OptimizerConfig(name="muon"), trained | kernel(), training_model.CONFIG.trunk, 3
  )
  return state.create(trained | kernel(), optimizer, jax.random.key(3), ema=True)


def kernel():
  return {"scoring/query_project/kernel": np.eye(4, dtype=np.float32)}


def test_checkpoints_are_restored_bit_for_bit(tmp_path):
  storage, now = TrainCheckpoints(tmp_path / "steps", max_to_keep=1), small_state()
  assert storage.latest is None
  storage.save(3, now, {"batches": {"number": 7}, "best": None})
  storage.save(5, now.replace(step=jnp.int32(5)), {"batches": {"number": 9}, "best": 1.5})
  storage.close()
  again = TrainCheckpoints(tmp_path / "steps", max_to_keep=1)
  assert again.latest == 5
  empty = jax.tree.map(jnp.zeros_like, dataclasses.replace(now, key=jnp.zeros(())))
  found, progress = again.restore(empty.replace(key=jax.random.key(0)))
  again.close()
  assert progress == {"batches": {"number": 9}, "best": 1.5}
  assert int(found.step) == 5
  assert jax.tree.structure(found) == jax.tree.structure(now)
  assert (jax.random.key_data(found.key) == jax.random.key_data(now.key)).all()
  for got, want in zip(
    jax.tree.leaves(dataclasses.replace(found, key=0, step=0)),
    jax.tree.leaves(dataclasses.replace(now, key=0, step=0)),
    strict=True,
  ):
    np.testing.assert_array_equal(got, want)


def test_damaged_checkpoint_is_one_line(tmp_path):
  storage, now = TrainCheckpoints(tmp_path / "steps", max_to_keep=1), small_state()
  storage.save(1, now, {})
  storage.wait()
  for file in (tmp_path / "steps" / "1" / "state").rglob("*"):
    if file.is_file():
      file.write_bytes(b"")
  with pytest.raises(ValueError, match=r"cannot resume from .*steps/1") as caught:
    storage.restore(now)
  assert "\n" not in str(caught.value)
  storage.close()
