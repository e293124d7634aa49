"""Images and requests of the load test, and the answers that `Sam3.decode` gives to them.

  python -m load.material WORK                  writes WORK/images and WORK/answers.json
  python -m load.material WORK --loop SECONDS   times the same work without a server

Each image has the same kinds of requests: a phrase, two phrases of which one is not in the image, a
phrase with an exemplar box, and a click.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from load import digest
from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.scenes import Scene, compose
from sam3_jax.evaluation.clicks import deepest_point
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.rle import bounds

IMAGES = 8
THRESHOLD = 0.4
PER_IMAGE = 4  # requests
WORDS = [concept.phrases[0] for concept in drawings.concepts()]


def write(work: Path, checkpoint: str) -> None:
  """Writes images, requests and answers."""
  model = Sam3.from_checkpoint(checkpoint)
  rng = np.random.default_rng(24)
  (work / "images").mkdir(parents=True, exist_ok=True)
  images, answers = [], {}
  for number in range(IMAGES):
    scene = compose(rng, drawings.TRAINING)
    path = work / "images" / f"{number}.jpg"
    Image.fromarray(scene.image).save(path, quality=90)
    data = path.read_bytes()
    height, width = scene.image.shape[:2]
    answers[digest(data)] = {"id": f"image{number}", "width": width, "height": height}
    bodies = [json.dumps(request) for request in _requests(scene, rng)]
    embedding = model.encode(data, visual=True)
    for body in bodies:
      answers[digest(body.encode())] = _answer(model, embedding, json.loads(body))
    images.append({"file": path.name, "requests": bodies})
  (work / "answers.json").write_text(json.dumps({"images": images, "answers": answers}))


def loop(work: Path, checkpoint: str, seconds: float) -> dict[str, float]:
  """Encodes and decodes the same images and prompts, one after another; returns rates."""
  model = Sam3.from_checkpoint(checkpoint)
  images = [
    (
      (work / "images" / image["file"]).read_bytes(),
      [json.loads(body) for body in image["requests"]],
    )
    for image in json.loads((work / "answers.json").read_text())["images"]
  ]
  for data, requests in images:  # compiles
    _decode_all(model, data, requests)
  print("ready", flush=True)
  start, prompts = time.perf_counter(), 0
  for done, (data, requests) in enumerate(itertools.cycle(images), 1):
    prompts += _decode_all(model, data, requests)
    if (passed := time.perf_counter() - start) >= seconds:
      return {"images": done / passed, "prompts": prompts / passed}
  raise AssertionError


def _requests(scene: Scene, rng: np.random.Generator) -> list[dict[str, Any]]:
  item = scene.objects[-1]  # nothing covers it
  word = WORDS[item.concept]
  seen = {WORDS[one.concept] for one in scene.objects}
  other = str(rng.choice([one for one in WORDS if one not in seen]))
  box = np.asarray(mask_to_box(item.mask), float).tolist()
  x, y, _ = deepest_point(item.mask)
  always = {"threshold": THRESHOLD, "format": "rle"}
  return [
    {"concepts": [{"phrase": word}]} | always,
    {"concepts": [{"phrase": other}, {"phrase": WORDS[scene.objects[0].concept]}]} | always,
    {"concepts": [{"phrase": word, "boxes": [box]}]} | always,
    {"visual": [{"points": [[float(x), float(y)]], "point_labels": [1]}]} | always,
  ]


def _answer(model: Sam3, embedding: Any, request: dict[str, Any]) -> dict[str, Any]:
  """The part of a response that does not depend on time, from single calls of the model."""
  concepts = []
  for one in request.get("concepts", []):
    [found] = model.decode(embedding, [_prompt(one)]).instances(request["threshold"])
    rows = [
      {"score": float(score), "box": [float(x) for x in box], "mask": found.masks.rle(i)}
      for i, (score, box) in enumerate(zip(found.scores, found.boxes, strict=True))
    ]
    concepts.append({"phrase": one["phrase"], "instances": rows})
  visual = []
  for one in request.get("visual", []):
    found = model.decode_visual(embedding, _click(one))
    [masks], rows = found.masks(), []
    for k, score in enumerate(np.asarray(found.iou)[0]):
      x, y, w, h = bounds(masks.rle(k))
      rows.append({"score": float(score), "box": [x, y, x + w, y + h], "mask": masks.rle(k)})
    visual.append({"masks": rows})
  return {"concepts": concepts, "visual": visual}


def _decode_all(model: Sam3, data: bytes, requests: list[dict[str, Any]]) -> int:
  """Encodes an image and decodes all prompts; returns their number."""
  embedding = model.encode(data, visual=True)
  count = 0
  for request in requests:
    for one in request.get("concepts", []):
      model.decode(embedding, [_prompt(one)]).instances(request["threshold"])
      count += 1
    for one in request.get("visual", []):
      np.asarray(model.decode_visual(embedding, _click(one)).mask_logits)
      count += 1
  return count


def _prompt(concept: dict[str, Any]) -> Prompt:
  return Prompt(concept["phrase"], concept.get("boxes"))


def _click(visual: dict[str, Any]) -> VisualPrompt:
  return VisualPrompt(visual["points"], visual["point_labels"])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("work", type=Path)
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--loop", type=float)
  arguments = parser.parse_args()
  if arguments.loop is None:
    write(arguments.work, arguments.checkpoint)
  else:
    print(json.dumps(loop(arguments.work, arguments.checkpoint, arguments.loop)))


if __name__ == "__main__":
  main()
