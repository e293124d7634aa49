"""Plots a roofline: how close the parts of `tpu_parts.py` come to the limits of a chip.

  python benchmarks/roofline.py benchmarks/results/tpu-v5e.json benchmarks/results/tpu-v6e.json \\
    --out docs/roofline.svg

Each point is a part. x is the arithmetic intensity: operations of its products per byte of traffic
with the chip's memory; y is the operations per second. The roof is the limit of products and
memory. The area of a point is proportional to the part's share of the time of its step: large
points far below the roof are the most promising to optimize.
"""

import argparse
import json
import sys
import textwrap
from pathlib import Path

import chips
import matplotlib.pyplot as plt

COLORS = {"encode": "tab:blue", "text": "tab:green", "decode": "tab:orange"}
NAMED = 0.08  # parts with at least this fraction of a step's time are named


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "reports", type=Path, nargs="+", help="JSON files of tpu_parts.py, one for each chip"
  )
  parser.add_argument("--out", type=Path, required=True, help="output file, an SVG or PNG")
  arguments = parser.parse_args()
  count = len(arguments.reports)
  figure, axes = plt.subplots(1, count, figsize=(6.4 * count, 5), squeeze=False, sharey=True)
  for axis, path in zip(axes[0], arguments.reports, strict=True):
    draw(axis, json.loads(path.read_text()))
  axes[0][0].set_ylabel("operations per second of the products, TFLOP/s")
  figure.tight_layout()
  figure.savefig(arguments.out, metadata={"Date": None} if arguments.out.suffix == ".svg" else None)
  return 0


def draw(axis: plt.Axes, report: dict) -> None:
  """Draws the roof of a chip and the parts of the model."""
  target = report["what"].split(",")[0]
  chip = chips.CHIPS[target]
  ridge = chip.flops / chip.bandwidth
  axis.plot([10, ridge, 1e4], [chip.bandwidth / 1e11, *[chip.flops / 1e12] * 2], color="black")
  for row in report["parts"]:
    if not row["products"]:
      continue
    operations = row["products"] * chip.flops
    intensity = min(1e4, operations / max(1.0, row["traffic"] * chip.bandwidth))
    share = row["times"] * row["seconds"] / report["sums"][row["step"]]
    if share == 1:  # a step with one part, such as the text encoder, would cover the others
      continue
    point = intensity, operations / row["seconds"] / 1e12
    axis.scatter(*point, s=3000 * share, color=COLORS[row["step"]], alpha=0.5, linewidth=0)
    if share > NAMED:
      settings = {"xytext": (0, -12), "textcoords": "offset points", "ha": "center", "va": "top"}
      axis.annotate(textwrap.fill(row["part"], 20), point, fontsize=7, **settings)
  for step, total in report["sums"].items():
    axis.scatter([], [], color=COLORS[step], alpha=0.5, label=f"{step}, {1e3 * total:.1f} ms")
  axis.set(xscale="log", yscale="log", xlim=(10, 1e4), ylim=(5, 2e3))
  axis.set_title(report["what"].replace("; ", "\n", 1), fontsize=10)
  axis.set_xlabel("operations per byte of memory traffic")
  axis.legend(loc="lower right", fontsize=8)


if __name__ == "__main__":
  sys.exit(main())
