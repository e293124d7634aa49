"""Helpers of the tests of batch inference: images, jobs, and an engine without a model.

Run as a program, it does a job with that engine, so that tests can kill it.
"""

import io
import itertools
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

from sam3_jax.batch import job_files, pipeline
from sam3_jax.batch.files import write_json
from sam3_jax.batch.inputs import frozen_input, list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.load_image import LoadedImage
from sam3_jax.batch.part_writer import PartWriter
from sam3_jax.batch.prefetch import prefetch, read_task
from sam3_jax.batch.prompt_schema import visual_prompts
from sam3_jax.batch.run import run
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.rle import encode
from sam3_jax.storage.objects import resolve

SIDE = 16


def _fault(phrase: str) -> str:
  """As `Tokenizer.fault`; each word is a token."""
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
  """Finds up to three instances for a prompt, which depend only on the pixels and the prompt."""

  pause = 0.0  # seconds per batch
  started = 0  # number of batches

  def __init__(self, model, *, threshold, images, prompts, max_detections, visual):
    self.batch_size, self.visual = images, visual

  def encode_phrases(self, prompts):
    assert all(prompt.phrase for prompt in prompts)

  def start(self, slots):
    assert len(slots) <= self.batch_size
    assert self.visual or not any(visual_prompts(slot.prompts) for slot in slots if slot)
    time.sleep(self.pause)
    Engine.started += 1
    found = [
      [] if slot is None else [_instances(slot, prompt) for prompt in slot.prompts]
      for slot in slots
    ]
    return types.SimpleNamespace(started=0.0, ready=0.0, instances=lambda: found)


def _instances(slot, prompt) -> Instances:
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
  """Writes `count` images of different sizes; returns the directory."""
  folder.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(count)
  for i in range(count):
    size = rng.integers(5, 40, 2)
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f"{i:03}.png")
  return folder


def broken() -> dict[str, bytes]:
  """Nine kinds of files that cannot be read as an image of at most a million pixels, by name."""
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
  settings: dict[str, Any] = {"part_size": 5, "batch_images": 2, "max_error_rate": 1.0} | settings
  images = str(images)
  settings["frozen_input"] = frozen_input(images, prompts)
  return Job(inputs=list_inputs(images, prompts), out=resolve(out), **settings)


def instance(mask) -> dict:
  """An instance as in a record."""
  return {
    "id": 1, "score": 0.9, "bbox": [10, 10, 30, 20], "area": int(mask.sum()),
    "segmentation": encode(mask),
  }  # fmt: skip


def write_job(out: Path, images) -> Path:
  """Writes a finished job.

  Args:
    out: output directory.
    images: names, for an image with one cat each, or the instances by name and phrase.
  """
  if not isinstance(images, dict):
    images = {name: {"cat": [instance(MASK)]} for name in images}
  settings = {"checkpoint": {}, "dtype": "float32", "threshold": 0.5, "max_detections": 100}
  write_json(out / job_files.JOB, {"inputs": len(images), "part_size": 256, **settings})
  writer = PartWriter(out, 0, range(len(images)))
  for number, (name, by_phrase) in enumerate(images.items()):
    prompts = [{"text": text, "instances": found} for text, found in by_phrase.items()]
    record = {"input": number, "image": name, "width": 80, "height": 60, "prompts": prompts}
    writer.add([json.dumps(record).encode() + b"\n"], [], range(number, number + 1))
  writer.finish()
  return out


def load_images(inputs, side=8, max_pixels=10**6) -> list[LoadedImage]:
  """The images of inputs, as batch inference loads them."""
  tasks = map(read_task, inputs, itertools.count())
  with prefetch(
    tasks, side=side, max_pixels=max_pixels, workers=0, threads=2, ahead=2
  ) as images:  # fmt: skip
    return list(images)


def files(out: Path) -> dict[str, bytes]:
  """The content of all files in a directory, by relative path."""
  return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.*"))}


if __name__ == "__main__":
  pipeline.Engine = Engine
  images, out, settings, Engine.pause = *map(Path, sys.argv[1:3]), *map(json.loads, sys.argv[3:5])
  sys.stdout.write("go\n")
  sys.stdout.flush()
  run(job(images, out, **settings), MODEL, QUIET, QUIET)
