"""Compares how fast sam3-jax and transformers track the objects of a phrase, on this machine.

  pip install -e ".[reference]"
  python benchmarks/video_speed.py --out benchmarks/results                # 860 M parameters
  python benchmarks/video_speed.py --size tiny --out benchmarks/results    # the same path, quickly

The checkpoint is that of `parity.py`, with seeded weights; `--work` may name the same directory.
The frames are crops of a photograph that move across it. Each side has a process of its own, and
they take turns, frame by frame. The threshold of the scores lies below the third score
of the first frame, and the other rules neither add nor remove objects, so that each side tracks
three objects. The first two frames, in which programs are compiled, are not counted.

transformers runs without patches: without the package `kernels` it leaves small holes in masks, so
sam3-jax leaves them, too. Both yield masks on the decoder's grid. Seconds are also given as CPU
time of all threads, which other work on the machine affects less.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from parity import HERE, conclude, options, parse, prepare
from parity_video import crops
from PIL import Image
from timing import machine
from video_sides import OBJECTS, PARTS

PHRASE = "coffee cup"
WARM = 2  # frames
MEMORIES = 7  # that a frame reads at most
SIDES = "sam3-jax", "transformers"


class Side:
  """A process that tracks a frame for each call of `track`.

  Attributes:
    about: its first line.
    rows: what it reported of each frame.
  """

  def __init__(self, python: str, script: str, *command: Any):
    self._process = subprocess.Popen(
      [python, str(HERE / script), *map(str, command)],
      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    self._script, self.about = script, self._read()
    self.rows: list[dict[str, Any]] = []

  def track(self) -> None:
    """Lets the side track a frame, and waits for it."""
    if self._process.poll() is None and self._process.stdin:
      self._process.stdin.write("\n")
      self._process.stdin.flush()
    self.rows.append(self._read())

  def close(self) -> None:
    self._process.kill()
    self._process.wait()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline() if self._process.stdout else ""
    if not line:
      raise SystemExit(f"{self._script} failed.")
    return json.loads(line)


def main() -> int:
  name = "video-speed-SIZE-DTYPE"
  parser = options(__doc__, name)
  parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  parser.add_argument("--frames", type=int, default=4, help="frames that count (default: 4)")
  arguments = parse(parser)
  if not 1 <= arguments.frames <= 12:
    parser.error(f"--frames must be 1 to 12; got {arguments.frames}.")
  with tempfile.TemporaryDirectory(prefix="sam3-jax-speed-") as temporary:
    sides = measure((arguments.work or Path(temporary)).resolve(), arguments)
  report = summary(sides, arguments.size, arguments.dtype)
  name = f"video-speed-{arguments.size}-{arguments.dtype}"
  return conclude(report, markdown(report), list(faults(report)), arguments.out, name)


def measure(work: Path, arguments: Any) -> list[Side]:
  """Runs both sides in turns, ours first."""
  checkpoint, bundle = prepare(work, arguments)
  photo = np.asarray(Image.open(checkpoint / "photo.png").convert("RGB"))
  count = WARM + arguments.frames
  moving = crops(photo, 5)  # there and back; the last one is only encoded
  order = [abs((t + 4) % 8 - 4) for t in range(count + 1)]
  frames = work / "speed-frames.npy"
  np.save(frames, moving[order])
  common = "--phrase", PHRASE, "--dtype", arguments.dtype
  sides: list[Side] = []
  try:
    ours = Side(sys.executable, "ours_video_speed.py", bundle, frames, *common)
    sides.append(ours)
    tokens = json.dumps(ours.about["tokens"])
    python, script = arguments.reference_python, "reference_video_speed.py"
    sides.append(Side(python, script, checkpoint, frames, *common, "--tokens", tokens))
    for frame in range(count):
      for side in sides if frame % 2 else sides[::-1]:
        side.track()
      times = ", ".join(f"{side.rows[-1]['seconds']:.2f}" for side in sides)
      print(f"frame {frame}: {times} s", file=sys.stderr, flush=True)
  finally:
    for side in sides:
      side.close()
  return sides


def summary(sides: list[Side], size: str, dtype: str) -> dict[str, Any]:
  """Medians of the frames that count."""
  versions: dict[str, str] = {}
  for side in sides:
    versions |= side.about["versions"]
  return {
    "size": size,
    "dtype": dtype,
    "machine": machine(),
    "versions": versions,
    "sides": {name: _medians(side.rows[WARM:]) for name, side in zip(SIDES, sides, strict=True)},
    "frames": {name: side.rows for name, side in zip(SIDES, sides, strict=True)},
  }


def _medians(rows: list[dict[str, Any]]) -> dict[str, Any]:
  found: dict[str, Any] = {"objects": sorted({row["objects"] for row in rows})}
  found["memory"] = max(row["memory"] for row in rows)
  for kind in ("seconds", "processor"):
    found[kind] = statistics.median(row[kind] for row in rows)
    found[f"{kind}_of"] = {
      part: statistics.median(row[f"{kind}_of"][part] for row in rows) for part in (*PARTS, "host")
    }
  return found


def faults(report: dict[str, Any]):
  """Describes a side that does not track the right number of objects."""
  for name, side in report["sides"].items():
    if side["objects"] != [OBJECTS]:
      yield f"{name} tracks {side['objects']} objects, not {OBJECTS}"


def markdown(report: dict[str, Any]) -> str:
  """A table of the parts."""
  ours, theirs = (report["sides"][name] for name in SIDES)
  versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
  count = len(report["frames"][SIDES[0]])
  lines = [
    f"Machine: {report['machine']}; {versions}. Size: {report['size']}, {report['dtype']}.",
    "",
    f"One phrase, {OBJECTS} objects; medians of frames {WARM} to {count - 1}, on which an object "
    f"has {min(WARM, MEMORIES)} to {min(count - 1, MEMORIES)} memories. Both sides take turns, "
    "frame by frame. A ratio above 1 means that sam3-jax is faster.",
    "",
    "| a frame | transformers, s | sam3-jax, s | ratio | transformers, CPU s | sam3-jax, CPU s | "
    "ratio |",
    "|---|---|---|---|---|---|---|",
  ]
  for part in (*PARTS, "host", None):
    cells = []
    for kind in ("seconds", "processor"):
      one, other = (x[kind] if part is None else x[f"{kind}_of"][part] for x in (ours, theirs))
      cells += [f"{other:.3f}", f"{one:.3f}", f"**{other / max(one, 1e-9):.2f}**"]
    lines.append(f"| {part or '**all**'} | {' | '.join(cells)} |")
  memory = " and ".join(f"{side['memory'] / 2**30:.1f} GiB ({name})" for name, side in
                        report["sides"].items())  # fmt: skip
  return "\n".join([*lines, "", f"Peak memory: {memory}."])


if __name__ == "__main__":
  sys.exit(main())
