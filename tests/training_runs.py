"""Training runs with a stand-in for the step, which compiles quickly."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training_model

from sam3_jax.checkpoint import bundle
from sam3_jax.training import loop, sharding, trainer
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.start import Start
from sam3_jax.training.state import TrainState, update_ema
from sam3_jax.utils.param_tree import flatten

PATTERN = r"decoder/norm/.*|scoring/query_project/.*"
TOKENIZER = Path(__file__).parent / "goldens" / "tokenizer.model"


def stand_in(settings, optimizer, schedule, mesh, state, frozen):
  """A cheap step that depends on everything that a real step depends on."""

  @jax.jit
  def run(state, frozen, batch):
    push = jnp.cos(batch.ids.sum() + jax.random.normal(jax.random.fold_in(state.key, state.step)))
    gradients = {path: jnp.sin(x) + push for path, x in state.trained.items()}
    updates, moments = optimizer.update(gradients, state.optimizer, state.trained)
    trained = {path: x + updates[path] for path, x in state.trained.items()}
    ema = update_ema(state.ema, trained, state.step, settings.ema_decay)
    metrics = {"loss": push + 2, "grad_norm": push * push, "learning_rate": schedule(state.step)}
    return TrainState(state.step + 1, trained, moments, ema, state.key), metrics

  return run


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(trainer, "make_step", stand_in)
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
  )


def config(**values):
  fields = {
    "model": training_model.CONFIG.to_dict(), "trainable": PATTERN,
    "steps": 7, "save_every": 2, "ema_decay": 0.5,
    "data": {"batch_size": 4, "present_prompts": 1, "prompts_per_image": 2},
    "optimizer": {"warmup_steps": 2, "cooldown_steps": 2, "learning_rate": 1e-2},
  }  # fmt: skip
  return TrainConfig.from_dict(fields | values)


def start():
  return Start(
    training_model.CONFIG,
    training_model.parameters(),
    TOKENIZER.read_bytes(),
    {"licence": "CC0-1.0"},
  )


def train(out, settings=None, source=None, **options):
  settings = settings or config()
  return loop.train(settings, start(), source or training_model.RandomBatches(), out, **options)


def parameters(path):
  """The parameters of a checkpoint, by path."""
  return flatten(jax.device_get(bundle.load(path).params))


def assert_same(found, wanted):
  assert found.keys() == wanted.keys()
  for path in wanted:
    np.testing.assert_array_equal(found[path], wanted[path], err_msg=path)


class Stop(Exception):
  pass


class Stopping(training_model.RandomBatches):
  """Raises `Stop` before a step."""

  def __init__(self, after):
    super().__init__()
    self.after = after

  def __next__(self):
    if self.number == self.after:
      raise Stop
    return super().__next__()
