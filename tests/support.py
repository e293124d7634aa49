"""Shared helpers: comparison of results, and the seeded model of the goldens, jitted."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from golden_model import CONFIG, parameters, visual_parameters

from sam3_jax import Sam3, Tokenizer
from sam3_jax.model.sam3 import Detector
from sam3_jax.types import Prompts, TextEmbedding

# Nearly all of the time of these tests is compilation. Half of that is LLVM's optimizations, and
# two thirds of the rest are XLA's newer emitter of fused loops, which jaxlib 0.11.2 and later
# always use.
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 11):
  QUICK["xla_cpu_use_fusion_emitters"] = False


def difference(got: Any, want: Any) -> float:
  """The largest absolute difference divided by the largest magnitude of `want`; 0 if empty."""
  got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
  assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
  if not want.size:
    return 0.0
  return float(np.abs(got - want).max() / max(np.abs(want).max(), np.finfo(np.float32).tiny))


def assert_close(got: Any, want: Any, *, rel: float, what: str = "") -> None:
  """Asserts that arrays, or the leaves of pytrees, have a `difference` of at most `rel`."""
  paths, structure = jax.tree_util.tree_flatten_with_path(want)
  assert structure == jax.tree.structure(got)
  for (path, wanted), gotten in zip(paths, jax.tree.leaves(got), strict=True):
    off = difference(gotten, wanted)
    assert off <= rel, f"{what}{jax.tree_util.keystr(path)}: off by {off:.2e}, allowed {rel:.2e}"


def run(method: str, *args: Any, key: jax.Array | None = None, params=None, **options: Any) -> Any:
  """Runs a jitted method of the detector of the goldens; returns NumPy arrays. Options: dtype,
  train, capture (also returns intermediates), and static arguments of the method."""
  params = parameters() if params is None else params
  # As NumPy arrays, since JAX would compile each slice and each comparison.
  return jax.device_get(_jitted(params, key, args, method, tuple(options.items())))


def shapes(method: str, *args: Any, **options: Any) -> Any:
  """The shapes and dtypes of the results of `run`."""
  apply = functools.partial(_apply, method=method, options=options)
  return jax.eval_shape(apply, parameters(), None, args)


def _apply(params, key, args, method, options):
  options = dict(options)
  detector = Detector(CONFIG, options.pop("dtype", jnp.float32), options.pop("train", False))
  captured = options.pop("capture", False)
  return detector.apply(
    {"params": params},
    *args,
    **options,
    method=method,
    rngs=None if key is None else {"dropout": key},
    capture_intermediates=captured,
    mutable=["intermediates"] if captured else False,
  )


_jitted = jax.jit(_apply, static_argnames=("method", "options"), compiler_options=QUICK)


STATIC = {"detect": "max_detections", "score": "max_detections", "decode_visual": "multimask"}


def quick(model: Sam3) -> Sam3:
  """The model with programs that compile with the options `QUICK`."""
  programs = model.programs
  for owner in (programs, programs.prompts, programs.split_prompts):
    for name, program in vars(owner).items():
      if hasattr(program, "lower"):
        options = {"static_argnames": STATIC.get(name), "compiler_options": QUICK}
        setattr(owner, name, jax.jit(program.__wrapped__, **options))
  return model


@functools.cache
def visual_model(tokenizer_path: Path) -> Sam3:
  """The model of the goldens with a head for visual prompts; one for all tests of a process."""
  params = parameters() | {"visual": visual_parameters()}
  info = {"name": "tiny", "trained": True}
  tokenizer = Tokenizer(tokenizer_path)
  return quick(Sam3(CONFIG, params, tokenizer, info=info, dtype="float32"))


def normal(seed: int, *shape: int) -> jax.Array:
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def random_tokens(rng: np.random.Generator, lengths: list[int]) -> np.ndarray:
  """Random token ids of phrases with these lengths (including start and end), padded with 0."""
  tokens = rng.integers(1, 49000, (len(lengths), CONFIG.text.context), np.int32)
  tokens[:, 0] = 49406
  for row, length in zip(tokens, lengths, strict=True):
    row[length - 1] = 49407
    row[length:] = 0
  return tokens


def random_images(rng: np.random.Generator, images: int) -> np.ndarray:
  """Smooth normalized images of the model's input size, values in [-1, 1]."""
  side = CONFIG.image_size
  y, x = np.indices((side, side)) / side
  waves = rng.uniform(2, 20, (images, 3, 2))[..., None, None]
  return np.sin(waves[:, :, 0] * y + waves[:, :, 1] * x).transpose(0, 2, 3, 1).astype(np.float32)


def random_prompts(
  rng: np.random.Generator, text: TextEmbedding, image: list[int], boxes: list[int], slots: int
) -> Prompts:
  """Prompt p is for image[p] and has boxes[p] boxes in its first slots, followed by padding."""
  rows = len(image)
  extents = rng.uniform(0.1, 0.5, (rows, slots, 2))
  centers = rng.uniform(0.2, 0.8, (rows, slots, 2))
  return Prompts(
    image=np.asarray(image, np.int32),
    first_id=np.arange(rows, dtype=np.int32) * CONFIG.queries,
    text=text,
    boxes=np.concatenate([centers, extents], axis=-1, dtype=np.float32),
    positive=rng.random((rows, slots)) < 0.7,
    valid=np.arange(slots) < np.asarray(boxes)[:, None],
  )
