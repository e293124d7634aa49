"""Compares bfloat16 with residual streams in bfloat16 (ours) and in float32 (PyTorch's autocast).

  python benchmarks/autocast.py --size vit-large      # seeded weights of the released size: 8 GB
  python benchmarks/autocast.py                       # sam3-tiny, which is trained

Meta runs bfloat16 under autocast: products have bfloat16 operands, but residual sums and norms are
float32. Ours rounds the sum after each block to bfloat16. Each variant runs in its own process on
the same image and phrases, and is compared with float32:

  bfloat16   ours: parameters, activations and residual streams in bfloat16
  trunk      the trunk's residual stream in float32, the rest as ours
  streams    the residual streams of trunk, text encoder and fusion encoder in float32

All variants round the parameters to bfloat16, as autocast does before each product.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from timing import machine

CLONE = Path(__file__).parents[1]
VARIANTS = ("float32", "bfloat16", "trunk", "streams")
PHRASES = ("lion", "a red apple")
COVERAGE = 0.001, 0.95  # range of the fraction of the image that compared masks cover


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkpoint", nargs="?", default="sam3-tiny", help="directory or name")
  parser.add_argument(
    "--size", help="use seeded weights of this size, such as vit-large, instead of a checkpoint"
  )
  parser.add_argument(
    "--image-size", type=int, help="side of the model input, with --size; 336 is faster"
  )
  parser.add_argument("--image", type=Path, default=CLONE / "docs" / "scene.jpg")
  parser.add_argument(
    "--variants", nargs="+", choices=VARIANTS[1:], default=VARIANTS[1:], help="variants to compare"
  )
  parser.add_argument("--run", choices=VARIANTS, help=argparse.SUPPRESS)
  parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.run:
    run(arguments)
    return 0
  found = {}
  with tempfile.TemporaryDirectory(prefix="sam3-jax-autocast-") as folder:
    for variant in (VARIANTS[0], *arguments.variants):
      out, start = Path(folder) / f"{variant}.npz", time.perf_counter()
      command = [sys.executable, __file__, *sys.argv[1:], "--run", variant, "--out", str(out)]
      subprocess.run(command, check=True)
      found[variant] = dict(np.load(out))
      print(f"{variant}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
  print(machine())
  print(table({name: compare(found[name], found["float32"]) for name in arguments.variants}))
  return 0


def run(arguments: argparse.Namespace) -> None:
  """Runs a variant and writes its results as float32 arrays."""
  import jax
  import ml_dtypes
  from speed.material import VOCABULARY, seeded

  from sam3_jax import Sam3, Tokenizer, VisualPrompt, find_checkpoint
  from sam3_jax.checkpoint import bundle
  from sam3_jax.config import SIZES
  from sam3_jax.utils.param_tree import flatten, nest

  dtype = "float32" if arguments.run == "float32" else "bfloat16"
  if arguments.size:
    config = SIZES[arguments.size]
    if arguments.image_size:
      config = dataclasses.replace(config, image_size=arguments.image_size)
    params = seeded(config)
    tokenizer = VOCABULARY.read_bytes()
  else:
    loaded = bundle.load(find_checkpoint(arguments.checkpoint))
    config, params, tokenizer = loaded.config, jax.device_get(loaded.params), loaded.tokenizer
  if arguments.run in ("trunk", "streams"):
    emulate(everywhere=arguments.run == "streams")
  flat, half = flatten(params), ml_dtypes.bfloat16
  del params
  for path in list(flat):  # one by one, so that memory never holds two copies
    rounded = flat.pop(path).astype(half)
    flat[path] = jax.device_put(rounded.astype(dtype))
  model = Sam3(config, nest(flat), Tokenizer(tokenizer, context=config.text.context), dtype=dtype)
  embedding = model.encode(arguments.image, visual=True)
  height, width = np.asarray(embedding.sizes)[0].tolist()
  found = model.decode(embedding, list(PHRASES))
  clicks = [VisualPrompt(points=[[width * x, height * y]]) for x in (0.3, 0.6) for y in (0.4, 0.7)]
  visual = model.decode_visual(embedding, clicks)
  arrays = {
    "map_fine": embedding.fine, "map_middle": embedding.middle, "map_coarse": embedding.coarse,
    "scores": found.scores, "boxes": found.boxes * config.image_size,
    "presence": found.presence_logit, "mask_logits": found.mask_logits,
    "visual_iou": visual.iou, "visual_mask_logits": visual.mask_logits,
  }  # fmt: skip
  np.savez(arguments.out, **{name: np.asarray(x, np.float32) for name, x in arrays.items()})


def emulate(*, everywhere: bool) -> None:
  """Makes residual streams float32: of the trunk, or also of text and fusion encoder."""
  import jax.numpy as jnp

  from sam3_jax.model import sam3, text, vit
  from sam3_jax.model.fusion import FusionEncoder
  from sam3_jax.model.norms import LayerNorm

  wide = jnp.float32

  class Trunk(vit.Trunk):
    @vit.nn.compact
    def __call__(self, images):
      config = self.config
      stem = config.stem and vit.Stem(config.stem, self.dtype, name="stem")
      patches = stem or vit.Patches(self.patch, config.width, self.dtype, name="patch_embed")
      x = patches(images)
      side = x.shape[1]
      shape = (config.pretrain_grid, config.pretrain_grid, config.width)
      position = self.param("position", vit.nn.initializers.zeros, shape)
      repeats = -(-side // config.pretrain_grid)
      position = jnp.tile(position, (repeats, repeats, 1))[:side, :side]
      x = LayerNorm(dtype=wide, name="norm_pre")(x.astype(wide) + position)
      x = x.reshape(len(x), side * side, config.width)
      x = vit._scan_blocks(self.variables["params"]["groups"], x, config, side, self.dtype)
      return x.reshape(-1, side, side, config.width).astype(self.dtype)

  class Fusion(FusionEncoder):
    def attend(self, image, position):
      return super().attend(image.astype(wide), position)

    def __call__(self, attended, position, prompt, valid):
      fused = super().__call__(attended.astype(wide), position, prompt, valid)
      return fused.astype(self.dtype)

  sam3.Trunk = Trunk
  if everywhere:
    sam3.FusionEncoder, stacked = Fusion, text.stacked

    def widened(block, length, layering):
      def build(*fields, **named_fields):
        layer = stacked(block, length, layering=layering)(*fields, **named_fields)
        return lambda x, drop_path: layer(x.astype(wide), drop_path)

      return build

    text.stacked = widened


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
  """Differences from float32; those of maps and logits are relative root mean squares."""

  def relative(name: str) -> float:
    return float(np.sqrt(((got[name] - want[name]) ** 2).mean() / (want[name] ** 2).mean()))

  def largest(name: str) -> float:
    return float(np.abs(got[name] - want[name]).max())

  rows = {f"{name}, relative": relative(name) for name in want if name.startswith("map_")}
  for name in ("mask_logits", "visual_mask_logits"):
    rows[f"{name}, relative"] = relative(name)
  for name in ("scores", "presence", "visual_iou"):
    rows[f"{name}, largest"] = largest(name)
  rows["boxes, pixels of the model's input, largest"] = largest("boxes")
  rows["boxes, pixels, mean"] = float(np.abs(got["boxes"] - want["boxes"]).mean())
  for name in ("mask_logits", "visual_mask_logits"):
    ious = overlaps(got[name] > 0, want[name] > 0)
    rows[f"1 - IoU of {name}, median"] = float(1 - np.median(ious))
    rows[f"1 - IoU of {name}, mean"] = float(1 - np.mean(ious))
  return rows


def overlaps(got: np.ndarray, want: np.ndarray) -> np.ndarray:
  """IoU of each mask whose coverage of the image is within `COVERAGE`."""
  covered = want.mean((2, 3))
  kept = (covered > COVERAGE[0]) & (covered < COVERAGE[1])
  both, either = (got & want).sum((2, 3))[kept], (got | want).sum((2, 3))[kept]
  return both / either if kept.any() else np.ones(1)


def table(rows: dict[str, dict[str, float]]) -> str:
  names = list(rows)
  lines = [f"| difference from float32 | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
  for what in rows[names[0]]:
    lines.append(f"| {what} | {' | '.join(f'{rows[name][what]:.2e}' for name in names)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
