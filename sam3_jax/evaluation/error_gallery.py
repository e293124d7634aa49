"""A page of the pairs that went worst: truth and prediction side by side, to be looked at."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation.concept import Counts
from sam3_jax.evaluation.predictions import Prediction
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.outputs.coco_json import Write
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.rle import decode
from sam3_jax.outputs.visualize import overlay

_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Worst pairs</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #eee; background: #16161a; }}
section {{ margin: 2.5rem 0; }}
figure {{ display: inline-block; width: 48%; margin: 0 1% 0 0; vertical-align: top; }}
img {{ width: 100%; }}
small, figcaption {{ color: #999; }}
</style>
<h1>Worst pairs</h1>
<p>Of {pairs} pairs those with the lowest F1 (mean over overlaps of 0.50 to 0.95), worst first; of
equals, those with more errors. Predictions count from a score of {score:g} on.</p>
{sections}
</html>
"""
_SECTION = """<section>
<h2>{rank}. {phrase}</h2>
<p>F1 {f1:.0f} %: {found} found, {truths} there, {matched} match at an overlap of 0.50.
<small>{file}, pair {id}</small></p>
<figure><img src="{truth}" alt=""><figcaption>truth</figcaption></figure>
<figure><img src="{prediction}" alt=""><figcaption>prediction</figcaption></figure>
</section>"""


def order(pair: Counts) -> tuple[float, int]:
  """Sorts pairs worst first: by the pair's mean F1, then by its errors at an overlap of 0.5."""
  return float(pair.f1.mean()), 2 * int(pair.matched[0]) - pair.truths - pair.found


def page(
  rows: Sequence[tuple[Pair, Counts]],
  found: Mapping[int, Sequence[Prediction]],
  images: Path,
  folder: Path,
  *,
  pairs: int,
  score: float,
) -> dict[Path, Write]:
  """The page's files, for `results.write`: index.html, and two images a pair, drawn as written.

  Args:
    rows: the worst pairs, worst first, with what they gave.
    found: predictions by pair.
    images: the folder that the pairs' file names are below.
    folder: where the files go.
    pairs: of how many these are the worst.
    score: the least at which a prediction counts.
  """
  files, sections = {}, []
  for rank, (pair, got) in enumerate(rows, start=1):
    truth, prediction = f"{rank:03d}-truth.jpg", f"{rank:03d}-prediction.jpg"
    kept = [one for one in found.get(pair.id, ()) if one.score >= score]
    files[folder / truth] = _drawing(pair, [one for one in pair.objects if not one.crowd], images)
    files[folder / prediction] = _drawing(pair, kept, images)
    sections.append(
      _SECTION.format(
        rank=rank,
        phrase=html.escape(pair.phrase),
        f1=100 * got.f1.mean(),
        found=got.found,
        truths=got.truths,
        matched=got.matched[0],
        file=html.escape(pair.file_name),
        id=pair.id,
        truth=truth,
        prediction=prediction,
      )
    )
  text = _PAGE.format(pairs=pairs, score=score, sections="\n".join(sections))
  files[folder / "index.html"] = lambda file: file.write(text.encode())
  return files


def _drawing(pair: Pair, objects: Sequence[Object | Prediction], images: Path) -> Write:
  def write(file) -> None:
    image = overlay(read_image(images / pair.file_name), [_instances(pair, objects)], [""])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    file.write(buffer.getvalue())

  return write


def _instances(pair: Pair, objects: Sequence[Object | Prediction]) -> Instances:
  """As the model's results: masks are logits of the image's own size."""
  masks = np.zeros((len(objects), pair.height, pair.width), np.float32)
  for i, one in enumerate(objects):
    masks[i] = decode(one.rle)
  boxes = np.array([one.box for one in objects], np.float32).reshape(-1, 4)
  boxes[:, 2:] += boxes[:, :2]
  return Instances(
    ids=np.arange(len(objects)),
    scores=np.array([getattr(one, "score", 1) for one in objects], np.float32),
    boxes=boxes,
    masks=Masks(masks - 0.5, (pair.height, pair.width)),
  )
