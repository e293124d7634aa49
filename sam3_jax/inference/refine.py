"""Refines instances of a concept by visual prompts: changes one by points, or adds one by a box.

All other instances, and every identity, stay as they are. The visual prompt starts from the
instance's own mask, so a point changes this mask instead of finding another object.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.visual_prompts import VisualPrompt, as_point_labels, as_points
from sam3_jax.ops.masks import mask_to_box
from sam3_jax.outputs.instances import Instances, visual_instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.types import ImageEmbedding, VisualMasks
from sam3_jax.utils.validation import is_whole


def refine_instance(
  model: Sam3,
  embedding: ImageEmbedding,
  instances: Instances,
  identity: int,
  prompt: VisualPrompt,
  image_index: int | None = None,
) -> Instances:
  """Replaces the mask and the box of one instance by those of a visual prompt.

  Args:
    model: with a head for visual prompts.
    embedding: encoded with `visual=True`.
    instances: of one prompt, from `Detections.instances`.
    identity: of the instance to refine, from `instances.ids`.
    prompt: points on and off the object, or a box. The instance's mask is added unless the prompt
      has one.
    image_index: row of the embedding; None if it has one image.

  Returns:
    The instances. An instance whose mask became empty has a box without area.

  Raises:
    ValueError: no such identity, an image of another size than the instances', or as
      `Sam3.decode_visual`.
    TypeError: an argument of the wrong type, or masks of `generate_masks`, which have no logits.
  """
  logits = _logits(instances)
  _check_prompt(prompt)
  (rows,) = np.nonzero(instances.ids == identity)
  if not len(rows):
    raise ValueError(f"there is no instance {identity}; there are {instances.ids.tolist()}.")
  row = int(rows[0])
  if prompt.mask is None:
    prompt = dataclasses.replace(prompt, mask=logits[row])
  found = model.decode_visual(embedding, prompt, image_index, multimask=False)
  _check_image(found, instances)
  changed, boxes = np.array(logits, np.float32), np.array(instances.boxes)
  changed[row] = np.asarray(found.mask_logits[0, 0], np.float32)
  masks = Masks(changed, instances.masks.size)
  boxes[row] = mask_to_box(masks[row])
  return dataclasses.replace(instances, boxes=boxes, masks=masks)


def add_instance(
  model: Sam3,
  embedding: ImageEmbedding,
  instances: Instances,
  prompt: VisualPrompt,
  image_index: int | None = None,
  *,
  identity: int | None = None,
) -> Instances:
  """Adds the object of a visual prompt, if the model finds one.

  Args:
    model, embedding, instances, prompt, image_index: as in `refine_instance`.
    identity: of the new instance; None for the largest plus 1.

  Returns:
    The instances, best first. The score of the new instance is its predicted IoU.

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
  found = model.decode_visual(embedding, prompt, image_index, multimask=prompt.is_ambiguous)
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


def refine_by_clicks(
  model: Sam3,
  embedding: ImageEmbedding,
  instances: Instances,
  points: Sequence[tuple[float, float]],
  labels: Sequence[int],
  image_index: int | None = None,
) -> Instances:
  """Refines instances by clicks, each of which applies to the instance under it.

  That is the best instance whose mask contains the click. If there is none, a positive click
  applies to the instance with the smallest box around it, or adds a new instance. A negative click
  then applies to the instance of the click before it.

  Args:
    model, embedding, instances, image_index: as in `refine_instance`.
    points: x, y in pixels of the image.
    labels: 1 for a positive click on the object, 0 for a negative click off it, one per point.

  Raises:
    ValueError: invalid points or labels, a negative click without an instance, or as
      `Sam3.decode_visual`.
  """
  _logits(instances)
  points = as_points(points)
  labels = as_point_labels(labels, len(points))
  clicks: dict[int | None, list[int]] = {}  # by instance; None is a new instance
  owner: int | None = None
  for i, (point, label) in enumerate(zip(points, labels, strict=True)):
    hit = _owner(instances, point, label)
    if hit is None and not label and not clicks:
      raise ValueError(
        f"the click [{point[0]:g}, {point[1]:g}] with label 0 is on no instance and follows no "
        "click; click on the object first."
      )
    owner = hit if hit is not None or label else owner
    clicks.setdefault(owner, []).append(i)
  for owner, chosen in clicks.items():
    prompt = VisualPrompt([points[i] for i in chosen], [labels[i] for i in chosen])
    if owner is None:
      instances = add_instance(model, embedding, instances, prompt, image_index)
    else:
      instances = refine_instance(model, embedding, instances, owner, prompt, image_index)
  return instances


def _owner(instances: Instances, point: tuple[float, float], label: int) -> int | None:
  """Identity of the instance that a click applies to; None if there is none."""
  height, width = instances.masks.size
  column, row = min(int(point[0]), width - 1), min(int(point[1]), height - 1)
  around = []
  for i, (x0, y0, x1, y1) in enumerate(instances.boxes.tolist()):
    # A mask may extend beyond its box; to look there would compute every instance's mask.
    if x0 <= point[0] <= x1 and y0 <= point[1] <= y1:
      if instances.masks[i][row, column]:
        return int(instances.ids[i])
      around.append(((x1 - x0) * (y1 - y0), i))
  return int(instances.ids[min(around)[1]]) if around and label else None


def _check_prompt(prompt: VisualPrompt) -> None:
  if not isinstance(prompt, VisualPrompt):
    raise TypeError(f"pass one VisualPrompt, VisualPrompt(points=[[x, y]]); got {prompt!r:.60}.")


def _check_image(found: VisualMasks, instances: Instances) -> None:
  """Raises ValueError unless the image of the prompt has the size of the instances' image."""
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
      f"these masks have no logits to start from; got {instances.masks!r}. Take the instances of "
      "Detections.instances."
    )
  return np.asarray(instances.masks.logits)
