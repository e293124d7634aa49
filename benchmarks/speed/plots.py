"""Plots the growth of time and memory with the count; needs the extra `plots`."""

from pathlib import Path
from typing import Any

from speed.cases import STEPS


def draw(report: dict[str, Any], path: Path) -> None:
  """Draws a column for each case with a fitted line; dots are measurements, lines are fits."""
  from matplotlib.figure import Figure

  cases = list(dict.fromkeys(fit["case"] for fit in report["growth"]))
  if not cases:
    raise ValueError("there is no growth to plot: leave out --plot, or add --only growth.")
  figure = Figure(figsize=(5 * len(cases), 7), layout="constrained")
  axes = figure.subplots(2, len(cases), squeeze=False)
  parts = (("median", "seconds", 1.0), ("memory", "peak memory, GB", 1e-9))
  for column, case in enumerate(cases):
    for row, (name, title, scale) in enumerate(parts):
      panel = axes[row][column]
      for number, fit in enumerate(f for f in report["growth"] if f["case"] == case):
        mine = [r for r in report["rows"] if (r["case"], r["side"]) == (case, fit["side"])]
        counts, color = [r["count"] for r in mine], f"C{number}"
        panel.plot(counts, [scale * r[name] for r in mine], "o", color=color, label=fit["side"])
        line = [scale * (fit[name]["start"] + fit[name]["each"] * n) for n in counts]
        panel.plot(counts, line, color=color, linewidth=1)
      panel.set(xscale="log", yscale="log", xlabel=xlabel(case), ylabel=title)
      panel.set_xticks(counts, [str(n) for n in counts])
      panel.set_xticks([], minor=True)
      panel.legend(frameon=False)
  figure.savefig(path, dpi=120)


def xlabel(case: str) -> str:
  """Describes what is counted, such as "decode: number of prompts"."""
  noun = STEPS[case].label.partition("{} ")[2].split()[0].rstrip(",")
  return f"{case}: number of {noun}s"
