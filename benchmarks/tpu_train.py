"""Memory and collectives of the full model's training step, compiled ahead of time for a TPU pod.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_train.py --out benchmarks/results  # 16 chips of v5e, 4 x 4

No TPU is needed and nothing is run: libtpu compiles for a topology on any Linux machine. Memory and
collectives are exact if the pod uses the same compiler version; time is not measured. The exit
status is 1 if the peak memory exceeds that of a chip.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import chips
import hlo


def lower(arguments: argparse.Namespace) -> Any:
  """Lowers the training step for the chips, fully sharded data parallel over all of them."""
  import jax
  import jax.numpy as jnp

  from sam3_jax.config import SIZES
  from sam3_jax.model.layers import Layering
  from sam3_jax.model.sam3 import parameter_shapes
  from sam3_jax.training import state as states
  from sam3_jax.training.losses import LossConfig
  from sam3_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
  from sam3_jax.training.sharding import gatherer, make_mesh
  from sam3_jax.training.step import StepSettings, make_step
  from sam3_jax.utils.param_tree import flatten

  config = SIZES[arguments.size]
  mesh = make_mesh(chips.devices(arguments.target, arguments.chips), fsdp=arguments.chips)
  trained, frozen = states.split(flatten(parameter_shapes(config)), arguments.train)
  recipe = OptimizerConfig()
  optimizer = make_optimizer(recipe, trained, config.trunk, 1000)
  state = jax.eval_shape(
    lambda arrays: states.create(arrays, optimizer, jax.random.key(0), ema=arguments.ema_decay > 0),
    trained,
  )
  settings = StepSettings(
    model=config,
    losses=LossConfig(),
    dtype=jnp.bfloat16,
    mask_prompts=arguments.mask_prompts,
    gradient_accumulation_steps=arguments.accumulate,
    ema_decay=arguments.ema_decay,
    frozen_parts=tuple(
      part for part in ("trunk", "text") if not any(x.startswith(f"{part}/") for x in trained)
    ),
    layering=Layering(arguments.remat == "full", gatherer(mesh, jnp.bfloat16)),
  )
  step = make_step(settings, optimizer, make_schedule(recipe, 1000), mesh, state, frozen)
  return step.lower(state, frozen, batch_shapes(config, arguments))


def batch_shapes(config: Any, arguments: argparse.Namespace) -> Any:
  """Shapes of a batch with `arguments.images` images per chip."""
  import jax
  import jax.numpy as jnp

  from sam3_jax.training.batch import Batch, Targets

  def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  images = arguments.chips * arguments.images
  rows, side, cells = (images, arguments.prompts), config.image_size, config.mask_size
  targets: dict[str, Any] = {
    "boxes": array(*rows, arguments.objects, 4),
    "masks": array(*rows, arguments.objects, cells, cells, dtype=jnp.uint8),
    "valid": array(*rows, arguments.objects, dtype=bool),
  }
  fields: dict[str, Any] = {
    "images": array(images, side, side, 3, dtype=jnp.uint8),
    "sizes": array(images, 2, dtype=jnp.int32),
    "ids": array(images, dtype=jnp.int32),
    "tokens": array(*rows, config.text.context, dtype=jnp.int32),
    "boxes": array(*rows, arguments.examples, 4),
    "positive": array(*rows, arguments.examples, dtype=bool),
    "box_valid": array(*rows, arguments.examples, dtype=bool),
    "prompt_valid": array(*rows, dtype=bool),
  }
  return Batch(**fields, targets=Targets(**targets))


def markdown(report: dict[str, Any]) -> str:
  """Memory and the table of collectives, as in docs/training-tpu.md."""
  memory, gb = report["memory"], 1e-9
  lines = [
    f"{report['what']}; {report['versions']}, compiled in {report['seconds']:.0f} s.",
    "",
    f"Peak memory of a chip: {memory['peak'] * gb:.2f} GB of {report['limit'] * gb:.0f} GB "
    f"(arguments {memory['arguments'] * gb:.2f} GB, temporaries {memory['temporaries'] * gb:.2f} "
    "GB).",
    "",
    "| part | collective | runs per step | MB of the largest | GB per step and chip |",
    "|---|---|---|---|---|",
  ]
  total = 0.0
  for row in report["collectives"]:
    lines.append(
      f"| {row['part']} | {row['kind']} | {row['times']} | {row['largest'] / 1e6:.2f} "
      f"| {row['bytes'] * gb:.3f} |"
    )
    total += row["bytes"]
  return "\n".join([*lines, f"| all | | | | {total * gb:.3f} |"])


def by_part(listed: list[hlo.Collective], parts: tuple[str, ...]) -> list[dict[str, Any]]:
  """Sums by part of the model and kind of collective, most bytes first."""
  rows: dict[tuple[str, str], dict[str, Any]] = {}
  for kind, size, times, scope in listed:
    part = next((p for p in parts if re.search(rf"[/(]{p}[/)]", scope)), "the rest")
    row = rows.setdefault(
      (part, kind), {"part": part, "kind": kind, "times": 0, "largest": 0, "bytes": 0}
    )
    row["times"] += times
    row["bytes"] += times * size
    row["largest"] = max(row["largest"], size)
  return sorted(rows.values(), key=lambda row: -row["bytes"])


PARTS = ("trunk", "neck", "text", "geometry", "fusion", "decoder", "scoring", "masks")


def main() -> int:
  arguments = _arguments()
  chips.describe()
  import jax
  import jaxlib

  compiled = chips.report(arguments.target, lower(arguments))
  if arguments.hlo:
    arguments.hlo.write_text(compiled.text)
  report = {
    "what": f"{arguments.target} {chips.TOPOLOGIES[arguments.chips]}, {arguments.chips} chips: "
    f"{arguments.images} image(s) a chip, {arguments.prompts} phrases each, masks for "
    f"{arguments.mask_prompts}, up to {arguments.objects} objects; bfloat16, remat "
    f"{arguments.remat}",
    "versions": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}",
    "seconds": compiled.compile_seconds,
    "limit": chips.CHIPS[arguments.target].memory,
    "memory": {
      "peak": compiled.peak,
      "arguments": compiled.arguments,
      "temporaries": compiled.temporaries,
    },
    "collectives": by_part(compiled.listing.collectives, PARTS),
  }
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"train-{arguments.target}-{arguments.chips}"
    (arguments.out / f"{name}.md").write_text(text + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  return 0 if report["memory"]["peak"] < report["limit"] else 1


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v5e")
  parser.add_argument("--chips", type=int, choices=chips.TOPOLOGIES, default=16)
  parser.add_argument(
    "--size", choices=("vit-tiny", "vit-small", "vit-base", "vit-large"), default="vit-large"
  )
  parser.add_argument("--images", type=int, default=1, help="images per chip")
  parser.add_argument("--prompts", type=int, default=4, help="phrases per image")
  parser.add_argument("--mask-prompts", type=int, default=2, help="phrases with masks")
  parser.add_argument("--objects", type=int, default=32, help="objects per phrase")
  parser.add_argument("--examples", type=int, default=4, help="exemplar boxes per phrase")
  parser.add_argument("--accumulate", type=int, default=1, help="microbatches per step")
  parser.add_argument("--ema-decay", type=float, default=0.999, help="0 for no average")
  parser.add_argument(
    "--train", default=".*", help="regular expression for the paths of trainable parameters"
  )
  parser.add_argument("--remat", choices=("none", "full"), default="full")
  parser.add_argument("--hlo", type=Path, help="file for the compiled program")
  parser.add_argument("--out", type=Path, help="folder for train-TARGET-CHIPS.md and .json")
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
