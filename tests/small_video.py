"""A small random model with a tracker, of 32-pixel images, whose frames take milliseconds."""

import dataclasses
import functools

import numpy as np
from golden_model import GOLDENS
from training_model import CONFIG, parameters, random_parameters
from video_model import quick_video

from sam3_jax import Sam3, Tokenizer
from sam3_jax.config import Config, VideoConfig
from sam3_jax.model.video import tracker
from sam3_jax.model.visual import head
from sam3_jax.utils.param_tree import nest

VIDEO = VideoConfig(memory_channels=16, layers=1, mlp_width=32, mask_widths=(4, 4, 8, 16))
SMALL = dataclasses.replace(CONFIG, video=VIDEO)
SIZE = (24, 40)


def small_model(dtype: str = "float32", config: Config = SMALL) -> Sam3:
  """A model with programs of its own; `config` may change the rules."""
  tokenizer = Tokenizer(GOLDENS / "tokenizer.model", context=CONFIG.text.context)
  info = {"name": "small"}
  return quick_video(Sam3(config, _parameters(), tokenizer, info=info, dtype=dtype))


@functools.cache
def _parameters() -> dict:
  shapes = {"visual": head.parameter_shapes(SMALL), "video": tracker.parameter_shapes(SMALL)}
  flat = parameters() | random_parameters(shapes)
  # Mostly present objects.
  flat["visual/decoder/object_head/fc3/bias"] = np.full(1, 2, np.float32)
  return nest(flat)


def moving_frames(count: int) -> np.ndarray:
  """Frames with a bright square that moves, uint8 [count, 24, 40, 3]."""
  height, width = SIZE
  frames = np.full((count, height, width, 3), 40, np.uint8)
  for t, frame in enumerate(frames):
    frame[:, :, 0] += np.arange(width, dtype=np.uint8) * 3
    x, y = t * 2 % (width - 10), t % (height - 10)
    frame[y : y + 10, x : x + 10] = (230, 90 + t % 50, 30)
  return frames
