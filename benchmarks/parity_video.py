"""Compares how sam3-jax and transformers track objects through a few frames, at full size.

  pip install -e ".[reference]"
  python benchmarks/parity_video.py                 # 860 M parameters: 7 GB of disk
  python benchmarks/parity_video.py --size tiny     # the same path in a minute or two

The checkpoint is that of `parity.py`, with seeded weights; `--work` may name the same directory.
The frames are crops of a photograph that move across it. Each side tracks two objects, from a click
and from a box on the first frame, in float32, in a process of its own. All stages of each frame are
compared. Each side continues from its own results, so that errors add up over the frames. The exit
status is 1 if a difference exceeds its limit, or if the sides read different frames.

`reference_video.py` says where transformers' tracker is patched to compute what Meta's code does.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from parity import conclude, mask_ious, options, parse, prepare, step, versions
from PIL import Image
from timing import machine

SIZE = 480, 320  # width and height of the frames
MOTION = 30, 20  # pixels from one frame to the next
PROMPTS = {
  "click": {"points": [[300, 190]], "point_labels": [1]},
  "box": {"box": [165, 65, 435, 315]},
}
RELATIVE = ("encoded", "conditioned", "mask_logits", "pointer", "memory")  # to the largest value
STAGES = {
  "encoded": "encoded frame",
  "conditioned": "after memory attention",
  "mask_logits": "mask logits",
  "iou": "IoU score",
  "object": "object logit",
  "pointer": "object pointer",
  "memory": "memory",
}
# Largest differences of all frames. Ten times as much is allowed.
MEASURED = {
  "tiny": {
    "encoded": 7.2e-7, "conditioned": 7.7e-7, "mask_logits": 1.6e-6, "iou": 1.2e-7,
    "object": 4.8e-7, "pointer": 6.7e-7, "memory": 1.1e-6,
  },
  "full": {
    "encoded": 2.9e-6, "conditioned": 6.4e-6, "mask_logits": 4.4e-6, "iou": 1.8e-7,
    "object": 7.2e-7, "pointer": 7.2e-7, "memory": 3.0e-6,
  },
}  # fmt: skip
MIN_IOU = 0.999
READ = "memories", "pointers"  # the frames that a frame reads
NAME = "parity-video"  # of the results


def main() -> int:
  parser = options(__doc__, NAME)
  parser.add_argument("--frames", type=int, choices=range(1, 6), default=4, help="number of frames")
  arguments = parse(parser)
  with tempfile.TemporaryDirectory(prefix="sam3-jax-parity-") as temporary:
    got, expected = measure((arguments.work or Path(temporary)).resolve(), arguments)
  report = {
    "size": arguments.size,
    "machine": machine(),
    "versions": versions((got, expected)),
    "parity": compare(got, expected),
  }
  faults = list(broken(report["parity"], MEASURED[arguments.size]))
  return conclude(report, markdown(report), faults, arguments.out, NAME)


def measure(work: Path, arguments: argparse.Namespace) -> list[np.lib.npyio.NpzFile]:
  """Runs both sides; returns their arrays, ours first."""
  checkpoint, bundle = prepare(work, arguments)
  frames, prompts = work / "frames.npy", work / "video.json"
  photo = np.asarray(Image.open(checkpoint / "photo.png").convert("RGB"))
  np.save(frames, crops(photo, arguments.frames))
  prompts.write_text(json.dumps(PROMPTS))
  ours, theirs = work / "ours-video.npz", work / "transformers-video.npz"
  step(sys.executable, "ours_video.py", bundle, frames, prompts, ours)
  step(arguments.reference_python, "reference_video.py", checkpoint, frames, prompts, theirs)
  return [np.load(ours), np.load(theirs)]


def crops(photo: np.ndarray, count: int) -> np.ndarray:
  """The frames: crops of a photograph, from its upper left corner on."""
  (width, height), (dx, dy) = SIZE, MOTION
  return np.stack([photo[t * dy : t * dy + height, t * dx : t * dx + width] for t in range(count)])


def compare(got, expected) -> dict[str, list[dict]]:
  """Differences of each object on each frame, and what else the transformers side has there."""
  frames = sum(name.endswith("/encoded") for name in expected)
  return {kind: [_compare(got, expected, kind, t) for t in range(frames)] for kind in PROMPTS}


def _compare(got, expected, kind: str, frame: int) -> dict:
  def pair(stage):
    name = f"{frame}/{stage}" if stage == "encoded" else f"{kind}/{frame}/{stage}"
    return got[name], expected[name]

  def error(stage):
    one, other = pair(stage)
    one = one.reshape(other.shape)
    scale = np.abs(other).max() if stage in RELATIVE else 1
    return float(np.abs(one - other).max() / scale)

  stages = [stage for stage in STAGES if frame > 0 or stage != "conditioned"]
  masks, expected_masks = (logits[None] > 0 for logits in pair("mask_logits"))
  return {stage: error(stage) for stage in stages} | {
    "mask_iou": float(mask_ious(masks, expected_masks)[0]),
    "object_logit": float(pair("object")[1]),
    "coverage": float(expected_masks.mean()),
    "reads": {what: pair(what)[1].tolist() for what in READ if frame > 0},
    "reads_equal": frame == 0 or all(np.array_equal(*pair(what)) for what in READ),
  }


def broken(rows: dict[str, list[dict]], measured: dict[str, float]):
  """Describes each difference over its limit."""
  for kind, frames in rows.items():
    for frame, row in enumerate(frames):
      for stage, usual in measured.items():
        if stage in row and not row[stage] <= 10 * usual:  # also catches NaN
          error, limit = row[stage], 10 * usual
          yield f"{kind}, frame {frame}: {stage} differs by {error:.1e}, limit {limit:.1e}"
      if not row["mask_iou"] >= MIN_IOU:
        yield f"{kind}, frame {frame}: mask IoU {row['mask_iou']:.4f}, limit {MIN_IOU}"
      if not row["reads_equal"]:
        yield f"{kind}, frame {frame}: transformers reads {row['reads']}, sam3-jax does not"


def markdown(report: dict) -> str:
  """The table of the report."""
  relative = ", ".join(STAGES[stage] for stage in RELATIVE)
  head = ["object", "frame", *STAGES.values(), "mask IoU"]
  lines = [
    f"Machine: {report['machine']}; {report['versions']}. Size: {report['size']}.",
    "",
    f"sam3-jax against transformers in Meta's order, float32. Relative to the largest value: "
    f"{relative}. The IoU is that of the masks on the decoder's grid.",
    "",
  ]
  lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
  for kind, frames in report["parity"].items():
    for frame, row in enumerate(frames):
      errors = [f"{row[stage]:.1e}" if stage in row else "-" for stage in STAGES]
      cells = [kind, str(frame), *errors, f"{row['mask_iou']:.5f}"]
      lines.append(f"| {' | '.join(cells)} |")
  return "\n".join(lines)


if __name__ == "__main__":
  sys.exit(main())
