"""Formats the report as Markdown."""

from collections.abc import Sequence
from typing import Any

from speed.cases import label


def markdown(report: dict[str, Any]) -> str:
  """All tables, and the list of skipped cases."""
  before, after = report["load"]
  height, width = report["image"]
  lines = [
    f"{report['machine']} (cores used: {report['cores']}), load {before:.1f} before and "
    f"{after:.1f} after. Checkpoint: {report['checkpoint']}; image: {height} x {width}. Medians of "
    f"{report['repeats']} calls after the first (minimum to maximum); the packages take turns.",
  ]
  if report["sides"]:
    lines += ["", *_sides(report["sides"])]
  if report["rows"]:
    lines += ["", *_seconds(report["rows"]), "", *_costs(report["rows"])]
  if report["growth"]:
    lines += ["", *_growth(report["growth"])]
  if report["skipped"]:
    lines += ["", "Skipped:", ""]
    lines += [f"- {row['what']}: {row['why']}" for row in _by_reason(report["skipped"])]
  return "\n".join(lines)


def _sides(sides: Sequence[dict[str, Any]]) -> list[str]:
  rows = [
    [
      side["name"], duration(side["import"]), duration(side["load"]), size(side["memory"]),
      side["device"], ", ".join(f"{k} {v}" for k, v in side["versions"].items()),
    ]
    for side in sides
  ]  # fmt: skip
  return table(["package", "import", "load", "memory after loading", "device", "versions"], rows)


def _seconds(rows: Sequence[dict[str, Any]]) -> list[str]:
  def cell(row: dict[str, Any], all_of_case: dict[str, dict[str, Any]]) -> str:
    least, most = min(row["seconds"]), max(row["seconds"])
    text = f"{duration(row['median'])} ({duration(least)} to {duration(most)})"
    ours = all_of_case.get(f"sam3-jax {row['side'].split()[-1]}")
    if ours is None or ours is row:
      return text
    return f"{text}, {row['median'] / ours['median']:.2f} x sam3-jax"

  return _by_case("time", rows, cell)


def _costs(rows: Sequence[dict[str, Any]]) -> list[str]:
  def cell(row: dict[str, Any], _: dict[str, dict[str, Any]]) -> str:
    return f"{duration(row['first'])}, {duration(row['processor'])}, {size(row['memory'])}"

  return _by_case("first call, CPU time of later calls, peak memory", rows, cell)


def _by_case(head: str, rows: Sequence[dict[str, Any]], cell: Any) -> list[str]:
  """A table with a row for each case and a column for each package and dtype."""
  sides = list(dict.fromkeys(row["side"] for row in rows))
  cases: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
  for row in rows:
    cases.setdefault((row["case"], row["count"]), {})[row["side"]] = row
  return table(
    [head, *sides],
    [
      [label(*case), *(cell(found[side], found) if side in found else "-" for side in sides)]
      for case, found in cases.items()
    ],
  )


def _growth(growth: Sequence[dict[str, Any]]) -> list[str]:
  def steps(line: dict[str, Any]) -> str:
    return ", ".join(f"{s['count']}: {s['ratio']:.2f} x" for s in line["steps"]) or "none"

  rows = []
  for fit in growth:
    time, memory = fit["median"], fit["memory"]
    rows.append(
      [
        fit["case"], fit["side"], f"{duration(time['start'])} + {duration(time['each'])} each",
        steps(time), f"{size(memory['start'])} + {size(memory['each'])} each", steps(memory),
      ]
    )  # fmt: skip
  above = "counts above 1.3 x the line"
  head = ["growth", "package", "time", above, "memory", above]
  return table(head, rows)


def _by_reason(skipped: Sequence[dict[str, str]]) -> list[dict[str, str]]:
  """Merges the entries with the same reason."""
  whats: dict[str, list[str]] = {}
  for row in skipped:
    whats.setdefault(row["why"], []).append(row["what"])
  return [{"what": ", ".join(what), "why": why} for why, what in whats.items()]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
  lines = [head, ["---"] * len(head), *rows]
  return [f"| {' | '.join(line)} |" for line in lines]


def duration(seconds: float) -> str:
  """Formats with three digits in a suitable unit."""
  units = {"s": 1, "ms": 1e-3, "us": 1e-6}
  unit, scale = next((u for u in units.items() if abs(seconds) >= u[1]), ("us", 1e-6))
  return f"{seconds / scale:.3g} {unit}"


def size(number: float) -> str:
  return f"{number / 1e9:.2f} GB" if abs(number) >= 1e9 else f"{number / 1e6:.3g} MB"
