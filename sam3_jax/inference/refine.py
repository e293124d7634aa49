"""Concepts and clicks together: a concept's instances, one mended by clicks, one added by a box.

All others, and every identity, stay as they were. An instance's own mask is what the head for
visual prompts starts from, so a click changes it rather than finding something else.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from sam3_jax.inputs.visual_prompts import VisualPrompt, as_point_labels, as_points
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances, visual_instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.types import ImageEmbedding, VisualMasks
from sam3_jax.utils.validation import is_whole

if TYPE_CHECKING:
  from sam3_jax.inference.predictor import Sam3


def mend_instance(
  model: "Sam3",
  embedding: ImageEmbedding,
  instances: Instances,
  identity: int,
  prompt: VisualPrompt,
  image_index: int | None = None,
) -> Instances:
  """The instances, the mask and the box of one of them as a visual prompt says.

  Args:
    model: with a head for visual prompts.
    embedding: encoded with `visual=True`.
    instances: of one prompt, from `Detections.instances`.
    identity: of the one to mend; one of `instances.ids`.
    prompt: points on it and off it, or a box; the instance's mask is added, unless there is one. A
      mask that becomes empty has a box without area.
    image_index: row of the embedding; None when it has one image.

  Raises:
    ValueError: no such identity, an image of another size than the instances', or as
      `Sam3.decode_visual`.
    TypeError: masks of whole pixels (of `generate_masks`), which have no logits, or what should be
      instances or a prompt is something else.
  """
  logits = _logits(instances)
  _check_prompt(prompt)
  (place,) = np.nonzero(instances.ids == identity)
  if not len(place):
    raise ValueError(f"there is no instance {identity}; there are {instances.ids.tolist()}.")
  if prompt.mask is None:
    prompt = dataclasses.replace(prompt, mask=logits[place[0]])
  found = model.decode_visual(embedding, prompt, image_index, multimask=False)
  _check_image(found, instances)
  changed, boxes = np.array(logits, np.float32), np.array(instances.boxes)
  changed[place[0]] = np.asarray(found.mask_logits[0, 0], np.float32)
  masks = Masks(changed, instances.masks.size)
  boxes[place[0]] = mask_to_box(masks[int(place[0])])
  return dataclasses.replace(instances, boxes=boxes, masks=masks)


def add_instance(
  model: "Sam3",
  embedding: ImageEmbedding,
  instances: Instances,
  prompt: VisualPrompt,
  image_index: int | None = None,
  *,
  identity: int | None = None,
) -> Instances:
  """The instances, and the one that a visual prompt points at, if it finds something.

  Args:
    model, embedding, instances, prompt, image_index: as for `mend_instance`.
    identity: of the new one; None for one more than the largest.

  Returns:
    The instances, best first: the new one's score is its quality as the model guesses it.

  Raises:
    ValueError: the identity is taken, or as `Sam3.decode_visual`.
  """
  logits = _logits(instances)
  _check_prompt(prompt)
  if identity is None:
    identity = int(instances.ids.max(initial=0)) + 1
  elif not is_whole(identity):
    raise ValueError(f"identity must be an integer; got {identity!r:.60}. None takes a new one.")
  elif identity in instances.ids:
    raise ValueError(f"identity {identity} is taken; there are {instances.ids.tolist()}.")
  found = model.decode_visual(embedding, prompt, image_index, multimask=prompt.leaves_doubt)
  _check_image(found, instances)
  (new,) = visual_instances(found, first_id=identity)
  grid = np.shape(found.mask_logits)[2:]
  both = Instances(
    ids=np.concatenate([instances.ids, new.ids]),
    scores=np.concatenate([instances.scores, new.scores]),
    boxes=np.concatenate([instances.boxes, new.boxes]),
    masks=Masks(
      np.concatenate([np.reshape(logits, (-1, *grid)), _logits(new)]), instances.masks.size
    ),
  )
  return both[np.argsort(-both.scores, kind="stable")]


def mend_by_clicks(
  model: "Sam3",
  embedding: ImageEmbedding,
  instances: Instances,
  points: Sequence[tuple[float, float]],
  labels: Sequence[int],
  image_index: int | None = None,
) -> Instances:
  """The instances as clicks mend them: each click goes to the instance that it is about.

  That is the best one whose mask it lies on; else, for a click with label 1, the one with the
  smallest box around it; else the one of the click before it, if its label is 0, or a new one.

  Args:
    model, embedding, instances, image_index: as for `mend_instance`.
    points: x, y in pixels of the image.
    labels: 1 for a click on the thing, 0 for one off it, one a point.

  Raises:
    ValueError: faulty points or labels, a click with label 0 that is about nothing, or as
      `Sam3.decode_visual`.
  """
  _logits(instances)
  points = as_points(points)
  labels = as_point_labels(labels, len(points))
  clicks: dict[int | None, list[int]] = {}  # of each instance; None of a new one
  owner: int | None = None
  for i, (point, label) in enumerate(zip(points, labels, strict=True)):
    hit = _owner(instances, point, label)
    if hit is None and not label and not clicks:
      raise ValueError(
        f"the click [{point[0]:g}, {point[1]:g}] with label 0 lies on no instance and follows no "
        "click; click on the thing first."
      )
    owner = hit if hit is not None or label else owner
    clicks.setdefault(owner, []).append(i)
  for owner, chosen in clicks.items():
    prompt = VisualPrompt([points[i] for i in chosen], [labels[i] for i in chosen])
    if owner is None:
      instances = add_instance(model, embedding, instances, prompt, image_index)
    else:
      instances = mend_instance(model, embedding, instances, owner, prompt, image_index)
  return instances


def _owner(instances: Instances, point: tuple[float, float], label: int) -> int | None:
  """Identity of the instance that a click is about, if it lies on one."""
  height, width = instances.masks.size
  column, row = min(int(point[0]), width - 1), min(int(point[1]), height - 1)
  inside = []
  for i, (x0, y0, x1, y1) in enumerate(instances.boxes.tolist()):
    # A mask may reach out of its box; looking there too would mean making every instance's mask.
    if x0 <= point[0] <= x1 and y0 <= point[1] <= y1:
      if instances.masks[i][row, column]:
        return int(instances.ids[i])
      inside.append(((x1 - x0) * (y1 - y0), i))
  return int(instances.ids[min(inside)[1]]) if inside and label else None


def _check_prompt(prompt: VisualPrompt) -> None:
  if not isinstance(prompt, VisualPrompt):
    raise TypeError(f"pass one VisualPrompt, VisualPrompt(points=[[x, y]]); got {prompt!r:.60}.")


def _check_image(found: VisualMasks, instances: Instances) -> None:
  """Raises ValueError unless the instances are of an image of the size of the prompt's."""
  size, own = tuple(np.asarray(found.sizes)[0].tolist()), tuple(instances.masks.size)
  if size != own:
    raise ValueError(
      f"the instances are of an image of {own[0]} x {own[1]} (height x width), and the prompt is "
      f"about an image of {size[0]} x {size[1]}: pass the image_index of the instances' image."
    )


def _logits(instances: Instances) -> Float[np.ndarray, "n Hm Wm"]:
  if not isinstance(instances, Instances):
    raise TypeError(
      f"instances must be those of one prompt, found.instances()[0]; got {type(instances)}."
    )
  if not isinstance(instances.masks, Masks):
    raise TypeError(
      f"masks of whole pixels have no logits to start from; got {instances.masks!r}. Take the "
      "instances of Detections.instances."
    )
  return np.asarray(instances.masks.logits)
