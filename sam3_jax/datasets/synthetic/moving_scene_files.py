"""Writes moving scenes as frames with annotations in YouTube-VIS's layout.

    OUT/annotations.json
    OUT/JPEGImages/000000_noto/00000.jpg ...

The annotations also have what SA-Co's video files (SA-Co/VEval) add: `noun_phrase`, and
`video_np_pairs` with the phrases of each video, of absent objects too. `occluded` of a video tells
whether an object or an occluder hides a pixel of another object in any frame.

Each scene has its own random generator, given by the seed and its index, so a larger number of
scenes starts with the same ones. Files are byte-equal for the same versions of this package, NumPy
and Pillow.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_jax.datasets.synthetic.moving_scenes import MovingScene, compose
from sam3_jax.datasets.synthetic.phrase_sampling import Phrase
from sam3_jax.datasets.synthetic.scene_files import (
  ABSENT,
  FRAMES,
  QUALITY,
  TRAIN,
  check_options,
  finish,
  info,
  prepare,
  style_names,
)
from sam3_jax.outputs.rle import Rle, areas, bounds, encode
from sam3_jax.utils.os_errors import reason


def write(
  out: Path,
  count: int,
  seed: int,
  style: str | Sequence[str] = TRAIN,
  *,
  frames: int = 24,
  size: tuple[int, int] | None = None,
  augment: float = 0.0,
  unseen: bool = False,
  progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> dict[str, int]:
  """Writes moving scenes to a directory; annotations.json is written last and atomically.

  Args:
    out: a directory that does not exist, is empty, or is left from an interrupted call, which is
      repeated.
    count: number of videos, at least 1.
    seed: random seed, at least 0.
    style: one of drawings.STYLES, "train", or several of them.
    frames: number of frames of each video, at least 2.
    size: height and width in pixels; None for random ones.
    augment: strength of changes of color and shape, in [0, 1].
    unseen: use synonyms and plurals that training never uses; objects without any are left out.
    progress: called with the name of a step and the fraction of the work done so far.

  Returns:
    Numbers of videos, frames, pairs of a video and a phrase, and objects.

  Raises:
    ValueError: an argument is invalid, or `out` cannot be written.
  """
  chosen = (style,) if isinstance(style, str) else tuple(style)
  styles = style_names(chosen)
  check_options(count, seed, augment, size)
  if not 2 <= frames <= 99_999:
    raise ValueError(f"a moving scene has 2 to 99,999 frames; got {frames:,}.")
  try:
    prepare(out)
    about = f"moving scenes: {count} of seed {seed}, style {', '.join(chosen)}"
    record = Record(info(about))
    for number in range(count):
      rng = np.random.default_rng([seed, number])
      progress("composing scenes", number / count)
      scene = compose(rng, styles, size, frames, augment=augment)
      sampled = scene.phrases(rng, absent=ABSENT, unseen=unseen)
      name = f"{number:06d}_{scene.style}"
      (out / FRAMES / name).mkdir(parents=True)
      masks: list[list[Rle]] = []
      occluded = False
      for t, frame in enumerate(scene):
        progress("composing scenes", (number + t / frames) / count)
        Image.fromarray(frame.image).save(out / FRAMES / file_name(name, t), quality=QUALITY)
        masks.append([encode(frame.mask(index)) for index in range(len(scene.concepts))])
        occluded |= frame.occluded
      record.add(name, scene, sampled, masks, occluded)
    finish(out, {"annotations.json": record.content})
  except OSError as error:
    raise ValueError(f"cannot write to {out}: {reason(error)}.") from error
  content = record.content
  return {
    "videos": count,
    "frames": count * frames,
    "pairs": len(content["video_np_pairs"]),
    "objects": len(content["annotations"]),
  }


def file_name(video: str, t: int) -> str:
  """The file of a frame, relative to the directory of all frames."""
  return f"{video}/{t:05d}.jpg"


class Record:
  """The annotations written so far."""

  def __init__(self, about: dict[str, str]):
    self.content: dict[str, Any] = {
      "info": about,
      "videos": [],
      "annotations": [],
      "categories": [],
      "video_np_pairs": [],
    }
    self._categories: dict[str, int] = {}

  def add(
    self,
    name: str,
    scene: MovingScene,
    phrases: Sequence[Phrase],
    masks: Sequence[Sequence[Rle]],
    occluded: bool,
  ) -> None:
    """Adds a video: its phrases, the masks of its objects in each frame, and whether one of them is
    partly hidden by another or by an occluder in any frame."""
    height, width = scene.size
    video = {
      "id": len(self.content["videos"]) + 1,
      "video_name": name,
      "file_names": [file_name(name, t) for t in range(len(scene))],
      "height": height,
      "width": width,
      "length": len(scene),
      "occluded": occluded,
    }
    self.content["videos"].append(video)
    for phrase in phrases:
      pair = {
        "id": len(self.content["video_np_pairs"]) + 1,
        "video_id": video["id"],
        "category_id": self._category(phrase.text),
        "noun_phrase": phrase.text,
        "num_masklets": len(phrase.objects),
      }
      self.content["video_np_pairs"].append(pair)
      for index in phrase.objects:
        self._add_object(pair, [row[index] for row in masks], scene.size)

  def _add_object(self, pair: dict[str, Any], masks: Sequence[Rle], size: tuple[int, int]) -> None:
    boxes = [bounds(rle) for rle in masks]
    seen = [box[2] > 0 for box in boxes]
    pixels, _ = areas(masks, [size] * len(masks))
    self.content["annotations"].append(
      {
        "id": len(self.content["annotations"]) + 1,
        "video_id": pair["video_id"],
        "category_id": pair["category_id"],
        "noun_phrase": pair["noun_phrase"],
        "segmentations": [rle if one else None for rle, one in zip(masks, seen, strict=True)],
        "bboxes": [list(box) if one else None for box, one in zip(boxes, seen, strict=True)],
        "areas": [int(n) if one else None for n, one in zip(pixels, seen, strict=True)],
        "iscrowd": 0,
        "height": size[0],
        "width": size[1],
      }
    )

  def _category(self, phrase: str) -> int:
    """The id of a phrase."""
    if phrase not in self._categories:
      self._categories[phrase] = len(self._categories) + 1
      self.content["categories"].append({"id": self._categories[phrase], "name": phrase})
    return self._categories[phrase]
