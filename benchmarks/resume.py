"""Kills `sam3-jax train` with SIGKILL at random moments, again and again, and compares the
parameters it ends with to those of a run that nothing disturbed: they must be equal bit by bit.

  python benchmarks/resume.py --kills 20 --out benchmarks/results/resume.json

It trains a small model, with every part of the released, on scenes, with all that is drawn at
random: scenes, phrases, mirror images, sizes, example boxes and their noise, dropout.
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
  from sam3_jax.checkpoint import bundle
  from sam3_jax.utils.param_tree import flatten

  return {path: np.asarray(x) for path, x in flatten(bundle.load(out / "final").params).items()}


def start(out: Path, steps: int, cache: Path) -> subprocess.Popen:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),  # else most kills would hit the compiler
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
  return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def wait_for_steps(metrics: Path, process: subprocess.Popen) -> None:
  """Until the process has added to its metrics, whose end it cut off first, or is done."""
  fewest = lines(metrics)
  while process.poll() is None:
    now = lines(metrics)
    if now > fewest:
      return
    fewest = min(fewest, now)
    time.sleep(0.05)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="a JSON file for the figures")
  given = parser.parse_args()
  with tempfile.TemporaryDirectory() as folder:
    whole, broken, cache = (Path(folder) / name / "run" for name in ("whole", "broken", "cache"))
    if start(whole, given.steps, cache).wait():
      sys.exit("the undisturbed run failed")
    began = time.perf_counter()
    again = Path(folder) / "again" / "run"
    if start(again, given.steps, cache).wait():
      sys.exit("the second undisturbed run failed")
    # With all compiled, as from here on.
    seconds = time.perf_counter() - began
    training = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    chance, kills = random.Random(given.seed), []
    while len(kills) < given.kills:
      process = start(broken, given.steps, cache)
      if chance.random() < 0.25:  # while it starts
        time.sleep(chance.uniform(0, seconds - training))
      else:  # among its steps; about half of all are done by the last kill
        wait_for_steps(broken / "metrics.jsonl", process)
        time.sleep(chance.uniform(0, 1.2 * training / given.kills))
      process.send_signal(signal.SIGKILL)
      process.wait()
      kills.append(lines(broken / "metrics.jsonl"))
      if (broken / "final").exists():
        sys.exit(f"the run was complete before kill {len(kills) + 1}: give more --steps")
    if start(broken, given.steps, cache).wait():
      sys.exit("the killed run did not end well")
    found, wanted = parameters(broken), parameters(whole)
  differing = [path for path, x in wanted.items() if not np.array_equal(found[path], x)]
  figures = {
    "kills": len(kills),
    "steps": given.steps,
    "lines_of_metrics_at_each_kill": kills,
    "parameters": len(wanted),
    "differing_parameters": differing,
  }
  print(json.dumps(figures, indent=2))
  if given.out:
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(figures, indent=2) + "\n")
  sys.exit(1 if differing else 0)


if __name__ == "__main__":
  main()
