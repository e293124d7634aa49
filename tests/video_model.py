"""The seeded model of the goldens in `goldens/video`, with its tracker, and its video."""

import functools
from pathlib import Path

import jax
import numpy as np
from golden_model import (
  GOLDENS,
  VIDEO_CONFIG,
  VIDEO_SEED,
  parameters,
  video_parameters,
  visual_parameters,
)
from support import QUICK

from sam3_jax import Sam3, Tokenizer

HEIGHT, WIDTH = 120, 160
# Arguments of these programs.
CONSUMED = dict.fromkeys(
  ("track", "memorize_tracked", "memorize_found", "remember", "write"), "bank"
)


def quick_video(model: Sam3) -> Sam3:
  """The model with programs that compile with the options `QUICK`."""
  programs = model.video_programs
  for name, program in vars(programs).items():
    if hasattr(program, "lower"):
      given = {"donate_argnames": CONSUMED.get(name), "compiler_options": QUICK}
      setattr(programs, name, jax.jit(program.__wrapped__, **given))
  return model


def video_parts() -> dict:
  """All parameters of the seeded model."""
  seed = VIDEO_SEED
  trees = {"visual": visual_parameters(seed), "video": video_parameters(seed)}
  return dict(parameters(seed)) | trees


@functools.cache
def video_model() -> Sam3:
  """The seeded model; one for all tests of a process."""
  tokenizer = Tokenizer(Path(GOLDENS / "tokenizer.model"))
  info = {"name": "tiny", "trained": True}
  return quick_video(Sam3(VIDEO_CONFIG, video_parts(), tokenizer, info=info, dtype="float32"))


@functools.cache
def video_frames() -> np.ndarray:
  """The frames of the goldens, uint8 [12, 120, 160, 3]: four moving shapes."""
  return np.load(GOLDENS / "video" / "frames.npz")["frames"]


@functools.cache
def object_masks() -> np.ndarray:
  """The mask prompts of the goldens, bool [3, 120, 160]; the last ones win where they overlap."""
  packed = np.load(GOLDENS / "video" / "tracker.npz")["masks.inputs"]
  return np.unpackbits(packed, axis=-1).astype(bool)
