"""Fingerprints: statistics of a model's outputs for a fixed image and fixed prompts.

`sam3-jax convert --verify` stores a fingerprint in the bundle, and `sam3-jax inspect --verify`
computes it again. It shows whether this machine and this version compute the same outputs. The
checksums show whether the parameters are the same.
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
RECIPE = 1  # version of the image, the prompts and the statistics
TINY = float(np.finfo(np.float32).tiny)
STATISTICS = ("mean", "root mean square", "mean times position")
# Relative to the root mean square, by the dtype of the computation. Measured at the released size
# with seeded weights: 8e-6 between code for SSE4.2 and for AVX-512, 1e-7 between one core and two,
# 5e-2 between float32 and bfloat16.
TOLERANCES = {"float32": 1e-4, "bfloat16": 0.2}
IMAGE = (200, 300)  # height and width
PHRASE = "red circle"
BOX, CENTER = (60, 40, 160, 140), (110, 90)  # of the disc in the image


@dataclasses.dataclass(frozen=True)
class Fingerprint:
  """Statistics of outputs.

  Attributes:
    dtype: of the computation.
    numbers: the `STATISTICS` of each output, such as `decode phrase: boxes`: the mean, the root
      mean square, and the mean of the values times a ramp from 0 at the first to 1 at the last.
    recipe: `RECIPE` of the code that computed it.
  """

  dtype: str
  numbers: dict[str, list[float]]
  recipe: int = RECIPE


@dataclasses.dataclass(frozen=True)
class ModelOutputs:
  """A model's outputs for the image and the prompts.

  Attributes:
    embedding: of the image.
    text: of the phrase.
    found: detections of the phrase, and of the phrase with the exemplar box.
    masks: multimask outputs of the point and the box; None without a head for visual prompts.
  """

  embedding: ImageEmbedding
  text: TextEmbedding
  found: Detections
  masks: VisualMasks | None


def summarize(outputs: ModelOutputs, dtype: str) -> Fingerprint:
  """The fingerprint of outputs.

  Args:
    outputs: of a model.
    dtype: of the computation.

  Raises:
    ValueError: an output is not finite.
  """
  embedding, text, masks = outputs.embedding, outputs.text, outputs.masks
  results: dict[str, Any] = {
    "encode image: coarse": embedding.coarse,
    "encode image: middle": embedding.middle,
    "encode image: fine": embedding.fine,
    "encode phrase": np.asarray(text.features, np.float32)[np.asarray(text.valid)],
  }
  for row, kind in enumerate(("phrase", "phrase and box")):
    for name in ("scores", "boxes", "mask_logits", "semantic_logits"):
      results[f"decode {kind}: {name}"] = getattr(outputs.found, name)[row]
  if masks is not None:
    results |= {f"decode visual: {name}": getattr(masks, name) for name in ("mask_logits", "iou")}
    # A single logit near 0 would make any relative difference large.
    results["decode visual: object"] = jax.nn.sigmoid(masks.object_logit)
  numbers = {name: _statistics(np.asarray(array)) for name, array in results.items()}
  for name, values in numbers.items():
    if not all(map(math.isfinite, values)):
      raise ValueError(f"{name} is not finite, so the parameters are unusable: use others.")
  return Fingerprint(dtype, numbers)


def compare(found: Fingerprint, wanted: Fingerprint) -> float:
  """The largest difference of two fingerprints, relative to the root mean square of each output.

  Raises:
    ValueError: it exceeds the tolerance of the coarser dtype, or the fingerprints have different
      recipes or outputs; the message names the number.
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
      if (error := abs(got - value) / scale) > worst:
        worst, where = error, (name, i)
  allowed = max(TOLERANCES[one.dtype] for one in (found, wanted))
  if worst > allowed:
    name, i = where
    raise ValueError(
      f"the {STATISTICS[i]} of {name!r} is {found.numbers[name][i]:.6g}, but the fingerprint has "
      f"{wanted.numbers[name][i]:.6g}: a difference of {worst:.1e} of its root mean square, "
      f"{allowed:.0e} allowed. This machine or version computes differently, or config.json was "
      "edited."
    )
  return worst


def write(fingerprint: Fingerprint, folder: Path) -> None:
  """Writes a fingerprint into a bundle."""
  write_json(folder / FILE, dataclasses.asdict(fingerprint), indent=1)


def read(folder: Path) -> Fingerprint | None:
  """Reads the fingerprint of a bundle; None if there is none, ValueError if it is damaged."""
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
  """The image: a red disc on gradients and stripes."""
  height, width = IMAGE
  y, x = np.indices(IMAGE)
  stripes = (7 * x + 13 * y) % 64 + 96
  image = np.stack([x * 255 // width, y * 255 // height, stripes], axis=-1)
  image[(x - CENTER[0]) ** 2 + (y - CENTER[1]) ** 2 < 50**2] = 220, 40, 30
  return image.astype(np.uint8)


def _statistics(array: np.ndarray) -> list[float]:
  values = array.astype(np.float64).reshape(-1)
  ramp = np.linspace(0, 1, values.size)
  found = values.mean(), np.sqrt(np.mean(values**2)), np.mean(values * ramp)
  return [float(f"{value:.8g}") for value in found]
