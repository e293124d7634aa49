"""Compiles the programs of batch inference ahead of time for TPUs: memory and collectives.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_batch.py --target v5e --chips 256 --images 1 2 4 8
  tpu/bin/python benchmarks/tpu_batch.py --target v6e --chips 16 --model 4  # 4 chips per prompt

See `chips.py`. The exit status is 1 if the encoder, or the decoder of whole prompts, contains a
collective, or if the smallest batch does not fit.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import chips
from tpu_train import PARTS, by_part


def lower_encoder(config: Any, dtype: Any, mesh: Any, images: int, rules: Any = None) -> Any:
  """Lowers the encoder with `images` per device; also returns the shapes of its output."""
  import jax
  import numpy as np

  from sam3_jax.inference import sharding
  from sam3_jax.inference.programs import Programs

  rules = rules or sharding.REPLICATED
  params, by_rows = _parameters(config, dtype, mesh, rules), sharding.by_rows(mesh)
  rows, side = images * mesh.size, config.image_size
  pixels = jax.ShapeDtypeStruct((rows, side, side, 3), np.uint8, sharding=by_rows)
  sizes = jax.ShapeDtypeStruct((rows, 2), np.int32, sharding=by_rows)
  encode: Any = Programs(config, dtype, mesh, rules, select_image=lambda image, _: image).encode
  return encode.lower(params, pixels, sizes), jax.eval_shape(encode, params, pixels, sizes)


def lower_decoder(
  config: Any, dtype: Any, mesh: Any, embedding: Any, prompts: int, most: int, split: bool = False
) -> Any:
  """Lowers the decoder with `prompts` per device, or per group of devices if `split`; `most` is the
  maximum number of instances per prompt."""
  import jax
  import numpy as np

  from sam3_jax import Prompt
  from sam3_jax.inference import sharding
  from sam3_jax.inference.programs import Programs
  from sam3_jax.inputs.prompts import pack
  from sam3_jax.types import TextEmbedding

  count = prompts * (mesh.shape["data"] if split else mesh.size)
  shards = sharding.by_groups(mesh) if split else sharding.by_rows(mesh)
  context, zeros = config.text.context, np.zeros(count, np.int32)
  text: Any = (np.zeros((count, context, config.width), dtype), np.ones((count, context), bool))
  packed = pack(
    [Prompt("a")] * count, np.ones((count, 2)), image=zeros, first_id=zeros,
    text=TextEmbedding(*text),
  )  # fmt: skip
  given = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=shards), (embedding, packed)
  )
  programs = Programs(config, dtype, mesh)
  detect: Any = (programs.split_prompts if split else programs.prompts).detect
  return detect.lower(_parameters(config, dtype, mesh, sharding.REPLICATED), *given, most)


def _parameters(config: Any, dtype: Any, mesh: Any, rules: Any) -> Any:
  import jax

  from sam3_jax.inference import sharding
  from sam3_jax.model.sam3 import parameter_shapes
  from sam3_jax.utils.param_tree import flatten, nest

  of = sharding.parameter_sharding(mesh, rules)
  flat = flatten(parameter_shapes(config))
  return nest(
    {
      path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=of(path, x.shape))
      for path, x in flat.items()
    }
  )


def report(name: str, target: str, lowered: Any) -> dict[str, Any]:
  """Compiles a lowered program; returns its row of the table."""
  compiled = chips.report(target, lowered)
  return {
    "program": name,
    "peak": compiled.peak,
    "temporaries": compiled.temporaries,
    "seconds": compiled.seconds,
    "collectives": by_part(compiled.listing.collectives, PARTS),
  }


def markdown(rows: list[dict[str, Any]], what: str, limit: float) -> str:
  lines = [f"{what}.", "", "| program | peak GB per chip | relative to its memory | collectives |"]
  lines.append("|---|---|---|---|")
  for row in rows:
    listed = [
      f"{one['times']} {one['kind']} in {one['part']}, {one['bytes'] / 1e6:.1f} MB"
      for one in row["collectives"]
    ]
    share = f"{row['peak'] / limit:.0%}"
    lines.append(
      f"| {row['program']} | {row['peak'] / 1e9:.2f} | {share} | {'; '.join(listed) or 'none'} |"
    )
  return "\n".join(lines)


def main() -> int:
  arguments = _arguments()
  chips.describe()
  import jax
  import jax.numpy as jnp

  from sam3_jax.config import SIZES
  from sam3_jax.inference import sharding

  config, target = SIZES[arguments.size], arguments.target
  mesh = sharding.make_mesh(chips.devices(target, arguments.chips), arguments.model)
  limit, rows, fits = chips.CHIPS[target].memory, [], []
  for images in arguments.images:
    lowered, embedding = lower_encoder(config, jnp.bfloat16, mesh, images)
    rows.append(report(f"encode, {images} image{'s' * (images > 1)} per chip", target, lowered))
    fits.append(rows[-1]["peak"] < limit)
  for prompts in arguments.prompts:
    decoder = lower_decoder(config, jnp.bfloat16, mesh, embedding, prompts, arguments.most)
    rows.append(report(f"decode, {prompts} prompts per chip, {images} images", target, decoder))
  crossing = any(row["collectives"] for row in rows)
  if arguments.model > 1:
    split = lower_decoder(config, jnp.bfloat16, mesh, embedding, 1, arguments.most, split=True)
    rows.append(report(f"decode, one prompt per {arguments.model} chips", target, split))
  name = f"{target} {chips.TOPOLOGIES[arguments.chips]}"
  what = f"{name}, {arguments.chips} chips, bfloat16, jax {jax.__version__}"
  text = markdown(rows, what, limit)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    stem = f"batch-{target}-{arguments.chips}"
    (arguments.out / f"{stem}.md").write_text(text + "\n")
    (arguments.out / f"{stem}.json").write_text(json.dumps(rows, indent=2) + "\n")
  return int(crossing or not fits[0])


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v5e", help="type of chip")
  parser.add_argument("--chips", type=int, choices=chips.TOPOLOGIES, default=256)
  parser.add_argument("--model", type=int, default=1, help="chips that split the work on a prompt")
  sizes = ("vit-tiny", "vit-small", "vit-base", "vit-large")
  parser.add_argument("--size", choices=sizes, default="vit-large")
  parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="images per chip")
  parser.add_argument("--prompts", type=int, nargs="+", default=[4], help="prompts per chip")
  parser.add_argument(
    "--most", type=int, default=100, metavar="N", help="at most N instances per prompt"
  )
  parser.add_argument(
    "--out", type=Path, help="output directory, for batch-TARGET-CHIPS.md and .json"
  )
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
