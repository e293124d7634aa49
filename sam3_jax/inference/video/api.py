"""The functions behind `Sam3.video` and `Sam3.track`."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sam3_jax.inference.video.programs import VideoPrograms
from sam3_jax.inference.video.session import VideoSession
from sam3_jax.inputs.frame_range import Position
from sam3_jax.inputs.video import open_video
from sam3_jax.inputs.video_source import VideoSource
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.outputs.video_frames import TrackedFrame
from sam3_jax.utils.json_text import shown

PART = "video"  # of the parameters


def video_programs(model: Any) -> VideoPrograms:
  """The programs of a model; raises ValueError if it cannot track."""
  name = str(model.info.get("name", "")) or "this checkpoint"
  if model.config.video is None or PART not in model.params:
    raise ValueError(
      f"{name} has no tracker: convert the released weights again, facebook/sam3 or sam3.pt, with "
      "`sam3-jax convert`, or load a checkpoint that has one."
    )
  model.visual_params()
  if model.mesh is not None:
    raise ValueError("tracking runs on one device: load the checkpoint without a mesh.")
  return VideoPrograms(model.config, model.dtype)


def open_session(model: Any, source: Any, **options: Any) -> VideoSession:
  """Opens a video for a session; see `Sam3.video`."""
  programs = model.video_programs  # an error about the checkpoint goes before those of the video
  assert_one = source if isinstance(source, VideoSource) else open_video(source)
  origin = str(source) if isinstance(source, str | bytes) or hasattr(source, "__fspath__") else None
  del programs
  return VideoSession(model, assert_one, origin=origin, **options)


def track(
  model: Any,
  source: Any,
  prompts: Any,
  **options: Any,
) -> Iterator[TrackedFrame]:
  """Tracks forward in one go; see `Sam3.track`."""
  session = open_session(model, source, history=False, **options)
  return session.stream(by_frame(prompts, session))


def by_frame(prompts: Any, session: VideoSession) -> dict[int, list[Any]]:
  """The prompts of each frame number, checked as far as they can be before reading.

  Raises:
    ValueError: no prompt, a frame outside the clip.
    TypeError: something that is neither a visual prompt nor a mask.
  """
  numbers = session.clip.numbers
  if not isinstance(prompts, Mapping):
    prompts = {None: prompts}
  found: dict[int, list[Any]] = {}
  for frame, given in prompts.items():
    rows = [given] if isinstance(given, VisualPrompt) or _is_mask(given) else list(given)
    for prompt in rows:
      if not isinstance(prompt, VisualPrompt) and not _is_mask(prompt):
        raise TypeError(f"prompts are VisualPrompts or masks [h, w]; got {shown(prompt)}.")
    if frame is None:
      number = session.clip.first
    elif numbers is None:
      number = int(frame)
    else:
      number = numbers[session.clip.position(frame)]
    found.setdefault(number, []).extend(rows)
  if not any(found.values()):
    raise ValueError("no prompt given; pass a VisualPrompt, or a list of them.")
  return found


def _is_mask(value: Any) -> bool:
  return isinstance(value, np.ndarray) and value.ndim == 2


_ = Position
