"""Images for benchmarks and tests of batch inference: scenes with objects that sam3-tiny knows."""

import json
import os
from pathlib import Path

from PIL import Image

from sam3_jax.datasets.synthetic import scene_files

DIFFERENT = 200  # composing a scene takes a third of a second; further images are copies


def write(folder: Path, count: int, *, scale: int = 1, phrases: int = 2) -> Path:
  """Writes images of 224 x 400 or 400 x 224 pixels, and a list of them.

  Args:
    folder: output directory.
    count: number of images.
    scale: factor by which the images are enlarged.
    phrases: number of phrases per image, those of visible objects first.

  Returns:
    The list, for `sam3-jax batch --images`.
  """
  different = min(count, DIFFERENT)
  scene_files.write(folder, different, seed=0)
  by_image: dict[str, list[str]] = {}
  for pair in json.loads((folder / "annotations.json").read_text())["images"]:
    by_image.setdefault(pair["file_name"], []).append(pair["text_input"])
  if scale > 1:
    for name in by_image:
      image = Image.open(folder / name)
      image.resize((scale * image.width, scale * image.height)).save(folder / name, quality=90)
  names, lines = list(by_image), []
  for i in range(count):
    name = first = names[i % different]
    if i >= different:
      name = f"images/{i:06}.jpg"
      os.link(folder / first, folder / name)
    lines.append(json.dumps({"image": name, "prompts": by_image[first][:phrases]}))
  path = folder / "list.jsonl"
  path.write_text("\n".join(lines) + "\n")
  return path
