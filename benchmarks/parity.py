"""Compares the outputs of sam3-jax and transformers on one photograph, at full size.

  pip install -e ".[reference]"
  python benchmarks/parity.py                 # 860 M parameters: 11 GB of disk, 24 GB of memory
  python benchmarks/parity.py --size tiny     # the same path in a minute or two

Converts a checkpoint of seeded weights in the layout of the release for transformers. Then each
side decodes text, box and text + box prompts, and in float32 points, boxes and a mask. The sides
run in processes of their own, one after the other. The exit status is 1 if a difference exceeds its
limit.

Both sides get the same token ids. Where transformers differs from Meta's released code, with which
the weights were trained and which we follow, it is patched from outside: its trunk's LayerNorm
epsilon is 1e-5 in config.json, and a prompt without boxes has one padding box, without which
transformers omits the class token. transformers clamps presence logits to +-10 and Meta does not:
ours are clamped for the comparison. Its tracker adds the "no memory" embedding to a map that is not
read; the patch adds it where Meta does.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from timing import machine

HERE = Path(__file__).parent
PHOTO = "coffee"  # of scikit-image: 600 x 400 pixels, a cup on a saucer and a spoon
CUP, SPOON = [165, 65, 435, 325], [440, 110, 575, 300]  # x0, y0, x1, y1
PROMPTS = {
  "text": {"text": "coffee cup"},
  "box": {"boxes": [CUP]},
  "text + box": {"text": "coffee cup", "boxes": [CUP]},
  "text + box + negative box": {"text": "cup", "boxes": [CUP, SPOON], "box_labels": [1, 0]},
}
INSIDE, OUTSIDE = [300, 190], [510, 200]  # a pixel of the cup, and one of the spoon
GRID = [[x, y] for y in range(50, 400, 100) for x in range(37, 600, 75)]
# One call each. `mask` is the best mask of the first prompt of the named kind.
VISUAL = {
  "a point": [{"points": [INSIDE]}],
  "3 points": [{"points": [INSIDE, [250, 120], OUTSIDE], "point_labels": [1, 1, 0]}],
  "a box": [{"box": CUP}],
  "box + point + mask": [{"box": CUP, "points": [OUTSIDE], "point_labels": [0], "mask": "a point"}],
  "32 points, one prompt each": [{"points": [point]} for point in GRID],
}
DTYPES = ("float32", "bfloat16")
MIN_IOU = 0.999
COVERAGE = 0.01, 0.99  # fraction of the image; the IoU of other masks is not meaningful
MIN_COMPARED = 20  # masks, or all queries of a smaller model
CONFIDENT = 1.0  # absolute mask logit; below it, bfloat16 may flip the sign
PRESENCE_CLAMP = 10.0
ERRORS = ("logits", "presence", "boxes", "mask_logits", "semantic_logits", "iou", "object")


def main() -> int:
  arguments = _arguments()
  with tempfile.TemporaryDirectory(prefix="sam3-jax-parity-") as temporary:
    work = (arguments.work or Path(temporary)).resolve()
    outputs = measure(work, arguments)
    report = {
      "size": arguments.size,
      "machine": machine(),
      "limit": arguments.limit,
      "versions": versions(outputs.values()),
      "parity": compare(outputs["ours float32"], outputs["transformers float32"]),
      "visual": compare_visual(outputs["ours float32"], outputs["transformers float32"]),
    }
    if "bfloat16" in arguments.dtypes:
      report["bfloat16"] = {
        side: compare(outputs[f"{side} bfloat16"], outputs[f"{side} float32"])
        for side in ("ours", "transformers")
      }
  faults = [*broken(report["parity"], arguments.limit), *broken(report["visual"], arguments.limit)]
  return conclude(report, markdown(report), faults, arguments.out, f"parity-{arguments.size}")


def conclude(report: dict, text: str, faults: list[str], out: Path | None, name: str) -> int:
  """Prints and writes a report; returns the exit status."""
  print(text)
  if out:
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text + "\n")
    (out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  for fault in faults:
    print(f"over the limit: {fault}", file=sys.stderr)
  return 1 if faults else 0


def prepare(work: Path, arguments: argparse.Namespace) -> tuple[Path, Path]:
  """The directories of the checkpoint in transformers' layout and of its conversion, which are made
  if they are missing."""
  checkpoint, bundle = work / "checkpoint", work / "bundle"
  work.mkdir(parents=True, exist_ok=True)
  if not (checkpoint / "photo.png").exists():
    size, python = arguments.size, arguments.reference_python
    step(python, "reference.py", "make", "--size", size, "--photo", PHOTO, checkpoint)
  if not bundle.exists():
    step(sys.executable, "ours.py", "convert", checkpoint, bundle)
  return checkpoint, bundle


def step(python: str, script: str, *command) -> None:
  """Runs a script of this directory in a process of its own."""
  subprocess.run([python, str(HERE / script), *map(str, command)], check=True)


def measure(work: Path, arguments: argparse.Namespace) -> dict[str, np.lib.npyio.NpzFile]:
  """Runs one process per package and dtype; returns their arrays."""
  checkpoint, bundle = prepare(work, arguments)
  outputs, reference = {}, arguments.reference_python
  for dtype in arguments.dtypes:
    settings, prompts = ("--dtype", dtype), work / f"prompts-{dtype}.json"
    visual = VISUAL if dtype == "float32" else {}
    prompts.write_text(json.dumps({"concepts": PROMPTS, "visual": visual}))
    ours, theirs = work / f"ours-{dtype}.npz", work / f"transformers-{dtype}.npz"
    photo = checkpoint / "photo.png"
    step(sys.executable, "ours.py", "run", bundle, photo, prompts, ours, *settings)
    inputs = ours.with_suffix(".inputs.json")
    step(reference, "reference.py", "run", checkpoint, inputs, theirs, *settings)
    outputs |= {f"ours {dtype}": np.load(ours), f"transformers {dtype}": np.load(theirs)}
  return outputs


def versions(outputs) -> str:
  """The versions of all packages."""
  every = {}
  for output in outputs:
    every |= json.loads(str(output["versions"]))
  return ", ".join(f"{name} {version}" for name, version in every.items())


def compare(got, expected) -> dict[str, dict[str, float]]:
  """Differences for each kind of prompt; relative errors are relative to `expected`."""
  return {kind: _compare(got, expected, kind) for kind in PROMPTS}


def _compare(got, expected, kind: str) -> dict[str, float]:
  def both(name):
    return got[f"{kind}/{name}"], expected[f"{kind}/{name}"]

  def error(name):
    one, other = both(name)
    return float(np.abs(one - other).max())

  def relative(name):
    return error(name) / float(np.abs(expected[f"{kind}/{name}"]).max())

  logits, expected_logits = both("mask_logits")
  pixels, expected_pixels = (np.unpackbits(masks, axis=1).astype(bool) for masks in both("masks"))
  covered = expected_pixels.mean(axis=1)
  compared = (covered >= COVERAGE[0]) & (covered <= COVERAGE[1])
  ious = mask_ious(pixels[compared], expected_pixels[compared])
  confident = np.abs(expected_logits[compared]) > CONFIDENT
  confident_ious = mask_ious(
    (logits[compared] > 0) & confident, (expected_logits[compared] > 0) & confident
  )
  presence = (np.clip(x, -PRESENCE_CLAMP, PRESENCE_CLAMP) for x in both("presence"))
  return {
    "logits": error("logits"),
    "presence": float(np.abs(np.subtract(*presence))),
    "boxes": error("boxes"),
    "mask_logits": relative("mask_logits"),
    "semantic_logits": relative("semantic_logits"),
    "min_iou": float(ious.min(initial=1)),
    "median_iou": float(np.median(ious)) if len(ious) else 1.0,
    "min_confident_iou": float(confident_ious.min(initial=1)),
    "confident_fraction": float(confident.mean()) if confident.size else 0.0,
    "compared": int(compared.sum()),
    "queries": len(compared),
    "coverage": [float(x) for x in np.quantile(covered, (0, 0.5, 1))],
  }


def compare_visual(got, expected) -> dict[str, dict[str, float]]:
  """Differences for each kind of visual prompt; all masks, on the decoder's grid."""
  rows = {}
  for kind in VISUAL:

    def error(name, kind=kind):
      return float(np.abs(got[f"{kind}/{name}"] - expected[f"{kind}/{name}"]).max())

    logits = expected[f"{kind}/mask_logits"]
    ious = mask_ious(
      got[f"{kind}/mask_logits"].reshape(-1, *logits.shape[-2:]) > 0,
      logits.reshape(-1, *logits.shape[-2:]) > 0,
    )
    rows[kind] = {
      "mask_logits": error("mask_logits") / float(np.abs(logits).max()),
      "iou": error("iou"),
      "object": error("object"),
      "min_iou": float(ious.min()),
      "masks": len(ious),
    }
  return rows


def mask_ious(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  """The IoU of each pair of masks; 1 for two empty masks."""
  axes = tuple(range(1, one.ndim))
  union = (one | other).sum(axes)
  return np.where(union > 0, (one & other).sum(axes) / np.maximum(union, 1), 1.0)


def broken(parity: dict[str, dict[str, float]], limit: float):
  """Describes each difference over its limit."""
  for kind, row in parity.items():
    for name in ERRORS:
      if name in row and not row[name] <= limit:  # also catches NaN
        yield f"{kind}: {name} differ by {row[name]:.1e}, limit {limit:.0e}"
    if not row["min_iou"] >= MIN_IOU:
      yield f"{kind}: minimum mask IoU {row['min_iou']:.4f}, limit {MIN_IOU}"
    if "compared" in row and row["compared"] < min(MIN_COMPARED, row["queries"]):
      yield f"{kind}: only {row['compared']} masks cover 1 to 99 % of the image"


def markdown(report: dict) -> str:
  """The tables of the report."""
  least, most = (f"{part:.0%}" for part in COVERAGE)
  lines = [
    f"Machine: {report['machine']}; {report['versions']}. "
    f"IoU of the masks that cover {least} to {most} of the photograph.",
    "",
    f"sam3-jax against transformers, float32 (limits {report['limit']:.0e}, IoU {MIN_IOU}):",
    "",
    *_parity_table(report["parity"]),
    "",
    "Visual prompts, float32 (the same limits; masks on the decoder's grid):",
    "",
    *_visual_table(report["visual"]),
  ]
  for side, rows in report.get("bfloat16", {}).items():
    name = side.replace("ours", "sam3-jax")
    lines += ["", f"bfloat16 against float32, {name}:", "", *_parity_table(rows, confident=True)]
  return "\n".join(lines)


def _parity_table(rows: dict[str, dict], confident: bool = False) -> list[str]:
  head = [
    "prompt",
    "logits",
    "presence",
    "boxes",
    "mask logits, relative",
    "semantic map, relative",
  ]
  head += ["mask IoU, minimum / median"]
  head += [f"minimum IoU where \\|logit\\| > {CONFIDENT:g}"] * confident
  head += ["masks"]
  lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for kind, row in rows.items():
    errors = ("logits", "presence", "boxes", "mask_logits", "semantic_logits")
    cells = [kind, *(f"{row[name]:.1e}" for name in errors)]
    cells += [f"{row['min_iou']:.5f} / {row['median_iou']:.5f}"]
    fraction = f"{row['confident_fraction']:.0%} of the cells"
    cells += [f"{row['min_confident_iou']:.5f} ({fraction})"] * confident
    lines.append(f"| {' | '.join([*cells, str(row['compared'])])} |")
  return lines


def _visual_table(rows: dict[str, dict]) -> list[str]:
  head = "visual prompt", "mask logits, relative", "IoU scores", "object logits", "minimum mask IoU"
  lines = [f"| {' | '.join(head)} | masks |", "|---" * (len(head) + 1) + "|"]
  for kind, row in rows.items():
    errors = " | ".join(f"{row[name]:.1e}" for name in ("mask_logits", "iou", "object"))
    lines.append(f"| {kind} | {errors} | {row['min_iou']:.5f} | {row['masks']} |")
  return lines


def options(description: str | None, name: str) -> argparse.ArgumentParser:
  """The common options of the comparisons; `name` is that of the results."""
  parser = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", choices=("full", "tiny"), default="full")
  parser.add_argument(
    "--reference-python", default=sys.executable, help="interpreter with the extra `reference`"
  )
  parser.add_argument(
    "--work", type=Path, help="directory that keeps the checkpoint and the bundle for the next run"
  )
  parser.add_argument("--out", type=Path, help=f"output directory of {name}.md and {name}.json")
  return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
  """Parses the command line, and checks the options of `options`."""
  arguments = parser.parse_args()
  if shutil.which(arguments.reference_python) is None:
    parser.error(f"--reference-python {arguments.reference_python} cannot be run")
  return arguments


def _arguments() -> argparse.Namespace:
  parser = options(__doc__, "parity-SIZE")
  parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
  parser.add_argument(
    "--limit", type=float, default=1e-3, help="limit on the differences in float32"
  )
  arguments = parse(parser)
  if "float32" not in arguments.dtypes:
    parser.error("--dtypes must include float32, to which the others are compared")
  return arguments


if __name__ == "__main__":
  sys.exit(main())
