"""Shows where the time of a frame goes when sam3-tiny tracks phrases, on this machine.

  python benchmarks/video_profile.py
  python benchmarks/video_profile.py --phrase ladybug --frames 24 --out benchmarks/results

Tracks the sample video of the documentation twice; the first pass compiles. Each program is waited
for, so that its time is its own. CPU time is that of all threads, which other work on the machine
affects less than the time that passes.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from timing import machine
from video_sides import PARTS, Stopwatch

from sam3_jax import Sam3

VIDEO = Path(__file__).parents[1] / "docs" / "moving_scene.mp4"


def main() -> int:
  arguments = _arguments()
  model = Sam3.from_checkpoint("sam3-tiny", dtype="float32")
  watch, programs = Stopwatch(jax.block_until_ready), model.video_programs
  watch.watch(programs, "encode_both", "encode")
  watch.watch(model, "decode", "detect")
  watch.watch(programs, "propagate", "track")
  for name in ("memorize_found", "remember"):
    watch.watch(programs, name, "memory")

  def track() -> list[int]:
    """The number of objects on each frame."""
    found = model.track(VIDEO, arguments.phrase, stop=arguments.frames)
    return [len(frame.instances) for frame in found]

  track()
  watch.seconds.clear()
  watch.processor.clear()
  start, processor = time.perf_counter(), time.process_time()
  objects = track()
  totals = {"seconds": time.perf_counter() - start, "processor": time.process_time() - processor}
  report: dict[str, Any] = {
    "machine": machine(), "phrases": arguments.phrase, "objects": objects,
    "fps": len(objects) / totals["seconds"],
  }  # fmt: skip
  for kind, total in totals.items():
    parts = {name: getattr(watch, kind).get(name, 0) for name in PARTS}
    parts |= {"host": total - sum(parts.values()), "all": total}
    report[kind] = {name: 1e3 * x / len(objects) for name, x in parts.items()}
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "video-profile.md").write_text(text + "\n")
    (arguments.out / "video-profile.json").write_text(json.dumps(report, indent=1) + "\n")
  return 0


def markdown(report: dict[str, Any]) -> str:
  """A table of the parts, in milliseconds per frame."""
  objects, processor = report["objects"], report["processor"]
  lines = [
    f"Machine: {report['machine']}. sam3-tiny, float32, phrases {', '.join(report['phrases'])}, "
    f"{len(objects)} frames with {min(objects)} to {max(objects)} objects; "
    f"{report['fps']:.2f} frames per second.",
    "",
    "| part | ms of a frame | CPU ms | share of the CPU time |",
    "|---|---|---|---|",
  ]
  for name, passed in report["seconds"].items():
    share = processor[name] / processor["all"]
    lines.append(f"| {name} | {passed:.1f} | {processor[name]:.1f} | {share:.0%} |")
  return "\n".join(lines)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--phrase", action="append", help="may be repeated (default: red apple, ladybug)"
  )
  parser.add_argument("--frames", type=int, default=12, help="number of frames (default: 12)")
  parser.add_argument("--out", type=Path, help="output directory of video-profile.md and .json")
  arguments = parser.parse_args()
  arguments.phrase = arguments.phrase or ["red apple", "ladybug"]
  return arguments


if __name__ == "__main__":
  sys.exit(main())
