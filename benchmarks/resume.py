"""Kills `sam3-jax train` with SIGKILL at random moments, and resumes it after each kill.

  python benchmarks/resume.py --kills 20 --out benchmarks/results/resume.json

The final parameters must be bit-equal to those of an uninterrupted run; otherwise the exit status
is 1. The model is small, but has every part of the released model. All sources of randomness are
enabled: scenes, phrases, flips, sizes, exemplar boxes and their noise, dropout.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SETTINGS: dict[str, Any] = {
  "model": {
    "trunk": {
      "width": 32, "heads": 2, "mlp_width": 64, "groups": 2, "windowed": 1, "window": 2,
      "pretrain_grid": 4,
    },
    "text": {"width": 16, "heads": 2, "mlp_width": 32, "layers": 2, "vocabulary": 4098},
    "image_size": 32, "patch": 8, "width": 32, "heads": 2, "mlp_width": 64, "queries": 6,
    "geometry_layers": 1, "fusion_layers": 2, "decoder_layers": 2, "concept_points": False,
  },
  "scenes": {"count": 50, "size": [64, 80]},
  "ema_decay": 0.9, "save_every": 5,
  "data": {
    "batch_size": 2, "prompts_per_image": 3, "present_prompts": 2, "max_objects": 3,
    "max_exemplars": 2,
  },
}  # fmt: skip


def parameters(out: Path) -> dict[str, np.ndarray]:
  """The final parameters of a run, by path."""
  from sam3_jax.checkpoint import bundle
  from sam3_jax.utils.param_tree import flatten

  return {path: np.asarray(x) for path, x in flatten(bundle.load(out / "final").params).items()}


def start(out: Path, steps: int, cache: Path) -> subprocess.Popen:
  """Starts or resumes training in an output directory."""
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),  # otherwise most kills would occur while compiling
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  out.parent.mkdir(exist_ok=True)
  config = out.parent / "run.json"
  config.write_text(json.dumps(SETTINGS | {"steps": steps}))
  program = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
  return subprocess.Popen(
    [*program, "train", str(config), "--out", str(out), "--quiet"], env=environment
  )


def lines(metrics: Path) -> int:
  """The number of lines in a metrics file; 0 if there is none."""
  return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_steps(metrics: Path, process: subprocess.Popen) -> None:
  """Waits until the process appends to its metrics file, which it first truncates, or ends."""
  fewest = lines(metrics)
  while process.poll() is None:
    now = lines(metrics)
    if now > fewest:
      return
    fewest = min(fewest, now)
    time.sleep(0.05)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=20, help="number of kills")
  parser.add_argument("--steps", type=int, default=400, help="training steps")
  parser.add_argument("--seed", type=int, default=0, help="seed of the times of the kills")
  parser.add_argument("--out", type=Path, help="JSON file for the result")
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as directory:
    names = ("uninterrupted", "killed", "cache")
    uninterrupted, killed, cache = (Path(directory) / name / "run" for name in names)
    if start(uninterrupted, given.steps, cache).wait():
      sys.exit("the uninterrupted run failed")
    began = time.perf_counter()
    second = Path(directory) / "second" / "run"
    if start(second, given.steps, cache).wait():
      sys.exit("the second uninterrupted run failed")
    # The second run took its programs from the cache, as all later runs do.
    seconds = time.perf_counter() - began
    training = json.loads((second / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    rng, kills = random.Random(given.seed), []
    while len(kills) < given.kills:
      process = start(killed, given.steps, cache)
      if rng.random() < 0.25:  # while it starts
        time.sleep(rng.uniform(0, seconds - training))
      else:  # during training; about half of the steps are done at the last kill
        wait_for_steps(killed / "metrics.jsonl", process)
        time.sleep(rng.uniform(0, 1.2 * training / given.kills))
      process.send_signal(signal.SIGKILL)
      process.wait()
      kills.append(lines(killed / "metrics.jsonl"))
      if (killed / "final").exists():
        sys.exit(f"the run was complete before kill {len(kills) + 1}: increase --steps")
    if start(killed, given.steps, cache).wait():
      sys.exit("the resumed run failed")
    found, expected = parameters(killed), parameters(uninterrupted)
  differing = [path for path, x in expected.items() if not np.array_equal(found[path], x)]
  result = {
    "kills": len(kills),
    "steps": given.steps,
    "metrics_lines_at_each_kill": kills,
    "parameters": len(expected),
    "differing_parameters": differing,
  }
  print(json.dumps(result, indent=2))
  if given.out:
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(result, indent=2) + "\n")
  sys.exit(1 if differing else 0)


if __name__ == "__main__":
  main()
