"""How time and memory grow with the count: a fitted line, and the counts that leave it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from speed.cases import STEPS

STEP = 1.3  # a value so many times the line's is a step


def fit(counts: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
  """`start` + `each` x count with the least squares of the relative errors, so that small counts
  weigh as much as large ones; and as `steps` the counts and ratios above `STEP` times the line.

  Args:
    counts: at least two different ones.
    values: positive.
  """
  n, y = np.asarray(counts, float), np.asarray(values, float)
  [start, each], *_ = np.linalg.lstsq(np.stack([1 / y, n / y], axis=1), np.ones_like(y), rcond=None)
  line = start + each * n
  ratios = np.where(line > 0, y / np.where(line > 0, line, 1), np.inf)
  steps = [
    {"count": int(count), "ratio": float(ratio)}
    for count, ratio in zip(counts, ratios, strict=True)
    if ratio > STEP
  ]
  return {"start": float(start), "each": float(each), "steps": steps}


def fits(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """For every case and side with all of its growth measured: the lines of seconds and of memory."""
  found = []
  for case, side in dict.fromkeys((row["case"], row["side"]) for row in rows):
    mine = [row for row in rows if (row["case"], row["side"]) == (case, side)]
    counts = [row["count"] for row in mine]
    wanted = {*STEPS[case].growth} if case in STEPS else set()
    if wanted and wanted <= {*counts}:
      lines = {name: fit(counts, [row[name] for row in mine]) for name in ("median", "memory")}
      found.append({"case": case, "side": side, **lines})
  return found
