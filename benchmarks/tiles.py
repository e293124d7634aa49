"""Segments a mosaic of scenes with known masks in windows, and compares it with the single scenes.

`python benchmarks/tiles.py --out benchmarks/results` composes an image of 12,000 x 9,000 pixels of
750 scenes, segments it with `Sam3.segment_tiled` in a process of its own, and reports

- identity: found objects on a seam, a line on which windows end, that have exactly one instance;
  of all of them, and of those that have one instance in their scene too, since the model finds
  parts of some objects in any image;
- duplicates: pairs of instances with an IoU of more than 0.5;
- mean IoU over all objects (0 for an object without instance), beside that of the same scenes
  segmented one by one;
- peak memory of the process;
- CPU time per window, beside that of the same windows as separate images.

Scenes are 400 x 360 pixels and windows 400 x 400, so that objects have the size in a window that
they have in a scene. `--columns 5 --rows 4` is a short form.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from timing import machine, peak_memory

from sam3_jax import Sam3, read_image
from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.scenes import compose
from sam3_jax.inputs.tiling import Tiling
from sam3_jax.outputs.coco_json import entries
from sam3_jax.outputs.column_runs import ColumnRuns
from sam3_jax.outputs.rle import runs

Image.MAX_IMAGE_PIXELS = None

HEIGHT, WIDTH = 360, 400  # of a scene
SEED = 2509
FOUND = 0.5  # IoU of an instance that finds an object
INSIDE = 0.5  # fraction of an instance's pixels on an object that counts as its instance
SAMPLE = 48  # windows whose time is compared


class Thing(NamedTuple):
  """An object of the mosaic.

  Attributes:
    phrase: that asks for it.
    cell: number of its scene.
    runs: its visible mask over the mosaic.
  """

  phrase: str
  cell: int
  runs: ColumnRuns


def main() -> None:
  arguments = _arguments()
  work = arguments.work
  work.mkdir(parents=True, exist_ok=True)
  if arguments.step == "segment":
    segment(work, arguments)
    return
  chosen = compose_mosaic(work, arguments)
  options = [f"--{name}={getattr(arguments, name)}" for name in ("work", "tile", "overlap")]
  subprocess.run([sys.executable, __file__, "--step=segment", *options], check=True)
  found = json.loads((work / "found.json").read_text())
  things = read_things(work)
  windows = Tiling(arguments.tile, arguments.overlap).windows(*found["size"])
  model = Sam3.from_checkpoint("sam3-tiny")
  tiled = {phrase: masks_of(rows) for phrase, rows in found["instances"].items()}
  pixels = read_image(work / "mosaic.jpg")
  single = segment_scenes(model, pixels, things, arguments.columns)
  record = {
    "machine": machine(),
    "image": found["size"][::-1],
    "scenes": arguments.columns * arguments.rows,
    "phrases": chosen,
    "tile": arguments.tile,
    "overlap": arguments.overlap,
    "windows": len(windows),
    "objects": score(things, tiled, single, windows),
    "peak_memory_mb": round(found["peak_memory"] / 1e6),
    "seconds": found["seconds"],
    "throughput": compare_times(model, pixels, chosen, arguments),
  }
  print(json.dumps(record, indent=1))
  if arguments.out:
    (arguments.out / "tiles.json").write_text(json.dumps(record, indent=1) + "\n")
    (arguments.out / "tiles.md").write_text(report(record))


def report(record: dict[str, Any]) -> str:
  """The figures as a table."""
  objects, times = record["objects"], record["throughput"]
  rows = [
    ("objects; on a seam", f"{objects['objects']}; {objects['on_seams']}", ""),
    ("found, %", objects["found"], objects["found_single"]),
    ("mean IoU of all objects", objects["mean_iou"], objects["mean_iou_single"]),
    ("mean IoU of objects that both find", objects["mean_iou_found_by_both"],
     objects["mean_iou_single_found_by_both"]),
    ("objects with several instances", objects["several_instances"],
     objects["several_instances_single"]),
    ("pairs of instances with an IoU over 0.5", objects["duplicates"],
     objects["duplicates_single"]),
    ("one identity, found objects on a seam, %", objects["one_identity_on_seams"], ""),
    (f"the same, {objects['found_on_seams_once_in_scene']} objects with one instance in their "
     "scene, %", objects["one_identity_on_seams_once_in_scene"], ""),
    ("CPU seconds per window; the same windows as separate images", f"{times['tiled']:.3f}",
     f"{times['separate']:.3f}"),
    ("peak memory of the process, MB", record["peak_memory_mb"], ""),
  ]  # fmt: skip
  width, height = record["image"]
  return (
    f"sam3-tiny, an image of {width:,} x {height:,} pixels composed of {record['scenes']} scenes, "
    f"{record['windows']:,} windows of {record['tile']} pixels with an overlap of "
    f"{record['overlap']}, phrases {', '.join(record['phrases'])}, threshold 0.5; with other work "
    f"on the machine; {record['machine']}.\n\n| | in windows | scenes one by one |\n|---|---|---|\n"
    + "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)
  )


def compose_mosaic(work: Path, arguments: argparse.Namespace) -> list[str]:
  """Writes the image and its objects; returns the phrases: those with most objects."""
  columns, rows = arguments.columns, arguments.rows
  size = rows * HEIGHT, columns * WIDTH
  pixels, items = np.empty((*size, 3), np.uint8), []
  for cell in range(rows * columns):
    scene = compose(np.random.default_rng([SEED, cell]), size=(HEIGHT, WIDTH))
    y, x = cell // columns * HEIGHT, cell % columns * WIDTH
    pixels[y : y + HEIGHT, x : x + WIDTH] = scene.image
    items += [(item.concept, cell, ColumnRuns.of_mask(item.mask, size, (x, y)))
              for item in scene.objects]  # fmt: skip
  Image.fromarray(pixels).save(work / "mosaic.jpg", quality=95)
  counts = Counter(concept for concept, _, _ in items)
  concepts = [concept for concept, _ in counts.most_common(arguments.phrases)]
  phrases = {concept: drawings.concepts()[concept].phrases[0] for concept in concepts}
  things = [
    {"phrase": phrases[concept], "cell": cell, "segmentation": mask.rle()}
    for concept, cell, mask in items
    if concept in phrases
  ]
  (work / "things.json").write_text(json.dumps({"phrases": [*phrases.values()], "things": things}))
  return [*phrases.values()]


def segment(work: Path, arguments: argparse.Namespace) -> None:
  """Segments the mosaic; runs in a process of its own, whose memory is measured."""
  phrases = json.loads((work / "things.json").read_text())["phrases"]
  model = Sam3.from_checkpoint("sam3-tiny")
  start = time.perf_counter()
  found = model.segment_tiled(
    work / "mosaic.jpg", phrases, tile=arguments.tile, overlap=arguments.overlap
  )
  seconds = time.perf_counter() - start
  size = found[0].masks.size
  rows = {phrase: entries(one, size) for phrase, one in zip(phrases, found, strict=True)}
  record = {"size": size, "seconds": seconds, "peak_memory": peak_memory(), "instances": rows}
  (work / "found.json").write_text(json.dumps(record))


def read_things(work: Path) -> list[Thing]:
  rows = json.loads((work / "things.json").read_text())["things"]
  return [Thing(row["phrase"], row["cell"], as_runs(row["segmentation"])) for row in rows]


def masks_of(rows: list[dict[str, Any]]) -> list[ColumnRuns]:
  return [as_runs(row["segmentation"]) for row in rows]


def as_runs(rle: dict[str, Any]) -> ColumnRuns:
  """COCO's run lengths as runs that end with their column."""
  size = tuple(rle["size"])
  edges = np.cumsum(runs(rle))
  starts, stops = edges[:-1:2], edges[1::2]
  if len(starts) and (starts // size[0] != (stops - 1) // size[0]).any():
    raise SystemExit("a mask of a whole column: the measure does not split its runs")
  return ColumnRuns(size, starts, stops)


def segment_scenes(
  model: Sam3, pixels: np.ndarray, things: list[Thing], columns: int
) -> dict[str, list[ColumnRuns]]:
  """The instances of each phrase in the scenes that contain it, each scene alone."""
  wanted: dict[int, list[str]] = {}
  for thing in things:
    if thing.phrase not in wanted.setdefault(thing.cell, []):
      wanted[thing.cell].append(thing.phrase)
  found: dict[str, list[ColumnRuns]] = {}
  for cell, phrases in wanted.items():
    y, x = cell // columns * HEIGHT, cell % columns * WIDTH
    embedding = model.encode(pixels[y : y + HEIGHT, x : x + WIDTH])
    for phrase, one in zip(phrases, model.decode(embedding, phrases).instances(), strict=True):
      size = pixels.shape[0], pixels.shape[1]
      masks = [ColumnRuns.of_mask(one.masks[i], size, (x, y)) for i in range(len(one))]
      found.setdefault(phrase, []).extend(masks)
  return found


def score(
  things: list[Thing],
  tiled: dict[str, list[ColumnRuns]],
  single: dict[str, list[ColumnRuns]],
  windows: list[Any],
) -> dict[str, Any]:
  """The figures of the objects."""
  seams_x = {edge for window in windows for edge in (window.x0, window.x1)}
  seams_y = {edge for window in windows for edge in (window.y0, window.y1)}
  rows = []
  for thing in things:
    x0, y0, x1, y1 = thing.runs.box
    seam = any(x0 < x < x1 for x in seams_x) or any(y0 < y < y1 for y in seams_y)
    rows.append((seam, *matches(thing, tiled), *matches(thing, single)))
  seam, iou, count, iou_single, count_single = np.array(rows).T
  found, found_single = iou >= FOUND, iou_single >= FOUND
  on_seam, both = found & (seam > 0), found & found_single
  once = on_seam & (count_single == 1)
  return {
    "objects": len(rows),
    "on_seams": int(seam.sum()),
    "found": percent(found),
    "found_single": percent(found_single),
    "found_on_seams": int(on_seam.sum()),
    "one_identity_on_seams": percent(count[on_seam] == 1),
    "found_on_seams_once_in_scene": int(once.sum()),
    "one_identity_on_seams_once_in_scene": percent(count[once] == 1),
    "several_instances": int((count > 1).sum()),
    "several_instances_single": int((count_single > 1).sum()),
    "duplicates": sum(map(duplicates, tiled.values())),
    "duplicates_single": sum(map(duplicates, single.values())),
    "mean_iou": percent(iou),
    "mean_iou_single": percent(iou_single),
    "mean_iou_found_by_both": percent(iou[both]),
    "mean_iou_single_found_by_both": percent(iou_single[both]),
    "instances": sum(map(len, tiled.values())),
  }


def percent(values: np.ndarray) -> float | None:
  return round(100 * float(values.mean()), 2) if len(values) else None


def duplicates(masks: list[ColumnRuns]) -> int:
  """The number of pairs with an IoU of more than 0.5."""
  count = 0
  boxes = np.array([mask.box for mask in masks]).reshape(-1, 4)
  for i, mask in enumerate(masks):
    later = boxes[i + 1 :]
    near = (later[:, :2] < boxes[i, 2:]).all(axis=1) & (boxes[i, :2] < later[:, 2:]).all(axis=1)
    for k in np.flatnonzero(near):
      other = masks[i + 1 + k]
      both = mask.shared(other)
      count += both > 0.5 * (mask.area + other.area - both)
  return count


def matches(thing: Thing, found: dict[str, list[ColumnRuns]]) -> tuple[float, int]:
  """The best IoU of an object, and the number of its instances."""
  best, count = 0.0, 0
  x0, y0, x1, y1 = thing.runs.box
  for mask in found.get(thing.phrase, []):
    u0, v0, u1, v1 = mask.box
    if u0 < x1 and x0 < u1 and v0 < y1 and y0 < v1:
      both = thing.runs.shared(mask)
      best = max(best, both / (thing.runs.area + mask.area - both))
      count += both > INSIDE * mask.area
  return best, count


def compare_times(
  model: Sam3, pixels: np.ndarray, phrases: list[str], arguments: argparse.Namespace
) -> dict[str, float]:
  """CPU seconds per window of `segment_tiled`, and of the same windows as separate images."""
  side = arguments.tile
  step = side - int(side * arguments.overlap)
  region = pixels[: side + 5 * step, : side + 7 * step]
  windows = Tiling(side, arguments.overlap).windows(*region.shape[:2])[:SAMPLE]
  region = region[: windows[-1].y1]
  text = model.encode_text(phrases)

  def separate() -> None:
    for first in range(0, len(windows), 4):
      images = [region[w.y0 : w.y1, w.x0 : w.x1] for w in windows[first : first + 4]]
      embedding, n = model.encode(images), len(images)
      found = model.decode(
        embedding, phrases * n, np.repeat(np.arange(n), len(phrases)).tolist(),
        text=text[np.tile(np.arange(len(phrases)), n)], min_score=0.5,
      )  # fmt: skip
      for one in found.instances():
        entries(one, one.masks.size)

  def tiled() -> None:
    for one in model.segment_tiled(region, phrases, tile=side, overlap=arguments.overlap):
      entries(one, one.masks.size)

  seconds: dict[Any, list[float]] = {separate: [], tiled: []}
  for _ in range(4):
    for function, measured in seconds.items():
      start = time.process_time()
      function()
      measured.append(time.process_time() - start)
  alone, windowed = (statistics.median(values[1:]) / len(windows) for values in seconds.values())
  return {"windows": len(windows), "separate": alone, "tiled": windowed, "ratio": windowed / alone}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
  parser.add_argument("--columns", type=int, default=30, help="scenes side by side")
  parser.add_argument("--rows", type=int, default=25, help="scenes one below the other")
  parser.add_argument("--phrases", type=int, default=4, help="phrases, those with most objects")
  parser.add_argument("--tile", type=int, default=WIDTH)
  parser.add_argument("--overlap", type=float, default=0.5)
  parser.add_argument("--work", type=Path, default=Path("tiles-work"), help="directory for files")
  parser.add_argument("--out", type=Path, help="directory of the record")
  parser.add_argument("--step", choices=("all", "segment"), default="all", help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  main()
