"""Jobs of `sam3-jax track` with the small model of `small_video`, in this process or another one.

Run as a program, this is `sam3-jax track` with that model; `SAVED` is the number of frames between
two saved sessions, and `PAUSE` the seconds that each frame takes longer.
"""

import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # pytest has this directory on its path
  sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import av
import clips
import numpy as np
import small_video

from sam3_jax.cli import track_video
from sam3_jax.cli.main import main

SAVED, PAUSE = "TRACK_JOB_SAVED", "TRACK_JOB_PAUSE"
POINTS = ("--point", "5,5", "--point", "2@30,12", "--point", "2@9:20,12", "--point", "2@9:2,2,0")


def write_video(path: Path, count: int = 40) -> Path:
  """A video of `small_video.moving_frames`, 24 x 40, at 25 frames per second."""
  frames = small_video.moving_frames(count)
  return clips.write_clip(
    path, count, small_video.SIZE, image=lambda i, *_: frames[i], options={"crf": "12"}
  )


def results(out: Path) -> dict[str, bytes]:
  """The files of a job, by name."""
  files = [path for path in sorted(out.rglob("*")) if path.is_file()]
  return {str(path.relative_to(out)): path.read_bytes() for path in files}


def frame_times(path: Path) -> list[int]:
  """Time stamps of the frames of a video, which must be readable, in its time base."""
  with av.open(str(path)) as file:
    return [frame.pts for frame in file.decode(video=0)]


def use_small_model() -> None:
  """Makes the command use the small model, as the environment variables say."""
  model = small_video.small_model()
  track_video.Sam3.from_checkpoint = lambda *_, **__: model  # pyright: ignore
  if SAVED in os.environ:
    track_video.SAVED_FRAMES = int(os.environ[SAVED])
  if pause := float(os.environ.get(PAUSE, 0)):
    count = track_video._Meter.count

    def slow(meter, leaving):
      time.sleep(pause)
      count(meter, leaving)

    track_video._Meter.count = slow


def mask_of(x: int, y: int, side: int = 10) -> np.ndarray:
  """A square, white on black, uint8 [24, 40]."""
  mask = np.zeros(small_video.SIZE, np.uint8)
  mask[y : y + side, x : x + side] = 255
  return mask


if __name__ == "__main__":
  use_small_model()
  sys.exit(main(sys.argv[1:]))
