"""Estimates the time of the released model on a TPU part by part, by compiling ahead of time.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_parts.py --target v6e --out benchmarks/results
  tpu/bin/python benchmarks/tpu_parts.py --target v6e --plain --out benchmarks/results

The whole model is too large for the compiler's finer grade (see `chips`), so it is split into
parts. Each is compiled once and multiplied by how often it runs; together they are the whole model.
Changes of layout between two parts are not counted, as each part chooses the layouts of its inputs
and outputs. If the finer grade fails or takes too long, the coarser one is used, and the table says
so; it is too high except for products. `--plain` compiles straightforward versions of attention,
GELU and the patch embedding: all logits at once, `jax.nn.gelu`, a convolution.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import chips
import jax
import timing
import work
from model_parts import parts, plain, without_attention


def measure(index: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """Compiles a part and returns the seconds of a run and their lower bounds."""
  with contextlib.ExitStack() as stack:
    if arguments.plain:
      stack.enter_context(plain())
    part = parts(arguments.prompts)[index]
    if not part.whole:
      stack.enter_context(without_attention())
    flops = 1e9 * work.gflop(part.function, *part.args)
    report = chips.compile_for(arguments.target, part.function, *part.args)
  chip = chips.CHIPS[arguments.target]
  return {
    "grade": arguments.grade,
    "seconds": report.seconds,
    "products": flops / chip.flops,
    "traffic": report.traffic / chip.bandwidth,
    "peak": report.peak,
  }


def in_a_process(index: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """Measures a part in its own process, as the finer grade may crash or take too long."""
  errors = ""
  for grade, limit in (("emitted", arguments.limit), ("planned", 600)):
    typed = ["--target", arguments.target, "--prompts", str(arguments.prompts), "--grade", grade]
    command = [sys.executable, __file__, *typed, "--one", str(index)]
    command += ["--plain"] if arguments.plain else []
    with contextlib.suppress(subprocess.TimeoutExpired):
      done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=False)
      if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
      errors = done.stderr
  raise RuntimeError(f"part {index} did not compile: {errors[-500:]}")


def markdown(report: dict[str, Any]) -> str:
  """A table of the parts, and sums of the steps."""
  lines = [
    f"{report['what']}; {report['versions']}, {report['seconds'] / 60:.0f} minutes.",
    "",
    "| step | part | runs | ms of one | ms | of it products at peak | memory at peak | grade |",
    "|---|---|---|---|---|---|---|---|",
  ]
  for row in report["parts"]:
    times = row["times"]
    figures = [f"{1e3 * times * row[name]:.2f}" for name in ("seconds", "products", "traffic")]
    lines.append(
      f"| {row['step']} | {row['part']} | {times} | {1e3 * row['seconds']:.3f} | "
      f"{' | '.join(figures)} | {row['grade']} |"
    )
  for step, total in report["sums"].items():
    lines.append(f"| **{step}** | **all** | | | **{1e3 * total:.1f}** | | | |")
  return "\n".join(lines)


def main() -> int:
  arguments = _arguments()
  if arguments.one is not None:
    with chips.emit() if arguments.grade == "emitted" else contextlib.nullcontext(chips.describe()):
      print(json.dumps(measure(arguments.one, arguments)))
    return 0
  chips.describe()
  start, rows, sums = time.perf_counter(), [], {}
  every = parts(arguments.prompts)
  chosen = [i for i, part in enumerate(every) if arguments.only in f"{part.step}: {part.name}"]
  with ThreadPoolExecutor(arguments.workers) as pool:
    found = pool.map(lambda i: in_a_process(i, arguments), chosen)
    for index, row in zip(chosen, found, strict=True):
      part = every[index]
      rows.append({"step": part.step, "part": part.name, "times": part.times} | row)
      sums[part.step] = sums.get(part.step, 0) + part.times * row["seconds"]
      took = f"{part.times} x {1e3 * row['seconds']:.3f} ms, {row['grade']}"
    print(f"{part.step}: {part.name}: {took}", flush=True)
  report = {
    "what": f"{arguments.target}, {'plain form, ' * arguments.plain}bfloat16; one image, "
    f"{arguments.prompts} prompts per call",
    "versions": f"jax {jax.__version__} on {timing.machine()}",
    "seconds": time.perf_counter() - start,
    "parts": rows,
    "sums": sums,
  }
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"tpu-{arguments.target}{'-plain' * arguments.plain}"
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / f"{name}.md").write_text(text + "\n")
  return 0


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v6e")
  parser.add_argument("--prompts", type=int, default=8, help="prompts per call, on one image")
  parser.add_argument("--plain", action="store_true", help="compile straightforward versions")
  parser.add_argument("--only", default="", help="parts whose 'step: name' contains this")
  parser.add_argument(
    "--limit", type=int, default=300, help="time limit of the finer grade, in seconds per part"
  )
  parser.add_argument("--workers", type=int, default=1, help="parts to compile in parallel")
  parser.add_argument("--out", type=Path, help="output directory, for tpu-TARGET.md and .json")
  parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
  parser.add_argument("--grade", choices=("emitted", "planned"), help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
