"""Images for the benchmarks and tests of batch inference: scenes, of which sam3-tiny knows."""

import json
import os
from pathlib import Path

from PIL import Image

from sam3_jax.datasets.synthetic import scene_files

DIFFERENT = 200  # composing one takes a third of a second; what more is asked for are copies


def write(folder: Path, count: int, *, scale: int = 1, phrases: int = 2) -> Path:
  """Writes images of 224 x 400 or 400 x 224 pixels, and a list of them.

  Args:
    folder: to be made.
    count: images.
    scale: enlarges them.
    phrases: asked about each: first what is there.

  Returns:
    The list, as `sam3-jax batch --images` takes it.
  """
  different = min(count, DIFFERENT)
  scene_files.write(folder, different, seed=0)
  asked: dict[str, list[str]] = {}
  for pair in json.loads((folder / "annotations.json").read_text())["images"]:
    asked.setdefault(pair["file_name"], []).append(pair["text_input"])
  if scale > 1:
    for name in asked:
      image = Image.open(folder / name)
      image.resize((scale * image.width, scale * image.height)).save(folder / name, quality=90)
  names, lines = list(asked), []
  for i in range(count):
    name = first = names[i % different]
    if i >= different:
      name = f"images/{i:06}.jpg"
      os.link(folder / first, folder / name)
    lines.append(json.dumps({"image": name, "prompts": asked[first][:phrases]}))
  path = folder / "list.jsonl"
  path.write_text("\n".join(lines) + "\n")
  return path
