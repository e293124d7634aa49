"""Training steps: sam3-jax and Meta's code on one machine, and the full model on a CPU.

  pip install torch torchvision; pip install --no-deps sam3==0.1.4 einops ftfy iopath portalocker \\
    pycocotools scipy timm torchmetrics lightning-utilities wcwidth psutil     # for Meta's side
  python benchmarks/train.py speed --meta-python PYTHON_WITH_THESE --out benchmarks/results
  python benchmarks/train.py full --mode detector     # 840 M parameters; or --mode lora

`speed`: both sides have the same seeded weights and the same batch, and run full steps in float32:
forward, all losses with one-to-many queries and masks, backward, clipping, AdamW. Each variant runs
in its own process, and the processes take turns, A B A B, so that other load on the machine affects
all variants alike. The exit status is 1 if the first step's losses differ by more than 1e-4.

`full`: random parameters, one image at 1008 pixels, remat; prints seconds, losses and peak memory.
"detector" freezes trunk and text encoder; "lora" trains low-rank factors of all attention and MLP
kernels.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine

HERE = Path(__file__).parent
LIMIT = 1e-4  # of the first loss, relative to Meta's
LEARNING_RATE = 1e-5
# Name, script and options of each variant. Both sides recompute layers in the backward pass by
# default.
VARIANTS = {
  "meta": ("Meta, remat (default)", "train_meta.py", ("--remat", "full")),
  "meta-kept": ("Meta, no remat", "train_meta.py", ("--remat", "none")),
  "ours": ("sam3-jax, remat (default)", "train_ours.py", ("--remat", "full")),
  "kept": ("sam3-jax, no remat", "train_ours.py", ("--remat", "none")),
  "no-scan": ("sam3-jax, no scan", "train_ours.py", ("--remat", "full", "--unroll")),
  "all-masks": ("sam3-jax, masks of absent phrases too", "train_ours.py", ("--all-masks",)),
}


def speed(arguments: argparse.Namespace) -> int:
  from train_batch import SIZES, make_batch

  config = full_config(SIZES[arguments.size])
  with tempfile.TemporaryDirectory(prefix="sam3-jax-train-") as temporary:
    work, load = Path(temporary), os.getloadavg()[0]
    (work / "config.json").write_text(json.dumps(config))
    np.savez(work / "batch.npz", **make_batch(config, arguments.images, arguments.prompts))
    rows = take_turns(work, arguments)
  report = {
    "size": arguments.size,
    "images": arguments.images,
    "prompts": arguments.prompts,
    "machine": machine(),
    "load": load,
    "rows": rows,
  }
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"train-{arguments.size}"
    (arguments.out / f"{name}.md").write_text(text + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  faults = [row for row in rows if not row["off"] <= LIMIT]  # NaN is over, too
  for row in faults:
    print(f"{row['name']}: the first loss is off by {row['off']:.1e}", file=sys.stderr)
  return 1 if faults else 0


def full_config(values: dict[str, Any]) -> dict[str, Any]:
  """The released configuration with other values for some fields."""
  from sam3_jax.config import Config

  config = Config().to_dict()
  for field, value in values.items():
    config[field] = config[field] | value if isinstance(value, dict) else value
  return json.loads(json.dumps(Config.from_dict(config).to_dict()))


def take_turns(work: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
  """Runs all variants: the first step compiles and warms up, later steps are timed."""
  rows = []
  with contextlib.ExitStack() as stack:
    processes = []
    for key in dict.fromkeys(("meta", *arguments.variants)):  # Meta's side writes files for ours
      name, script, options = VARIANTS[key]
      python = arguments.meta_python if script == "train_meta.py" else sys.executable
      command = [python, str(HERE / script), str(work), *options]
      command += ["--learning-rate", str(LEARNING_RATE)]
      process = stack.enter_context(
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
      )
      processes.append((process, _answer(process, name)))
      rows.append({"name": name, "steps": []})
      rows[-1]["steps"].append(_step(process, name))  # one at a time: compiling uses all cores
    for _ in range(arguments.repeats):
      for (process, _), row in zip(processes, rows, strict=True):
        row["steps"].append(_step(process, row["name"]))
    for process, _ in processes:
      process.stdin.close()
  for (_, about), row in zip(processes, rows, strict=True):
    row |= about | _figures(row["steps"], arguments.images)
    row["off"] = abs(row["steps"][0]["loss"] / rows[0]["steps"][0]["loss"] - 1)
  return rows


def _figures(steps: list[dict[str, float]], images: int) -> dict[str, float]:
  seconds = [step["seconds"] for step in steps[1:]]
  median = statistics.median(seconds)
  return {
    "first": steps[0]["seconds"],
    "seconds": median,
    "least": min(seconds),
    "processor": statistics.median(step["processor"] for step in steps[1:]),
    "images_per_second": images / median,
    "memory": max(step["memory"] for step in steps),
  }


def _step(process: subprocess.Popen, name: str) -> dict[str, float]:
  process.stdin.write("\n")
  process.stdin.flush()
  return _answer(process, name)


def _answer(process: subprocess.Popen, name: str) -> dict[str, Any]:
  if not (line := process.stdout.readline()):
    raise SystemExit(f"{name} ended with status {process.wait()}; its message is above.")
  return json.loads(line)


def markdown(report: dict[str, Any]) -> str:
  """The report as a Markdown table."""
  rows, versions = report["rows"], {}
  for row in rows:
    versions |= row["versions"]
  base = rows[0]["images_per_second"]
  lines = [
    f"Machine: {report['machine']}, load {report['load']:.1f} beforehand; "
    + ", ".join(f"{name} {version}" for name, version in versions.items())
    + f". {report['images']} images of {report['prompts']} phrases per step, size "
    f"`{report['size']}`, float32, medians of {len(rows[0]['steps']) - 1} steps in turns.",
    "",
    "| training step | seconds (median, least) | processor seconds | images/s | ratio "
    "| peak memory | first step | first loss off by |",
    "|---" * 8 + "|",
  ]
  for row in rows:
    lines.append(
      f"| {row['name']} | {row['seconds']:.2f}, {row['least']:.2f} | {row['processor']:.2f} "
      f"| {row['images_per_second']:.2f} | {row['images_per_second'] / base:.2f} "
      f"| {row['memory'] / 1e9:.2f} GB | {row['first']:.1f} s | {row['off']:.1e} |"
    )
  return "\n".join(lines)


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parts = parser.add_subparsers(dest="part", required=True)
  part = parts.add_parser("speed", help="compare with Meta's training step")
  part.add_argument("--size", choices=("tiny", "small"), default="small")
  part.add_argument("--images", type=int, default=4)
  part.add_argument("--prompts", type=int, default=3, help="phrases per image; the last is absent")
  part.add_argument(
    "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="besides meta"
  )
  part.add_argument("--repeats", type=int, default=5, help="timed steps")
  part.add_argument("--meta-python", default=sys.executable, help="interpreter with Meta's sam3")
  part.add_argument("--out", type=Path, help="directory for train-SIZE.md and train-SIZE.json")
  part = parts.add_parser("full", help="840 M parameters")
  part.add_argument("--mode", choices=("detector", "lora"), required=True)
  part.add_argument("--steps", type=int, default=2)
  part.add_argument("--rank", type=int, default=16, help="of lora")
  part.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny for a quick try")
  part.add_argument("--out", type=Path, help="directory for train-full-MODE.json")
  arguments = parser.parse_args()
  if arguments.part == "speed" and shutil.which(arguments.meta_python) is None:
    parser.error(f"--meta-python {arguments.meta_python} cannot be run")
  return arguments


def main() -> int:
  arguments = _arguments()
  if arguments.part == "speed":
    return speed(arguments)
  from train_full import full

  return full(arguments.mode, arguments.steps, arguments.rank, arguments.size, arguments.out)


if __name__ == "__main__":
  sys.exit(main())
