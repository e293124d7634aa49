"""Compiles the program of a tracked frame ahead of time for a TPU: time, memory and the bank.

  python3.11 -m venv tpu; tpu/bin/pip install "jax[tpu]==0.10.2" -e .
  tpu/bin/python benchmarks/tpu_video.py --target v6e --out benchmarks/results

See `chips.py`. The whole program is too large for the compiler's finer grade, so its times have the
coarser one, which is too high except for products; `tpu_parts.py --video` tries the finer one for
each part. An instruction belongs to the first of `GROUPS` whose pattern its scope matches. The exit
status is 1 if the program copies the bank of memories, or does not overwrite it.
"""

import argparse
import collections
import json
import re
import sys
from pathlib import Path
from typing import Any

import chips
import hlo
import timing
import work

GROUPS = {
  "memory attention: cross-attention": r"cross_attn|norm2|_read/add|_read/while/body/closed_call$",
  "memory attention: self-attention": r"layers\.attend|self_attn",
  "memory attention: MLP": r"layers/(mlp|norm3)",
  "memory attention: first self-attention of the frame, final norm": r"memory_attention",
  "memory encoder": r"memory_encoder|encode_memory|yh,\.\.\.hw",
  "mask decoder and pointer": r"detect_tracked|VideoTracker\.pointer",
  "bank: gather": r"gather",
  "bank: write": r"scatter",
  "without a scope, such as rotary positions": r"",
}


def compiled(target: str, objects: int) -> chips.Report:
  """Compiles the program.

  The products that resize masks have one pass instead of six, which take minutes to compile; they
  take at most a hundredth of the time.
  """
  import jax
  import video_parts

  sharding = jax.sharding.SingleDeviceSharding(chips.devices(target)[0])
  with video_parts.quick_resize():
    function, arguments = video_parts.track(video_parts.CONFIG, "bfloat16", objects, sharding)
    return chips.report(target, function.lower(*arguments))


def by_group(report: chips.Report) -> dict[str, dict[str, float]]:
  """Seconds of each group, and those that its memory traffic would take alone."""
  chip = chips.CHIPS[report.target]
  sums: dict[str, Any] = {name: collections.Counter() for name in GROUPS}
  for op in report.listing.ops:
    if seconds := op.seconds(chip.clock, chip.bandwidth):
      name = next(name for name, pattern in GROUPS.items() if re.search(pattern, op.scope))
      sums[name]["seconds"] += seconds
      sums[name]["traffic"] += op.traffic * op.times / chip.bandwidth
  return sums


def products(target: str, objects: int) -> dict[str, float]:
  """Seconds of each group's products at the chip's peak rate, by the parts of `video_parts`."""
  import video_parts

  peak, found = chips.CHIPS[target].flops, collections.Counter()
  for part in video_parts.parts(objects):
    name = next((name for name in GROUPS if name.startswith(part.name)), None)
    if name is not None:
      found[name] += part.times * 1e9 * work.gflop(part.function, *part.args) / peak
  return found


def markdown(report: dict[str, Any]) -> str:
  """A table of the groups, per object, then memory and the bank."""
  objects, total = report["objects"], sum(x["seconds"] for x in report["groups"].values())
  lines = [
    f"{report['what']}; {report['versions']}.",
    "",
    "| part | ms per object | share | products at peak rate, ms | "
    "share of the matrix units' peak | memory at peak rate, ms |",
    "|---|---|---|---|---|---|",
  ]
  for name, row in report["groups"].items():
    each = {key: 1e3 * value / objects for key, value in row.items()}
    used = f"{row['products'] / row['seconds']:.0%}" if row["products"] else ""
    lines.append(
      f"| {name} | {each['seconds']:.3f} | {row['seconds'] / total:.0%} | {each['products']:.3f} | "
      f"{used} | {each['traffic']:.3f} |"
    )
  everything = sum(x["products"] for x in report["groups"].values())
  lines += [
    f"| **all** | **{1e3 * total / objects:.2f}** | | {1e3 * everything / objects:.3f} | "
    f"{everything / total:.0%} | |",
    "",
    f"Peak memory {report['peak'] / 1e9:.2f} GB, of which the bank is {report['bank'] / 1e9:.2f} GB"
    f" and temporaries are {report['temporaries'] / 1e9:.2f} GB. The bank is "
    f"{'overwritten in place' if report['in_place'] else 'NOT overwritten in place'}; instructions "
    f"that copy it: {report['copies']}.",
  ]
  return "\n".join(lines)


def main() -> int:
  arguments = _arguments()
  chips.describe()
  import jax
  import video_parts

  objects, target = arguments.objects, arguments.target
  found = compiled(target, objects)
  if arguments.text:
    arguments.text.write_text(found.text)
  bank, needed = video_parts.bank_type(objects), products(target, objects)
  groups = {
    name: {"seconds": row["seconds"], "products": needed.get(name, 0), "traffic": row["traffic"]}
    for name, row in by_group(found).items()
  }
  report = {
    "what": f"{target}, bfloat16; one frame, {objects} objects; coarser grade",
    "versions": f"jax {jax.__version__} on {timing.machine()}",
    "objects": objects,
    "groups": groups,
    "peak": found.peak,
    "temporaries": found.temporaries,
    "bank": hlo.size(bank),
    "in_place": {"0", "1"} <= hlo.aliases(found.text).keys(),
    "copies": len(hlo.rewrites(found.listing, bank)),
  }
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"tpu-video-{target}.json").write_text(json.dumps(report, indent=1) + "\n")
    (arguments.out / f"tpu-video-{target}.md").write_text(text + "\n")
  return int(report["copies"] > 0 or not report["in_place"])


def _arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--target", choices=chips.CHIPS, default="v6e")
  parser.add_argument("--objects", type=int, default=64, help="slots of the bank")
  parser.add_argument(
    "--out", type=Path, help="output directory, for tpu-video-TARGET.md and .json"
  )
  parser.add_argument("--text", type=Path, help="output file for the compiled program (HLO)")
  return parser.parse_args()


if __name__ == "__main__":
  sys.exit(main())
