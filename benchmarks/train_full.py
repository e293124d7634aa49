"""`train.py full`: training steps of the released model on this machine, to measure memory.

Random parameters are created one by one on the device, so there is never a second copy of the
model, as in training from a checkpoint.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from timing import machine, peak_memory, timed
from train_batch import SIZES, make_batch
from train_ours import make_batch as padded_batch

from sam3_jax.config import Config
from sam3_jax.model.layers import Layering
from sam3_jax.model.sam3 import parameter_shapes
from sam3_jax.training import lora
from sam3_jax.training import state as states
from sam3_jax.training.config import DETECTOR, NO_PARAMETER
from sam3_jax.training.losses import LossConfig
from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from sam3_jax.training.sharding import make_mesh, put_batch, state_shardings
from sam3_jax.training.step import StepSettings, make_step
from sam3_jax.utils.param_tree import flatten

PROMPTS = 2  # of the image; the second is absent
LIMIT = 24e9  # bytes


def full(mode: str, steps: int, rank: int, size: str, out: Path | None) -> int:
  """Trains `steps` steps in `mode`, "detector" or "lora"; returns the exit status."""
  from train import full_config

  values = full_config({} if size == "full" else SIZES["tiny"])
  config, low_rank = Config.from_dict(values), lora.LoraConfig(rank=rank * (mode == "lora"))
  parameters = random_parameters(config)
  made = peak_memory()
  pattern = NO_PARAMETER if low_rank.rank else DETECTOR
  trained, frozen = states.split(parameters, pattern, allow_none=low_rank.rank > 0)
  trained |= lora.adapt(parameters, low_rank, jax.random.key(1))
  counts = {name: sum(x.size for x in part.values()) for name, part in
            (("trained", trained), ("frozen", frozen))}  # fmt: skip
  recipe = OptimizerConfig()
  optimizer = make_optimizer(recipe, trained, config.trunk, 1000)
  state = states.create(trained, optimizer, jax.random.key(0), ema=False)
  del parameters, trained
  settings = StepSettings(
    model=config,
    losses=LossConfig(),
    mask_prompts=PROMPTS - 1,
    frozen_parts=() if low_rank.rank else ("trunk", "text"),
    layering=Layering(remat=True),
  )
  mesh = make_mesh(jax.devices()[:1])
  frozen = jax.device_put(frozen, state_shardings(mesh, frozen))  # no copy: they are already there
  state = jax.device_put(state, state_shardings(mesh, state))
  step = make_step(settings, optimizer, make_schedule(recipe, 1000), mesh, state, frozen)
  batch = put_batch(mesh, padded_batch(make_batch(values, 1, PROMPTS, mask_side=config.mask_size)))

  rows = []
  for number in range(1, steps + 1):

    def one() -> dict[str, Any]:
      nonlocal state
      state, metrics = step(state, frozen, batch)
      return jax.device_get(metrics)

    metrics, figures = timed(one, repeats=0)
    rows.append({"loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])})
    rows[-1] |= {"seconds": figures["later"], "processor": figures["processor"]}
    rows[-1]["memory"] = peak_memory()
    print(f"step {number}: {json.dumps(rows[-1])}", flush=True)
  report = {"mode": mode, "size": size, "machine": machine(), "jax": jax.__version__}
  report |= {
    "parameters": counts,
    "memory_with_parameters": made,
    "memory": peak_memory(),
    "steps": rows,
  }
  print(
    f"{mode}: {counts['trained'] / 1e6:.1f} M of {sum(counts.values()) / 1e6:.1f} M parameters "
    f"trained; peak memory {report['memory'] / 1e9:.1f} GB ({made / 1e9:.1f} GB after "
    f"creating the parameters)"
  )
  if out:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"train-{size}-{mode}.json").write_text(json.dumps(report, indent=2) + "\n")
  finite = all(math.isfinite(row["loss"]) for row in rows)
  return 0 if finite and report["memory"] < LIMIT else 1


def random_parameters(config: Config) -> dict[str, jax.Array]:
  """Random kernels that keep activations of order one, scales of 1 and biases of 0, by path."""
  rng, made = np.random.default_rng(0), {}
  for path, shape in flatten(parameter_shapes(config)).items():
    leaf = path.rpartition("/")[2]
    if leaf in ("scale", "bias"):
      made[path] = jnp.full(shape.shape, float(leaf == "scale"))
      continue
    stack = states.stacked_axes(path)
    inputs = math.prod(shape.shape[stack:-1]) if leaf == "kernel" else 1
    array = rng.random(shape.shape, np.float32)
    array -= 0.5
    array *= math.sqrt(12 / inputs)
    made[path] = jax.block_until_ready(jax.device_put(array))
  return made
