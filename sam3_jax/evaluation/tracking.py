"""Evaluates a tracker on annotated videos: J&F from masks, boxes and clicks.

Each object is prompted in the first frame in which it is visible. The clicks are those of a user
who looks at that frame only: each one corrects the largest error of the mask so far, as in SAM 2
(Ravi et al. 2024, arXiv:2408.00714, section 6.1). As in DAVIS's semi-supervised task, an object's
scores leave out the frame of its prompt and the last frame of the video.

The tracker is any callable, so this module does not depend on the model.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from sam3_jax.datasets.video_annotations import Video, VideoObject
from sam3_jax.evaluation.clicks import corrective_click, deepest_point
from sam3_jax.evaluation.region_contour import Scores, scores, summary
from sam3_jax.ops.masks import mask_to_box

Mask = Bool[np.ndarray, "h w"]
Image = UInt8[np.ndarray, "h w 3"]
Progress = Callable[[str, float], None]  # name of a video, fraction of the work done so far

CLICKS = (1, 3, 5)
PROMPTS = ("mask", "box", *(f"click_{count}" for count in CLICKS))


@dataclasses.dataclass(frozen=True, eq=False)
class ObjectPrompt:
  """A prompt for an object: clicks, a box or a mask.

  Attributes:
    points: x and y of each click in pixels, in the order of the clicks.
    labels: 1 for a click on the object, 0 for one off it.
    box: x0, y0, x1, y1 in pixels.
    mask: of the size of the image.
  """

  points: tuple[tuple[float, float], ...] = ()
  labels: tuple[int, ...] = ()
  box: tuple[int, int, int, int] | None = None
  mask: Mask | None = None


ObjectPrompts = Mapping[int, ObjectPrompt]  # by object id
# Takes the frames of a video, and the prompts by the index of their frame. Yields the masks by
# object id, for each frame from the first prompt on. Objects without a mask are not visible.
Tracker = Callable[[Sequence[Image], Mapping[int, ObjectPrompts]], Iterable[Mapping[int, Mask]]]


def evaluate_tracking(
  track: Tracker,
  videos: Sequence[Video],
  folder: str | Path,
  prompts: Sequence[str] = PROMPTS,
  *,
  exclude_ends: bool = True,
  progress: Progress | None = None,
) -> dict[str, Any]:
  """Tracks the objects of each video together, once for each kind of prompts.

  Args:
    track: see `Tracker`.
    videos: from `video_annotations.read`; crowds are left out.
    folder: directory of the frames.
    prompts: from `PROMPTS`.
    exclude_ends: leave out the frame of the prompt and the last frame of the video.
    progress: called with the name of a video and the fraction of the work done.

  Returns:
    The numbers of `videos` and `objects` that are scored, and `region_contour.summary` for each
    kind of prompts.

  Raises:
    ValueError: there are no objects to score, or the tracker yields another number of frames.
    FileNotFoundError: a frame is missing.
  """
  found: dict[str, list[Scores]] = {kind: [] for kind in prompts}
  scored = [(video, scorable(video, exclude_ends)) for video in videos]
  scored = [(video, objects) for video, objects in scored if objects]
  if not scored:
    raise ValueError(f"none of the {len(videos)} videos has an object to score; give others.")
  for done, (video, objects) in enumerate(scored):
    frames = list(video.frames(folder))
    given = _all_prompts(track, video, objects, frames, prompts)
    for k, kind in enumerate(prompts):
      if progress is not None:
        progress(video.name, (done + k / len(prompts)) / len(scored))
      masks = _tracked(track, frames, given[kind])
      for one in objects:
        own = [None if row is None else row.get(one.id) for row in masks]
        found[kind].append(score_object(video, one, own, exclude_ends))
  counts = {"videos": len(scored), "objects": sum(len(objects) for _, objects in scored)}
  return counts | {kind: summary(several) for kind, several in found.items()}


def scorable(video: Video, exclude_ends: bool = True) -> list[VideoObject]:
  """The objects of a video that have a frame to score; crowds have none."""
  return [
    one for one in video.objects if not one.crowd and len(scored_frames(video, one, exclude_ends))
  ]


def scored_frames(video: Video, one: VideoObject, exclude_ends: bool = True) -> range:
  """The frames in which an object is scored."""
  return range(one.first + 1, len(video) - 1) if exclude_ends else range(one.first, len(video))


def score_object(
  video: Video, one: VideoObject, masks: Sequence[Mask | None], exclude_ends: bool = True
) -> Scores:
  """J and F of an object.

  Args:
    video: the video.
    one: an object of it.
    masks: the predicted mask in each frame of the video; None where it is not visible.
    exclude_ends: see `evaluate_tracking`.
  """
  chosen = scored_frames(video, one, exclude_ends)
  empty = np.zeros((video.height, video.width), bool)
  predicted = (empty if masks[t] is None else np.asarray(masks[t], bool) for t in chosen)
  return scores(predicted, (video.mask(one, t) for t in chosen))


def next_click(mask: Mask, truth: Mask) -> tuple[tuple[float, float], int]:
  """The click of a user that corrects a mask, x and y in pixels, and its label.

  It is at the center of the largest error, the point farthest from the error's edges; see
  `clicks.corrective_click`.
  """
  return corrective_click(mask, truth)


def simulate_clicks(
  track: Tracker, image: Image, truths: Mapping[int, Mask], counts: Sequence[int] = CLICKS
) -> dict[int, dict[int, ObjectPrompt]]:
  """Simulates clicks on the objects of a frame.

  Args:
    track: computes the mask after each click.
    image: the frame.
    truths: the mask of each object, by its id; none is empty.
    counts: numbers of clicks, ascending.

  Returns:
    The prompts by object id, for each number of clicks.
  """
  prompts, found = {}, {}
  for key, truth in truths.items():
    x, y, _ = deepest_point(truth)
    prompts[key] = ObjectPrompt(((x, y),), (1,))
  for count in range(1, counts[-1] + 1):
    if count in counts:
      found[count] = dict(prompts)
    if count == counts[-1]:
      break
    [masks] = _tracked(track, [image], {0: prompts})
    for key, truth in truths.items():
      mask = (masks or {}).get(key)
      point, label = next_click(np.zeros_like(truth) if mask is None else mask, truth)
      old = prompts[key]
      prompts[key] = ObjectPrompt((*old.points, point), (*old.labels, label))
  return found


def _all_prompts(
  track: Tracker,
  video: Video,
  objects: Sequence[VideoObject],
  frames: Sequence[Image],
  kinds: Sequence[str],
) -> dict[str, dict[int, dict[int, ObjectPrompt]]]:
  """The prompts of each kind, by the index of their frame and by object id."""
  found: dict[str, dict[int, dict[int, ObjectPrompt]]] = {kind: {} for kind in kinds}
  for t in sorted({one.first for one in objects}):
    truths = {one.id: video.mask(one, t) for one in objects if one.first == t}
    counts = [count for count in CLICKS if f"click_{count}" in kinds]
    clicks = simulate_clicks(track, frames[t], truths, counts) if counts else {}
    for kind in kinds:
      if kind == "mask":
        found[kind][t] = {key: ObjectPrompt(mask=truth) for key, truth in truths.items()}
      elif kind == "box":
        found[kind][t] = {key: ObjectPrompt(box=mask_to_box(truths[key])) for key in truths}
      else:
        found[kind][t] = clicks[int(kind.removeprefix("click_"))]
  return found


def _tracked(
  track: Tracker, frames: Sequence[Image], prompts: Mapping[int, ObjectPrompts]
) -> list[Mapping[int, Mask] | None]:
  """The masks of each frame; None before the first prompt."""
  first = min(prompts)
  masks = list(track(frames, prompts))
  if len(masks) != len(frames) - first:
    raise ValueError(
      f"the tracker yields {len(masks)} frames; it must yield the {len(frames) - first} frames "
      f"from the first prompt on, which is on frame {first} of {len(frames)}."
    )
  return [*[None] * first, *masks]
