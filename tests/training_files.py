"""A training run in files, and its command."""

import json

import numpy as np
import pytest
import training_model
from PIL import Image
from training_runs import TOKENIZER

from sam3_jax.checkpoint import bundle
from sam3_jax.utils.param_tree import nest


@pytest.fixture
def files(tmp_path):
  """A checkpoint of the training model, and two annotated images with a square each."""
  info = {"name": "toy", "licence": "CC0-1.0", "trained": False}
  folder = tmp_path / "toy"
  params = nest(training_model.parameters() | training_model.visual_parameters())
  bundle.save(folder, params, training_model.CONFIG, TOKENIZER.read_bytes(), info=info)
  images = tmp_path / "images"
  images.mkdir()
  entries, found = [], []
  for number in range(2):
    pixels = np.full((40, 50, 3), 60 * number, np.uint8)
    pixels[10:30, 5:25] = 255
    Image.fromarray(pixels).save(images / f"{number}.png")
    entries.append({"id": number, "file_name": f"{number}.png", "width": 50, "height": 40})
    square = [5, 10, 25, 10, 25, 30, 5, 30]
    found.append(
      {
        "id": number + 1,
        "image_id": number,
        "category_id": 1,
        "segmentation": [square],
        "bbox": [5, 10, 20, 20],
        "area": 400,
        "iscrowd": 0,
      }
    )
  categories = [{"id": 1, "name": "square"}, {"id": 2, "name": "circle"}]
  content = {"images": entries, "annotations": found, "categories": categories}
  (tmp_path / "data.json").write_text(json.dumps(content))
  (tmp_path / "run.json").write_text(
    json.dumps(
      {
        "steps": 3,
        "save_every": 2,
        "trainable": "decoder/norm/.*",
        "evaluate_every": 2,
        "data": {
          "batch_size": 2,
          "prompts_per_image": 2,
          "present_prompts": 1,
          "max_objects": 2,
          "prefetch": 0,
        },
      }
    )
  )
  return tmp_path


def typed(files, *more):
  return [
    "train", str(files / "run.json"), "--data", str(files / "data.json"),
    "--images", str(files / "images"), "--checkpoint", str(files / "toy"),
    "--out", str(files / "out"), *more,
  ]  # fmt: skip
