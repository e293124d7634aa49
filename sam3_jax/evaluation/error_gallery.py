"""An HTML page of the worst pairs, with ground truth and predictions side by side."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.evaluation.cgf1 import PairCounts
from sam3_jax.evaluation.predictions import EvalPrediction
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
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem;
  color: #eee; background: #16161a; }}
section {{ margin: 2.5rem 0; }}
figure {{ display: inline-block; width: 48%; margin: 0 1% 0 0; vertical-align: top; }}
img {{ width: 100%; }}
small, figcaption {{ color: #999; }}
</style>
<h1>{title}</h1>
<p>{text}</p>
{sections}
</html>
"""
_TEXT = """The pairs with the lowest F1 (mean over IoU 0.50 to 0.95) of {pairs}, worst first; among
equals, those with more errors first. Predictions with a score of at least {score:g} count."""
_SECTION = """<section>
<h2>{rank}. {phrase}</h2>
<p>F1 {f1:.0f} %: {found} predictions, {truths} objects, {matched} matches at IoU 0.50.
<small>{file}, pair {id}</small></p>
<figure><img src="{truth}" alt=""><figcaption>ground truth</figcaption></figure>
<figure><img src="{prediction}" alt=""><figcaption>prediction</figcaption></figure>
</section>"""


def html_page(title: str, text: str, sections: Sequence[str]) -> Write:
  """A page of sections, for `coco_json.write`; texts are HTML."""
  page = _PAGE.format(title=title, text=text, sections="\n".join(sections))
  return lambda file: file.write(page.encode())


def sort_key(pair: PairCounts) -> tuple[float, int]:
  """Sorts pairs worst first: by the mean F1 of the pair, then by its errors at IoU 0.5."""
  return float(pair.f1.mean()), 2 * int(pair.matched[0]) - pair.truths - pair.found


def page(
  worst: Sequence[tuple[Pair, PairCounts]],
  found: Mapping[int, Sequence[EvalPrediction]],
  images: Path,
  folder: Path,
  *,
  pairs: int,
  score: float,
) -> dict[Path, Write]:
  """The files of the page, for `coco_json.write`: index.html, and two images per pair, which are
  drawn when they are written.

  Args:
    worst: the worst pairs with their counts, worst first.
    found: predictions by pair id.
    images: the directory of the file names of the pairs.
    folder: output directory of the page.
    pairs: number of all pairs.
    score: minimum score of a prediction, inclusive.
  """
  files, sections = {}, []
  for rank, (pair, counts) in enumerate(worst, start=1):
    truth, prediction = f"{rank:03d}-truth.jpg", f"{rank:03d}-prediction.jpg"
    kept = [prediction for prediction in found.get(pair.id, ()) if prediction.score >= score]
    files[folder / truth] = _drawing(
      pair, [target for target in pair.objects if not target.crowd], images
    )
    files[folder / prediction] = _drawing(pair, kept, images)
    sections.append(
      _SECTION.format(
        rank=rank,
        phrase=html.escape(pair.phrase),
        f1=100 * counts.f1.mean(),
        found=counts.found,
        truths=counts.truths,
        matched=counts.matched[0],
        file=html.escape(pair.file_name),
        id=pair.id,
        truth=truth,
        prediction=prediction,
      )
    )
  text = _TEXT.format(pairs=pairs, score=score)
  files[folder / "index.html"] = html_page("Worst pairs", text, sections)
  return files


def _drawing(pair: Pair, objects: Sequence[Object | EvalPrediction], images: Path) -> Write:
  def write(file) -> None:
    image = overlay(read_image(images / pair.file_name), [_instances(pair, objects)], [""])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    file.write(buffer.getvalue())

  return write


def _instances(pair: Pair, objects: Sequence[Object | EvalPrediction]) -> Instances:
  """Objects as instances, with masks as logits of the size of the image."""
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
