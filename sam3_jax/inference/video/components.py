"""Small holes and islands of masks, as Meta's video code removes them."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Float

FILLED, REMOVED = 0.1, -0.1  # logits


def clean_mask(logits: Float[np.ndarray, "Hm Wm"], area: int) -> Float[np.ndarray, "Hm Wm"]:
  """Fills holes, then removes islands, of at most `area` cells.

  Holes are regions of 8-connected cells outside the mask, wherever they are; islands are such
  regions of the mask, if they are at most half of it.
  """
  if area <= 0 or (logits.size > area and not (logits > 0).any()):
    return logits
  holes = _small_regions(logits <= 0, area)
  logits = np.where(holes, np.float32(FILLED), logits)
  inside = logits > 0
  islands = _small_regions(inside, min(area, int(inside.sum()) // 2))
  return np.where(islands, np.float32(REMOVED), logits)


def _small_regions(mask: Bool[np.ndarray, "Hm Wm"], area: int) -> Bool[np.ndarray, "Hm Wm"]:
  from scipy import ndimage  # not at the top: it is slow to import

  found: Any = ndimage.label(mask, structure=np.ones((3, 3)))
  sizes = np.bincount(found[0].ravel())
  small = sizes <= area
  small[0] = False
  return small[found[0]]
