"""Kills a training run with SIGKILL at random moments, again and again, and compares the parameters
it ends with to those of a run that nothing disturbed: they must be equal bit by bit.

  python benchmarks/resume.py --kills 20 --out results/resume.json

Source of the pictures: random numbers. The model is a small one with every part of the released.
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
SIDE, TOKENS, OBJECTS = 32, 8, 3
SETTINGS: dict[str, Any] = {
  "model": {
    "trunk": {
      "width": 32, "heads": 2, "mlp_width": 64, "groups": 2, "windowed": 1, "window": 2,
      "pretrain_grid": 4,
    },
    "text": {"width": 16, "heads": 2, "mlp_width": 32, "layers": 2, "context": TOKENS},
    "image_size": SIDE, "patch": 8, "width": 32, "heads": 2, "mlp_width": 64, "queries": 6,
    "geometry_layers": 1, "fusion_layers": 2, "decoder_layers": 2, "concept_points": False,
  },
  "average": 0.9, "save_every": 5,
  "data": {"batch": 2, "prompts": 2, "present": 1, "objects": OBJECTS, "examples": 1},
}  # fmt: skip


class Source:
  """Random batches without end."""

  def __init__(self):
    self.number = 0

  def __next__(self):
    from sam3_jax.training.batch import Batch, Targets

    self.number += 1
    rng = np.random.default_rng(self.number)
    rows = (SETTINGS["data"]["batch"], SETTINGS["data"]["prompts"])
    valid = np.zeros((*rows, OBJECTS), bool)
    valid[:, 0] = np.arange(OBJECTS) < rng.integers(1, OBJECTS + 1, (rows[0], 1))
    tokens = np.zeros((*rows, TOKENS), np.int32)
    tokens[..., :3] = 49406, 320, 49407
    targets: Any = {
      "boxes": rng.uniform(0.3, 0.6, (*rows, OBJECTS, 4)).astype(np.float32),
      "masks": rng.integers(0, 256, (*rows, OBJECTS, 16, 16)).astype(np.uint8),
      "valid": valid,
    }
    fields: Any = {
      "images": rng.integers(0, 256, (rows[0], SIDE, SIDE, 3)).astype(np.uint8),
      "sizes": np.full((rows[0], 2), SIDE, np.int32),
      "ids": np.arange(rows[0], dtype=np.int32),
      "tokens": tokens,
      "boxes": rng.uniform(0.3, 0.6, (*rows, 1, 4)).astype(np.float32),
      "positive": np.ones((*rows, 1), bool),
      "box_valid": rng.random((*rows, 1)) < 0.5,
      "prompt_valid": np.ones(rows, bool),
      "targets": Targets(**targets),
    }
    return Batch(**fields)

  def get_state(self) -> dict[str, int]:
    return {"number": self.number}

  def set_state(self, state: dict[str, int]) -> None:
    self.number = state["number"]

  def name(self, index: int) -> str:
    return f"random picture {index}"


def work(out: Path, steps: int) -> None:
  """The process that is killed: it trains, or goes on."""
  from sam3_jax.training import command, loop
  from sam3_jax.training.config import TrainConfig

  vocabulary = str(ROOT / "tests" / "goldens" / "tokenizer.model")
  config = TrainConfig.from_dict(SETTINGS | {"steps": steps, "tokenizer": vocabulary})
  loop.train(config, command.load_start(config), Source(), out)


def parameters(out: Path) -> dict[str, np.ndarray]:
  from sam3_jax import checkpoint
  from sam3_jax.trees import flatten

  return {path: np.asarray(x) for path, x in flatten(checkpoint.load(out / "final").params).items()}


def start(out: Path, steps: int, cache: Path) -> subprocess.Popen:
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),  # else most kills would hit the compiler
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "PYTHONPATH": str(ROOT),
  }
  command = [sys.executable, __file__, "--work", str(out), "--steps", str(steps)]
  return subprocess.Popen(command, env=environment)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--kills", type=int, default=20)
  parser.add_argument("--steps", type=int, default=400)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="a JSON file for the figures")
  parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.work:
    work(given.work, given.steps)
    return

  with tempfile.TemporaryDirectory() as folder:
    whole, broken, cache = (Path(folder) / name / "run" for name in ("whole", "broken", "cache"))
    if start(whole, given.steps, cache).wait():
      sys.exit("the undisturbed run failed")
    began = time.perf_counter()
    again = Path(folder) / "again" / "run"
    if start(again, given.steps, cache).wait():
      sys.exit("the second undisturbed run failed")
    # With all compiled, as from here on. Six tenths of the run are done by the last kill.
    seconds = time.perf_counter() - began
    training = json.loads((again / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    longest = seconds - training + 1.2 * training / given.kills
    chance, kills = random.Random(given.seed), []
    while len(kills) < given.kills:
      process = start(broken, given.steps, cache)
      time.sleep(chance.uniform(0, longest))
      process.send_signal(signal.SIGKILL)
      process.wait()
      metrics = broken / "metrics.jsonl"
      kills.append(len(metrics.read_text().splitlines()) if metrics.exists() else 0)
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
