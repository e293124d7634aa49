"""`VideoModel`: the methods of `Sam3` for videos."""

import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np

from sam3_jax.inference.loaded_model import LoadedModel
from sam3_jax.inference.video.clip import Clip
from sam3_jax.inference.video.programs import VideoPrograms
from sam3_jax.inference.video.session import VideoSession
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.frame_range import Position, Seconds, parse_position
from sam3_jax.inputs.prompts import ConceptPrompt, Prompt
from sam3_jax.inputs.tokenizer import check_distinct
from sam3_jax.inputs.video import VideoInput, open_video
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.utils.json_text import shown

# A string is a phrase, and an array is a mask [h, w].
ObjectPrompt: TypeAlias = str | ConceptPrompt | VisualPrompt | np.ndarray
TrackPrompts: TypeAlias = (
  ObjectPrompt | list[ObjectPrompt] | Mapping[Position, ObjectPrompt | list[ObjectPrompt]]
)


class VideoModel(LoadedModel):
  """A model with methods for videos; the base of `Sam3`."""

  def track(
    self, source: VideoInput, prompts: TrackPrompts, *, hold: int | None = None, **options: Any
  ) -> Iterator[TrackedFrame]:
    """Tracks objects forward through a video, which may be endless, in constant memory.

    for frame in model.track("clip.mp4", ["player", VisualPrompt(points=[[x, y]])]):
      frame.instances  # ids, scores, boxes, masks of all objects
      frame.of("player")  # of those that the phrase found

    A phrase finds all objects that match it, on every frame: new ones appear, and each one keeps
    its id. Several phrases share the encoded frames.

    Args:
      source: a path, a directory of images, an array or a list of frames, or an iterator of frames
        such as a camera; see `open_video`.
      prompts: phrases, `Prompt`s with exemplar boxes and `Concept`s, each of which finds objects;
        visual prompts or masks (bool [h, w]), one for each object. They are of the first frame; or
        {frame: prompts}, by number or time of the frame. Ids are 1, 2 and so on, over all prompts.
      hold: as in `VideoSession.run`.
      options: `start`, `stop`, `every`, `rules` and `resample`, as in `video`.

    Yields:
      Every frame of the clip, with the objects that are visible on it: ids, scores, boxes in
      pixels, lazy masks. The score of an object that a phrase found is that of its first detection;
      that of another object is the probability that it is on the frame. With phrases, frames come
      up to 14 frames late; see `hold`.

    Raises:
      ValueError: no prompt, a phrase that is given twice, a prompt outside its frame or the clip, a
        mask of another size, a checkpoint without tracker, or as `open_video`.
    """
    session = self.video(source, history=False, **options)
    return session.stream(prompts_by_frame(prompts, session.clip), hold)

  def video(self, source: VideoInput, **options: Any) -> VideoSession:
    """Opens a video for prompts on any frame, passes in both directions, and corrections.

    Args:
      source: a path, a directory of images, an array or a list of frames; see `open_video`.
      options: of `VideoSession`:
        start, stop, every: the frames of the clip, as in `VideoSource.frames`.
        rules: `Rules`; None for those of the checkpoint.
        history: whether frames are kept for corrections and backward passes, 1 MB an object and
          frame of the released model. False keeps what a pass in one direction reads.
        budget: bytes of memory for that; the rest is on disk.
        directory: for it; None for a temporary one.
        resample: "bilinear" to read frames as still images; "bicubic" as Meta's code reads frames.

    Raises:
      ValueError: a checkpoint without tracker, an invalid option, or as `open_video`.
      TypeError: `rules` of another type.
    """
    _ = self.video_programs  # so that a checkpoint without tracker is reported first
    path = os.fspath(source) if isinstance(source, str | os.PathLike) else None
    return VideoSession(self, open_video(source), origin=path, **options)

  @property
  def video_programs(self) -> VideoPrograms:
    """The jitted functions for video; raises ValueError if the checkpoint has no tracker."""
    self.video_params()
    if self.mesh is not None:
      raise ValueError("tracking runs on one device: load the checkpoint without a mesh.")
    return self._video_programs

  @functools.cached_property
  def _video_programs(self) -> VideoPrograms:
    return VideoPrograms(self.config, self.dtype)


def prompts_by_frame(
  prompts: TrackPrompts, clip: Clip
) -> dict[int | Seconds | None, list[ObjectPrompt]]:
  """The prompts of each frame: by its number, by its time if that is not known yet, or by None for
  the first frame.

  Raises:
    ValueError: no prompt, a frame outside the clip, or a phrase that is given twice.
    TypeError: something that is no prompt.
  """
  found: dict[int | Seconds | None, list[ObjectPrompt]] = {}
  given: Any = prompts if isinstance(prompts, Mapping) else {None: prompts}
  for frame, value in given.items():
    several = isinstance(value, list | tuple)
    rows = list(value) if several else [value]
    for prompt in rows:
      if not isinstance(prompt, str | Prompt | Concept | VisualPrompt | np.ndarray):
        raise TypeError(
          "prompts are phrases, Prompts, VisualPrompts or masks [h, w], a list of them, or "
          f"{{frame: list}}; got {shown(prompt)}."
        )
    if frame is None:
      key = None
    elif clip.numbers is None:
      key = parse_position(frame, "the frame of a prompt")
    else:
      key = clip.numbers[clip.position(frame)]
    found.setdefault(key, []).extend(rows)
  if not any(found.values()):
    raise ValueError("no prompt given; pass a phrase, a VisualPrompt, a list or {frame: list}.")
  check_distinct(
    one if isinstance(one, str) else one.text
    for rows in found.values()
    for one in rows
    if isinstance(one, str | Prompt | Concept)
  )
  return found
