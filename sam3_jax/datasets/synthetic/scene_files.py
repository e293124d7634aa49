"""Writes scenes as image files with annotations in SA-Co's layout.

    OUT/annotations.json
    OUT/crown.json               the pairs of the new concept, if one is given
    OUT/images/000000_noto.jpg ...

Each scene has its own random generator, given by the seed and its index, so a larger number of
scenes starts with the same ones. Files are byte-equal for the same versions of this package, NumPy
and Pillow.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.phrase_sampling import Phrase
from sam3_jax.datasets.synthetic.scenes import SMALLEST, Scene, compose, phrases
from sam3_jax.outputs.rle import bounds, encode
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.os_errors import reason

TRAIN = "train"  # stands for all styles of training
ABSENT = 2.0  # absent phrases per present phrase, as in the fixed scenes
QUALITY = 92  # of the JPEG files
FRAMES = "JPEGImages"  # directory of the frames of moving scenes, named as in DAVIS and YouTube-VIS
LARGEST = 8192  # side of an image in pixels
_UNFINISHED = ".unfinished-scenes"


def write(
  out: Path,
  count: int,
  seed: int,
  style: str | Sequence[str] = TRAIN,
  *,
  new: str | None = None,
  augment: float = 0.0,
  unseen: bool = False,
  size: tuple[int, int] | None = None,
  progress: Callable[[str, float], None] = lambda what, fraction: None,
) -> dict[str, int]:
  """Writes scenes to a directory; annotations.json is written last and atomically.

  Args:
    out: a directory that does not exist, is empty, or is left from an interrupted call, which is
      repeated.
    count: number of scenes, at least 1.
    seed: random seed, at least 0.
    style: one of drawings.STYLES, "train", or several of them.
    new: name of a new concept (see drawings.new_concepts). Every scene has a phrase for it, and
      about half of them show it; its pairs are also written to NAME.json, to evaluate them alone.
    augment: strength of changes of color and shape, in [0, 1].
    unseen: use synonyms and plurals that training never uses.
    size: height and width of the images in pixels; None for random ones.
    progress: called with the name of a step and the fraction of the work done so far.

  Returns:
    Numbers of images, pairs and objects (counted for each pair they match).

  Raises:
    ValueError: an argument is invalid, or `out` cannot be written.
  """
  chosen = (style,) if isinstance(style, str) else tuple(style)
  styles, number_of_new = style_names(chosen), _number(new)
  check_options(count, seed, augment, size)
  try:
    prepare(out)
    (out / "images").mkdir(exist_ok=True)
    about = f", new: {new}" if new else ""
    record = _record(f"scenes: {count} of seed {seed}, style {', '.join(chosen)}{about}")
    pairs_of_new = set()
    for number in range(count):
      progress("composing scenes", number / count)
      rng = np.random.default_rng([seed, number])
      scene = compose(rng, styles, size, augment=augment, new=number_of_new)
      sampled = phrases(rng, scene, absent=ABSENT, unseen=unseen, new=number_of_new)
      file = f"images/{number:06d}_{scene.style}.jpg"
      Image.fromarray(scene.image).save(out / file, quality=QUALITY)
      for phrase in sampled:
        pair = _add(record, file, scene, phrase)
        pairs_of_new |= {pair} if phrase.named == number_of_new else set()
    files = {f"{new}.json": _only(record, pairs_of_new)} if new else {}
    finish(out, {**files, "annotations.json": record})
  except OSError as error:
    raise ValueError(f"cannot write to {out}: {reason(error)}.") from error
  pairs, objects = len(record["images"]), len(record["annotations"])
  return {"images": count, "pairs": pairs, "objects": objects}


def check_options(
  count: int, seed: int, augment: float, size: tuple[int, int] | None = None
) -> None:
  """Raises ValueError if an option of `write` is out of its range."""
  if count < 1 or seed < 0:
    raise ValueError(
      f"count must be at least 1 and seed at least 0; got {count} scenes of seed {seed}."
    )
  if not 0 <= augment <= 1:  # also false for NaN
    raise ValueError(f"augment must be between 0 and 1; got {augment}.")
  if size is not None and not SMALLEST <= min(size) <= max(size) <= LARGEST:
    raise ValueError(
      f"a scene must be {SMALLEST} to {LARGEST} pixels wide and high; got {size[1]} x {size[0]}."
    )


def style_names(chosen: Sequence[str]) -> tuple[str, ...]:
  """The artists, each once, in the given order; raises ValueError for an unknown one."""
  for style in chosen:
    if style not in (*drawings.STYLES, TRAIN):
      raise ValueError(f"no style {style!r}; choose from {', '.join((*drawings.STYLES, TRAIN))}.")
  each = [one for style in chosen for one in (drawings.TRAINING if style == TRAIN else (style,))]
  return tuple(dict.fromkeys(each))


def _number(new: str | None) -> int | None:
  """The index of a new concept."""
  if new is None:
    return None
  names = [one.name for one in drawings.new_concepts()]
  if new not in names:
    raise ValueError(f"no new concept {new!r}; choose from {', '.join(names)}.")
  return len(drawings.concepts()) + names.index(new)


def prepare(out: Path) -> None:
  """Creates the directory and marks it as unfinished; empties an unfinished one."""
  if out.exists() and not out.is_dir():
    raise ValueError(f"{out} is a file; give another directory.")
  names = {path.name for path in out.iterdir()} if out.exists() else set()
  if names and _UNFINISHED not in names:
    raise ValueError(f"{out} is not empty; give another directory, or remove it first.")
  out.mkdir(parents=True, exist_ok=True)
  (out / _UNFINISHED).touch()
  for left in (*out.glob("images/*.jpg"), *out.glob(f"{FRAMES}/*/*.jpg"), *out.glob("*.json")):
    left.unlink(missing_ok=True)
  for empty in out.glob(f"{FRAMES}/*"):
    empty.rmdir()


def finish(out: Path, files: Mapping[str, dict[str, Any]]) -> None:
  """Writes JSON files atomically, in order, and removes the mark."""
  for name, content in files.items():
    write_json(out / name, content)
  (out / _UNFINISHED).unlink()


def info(description: str) -> dict[str, str]:
  """What the files of annotations say about themselves."""
  return {
    "description": description,
    "licence": "of the drawings: Noto Emoji and Noto Emoji v1 (Google, Apache-2.0), Fluent Emoji "
    "Flat (Microsoft, MIT), Twemoji (Twitter and contributors, CC BY 4.0)",
  }


def _record(description: str) -> dict[str, Any]:
  return {
    "info": info(description),
    "categories": [{"id": 1, "name": "visual"}],
    "images": [],
    "annotations": [],
  }


def _only(record: dict[str, Any], pairs: set[int]) -> dict[str, Any]:
  """Restricts a record to some of its pairs."""
  return {
    **record,
    "images": [one for one in record["images"] if one["id"] in pairs],
    "annotations": [one for one in record["annotations"] if one["image_id"] in pairs],
  }


def _add(record: dict[str, Any], file: str, scene: Scene, phrase: Phrase) -> int:
  """Adds a pair and the matching objects; returns its id."""
  height, width = scene.image.shape[:2]
  pair = len(record["images"])
  record["images"].append(
    {
      "id": pair,
      "file_name": file,
      "width": width,
      "height": height,
      "text_input": phrase.text,
      "is_instance_exhaustive": 1,
    }
  )
  for number in phrase.objects:
    mask = scene.objects[number].mask
    rle = encode(mask)
    x, y, w, h = bounds(rle)
    record["annotations"].append(
      {
        "id": len(record["annotations"]),
        "image_id": pair,
        "category_id": 1,
        "iscrowd": 0,
        "area": int(mask.sum()),
        "bbox": [x / width, y / height, w / width, h / height],  # as in SA-Co
        "segmentation": rle,
      }
    )
  return pair
