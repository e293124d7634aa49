"""Entries of YouTube-VIS annotation files (https://youtube-vos.org/dataset/vis/).

An annotation is an object over the whole video: `segmentations` (compressed RLE), `bboxes` and
`areas` have an entry for each frame, null where the object is absent.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from sam3_jax.outputs.track_rows import OBJECT, image_name, visible


@dataclasses.dataclass
class VideoTracks:
  """The tracks of a video, by object.

  Attributes:
    size: height and width of the frames.
    frames: numbers of the tracked frames.
    times: of these frames, in seconds.
    objects: by id: the position of each frame in which the object has pixels, and its row.
  """

  size: tuple[int, int]
  frames: list[int] = dataclasses.field(default_factory=list)
  times: list[float] = dataclasses.field(default_factory=list)
  objects: dict[int, list[tuple[int, dict[str, Any]]]] = dataclasses.field(default_factory=dict)

  @classmethod
  def of_rows(cls, size: tuple[int, int], rows: Iterable[dict[str, Any]]) -> "VideoTracks":
    """Collects the rows of a video, in the order of its frames."""
    tracks = cls(size)
    for at, row in enumerate(rows):
      tracks.frames.append(row["frame"])
      tracks.times.append(row["time"])
      for one in visible(row):
        tracks.objects.setdefault(one["id"], []).append((at, one))
    return tracks

  def phrase(self, identity: int, other: str = OBJECT) -> str:
    """The phrase that found an object; `other` for an object of another prompt."""
    return self.objects[identity][0][1].get("phrase", other)

  def video(self, number: int, name: str) -> dict[str, Any]:
    """The entry of `videos`.

    Args:
      number: its id.
      name: of the video; frames are NAME/00012.jpg by their numbers.
    """
    height, width = self.size
    return {
      "id": number, "width": width, "height": height, "length": len(self.frames), "name": name,
      "file_names": [image_name(name, frame) for frame in self.frames], "times": self.times,
    }  # fmt: skip

  def annotations(self) -> Iterator[tuple[int, dict[str, Any]]]:
    """The id of each object in the video, in their order, and its entry of `annotations`, which
    lacks `id`, `video_id` and `category_id`. `score` is the mean over its frames."""
    height, width = self.size
    for identity, found in sorted(self.objects.items()):
      columns: dict[str, list[Any]] = {
        key: [None] * len(self.frames) for key in ("segmentations", "bboxes", "areas")
      }
      for at, one in found:
        columns["segmentations"][at] = one["segmentation"]
        columns["bboxes"][at], columns["areas"][at] = one["bbox"], one["area"]
      mean = float(np.mean([one["score"] for _, one in found]))
      yield (
        identity,
        {"iscrowd": 0, "score": round(mean, 6), "width": width, "height": height, **columns},
      )
