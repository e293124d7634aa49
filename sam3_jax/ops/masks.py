"""Binary masks: their IoU, and the box around a mask."""

from typing import Any

import numpy as np
from jaxtyping import Bool


def mask_iou(mask: Bool[Any, "h w"], other: Bool[Any, "h w"]) -> float:
  """The IoU of two masks; 0 if both are empty."""
  return float((mask & other).sum() / max(1, (mask | other).sum()))


def mask_to_box(mask: Bool[np.ndarray, "h w"]) -> tuple[int, int, int, int]:
  """The box around the pixels of a mask: xyxy, in whole pixels; zeros if there are none."""
  rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
  if not len(rows):
    return 0, 0, 0, 0
  return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
