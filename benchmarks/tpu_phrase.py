"""Estimates the time of a frame on a TPU on which a phrase is detected and its objects are
tracked, by compiling ahead of time.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_phrase.py --target v6e --out benchmarks/results

Adds up parts, as `tpu_parts.py` does: encoding a frame and detecting a phrase from its results in
`--out` (four prompts a program), and the parts of `video_parts`. Objects take the slots of the next
bucket; memory attention skips free slots, other parts do not. A part that was compiled before is
read from the results in `--out`, so that a rerun resumes. What the host does is not included.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import chips
import tpu_parts

OBJECTS = 1, 5, 10, 64
SHARED = "second neck", "memory attention: first self-attention"  # of all objects of a frame
ATTENTION = (
  "memory attention: self-attention", "memory attention: cross-attention",
  "memory attention: MLP", "memory attention: norms",
)  # fmt: skip
BY_SLOT = (
  "mask decoder and pointer",
  "memory encoder, with competing masks",
  "bank: gather",
  "bank: write",
)
ROWS = {
  "encode": "encode the frame, for detector and tracker",
  "detect": "detect the phrase",
  "attention": "memory attention",
  "decode": "mask decoder and pointers",
  "memory": "memories",
  "bank": "read and write the bank",
}


def main() -> int:
  arguments = _arguments()
  chips.describe()
  import jax
  import timing
  import video_parts

  from sam3_jax.inference.video.bank import bucket

  path = arguments.out / f"tpu-phrase-{arguments.target}.json"
  known = json.loads(path.read_text())["parts"] if path.exists() else {}

  def seconds(name: str, slots: int) -> float:
    """Of one run of a part."""
    key = f"{name}, {slots} slots"
    if key not in known:
      arguments.objects = slots
      names = [part.name for part in video_parts.parts(slots)]
      known[key] = tpu_parts.in_a_process(names.index(name), arguments)
      print(f"{key}: {1e3 * known[key]['seconds']:.3f} ms, {known[key]['grade']}", flush=True)
      path.write_text(json.dumps({"parts": known}, indent=1) + "\n")
    return known[key]["seconds"]

  image = json.loads((arguments.out / f"tpu-{arguments.target}.json").read_text())
  layers, first = video_parts.VIDEO.layers, video_parts.parts(1)
  runs = {part.name: part.times for part in first}
  shared = {name: seconds(name, 1) for name in SHARED}
  attention = sum(runs[name] * seconds(name, 1) for name in ATTENTION)
  frames = {}
  for objects in arguments.counts:
    decode, memory, *bank = (seconds(name, bucket(objects)) for name in BY_SLOT)
    frames[objects] = {
      "encode": image["sums"]["encode"] + shared[SHARED[0]],
      "detect": image["sums"]["decode"] / arguments.prompts,
      "attention": shared[SHARED[1]] + objects * attention,
      "decode": decode,
      "memory": memory,
      "bank": sum(bank),
    }
  report = {
    "what": f"{arguments.target}, bfloat16; a frame with one phrase, {layers} layers of memory "
    f"attention to {video_parts.VIDEO.memories} memories",
    "versions": f"jax {jax.__version__} on {timing.machine()}",
    "frames": frames,
    "parts": known,
  }
  path.write_text(json.dumps(report, indent=1) + "\n")
  text = markdown(report)
  path.with_suffix(".md").write_text(text + "\n")
  print(text)
  return 0


def markdown(report: dict[str, Any]) -> str:
  """A table of milliseconds, and frames per second."""
  frames = report["frames"]
  grades = {name.split(", ")[0]: part["grade"] for name, part in report["parts"].items()}
  lines = [
    f"{report['what']}; {report['versions']}. Grades: "
    f"{', '.join(f'{name} {grade}' for name, grade in grades.items())}.",
    "",
    f"| ms, by objects | {' | '.join(map(str, frames))} |",
    "|---" * (1 + len(frames)) + "|",
  ]
  for part, name in ROWS.items():
    lines.append(f"| {name} | {' | '.join(f'{1e3 * x[part]:.1f}' for x in frames.values())} |")
  totals = [sum(x.values()) for x in frames.values()]
  lines.append(f"| **all** | {' | '.join(f'**{1e3 * total:.1f}**' for total in totals)} |")
  lines.append(f"| frames per second | {' | '.join(f'{1 / total:.1f}' for total in totals)} |")
  return "\n".join(lines)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v6e")
  parser.add_argument(
    "--counts", type=int, nargs="+", default=OBJECTS, metavar="N",
    help="numbers of objects (default: 1 5 10 64)",
  )  # fmt: skip
  parser.add_argument(
    "--limit", type=int, default=300,
    help="time limit of the finer grade, in seconds per part; 1 for the coarser grade",
  )  # fmt: skip
  parser.add_argument(
    "--out", type=Path, default=Path(__file__).parent / "results",
    help="output directory, with the results of tpu_parts.py (default: benchmarks/results)",
  )  # fmt: skip
  # What `tpu_parts` takes besides.
  parser.set_defaults(video=True, plain=False, prompts=4, objects=1)
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
