"""Helpers of the tests of batch jobs of videos: clips, jobs, and a model that tracks nothing real.

Run as a program, this is `sam3-jax batch` with that model; the variable `PAUSE` has the seconds
that each frame takes, so that tests can kill it.
"""

import os
import sys
import time
import zlib
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # pytest has this directory on its path
  sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import clips
import numpy as np
from batches import MODEL, QUIET
from PIL import Image

from sam3_jax.batch.inputs import common_phrases
from sam3_jax.batch.video_inputs import frozen_video, list_videos
from sam3_jax.batch.video_job import VideoJob
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.video import open_video
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import encode
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.storage.objects import resolve

PAUSE = "VIDEO_BATCH_PAUSE"
SIZE = (64, 96)
PHRASES = ("player", "ball")


class Model:
  """Finds a rectangle for each phrase but "nothing", which depends on the pixels of its frame."""

  info, identity, dtype = MODEL.info, MODEL.identity, MODEL.dtype
  tokenizer = MODEL.tokenizer
  video_programs: object = None

  def __init__(self, pause: float = 0.0):
    self.pause, self.frames = pause, 0

  def track(self, source, prompts):
    with open_video(source) as opened:
      wanted = [prompt for prompt in prompts if prompt != "nothing"]
      for frame in opened:
        time.sleep(self.pause)
        self.frames += 1
        masks = [_mask(frame.image, prompt) for prompt in wanted]
        boxes = np.array([[*_corner(one), *_corner(one[::-1, ::-1])] for one in masks], np.float32)
        found = Instances(
          ids=np.arange(1, len(wanted) + 1, dtype=np.int32),
          scores=np.array([0.9 - 0.1 * i for i in range(len(wanted))], np.float32),
          boxes=boxes.reshape(-1, 4),
          masks=RleMasks([encode(one) for one in masks], opened.size),
        )
        yield TrackedFrame(frame.index, frame.time, opened.size, found, tuple(wanted))


def _mask(image, prompt):
  height, width, _ = image.shape
  seed = zlib.crc32(np.ascontiguousarray(image).tobytes() + prompt.encode())
  x, y = seed % (width - 4), seed // 1000 % (height - 4)
  mask = np.zeros((height, width), bool)
  mask[y : y + 4, x : x + 4] = True
  return mask


def _corner(mask):
  y, x = np.argwhere(mask)[0]
  return x, y


def write_clip(path: Path, count: int = 5, shift: int = 0) -> Path:
  """A clip of `count` frames; `shift` tells clips apart."""
  path.parent.mkdir(parents=True, exist_ok=True)
  return clips.write_clip(
    path, count, SIZE, image=lambda i, *size: clips.frame_image(i + shift, *size)
  )


def write_frames(folder: Path, count: int = 4, shift: int = 0) -> Path:
  """A directory of frames."""
  folder.mkdir(parents=True)
  for i in range(count):
    Image.fromarray(clips.frame_image(i + shift, *SIZE)).save(folder / f"{i:05d}.png")
  return folder


def write_videos(folder: Path, count: int = 4) -> Path:
  """A directory with `count` clips in two directories, and a directory of frames."""
  for i in range(count):
    write_clip(folder / "ab"[i % 2] / f"clip{i}.mp4", 4 + i, 7 * i)
  write_frames(folder / "c" / "frames")
  return folder


def job(videos, out, phrases=PHRASES, **settings) -> VideoJob:
  common = common_phrases(None, phrases)
  settings = {"max_error_rate": 1.0, **settings}
  return VideoJob(
    inputs=list_videos(str(videos), common), out=resolve(out),
    frozen_input=frozen_video(str(videos), common), **settings,
  )  # fmt: skip


def patched(pause: float = 0.0):
  """A patch that puts the model into the command."""
  return mock.patch.object(Sam3, "from_checkpoint", return_value=Model(pause))


__all__ = ["PHRASES", "QUIET", "SIZE", "Model", "job", "patched", "write_clip", "write_frames"]

if __name__ == "__main__":
  from sam3_jax.batch import pipeline
  from sam3_jax.cli.main import entry

  pipeline.BACKOFF = (0.05, 0.1, 0.2)
  patched(float(os.environ.get(PAUSE, "0"))).start()
  entry()
