"""Measures exemplars of other images: pmF1 of concepts, and of exemplar boxes in the same image.

  pip install --no-deps stardist && python benchmarks/nuclei.py nuclei
  python benchmarks/concepts.py --nuclei nuclei/score --out benchmarks/results

An exemplar is the largest object of a pair of image and phrase, as in `sam3-jax evaluate --prompt
box`. The other images are the next ones in the file that show the phrase; for the nuclei, each of
the other tiles in turn. Pairs without objects are in the rows with one other image only, for IL_MCC
and cgF1.

The second table compares what an exemplar can take along to another image:

- its token before it attends to an image, which then attends to the image that is searched (what
  `Sam3.concept` keeps), or the token that has attended to its own image;
- in both, the coordinates of the box, those of a centered box of the same size, or none.

Results are written after each row, and a rerun skips the rows that the file has.
"""

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from timing import machine

from sam3_jax import Concept, Prompt, Sam3
from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Pair
from sam3_jax.evaluation.cgf1 import MetricSums, count_matches
from sam3_jax.evaluation.detect import as_prompt
from sam3_jax.evaluation.predictions import EvalPrediction
from sam3_jax.inputs.prompts import pack
from sam3_jax.model.geometry import GeometryEncoder
from sam3_jax.model.positions import sine_code
from sam3_jax.model.sam3 import Detector
from sam3_jax.outputs.instances import Instances, instances, xywh

SCENES = Path(__file__).parent.parent / "tests" / "scenes"
NAME = "concepts"  # of the files of results
Where = Literal["same", "other", "none"]
Position = Literal["kept", "centered", "none"]


class Row(NamedTuple):
  """What to measure.

  Attributes:
    where: the image of the exemplars: the same one, or others; none for the phrase alone.
    images: the number of images with exemplars.
    phrase: whether the prompt has the phrase, too.
    position: the coordinates of exemplars.
    own: whether exemplars attend to their own image.
  """

  where: Where
  images: int = 1
  phrase: bool = False
  position: Position = "kept"
  own: bool = False

  @property
  def absent(self) -> bool:
    """Whether pairs without objects are included."""
    return self.where == "other" and self.images == 1 and self not in VARIANTS


MAIN = (
  Row("same"), Row("other"), Row("other", 3),
  Row("same", phrase=True), Row("other", phrase=True), Row("other", 3, phrase=True),
  Row("none", phrase=True),
)  # fmt: skip
VARIANTS = tuple(
  Row("other", images, position=position, own=own)
  for images in (1, 3)
  for own in (False, True)
  for position in ("kept", "centered", "none")
  if own or position != "kept"
)


class Data:
  """The pairs of a dataset, and its encoded images."""

  def __init__(self, model: Sam3, folder: Path, turns: int):
    """Encodes all images; `turns` is the number of choices of other images."""
    self.turns = turns
    self.concepts: dict[tuple[str, str, Position], Concept] = {}  # by image, phrase, coordinates
    self.pairs = [
      pair for pair in annotations.read(folder / "annotations.json", negatives=0) if pair.exhaustive
    ]
    self.by_phrase: dict[str, list[Pair]] = collections.defaultdict(list)
    for pair in self.pairs:
      if as_prompt(pair, "box") is not None:
        self.by_phrase[pair.phrase].append(pair)
    names = dict.fromkeys(pair.file_name for pair in self.pairs)
    self.images = {name: model.encode(folder / name) for name in names}

  def cases(self, row: Row) -> Iterator[tuple[Pair, list[Pair]]]:
    """Pairs to search, and the pairs with the exemplars; the same pairs for all rows, except those
    without objects."""
    for pair in self.pairs:
      known = self.by_phrase[pair.phrase]
      start = next((i for i, one in enumerate(known) if one.id >= pair.id), 0)
      others = [p for p in known[start:] + known[:start] if p.file_name != pair.file_name]
      if not others or not (row.absent or pair in known):
        continue
      if row.where != "other":
        yield pair, [pair]
        continue
      for turn in range(min(self.turns, len(others))):
        yield pair, (others[turn:] + others[:turn])[: row.images]


class Bench:
  """A model with the variants of concepts."""

  def __init__(self, model: Sam3):
    self.model, self.detector = model, Detector(model.config, model.dtype)
    self.attended, self.detect = jax.jit(self._attended), jax.jit(self._detect)

  def measure(self, data: Data, row: Row) -> dict[str, float]:
    sums = MetricSums()
    for pair, sources in data.cases(row):
      found = predictions(self._find(data, row, pair, sources), pair)
      sums.add(count_matches(pair.objects, found, "masks", 0.5))
    metrics = sums.metrics()
    kept = {name: metrics[name] for name in ("pmf1", "pmf1_50", "il_mcc", "cgf1")}
    return {"pairs": sums.pairs, "positive_pairs": sums.positives, **kept}

  def _find(self, data: Data, row: Row, pair: Pair, sources: Sequence[Pair]) -> Instances:
    text = pair.phrase if row.phrase else None
    embedding = data.images[pair.file_name]
    if row.where == "none":
      return self.model.decode(embedding, pair.phrase).instances()[0]
    if row.where == "same":
      prompt = dataclasses.replace(exemplar(pair), text=text)
      return self.model.decode(embedding, prompt).instances()[0]
    parts = [self._concept(one, data, row.position) for one in sources]
    if not row.own:
      concept = dataclasses.replace(Concept.join(parts), text=text)
      return self.model.decode(embedding, concept).instances()[0]
    coarse = [data.images[one.file_name].coarse for one in sources]
    prompts = [packed([part], None) for part in parts]
    geometry = [self.attended(*inputs) for inputs in zip(coarse, prompts, strict=True)]
    tokens, valid = (np.concatenate(x, axis=1) for x in zip(*geometry, strict=True))
    encoded = self.model.encode_text(text or "visual")
    found = self.detect(clean(embedding), clean(encoded).replace(tokens=None), tokens, valid)
    return instances(found, 0.5)[0]

  def _concept(self, pair: Pair, data: Data, position: Position) -> Concept:
    """The exemplar of a pair."""
    key = pair.file_name, pair.phrase, position
    if key not in data.concepts:
      data.concepts[key] = self._encoded(pair, data, position)
    return data.concepts[key]

  def _encoded(self, pair: Pair, data: Data, position: Position) -> Concept:
    prompt = exemplar(pair)
    concept = self.model.concept(data.images[pair.file_name], prompt)
    if position == "kept":
      return concept
    ((x0, y0, x1, y1),), scale = prompt.boxes, np.array([pair.width, pair.height] * 2)
    box = np.array([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / scale
    tokens: Any = np.asarray(concept.tokens) - self._coordinates(box)
    if position == "centered":
      tokens += self._coordinates(np.array([0.5, 0.5, *box[2:]]))
    return dataclasses.replace(concept, tokens=tokens.astype(np.float32))

  def _coordinates(self, box: np.ndarray) -> np.ndarray:
    """The part of a token that depends on the coordinates of its box (cxcywh) only."""
    params, half = self.model.params["geometry"], self.model.config.width // 2
    code = [sine_code(box[1], half), sine_code(box[0], half), box[3:], box[2:3]]
    inputs = {"box_project": box, "box_position_project": np.concatenate(code)}
    return sum(
      np.asarray(x) @ np.asarray(params[name]["kernel"]) + np.asarray(params[name]["bias"])
      for name, x in inputs.items()
    )

  def _attended(self, coarse: Any, prompts: Any) -> Any:
    """The tokens of exemplars that have attended to their own image, and a class token."""

    def encode(detector: Detector) -> Any:
      return detector.geometry(coarse, prompts)

    return self.detector.apply({"params": self.model.params}, method=encode)

  def _detect(self, embedding: Any, text: Any, tokens: Any, valid: Any) -> Any:
    """Detects with given tokens in place of those of the geometry encoder."""

    def replace(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
      is_encoder = isinstance(context.module, GeometryEncoder)
      given = is_encoder and context.method_name == "__call__"
      return (tokens, valid) if given else call(*args, **kwargs)

    with nn.intercept_methods(replace):
      params, prompts = {"params": self.model.params}, packed([Prompt("any")], text)
      return self.detector.apply(params, embedding, prompts, method=Detector.detect)


def exemplar(pair: Pair) -> Prompt:
  """The box of the largest object."""
  prompt = as_prompt(pair, "box")
  if prompt is None:
    raise ValueError(f"{pair.file_name} has no {pair.phrase!r}.")
  return prompt


def packed(prompts: Sequence[Any], text: Any) -> Any:
  row = np.zeros(len(prompts), np.int32)
  return pack(prompts, np.ones((len(prompts), 2)), image=row, first_id=row, text=text)


def clean(pytree: Any) -> Any:
  """Without the origin, for which JAX would compile again."""
  return dataclasses.replace(pytree, origin=type(pytree.origin)())


def predictions(found: Instances, pair: Pair) -> list[EvalPrediction]:
  boxes = xywh(found.boxes, (pair.height, pair.width)).tolist()
  return [
    EvalPrediction(float(score), (x, y, w, h), found.masks.rle(i))
    for i, (score, (x, y, w, h)) in enumerate(zip(found.scores, boxes, strict=True))
  ]


def label(row: Row) -> str:
  exemplars = {1: "another image", 3: "up to three other images"}[row.images]
  name = {"same": "a box in the same image", "none": "phrase alone", "other": exemplars}[row.where]
  return f"{name}, with phrase" if row.phrase and row.where != "none" else name


def tables(results: dict[str, dict[str, Any]], where: str) -> str:
  """The results in Markdown."""

  def cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    for dataset in results.values():
      found = dataset.get(json.dumps(row))
      for name in names:
        known = found and (name != "cgf1" or found["pairs"] > found["positive_pairs"])
        yield f"{found[name]:.1f}" if known else ""

  heads = [f"{name}: pmF1 | at 0.5 | cgF1" for name in results]
  lines = [
    f"sam3-tiny; exemplars of one image, used in others; {where}.", "",
    f"| exemplars | {' | '.join(heads)} |", f"|{'---|' * (3 * len(results) + 1)}",
  ]  # fmt: skip
  for row in MAIN:
    values = " | ".join(cells(row, ("pmf1", "pmf1_50", "cgf1")))
    lines.append(f"| {label(row)} | {values} |")
  heads = [f"{name}: pmF1" for name in results]
  lines += [
    "", f"| exemplars | attend to | coordinates | {' | '.join(heads)} |",
    f"|{'---|' * (len(results) + 3)}",
  ]  # fmt: skip
  for row in (Row("other"), *VARIANTS[:5], Row("other", 3), *VARIANTS[5:]):
    image = "their own image" if row.own else "the searched image"
    values = " | ".join(cells(row, ("pmf1",)))
    lines.append(f"| {label(row)} | {image} | {row.position} | {values} |")
  lines += ["", "sam3-tiny has no concept points (`concept_points = false`)."]
  return "\n".join(lines) + "\n"


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--nuclei", type=Path, help="directory of benchmarks/nuclei.py's score/")
  parser.add_argument("--known", type=Path, default=SCENES / "known")
  parser.add_argument("--twemoji", type=Path, default=SCENES / "twemoji")
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--out", type=Path, required=True, help="directory of the results")
  arguments = parser.parse_args()
  folders = {"nuclei": arguments.nuclei, "Twemoji": arguments.twemoji, "known": arguments.known}
  file = arguments.out / f"{NAME}.json"
  results = json.loads(file.read_text())["results"] if file.exists() else {}
  bench = Bench(Sam3.from_checkpoint(arguments.checkpoint, dtype="float32"))
  data: dict[str, Data] = {}
  for rows in (MAIN, VARIANTS):
    for name, row in ((name, row) for name in folders for row in rows):
      folder, done = folders[name], results.setdefault(name, {})
      if folder is None or json.dumps(row) in done:
        continue
      if name not in data:
        data[name] = Data(bench.model, folder, turns=7 if name == "nuclei" else 1)
      found = done[json.dumps(row)] = bench.measure(data[name], row)
      print(name, row, {key: round(value, 1) for key, value in found.items()}, flush=True)
      file.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
  (arguments.out / f"{NAME}.md").write_text(tables(results, machine()))


if __name__ == "__main__":
  main()
