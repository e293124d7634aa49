"""The results of a frame, from low-resolution logits."""

from collections.abc import Mapping

import numpy as np

from sam3_jax.inference.video.components import clean_mask
from sam3_jax.inference.video.tracker import ObjectResult
from sam3_jax.inputs.video_source import Frame
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.tracked_frame import TrackedFrame


def tracked_frame(
  frame: Frame, size: tuple[int, int], results: Mapping[int, ObjectResult], hole_area: int
) -> TrackedFrame:
  """The visible objects of a frame, by id.

  Args:
    frame: from the source.
    size: its height and width.
    results: of all objects; those that are absent, or whose mask is empty, are left out.
    hole_area: holes and islands of up to this many cells of the low-resolution mask are removed.
  """
  grids, boxes, kept = [], [], []
  for identity, result in sorted(results.items()):
    if result.object_logit <= 0:
      continue
    grid = clean_mask(result.mask_logits, hole_area)
    box = mask_to_box(Masks(grid[None], size)[0])
    if box[2]:
      grids.append(grid)
      boxes.append(box)
      kept.append(identity)
  side = next((result.mask_logits.shape for result in results.values()), (1, 1))
  logits = np.array([results[identity].object_logit for identity in kept], np.float32)
  instances = Instances(
    ids=np.array(kept, np.int64),
    scores=(1 / (1 + np.exp(-logits))).astype(np.float32),
    boxes=np.array(boxes, np.float32).reshape(-1, 4),
    masks=Masks(np.array(grids, np.float32).reshape(-1, *side), size),
  )
  return TrackedFrame(index=frame.index, time=frame.time, size=size, instances=instances)
