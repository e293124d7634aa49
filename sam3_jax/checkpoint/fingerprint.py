"""A few numbers that a checkpoint's programs give for an image and prompts that never change.

`sam3-jax convert --verify` keeps them in the bundle, `sam3-jax inspect --verify` computes them
again: whether this machine and this version of the code compute what was computed then. Whether the
parameters are the same is for the checksums to say, which a flipped bit does not pass.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3_jax.types import Detections, ImageEmbedding, TextEmbedding, VisualMasks
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.json_text import parse

FILE = "fingerprint.json"
RECIPE = 1  # the number of this image, these prompts and statistics
TINY = float(np.finfo(np.float32).tiny)
STATISTICS = ("mean", "root mean square", "mean times place")
# Of the root mean square, by the dtype that was computed in. Measured at the released size with
# seeded weights: 8e-6 between code for SSE4.2 and for AVX-512, 1e-7 between one core and two, 5e-2
# between float32 and bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2}
IMAGE = (200, 300)  # height and width
PHRASE = "red circle"
BOX, CENTRE = (60, 40, 160, 140), (110, 90)  # of the disc in the image


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """What was computed.

  Attributes:
    dtype: of the computation.
    numbers: of each result, such as `decode phrase: boxes`, the `STATISTICS`: the mean, the root of
      the mean square, and the mean of the values times a ramp from 0 at the first to 1 at the last.
    recipe: `RECIPE` of the code that computed it.
  """

  dtype: str
  numbers: dict[str, list[float]]
  recipe: int = RECIPE


@dataclasses.dataclass(frozen=True)
class Answers:
  """What a model gives for the image and the prompts.

  Attributes:
    embedding: of the image.
    text: of the phrase.
    found: of the phrase, and of it with the box.
    masks: of the point and the box, three readings; None without a head for visual prompts.
  """

  embedding: ImageEmbedding
  text: TextEmbedding
  found: Detections
  masks: VisualMasks | None


def summarise(answers: Answers, dtype: str) -> Fingerprint:
  """Their statistics.

  Raises:
    ValueError: a result is not finite.
  """
  embedding, text, masks = answers.embedding, answers.text, answers.masks
  results: dict[str, Any] = {
    "encode image: coarse": embedding.coarse,
    "encode image: middle": embedding.middle,
    "encode image: fine": embedding.fine,
    "encode phrase": np.asarray(text.features, np.float32)[np.asarray(text.valid)],
  }
  for row, kind in enumerate(("phrase", "phrase and box")):
    for name in ("scores", "boxes", "mask_logits", "semantic_logits"):
      results[f"decode {kind}: {name}"] = getattr(answers.found, name)[row]
  if masks is not None:
    results |= {f"decode visual: {name}": getattr(masks, name) for name in ("mask_logits", "iou")}
    # Of a logit alone near 0, any difference would be large.
    results["decode visual: object"] = jax.nn.sigmoid(masks.object_logit)
  numbers = {name: _statistics(np.asarray(array)) for name, array in results.items()}
  for name, values in numbers.items():
    if not all(map(math.isfinite, values)):
      raise ValueError(f"{name} is not finite: these parameters compute nothing; convert others.")
  return Fingerprint(dtype, numbers)


def compare(found: Fingerprint, wanted: Fingerprint) -> float:
  """The largest difference of two fingerprints, as a fraction of each result's root mean square.

  Raises:
    ValueError: it is over the tolerance of the coarser dtype, or they have other recipes or
      results; the message names the number.
  """
  if (found.recipe, found.numbers.keys()) != (wanted.recipe, wanted.numbers.keys()):
    names = sorted(found.numbers.keys() ^ wanted.numbers.keys())
    raise ValueError(
      f"the fingerprint is of recipe {wanted.recipe}, this version of sam3-jax has recipe "
      f"{found.recipe}{f', and only one of them has {names}' if names else ''}; convert again."
    )
  worst, where = 0.0, ("", 0)
  for name, values in wanted.numbers.items():
    scale = max(values[1], found.numbers[name][1], TINY)
    for i, (value, got) in enumerate(zip(values, found.numbers[name], strict=True)):
      if (off := abs(got - value) / scale) > worst:
        worst, where = off, (name, i)
  allowed = max(TOLERANCES[one.dtype] for one in (found, wanted))
  if worst > allowed:
    name, i = where
    raise ValueError(
      f"the {STATISTICS[i]} of {name!r} is {found.numbers[name][i]:.6g}, but the fingerprint has "
      f"{wanted.numbers[name][i]:.6g}: off by {worst:.1e} of its root mean square, {allowed:.0e} "
      "allowed. This machine or version computes something else, or config.json was edited."
    )
  return worst


def write(fingerprint: Fingerprint, folder: Path) -> None:
  """Writes it into a bundle."""
  write_json(folder / FILE, dataclasses.asdict(fingerprint), indent=1)


def read(folder: Path) -> Fingerprint | None:
  """A bundle's, None if it has none; ValueError if it is damaged."""
  path = folder / FILE
  if not path.exists():
    return None
  try:
    found = Fingerprint(**parse(path.read_bytes(), "it"))
    rows = found.numbers.values()
    whole = all(len(row) == len(STATISTICS) and all(map(math.isfinite, row)) for row in rows)
    if found.dtype not in TOLERANCES or not whole:
      raise ValueError(f"dtype {found.dtype!r}, {len(rows)} results")
  except (OSError, ValueError, TypeError, AttributeError) as error:
    raise ValueError(f"{path} is damaged ({error}); remove it, or convert again.") from error
  return found


def image() -> np.ndarray:
  """A red disc on slopes and stripes."""
  height, width = IMAGE
  y, x = np.indices(IMAGE)
  stripes = (7 * x + 13 * y) % 64 + 96
  image = np.stack([x * 255 // width, y * 255 // height, stripes], axis=-1)
  image[(x - CENTRE[0]) ** 2 + (y - CENTRE[1]) ** 2 < 50**2] = 220, 40, 30
  return image.astype(np.uint8)


def _statistics(array: np.ndarray) -> list[float]:
  values = array.astype(np.float64).reshape(-1)
  ramp = np.linspace(0, 1, values.size)
  found = values.mean(), np.sqrt(np.mean(values**2)), np.mean(values * ramp)
  return [float(f"{value:.8g}") for value in found]
