"""What the tests of batch inference share: images, jobs, and an engine without a model.

Run as a program it does a job's share by that engine, to be killed at will.
"""

import io
import json
import sys
import time
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from sam3_jax.batch import parts, pipeline
from sam3_jax.batch import run as runs
from sam3_jax.batch.files import write_json
from sam3_jax.batch.inputs import find
from sam3_jax.batch.job import Job
from sam3_jax.batch.prompt_schema import pointing
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.rle import encode

SIDE = 16


def _fault(phrase: str) -> str:
  """A word is a token."""
  count = len(phrase.split())
  return f"phrase {phrase!r} has {count} tokens, and at most 30 are read" if count > 30 else ""


MODEL = types.SimpleNamespace(
  info={"name": "stub"},
  identity="0",
  dtype=np.dtype("float32"),
  config=types.SimpleNamespace(image_size=SIDE),
  visual_params=dict,
  tokenizer=types.SimpleNamespace(fault=_fault),
)
QUIET = Console(quiet=True)
MASK = np.zeros((60, 80), bool)
MASK[10:30, 10:40] = True


class Engine:
  """Finds up to three things in an image, by its pixels and the phrase alone."""

  pause = 0.0  # seconds a batch
  started = 0  # batches

  def __init__(self, model, *, threshold, images, prompts, most, visual):
    self.rows, self.visual = images, visual

  def learn(self, prompts):
    assert all(prompt.phrase for prompt in prompts)

  def start(self, slots):
    assert len(slots) <= self.rows
    assert self.visual or not any(pointing(one.prompts) for one in slots if one is not None)
    time.sleep(self.pause)
    Engine.started += 1
    found = [
      [] if one is None else [_found(one, prompt) for prompt in one.prompts] for one in slots
    ]
    return types.SimpleNamespace(started=0.0, ready=0.0, instances=lambda: found)


def _found(slot, prompt) -> Instances:
  rng = np.random.default_rng(
    [zlib.crc32(slot.pixels.tobytes()), zlib.crc32(repr(prompt).encode())]
  )
  count = int(rng.integers(0, 4))
  height, width = slot.size
  return Instances(
    ids=np.arange(1, count + 1, dtype=np.int32),
    scores=np.sort(rng.random(count, np.float32))[::-1],
    boxes=np.sort(rng.random((count, 2, 2), np.float32), axis=1).reshape(-1, 4)
    * np.float32([width, height, width, height]),
    masks=Masks(rng.standard_normal((count, 8, 8), np.float32), (height, width)),
  )


def write_images(folder: Path, count: int) -> Path:
  """So many images, of all sizes."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(count)
  for i in range(count):
    size = rng.integers(5, 40, 2)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:03}.png")
  return folder


def broken() -> dict[str, bytes]:
  """Nine kinds of files that no image of up to a million pixels can be read from."""
  png, jpeg, large = (
    _saved(Image.effect_noise(size, 80), kind)
    for size, kind in (((40, 30), "png"), ((64, 64), "jpeg"), ((1001, 1000), "png"))
  )
  return {
    "empty.png": b"", "text.jpg": b"no image", "zeros.png": bytes(500), "cut.png": png[:90],
    "head.png": png[:8], "flipped.png": png[:60] + b"\xff" * 20 + png[80:],
    "html.jpg": b"<html>404</html>", "cut.jpg": jpeg[:600], "large.png": large,
  }  # fmt: skip


def _saved(image: Image.Image, kind: str) -> bytes:
  file = io.BytesIO()
  image.save(file, kind)
  return file.getvalue()


def job(images, out, prompts="cat, dog", **settings) -> Job:
  settings: dict[str, Any] = {"part_size": 5, "images": 2, "max_error_rate": 1.0} | settings
  return Job(inputs=find(str(images), prompts), out=out, **settings)


def instance(mask) -> dict:
  """An instance as a record has it."""
  return {
    "id": 1, "score": 0.9, "bbox": [10, 10, 30, 20], "area": int(mask.sum()),
    "segmentation": encode(mask),
  }  # fmt: skip


def write_job(out: Path, images) -> Path:
  """A finished job: for each image the instances of each phrase, or one cat."""
  if not isinstance(images, dict):
    images = {name: {"cat": [instance(MASK)]} for name in images}
  settings = {"checkpoint": {}, "dtype": "float32", "threshold": 0.5, "max_detections": 100}
  write_json(out / parts.JOB, {"inputs": len(images), "part_size": 256, **settings})
  writer = parts.PartWriter(out, 0, range(len(images)))
  for number, (name, asked) in enumerate(images.items()):
    prompts = [{"text": text, "instances": found} for text, found in asked.items()]
    record = {"input": number, "image": name, "width": 80, "height": 60, "prompts": prompts}
    writer.add([json.dumps(record).encode() + b"\n"], [], range(number, number + 1))
  writer.finish()
  return out


def files(out: Path) -> dict[str, bytes]:
  return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*"))}


if __name__ == "__main__":
  pipeline.Engine = Engine
  images, out, settings, Engine.pause = *map(Path, sys.argv[1:3]), *map(json.loads, sys.argv[3:5])
  sys.stdout.write("go\n")
  sys.stdout.flush()
  runs.run(job(images, out, **settings), MODEL, QUIET, QUIET)
