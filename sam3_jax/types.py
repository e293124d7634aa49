"""The pytrees that the parts of the model pass to each other, and the meaning of dimension letters.

  B  images                  T  text tokens (32)          H, W  cells of a grid
  P  prompts                 N  boxes of a prompt         Hm, Wm  cells of a mask
  Q  queries (200)           S  prompt tokens, T + N + 1  L  layers
  K  kept queries, masks     D  width (256)               M  points of a prompt
  C  channels of any layer   A, I, J  batch, queries and keys of an attention
  G  geometry tokens, N + 1  Hi, Wi, Hf, Wf, Hn, Wn  pixels; cells of the fine and the middle map
  O  tracked objects         F  remembered frames       E  object pointers, or their tokens
  U  exemplars of a concept, encoded in other images

A letter has the same meaning everywhere. Q1 is Q + 1; H2 and C2 are a layer's output sizes where H
and C are its input sizes; P2, P3 and A2 equal P or A, or are 1 and broadcast. `training.batch`
defines more letters. Boxes are xyxy or cxcywh as the name or docstring says, x before y, and inside
the model always fractions of the image's width and height. All classes are `flax.struct` pytrees:
they stay on the device, and can be mapped, sharded, sliced and saved.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.utils.identity import Origin
from sam3_jax.utils.pytrees import Saveable, Sliceable


@struct.dataclass
class VisualEmbedding(Saveable):
  """The second neck's maps, against which visual prompts (points, boxes, masks) are decoded.

  Attributes:
    fine: for masks; 4 times the trunk's grid, D / 8 channels.
    middle: for masks; 2 times the grid, D / 4 channels.
    coarse: the grid itself; the prompts attend to it.
  """

  fine: Float[Array, "B Hf Wf C"]
  middle: Float[Array, "B Hn Wn C2"]
  coarse: Float[Array, "B H W D"]


@struct.dataclass
class ImageMaps(Sliceable):
  """The output of trunk and neck.

  Attributes:
    fine: 4 times the trunk's grid (288 x 288 for the released model).
    middle: 2 times the grid.
    coarse: the grid itself (72 x 72).
    sizes: height and width of the source image in pixels, after EXIF rotation.
  """

  fine: Float[Array, "B Hf Wf D"]
  middle: Float[Array, "B Hn Wn D"]
  coarse: Float[Array, "B H W D"]
  sizes: Int[Array, "B 2"]


@struct.dataclass
class ImageEmbedding(Saveable):
  """Encoded images: everything that does not depend on the prompt, computed once per image.

  Attributes:
    fine: the mask head's last convolution applied to the fine map.
    middle: the mask head's first convolution applied to the middle map.
    coarse: the coarse map, from which exemplar boxes pool their features.
    attended: the coarse map after the fusion encoder's first self-attention.
    sizes: height and width of the source image in pixels, after EXIF rotation.
    visual: for visual prompts; None if `encode` was called without `visual=True`.
    origin: the checkpoint that made it; no other checkpoint may decode it. Unknown in the
      functional layer. Not an array: embeddings of different checkpoints cannot be concatenated.
  """

  OPTIONAL: ClassVar[Mapping[str, type[Saveable] | None]] = {"visual": VisualEmbedding}

  fine: Float[Array, "B Hf Wf D"]
  middle: Float[Array, "B Hn Wn D"]
  coarse: Float[Array, "B H W D"]
  attended: Float[Array, "B H W D"]
  sizes: Int[Array, "B 2"]
  visual: VisualEmbedding | None = None
  origin: Origin = struct.field(pytree_node=False, default=Origin())


@struct.dataclass
class TextEmbedding(Saveable):
  """Encoded phrases.

  Attributes:
    features: one vector per token.
    valid: False on padding.
    tokens: token ids, by which `decode` recognises the phrases; None in the functional layer.
    origin: the checkpoint that made it, as in `ImageEmbedding`.
  """

  OPTIONAL: ClassVar[Mapping[str, type[Saveable] | None]] = {"tokens": None}

  features: Float[Array, "P T D"]
  valid: Bool[Array, "P T"]
  tokens: Int[Array, "P T"] | None = None
  origin: Origin = struct.field(pytree_node=False, default=Origin())


@struct.dataclass
class Points(Sliceable):
  """Points of a concept prompt (functional layer only; in the API a point is a visual prompt).

  Attributes:
    xy: x, y as fractions of the image's width and height.
    positive: True for a point on an instance, False for a negative point.
    valid: False on padding, which may be anywhere.
  """

  xy: Float[Array, "P M 2"]
  positive: Bool[Array, "P M"]
  valid: Bool[Array, "P M"]


@struct.dataclass
class Exemplars(Sliceable):
  """Exemplars that were encoded in other images (`Concept`), padded.

  Attributes:
    tokens: of boxes, before they attend to an image.
    valid: False on padding, which may be anywhere.
  """

  tokens: Float[Array, "P U D"]
  valid: Bool[Array, "P U"]


@struct.dataclass
class Prompts(Sliceable):
  """Concept prompts as the model takes them: padded, normalized, encoded.

  Attributes:
    image: index of the prompt's image in the embedding.
    first_id: id of the prompt's query 0; query q has id first_id + q.
    text: the encoded phrase; for a prompt with boxes only, the encoded word "visual".
    boxes: exemplar boxes, cxcywh as fractions of the image's width and height.
    positive: True for a positive box, False for a negative one.
    valid: False on padding, which may be anywhere.
    points: points in addition to the boxes, or None.
    exemplars: of other images in addition to the boxes, or None.
  """

  image: Int[Array, " P"]
  first_id: Int[Array, " P"]
  text: TextEmbedding
  boxes: Float[Array, "P N 4"]
  positive: Bool[Array, "P N"]
  valid: Bool[Array, "P N"]
  points: Points | None = None
  exemplars: Exemplars | None = None


@struct.dataclass
class DetectorOutput:
  """The raw output of every decoder layer, and the masks of the last one; used in training.

  Attributes:
    logits: of the queries, clamped to +-12; not multiplied by the presence score.
    boxes: cxcywh as fractions, not clipped.
    presence_logit: whether the image contains the concept at all.
    mask_logits: of the last layer, before the sigmoid.
    semantic_logits: whether a cell belongs to any instance of the concept.
    cell_logits: of the coarse map's cells, scored as if they were queries; used in a loss that no
      reference implementation has.
  """

  logits: Float[Array, "L P Q"]
  boxes: Float[Array, "L P Q 4"]
  presence_logit: Float[Array, "L P"]
  mask_logits: Float[Array, "P Q Hm Wm"]
  semantic_logits: Float[Array, "P Hm Wm"]
  cell_logits: Float[Array, "P HW"]


@struct.dataclass
class ScoredQueries(Sliceable):
  """Scored queries before their masks are computed, with the inputs of the mask head.

  Attributes:
    scores, boxes, presence_logit, image_index, sizes, ids: as in `Detections`.
    states: decoder states of the kept queries.
    memory: the coarse map, conditioned on the prompt.
    prompt: tokens of the phrase and the exemplar boxes.
    valid: False on padding tokens.
  """

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  presence_logit: Float[Array, " P"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]
  ids: Int[Array, "P K"]
  states: Float[Array, "P K D"]
  memory: Float[Array, "P H W D"]
  prompt: Float[Array, "P S D"]
  valid: Bool[Array, "P S"]


@struct.dataclass
class Detections(Saveable):
  """The predictions of all queries, before any threshold; the first axis is the prompt.

  Attributes:
    scores: sigmoid(query logit) * sigmoid(presence logit), in [0, 1].
    boxes: xyxy, as fractions of the image; not clipped, so they may leave [0, 1].
    mask_logits: before the sigmoid, on the decoder's grid (288 x 288 for the released model).
    presence_logit: whether the image contains the concept at all.
    semantic_logits: whether a cell belongs to any instance of the concept.
    image_index: index of the prompt's image in the embedding.
    sizes: height and width of the source image, in pixels.
    ids: unique per image within one decode call, over all its prompts; each call starts at 1.
    mask_min_score: the `min_score` of `decode` for a prompt whose scores all stay at or below it
      and which therefore has no masks (all 0); 0 for a prompt with masks. None if all have masks.
  """

  RENAMED: ClassVar[Mapping[str, str]] = {"presence": "presence_logit"}
  OPTIONAL: ClassVar[Mapping[str, type[Saveable] | None]] = {"mask_min_score": None}

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  mask_logits: Float[Array, "P K Hm Wm"]
  presence_logit: Float[Array, " P"]
  semantic_logits: Float[Array, "P Hm Wm"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]
  ids: Int[Array, "P K"]
  mask_min_score: Float[Array, " P"] | None = None

  def _upgrade(self, path: str | Path) -> Self:
    """Marks the prompts without masks, which files of version 1 do not: their masks are all 0."""
    blank = ~np.array([np.asarray(logits).any() for logits in self.semantic_logits], bool)
    if not blank.any():
      return self
    best = np.maximum(np.asarray(self.scores, np.float32).max(axis=1), np.finfo(np.float32).tiny)
    return dataclasses.replace(self, mask_min_score=jnp.asarray(np.where(blank, best, 0)))


@struct.dataclass
class VisualPrompts(Sliceable):
  """Visual prompts as the model takes them: padded and normalized.

  Attributes:
    image: index of the prompt's image in the embedding.
    xy: points and corners of boxes, x and y as fractions of the image's width and height.
    labels: 1 for a point on the object, 0 for a point off it, 2 and 3 for a box's first and last
      corner, -1 for padding, which may be anywhere.
    mask: logits of an earlier decoding, in [-32, 32]; None if no prompt has one.
    has_mask: False where `mask` is padding; None if `mask` is None.
  """

  image: Int[Array, " P"]
  xy: Float[Array, "P M 2"]
  labels: Int[Array, "P M"]
  mask: Float[Array, "P Hm Wm"] | None = None
  has_mask: Bool[Array, " P"] | None = None


@struct.dataclass
class VisualHeadOutput(Sliceable):
  """The raw output for visual prompts; used in training.

  The first of the K masks is the single-mask output, for unambiguous prompts; the others are the
  multimask outputs, for ambiguous ones.

  Attributes:
    mask_logits: before the sigmoid.
    iou: the model's estimate of each mask's IoU with the intended object, in [0, 1].
    object_logit: whether there is an object at all.
    tokens: mask tokens after the decoder.
  """

  mask_logits: Float[Array, "P K Hm Wm"]
  iou: Float[Array, "P K"]
  object_logit: Float[Array, " P"]
  tokens: Float[Array, "P K D"]


@struct.dataclass
class VisualMasks(Saveable):
  """The masks of visual prompts; the first axis is the prompt.

  Attributes:
    mask_logits: before the sigmoid, on the decoder's grid (288 x 288 for the released model). Each
      can be the mask prompt of the next call.
    iou: the model's estimate of each mask's IoU with the intended object, in [0, 1].
    object_logit: whether there is an object at all.
    image_index: index of the prompt's image in the embedding.
    sizes: height and width of the source image, in pixels.
  """

  mask_logits: Float[Array, "P K Hm Wm"]
  iou: Float[Array, "P K"]
  object_logit: Float[Array, " P"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]

  def best(self) -> Self:
    """Keeps each prompt's mask with the highest IoU; the first one of equals."""
    choice = self.iou.argmax(axis=1)[:, None]
    logits = jnp.take_along_axis(self.mask_logits, choice[:, :, None, None], axis=1)
    iou = jnp.take_along_axis(self.iou, choice, axis=1)
    return dataclasses.replace(self, mask_logits=logits, iou=iou)


@struct.dataclass
class Remembered:
  """What tracked objects have of earlier frames; without the first axis, what one object has.

  Attributes:
    memory: memories of frames, cell by cell.
    code: position codes of the frames in time.
    valid: False on padding.
    token: object pointers, cut into tokens.
    token_code: their position codes in time.
    token_valid: False on padding.
  """

  memory: Float[Array, "*O F HW C"]
  code: Float[Array, "*O F C"]
  valid: Bool[Array, "*O F"]
  token: Float[Array, "*O E C"]
  token_code: Float[Array, "*O E C"]
  token_valid: Bool[Array, "*O E"]
