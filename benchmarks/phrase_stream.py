"""Tracks a phrase through a long stream in which objects come and go, and measures memory.

`python benchmarks/phrase_stream.py` is the long form of a test in `tests/test_phrase_stream.py`:
10,000 frames of a small model, whose detections and masks follow a script. It writes resident
memory at frame 1,000 and at the end, programs, and whether an id was given to two objects.
"""

import argparse
import sys
import time
from pathlib import Path

import pytest
from timing import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_phrase_stream

RESULTS = Path(__file__).parent / "results"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--frames", type=int, default=10_000)
  parser.add_argument("--out", type=Path, default=RESULTS, help="directory of phrase-stream.md")
  options = parser.parse_args()
  early, start = options.frames // 10, time.perf_counter()
  with pytest.MonkeyPatch.context() as patch:
    growth, programs, shown = test_phrase_stream.run(patch, options.frames, early)
  seconds = time.perf_counter() - start
  reused = sum(len(ids) != 1 for ids in shown.values())
  compiled = programs[options.frames - 1] - programs[early]
  lines = [
    f"{options.frames:,} frames, {len(shown):,} objects that came and went: resident memory "
    f"{growth:+.2%} from frame {early:,} to the end, {compiled} programs compiled after frame "
    f"{early:,}, {reused} objects with another's id or several ids; {seconds:.0f} s.",
    f"{machine()}.",
  ]
  print("\n".join(lines))
  options.out.mkdir(parents=True, exist_ok=True)
  (options.out / "phrase-stream.md").write_text("\n\n".join(lines) + "\n")
  return int(growth > 0.03 or compiled > 0 or reused > 0)


if __name__ == "__main__":
  sys.exit(main())
