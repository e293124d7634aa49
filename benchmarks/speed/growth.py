"""Growth of time and memory with the count: a fitted line, and the counts far above it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from speed.cases import STEPS

STEP = 1.3  # a value above this multiple of the line is reported as a step


def fit(counts: Sequence[int], values: Sequence[float]) -> dict[str, Any]:
  """Fits `start` + `each` x count by least squares of the relative errors, so that small counts
  have the same weight as large ones. Lists as `steps` the counts whose ratio to the line exceeds
  `STEP`.

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
  """Fits time and memory of each case and side whose growth was measured completely."""
  found = []
  for case, side in dict.fromkeys((row["case"], row["side"]) for row in rows):
    mine = [row for row in rows if (row["case"], row["side"]) == (case, side)]
    counts = [row["count"] for row in mine]
    wanted = {*STEPS[case].growth} if case in STEPS else set()
    if wanted and wanted <= {*counts}:
      lines = {name: fit(counts, [row[name] for row in mine]) for name in ("median", "memory")}
      found.append({"case": case, "side": side, **lines})
  return found
