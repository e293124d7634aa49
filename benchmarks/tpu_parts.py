"""Estimates the time of the released model on a TPU part by part, by compiling ahead of time.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_parts.py --target v6e --out benchmarks/results
  tpu/bin/python benchmarks/tpu_parts.py --target v6e --plain --out benchmarks/results
  tpu/bin/python benchmarks/tpu_parts.py --target v6e --video --out benchmarks/results

The whole model is too large for the compiler's finer grade (see `chips`), so it is split into
parts. Each is compiled once and multiplied by how often it runs; together they are the whole model.
Changes of layout between two parts are not counted, as each part chooses the layouts of its inputs
and outputs. If the finer grade fails or takes too long, the coarser one is used, and the table says
so; it is too high except for products. `--plain` compiles straightforward versions of attention,
GELU and the patch embedding: all logits at once, `jax.nn.gelu`, a convolution. `--video` compiles
the parts of a tracked frame instead (`video_parts`).
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
import model_parts
import timing
import video_parts
import work


def parts(arguments: argparse.Namespace) -> list[model_parts.Part]:
  """The parts to compile, of an image with prompts or of a tracked frame."""
  if arguments.video:
    return video_parts.parts(arguments.objects)
  return model_parts.parts(arguments.prompts)


def measure(index: int, arguments: argparse.Namespace) -> dict[str, Any]:
  """Compiles a part and returns the seconds of a run and their lower bounds."""
  with contextlib.ExitStack() as stack:
    if arguments.plain:
      stack.enter_context(model_parts.plain())
    part = parts(arguments)[index]
    if not part.whole:
      stack.enter_context(model_parts.without_attention())
    flops = 1e9 * work.gflop(part.function, *part.args)
    report = chips.compile_for(arguments.target, part.function, *part.args, donated=part.donated)
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
  if not arguments.limit:
    return measure(index, arguments)
  errors = ""
  for grade, limit in (("emitted", arguments.limit), ("planned", 600)):
    typed = ["--target", arguments.target, "--prompts", str(arguments.prompts), "--grade", grade]
    typed += ["--objects", str(arguments.objects)]
    command = [sys.executable, __file__, *typed, "--one", str(index)]
    command += ["--plain"] * arguments.plain + ["--video"] * arguments.video
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
    "| step | part | runs | ms of one | ms | of it products at peak | memory at peak | "
    "share of the matrix units' peak | grade |",
    "|---|---|---|---|---|---|---|---|---|",
  ]
  for row in report["parts"]:
    times = row["times"]
    figures = [f"{1e3 * times * row[name]:.2f}" for name in ("seconds", "products", "traffic")]
    lines.append(
      f"| {row['step']} | {row['part']} | {times} | {1e3 * row['seconds']:.3f} | "
      f"{' | '.join(figures)} | {row['products'] / row['seconds']:.0%} | {row['grade']} |"
    )
  for step, total in report["sums"].items():
    lines.append(f"| **{step}** | **all** | | | **{1e3 * total:.1f}** | | | | |")
  if objects := report.get("objects"):
    one = 1e3 * report["sums"]["objects"] / objects
    lines.append(f"| **objects** | **per object** | | | **{one:.2f}** | | | | |")
  return "\n".join(lines)


def main() -> int:
  arguments = _arguments()
  if arguments.one is not None:
    with chips.emit() if arguments.grade == "emitted" else contextlib.nullcontext(chips.describe()):
      print(json.dumps(measure(arguments.one, arguments)))
    return 0
  chips.describe()
  start, every = time.perf_counter(), parts(arguments)
  rows = _earlier(arguments)
  chosen = [i for i, part in enumerate(every) if arguments.only in f"{part.step}: {part.name}"]
  with ThreadPoolExecutor(arguments.workers) as pool:
    found = pool.map(lambda i: in_a_process(i, arguments), chosen)
    for index, row in zip(chosen, found, strict=True):
      part = every[index]
      rows[index] = {"step": part.step, "part": part.name, "times": part.times} | row
      took = f"{part.times} x {1e3 * row['seconds']:.3f} ms, {row['grade']}"
      print(f"{part.step}: {part.name}: {took}", flush=True)
  sums: dict[str, float] = {}
  for row in rows.values():
    sums[row["step"]] = sums.get(row["step"], 0) + row["times"] * row["seconds"]
  count = f"one image, {arguments.prompts} prompts"
  if arguments.video:
    count = f"one frame, {arguments.objects} objects"
  report = {
    "what": f"{arguments.target}, {'plain form, ' * arguments.plain}bfloat16; {count} per call",
    "versions": f"jax {jax.__version__} on {timing.machine()}",
    "seconds": time.perf_counter() - start,
    "parts": [rows[index] for index in sorted(rows)],
    "sums": sums,
  } | ({"objects": arguments.objects} if arguments.video else {})
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = _results(arguments)
    results.write_text(json.dumps(report, indent=1) + "\n")
    results.with_suffix(".md").write_text(text + "\n")
  return 0


def _results(arguments: argparse.Namespace) -> Path:
  video, plain = "video-parts-" * arguments.video, "-plain" * arguments.plain
  return arguments.out / f"tpu-{video}{arguments.target}{plain}.json"


def _earlier(arguments: argparse.Namespace) -> dict[int, dict[str, Any]]:
  """The rows of an earlier run, by part, if this one measures only some parts."""
  if not (arguments.only and arguments.out and _results(arguments).exists()):
    return {}
  found = json.loads(_results(arguments).read_text())["parts"]
  by_name = {(row["step"], row["part"]): row for row in found}
  names = [(part.step, part.name) for part in parts(arguments)]
  return {index: by_name[name] for index, name in enumerate(names) if name in by_name}


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v6e")
  parser.add_argument("--prompts", type=int, default=8, help="prompts per call, on one image")
  parser.add_argument("--video", action="store_true", help="the parts of a tracked frame")
  parser.add_argument("--objects", type=int, default=8, help="objects on the frame, for --video")
  parser.add_argument("--plain", action="store_true", help="compile straightforward versions")
  parser.add_argument(
    "--only", default="",
    help="parts whose 'step: name' contains this; the others keep their results in --out",
  )  # fmt: skip
  parser.add_argument(
    "--limit", type=int, default=300,
    help="time limit of the finer grade, in seconds per part; 0 for the coarser grade",
  )  # fmt: skip
  parser.add_argument("--workers", type=int, default=1, help="parts to compile in parallel")
  parser.add_argument("--out", type=Path, help="output directory, for tpu-TARGET.md and .json")
  parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
  grades = "emitted", "planned"
  parser.add_argument("--grade", choices=grades, default="planned", help=argparse.SUPPRESS)
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
