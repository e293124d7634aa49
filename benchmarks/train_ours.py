"""The sam3-jax side of `train.py`: the training step on the same batch and weights as Meta's."""

import argparse
import json
from pathlib import Path

import flax
import flax.linen as nn
import jax
import numpy as np
from sam3_jax.converters.in_memory import convert_meta
from timing import serve
from weights import weights

from sam3_jax.config import Config
from sam3_jax.model.layers import Layering
from sam3_jax.training import state as states
from sam3_jax.training.batch import Batch, Targets
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from sam3_jax.training.sharding import make_mesh, put_batch, state_shardings
from sam3_jax.training.step import StepSettings, make_step
from sam3_jax.utils.param_tree import flatten


def make_batch(arrays: dict[str, np.ndarray]) -> Batch:
  """Converts the batch of `train_batch` to the step's `Batch`."""
  images = len(arrays["images"])
  side = arrays["images"].shape[1]
  return Batch(
    images=arrays["images"],
    sizes=np.full((images, 2), side, np.int32),
    ids=np.arange(images, dtype=np.int32),
    tokens=arrays["tokens"],
    boxes=arrays["exemplars"],
    positive=np.ones_like(arrays["given"]),
    box_valid=arrays["given"],
    prompt_valid=np.ones(arrays["given"].shape[:2], bool),
    targets=Targets(arrays["boxes"], arrays["masks"].astype(np.uint8) * 255, arrays["valid"]),
  )


def unroll_layers() -> None:
  """Unrolls every stack of layers instead of scanning it."""
  scan = nn.scan
  nn.scan = lambda layer, *, length, **options: scan(layer, length=length, unroll=length, **options)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("work", type=Path, help="has config.json, batch.npz and names.json")
  parser.add_argument("--remat", choices=("none", "full"), default="full")
  parser.add_argument("--learning-rate", type=float, required=True)
  parser.add_argument("--unroll", action="store_true", help="unroll layers")
  parser.add_argument(
    "--all-masks", action="store_true", help="compute masks of absent phrases too"
  )
  arguments = parser.parse_args()
  if arguments.unroll:
    unroll_layers()
  config = Config.from_dict(json.loads((arguments.work / "config.json").read_text()))
  names = json.loads((arguments.work / "names.json").read_text())
  _, tree = convert_meta({n: weights(n, tuple(s)) for n, s in names.items()}, config)
  parameters, batch = flatten(tree), make_batch(dict(np.load(arguments.work / "batch.npz")))
  prompts_with_objects = int(batch.targets.valid.any(axis=(0, 2)).sum())
  settings = StepSettings(
    model=config,
    losses=LossConfig(),
    mask_prompts=None if arguments.all_masks else prompts_with_objects,
    layering=Layering(remat=arguments.remat == "full"),
  )
  recipe = OptimizerConfig(
    learning_rate=arguments.learning_rate, learning_rate_multipliers=(), layer_decay=1.0,
    schedule="constant", warmup_steps=0, cooldown_steps=0,
  )  # fmt: skip
  optimizer = make_optimizer(recipe, parameters, config.trunk, 1000)
  state = states.create(parameters, optimizer, jax.random.key(0), ema=False)
  mesh = make_mesh(jax.devices()[:1])
  state = jax.device_put(state, state_shardings(mesh, state))
  step = make_step(settings, optimizer, make_schedule(recipe, 1000), mesh, state, {})
  device_batch = put_batch(mesh, batch)

  def one() -> float:
    nonlocal state
    state, metrics = step(state, {}, device_batch)
    return float(jax.block_until_ready((state, metrics))[1]["loss"])

  serve(one, {m.__name__: m.__version__ for m in (jax, flax)}, {"device": str(jax.devices()[0])})


if __name__ == "__main__":
  main()
