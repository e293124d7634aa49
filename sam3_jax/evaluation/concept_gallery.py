"""An HTML page of the worst pairs of videos and phrases: short films with the ground truth beside
the prediction, as animated WebP images, which browsers play."""

import html
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from sam3_jax.datasets.video_annotations import Video
from sam3_jax.evaluation.concept_tracks import ConceptTrack
from sam3_jax.evaluation.error_gallery import html_page
from sam3_jax.evaluation.score_concepts import PairScore
from sam3_jax.evaluation.track_overlap import Masks, overlap_masks
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.coco_json import Write
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import Rle
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.outputs.video_overlay import draw_objects

FRAMES = 60  # at most, in a film; of longer videos, evenly spaced ones
SIDE = 480  # longest side of an image, in pixels
_DURATION, _GAP = 125, 8  # milliseconds of a frame; pixels between the images
_TEXT = """The pairs with the lowest HOTA of {pairs}, worst first; among equals, those with more
errors at IoU 0.50 first. Ground truth is on the left, prediction on the right: a predicted track
has the color and the number of the object that it follows best. Tracks with a score of at least
{score:g} count."""
_SECTION = """<section>
<h2>{rank}. {phrase}</h2>
<p>HOTA {hota:.0f} %: {found} tracks, {truths} objects, {matched} matches at IoU 0.50,
{switches} identity switches. <small>{video}, {frames} frames</small></p>
<img src="{film}" alt="ground truth and prediction">
</section>"""


def sort_key(score: PairScore) -> tuple[float, int]:
  """Sorts pairs worst first: by HOTA, then by the errors at IoU 0.5."""
  counts = score.counts
  return score.hota, 2 * int(counts.matched[0]) - counts.truths - counts.found


def page(
  worst: Sequence[PairScore],
  videos: Sequence[Video],
  found: Mapping[int, Sequence[ConceptTrack]],
  frames: Path,
  folder: Path,
  threshold: float,
  pairs: int,
) -> dict[Path, Write]:
  """The files of the page, for `coco_json.write`: index.html, and a film for each pair, which is
  drawn when it is written.

  Args:
    worst: the worst pairs, worst first.
    videos: the truth.
    found: predictions by video id.
    frames: the directory of the frames.
    folder: output directory of the page.
    threshold: minimum score of a prediction, inclusive.
    pairs: number of all pairs.
  """
  by_id, files, sections = {video.id: video for video in videos}, {}, []
  for rank, score in enumerate(worst, start=1):
    video, film = by_id[score.video], f"{rank:03d}.webp"
    truths = [one.rles for one in video.objects if one.category == score.pair.category]
    tracks = [
      one
      for one in found.get(video.id, ())
      if one.category == score.pair.category and one.score >= threshold
    ]
    files[folder / film] = _film(video, truths, tracks, frames)
    sections.append(
      _SECTION.format(
        rank=rank,
        phrase=html.escape(score.pair.phrase),
        hota=score.hota,
        found=score.counts.found,
        truths=score.counts.truths,
        matched=score.counts.matched[0],
        switches=score.switches,
        video=html.escape(video.title),
        frames=len(video),
        film=film,
      )
    )
  text = _TEXT.format(pairs=pairs, score=threshold)
  files[folder / "index.html"] = html_page("Worst pairs", text, sections)
  return files


def film(
  video: Video, truths: Sequence[Masks], tracks: Sequence[ConceptTrack], folder: Path
) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
  """Yields the frames of a film: the ground truth on the left, the prediction on the right.

  Args:
    video: the video.
    truths: the masks of the true objects.
    tracks: the predicted objects.
    folder: the directory of the frames.
  """
  scale = min(1.0, SIDE / max(video.height, video.width))
  size = max(1, round(video.height * scale)), max(1, round(video.width * scale))
  masks = [one.rles for one in tracks]
  ids = _numbers(truths, masks, len(video))
  count = min(FRAMES, len(video))
  for t in np.unique(np.linspace(0, len(video) - 1, count).round().astype(int)).tolist():
    image = np.asarray(
      Image.fromarray(read_image(folder / video.file_names[t])).resize((size[1], size[0]))
    )
    left = _draw(image, t, range(1, len(truths) + 1), [1.0] * len(truths), [m[t] for m in truths])
    right = _draw(image, t, ids, [one.score for one in tracks], [m[t] for m in masks])
    gap = np.full((size[0], _GAP, 3), 22, np.uint8)
    yield np.concatenate([left, gap, right], axis=1)


def _film(
  video: Video, truths: Sequence[Masks], tracks: Sequence[ConceptTrack], folder: Path
) -> Write:
  def write(file) -> None:
    first, *others = (Image.fromarray(frame) for frame in film(video, truths, tracks, folder))
    first.save(
      file, "WEBP", save_all=True, append_images=others, duration=_DURATION, loop=0, quality=70,
      method=2,
    )  # fmt: skip

  return write


def _numbers(truths: Sequence[Masks], found: Sequence[Masks], frames: int) -> list[int]:
  """A number from 1 for each predicted track: that of the object that it follows best, if any."""
  from scipy.optimize import linear_sum_assignment

  tubes = overlap_masks(truths, found, frames).tubes
  numbers, free = [0] * len(found), len(truths) + 1
  for row, column in zip(*linear_sum_assignment(tubes, maximize=True), strict=True):
    if tubes[row, column]:
      numbers[column] = int(row) + 1
  for column, number in enumerate(numbers):
    if not number:
      numbers[column], free = free, free + 1
  return numbers


def _draw(
  image: UInt8[np.ndarray, "h w 3"],
  t: int,
  ids: Sequence[int],
  scores: Sequence[float],
  rles: Sequence[Rle | None],
) -> UInt8[np.ndarray, "h w 3"]:
  """The objects that are visible in a frame, drawn over it."""
  size = image.shape[:2]
  rows = [(i, s, rle) for i, s, rle in zip(ids, scores, rles, strict=True) if rle is not None]
  if not rows:
    return image
  numbers, values, visible = zip(*rows, strict=True)
  masks = RleMasks(list(visible), tuple(visible[0]["size"])).at(size)
  boxes = np.array([mask_to_box(masks[k]) for k in range(len(rows))], np.float32)
  found = Instances(np.array(numbers), np.array(values, np.float32), boxes, masks)
  return draw_objects(image, TrackedFrame(t, 0.0, size, found))
