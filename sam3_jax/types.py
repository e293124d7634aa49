"""The pytrees at the joints of the model, and the glossary of dimension letters.

  B  images                  T  text tokens (32)          H, W  cells of a grid
  P  prompts                 N  boxes of a prompt         Hm, Wm  cells of a mask
  Q  queries (200)           S  prompt tokens, T + N + 1  L  layers
  K  kept queries, masks     D  width (256)               M  points of a prompt
  C  channels of any layer   A, I, J  rows, queries, keys of an attention
  G  geometry tokens, N + 1  Hi, Wi, Hf, Wf, Hn, Wn  pixels; cells of the fine and the middle map

One letter means one thing everywhere; Q1 is Q + 1, H2 and C2 are what a layer makes of H and C, and
P2, P3 and A2 are P or A, or one row that serves all. `training.batch` adds letters of its own.
Boxes are xyxy or cxcywh as each name or docstring says, x before y, and always fractions of the
picture's width and height inside the model. All of these are `flax.struct` pytrees: they stay on
the device, and can be mapped, sharded, sliced and saved.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

if TYPE_CHECKING:
  from sam3_jax.masks import Masks
  from sam3_jax.postprocess import Instances


class Rows:
  """Slicing along the first axis."""

  def __getitem__(self, index) -> Self:
    """The rows that `index` (a slice, or an integer array) selects; the axis stays."""
    if not isinstance(index, slice) and np.ndim(index) == 0:
      raise TypeError(f"use [{index}:{index + 1}] rather than [{index}]: the first axis must stay.")
    return jax.tree.map(lambda array: array[index], self)

  def __len__(self) -> int:
    return jax.tree.leaves(self)[0].shape[0]


class SavedRows(Rows):
  """Slicing, and saving: of pytrees of arrays, some of which (`OPTIONAL`) may be None."""

  OPTIONAL: ClassVar[dict[str, type["SavedRows"]]] = {}

  def save(self, path: str | Path) -> None:
    """Writes a safetensors file, bit for bit, any dtype."""
    from safetensors.flax import save_file

    leaves = jax.tree_util.tree_leaves_with_path(self)
    save_file(
      {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves},
      str(path),
    )

  @classmethod
  def load(cls, path: str | Path) -> Self:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else.
    """
    from safetensors import SafetensorError
    from safetensors.flax import load_file

    try:
      arrays = load_file(str(path))
    except SafetensorError as error:
      raise ValueError(f"{path} is not a file that {cls.__name__}.save wrote: {error}.") from error
    names = cls._names()
    parts = {part: kind._names(f"{part}.") for part, kind in cls.OPTIONAL.items()}
    there = {part: inner for part, inner in parts.items() if inner <= set(arrays)}
    if set(arrays) != names.union(*there.values()):
      raise ValueError(
        f"{path} holds {sorted(arrays)}, but {cls.__name__} has {sorted(names)}; "
        "load it with the class that saved it."
      )
    fields: dict[str, Any] = {name: arrays[name] for name in names}
    for part, inner in there.items():
      values = {name.removeprefix(f"{part}."): arrays[name] for name in inner}
      fields[part] = cls.OPTIONAL[part](**values)
    return cls(**fields)

  @classmethod
  def _names(cls, prefix: str = "") -> set[str]:
    """Of the arrays that a file must hold."""
    fields = (field.name for field in dataclasses.fields(cls))  # pyright: ignore[reportArgumentType]
    return {prefix + name for name in fields if name not in cls.OPTIONAL}


@struct.dataclass
class VisualEmbedding(SavedRows):
  """What visual prompts (points, boxes, masks) are decoded against: the second neck's maps.

  Attributes:
    fine: for masks; 4 times the trunk's grid, D / 8 channels.
    middle: for masks; 2 times the grid, D / 4 channels.
    coarse: the grid itself; what the prompts attend to.
  """

  fine: Float[Array, "B Hf Wf C"]
  middle: Float[Array, "B Hn Wn C2"]
  coarse: Float[Array, "B H W D"]


@struct.dataclass
class ImageMaps(Rows):
  """What trunk and neck make of images.

  Attributes:
    fine: 4 times the trunk's grid (288 x 288 for the released model).
    middle: 2 times the grid.
    coarse: the grid itself (72 x 72).
    sizes: height and width of the source picture in pixels, after EXIF rotation.
  """

  fine: Float[Array, "B Hf Wf D"]
  middle: Float[Array, "B Hn Wn D"]
  coarse: Float[Array, "B H W D"]
  sizes: Int[Array, "B 2"]


@struct.dataclass
class ImageEmbedding(SavedRows):
  """What `encode` makes of images, once: all that depends on no prompt. Prompts are decoded against
  it.

  Attributes:
    fine: the fine map's part in the masks' last convolution.
    middle: the middle map's part in the one before.
    coarse: the coarse map; what example boxes look at.
    attended: the coarse map after the fusion encoder's first self-attention.
    sizes: height and width of the source picture in pixels, after EXIF rotation.
    visual: for visual prompts, if they were asked for; else None.
  """

  OPTIONAL: ClassVar[dict[str, type[SavedRows]]] = {"visual": VisualEmbedding}

  fine: Float[Array, "B Hf Wf D"]
  middle: Float[Array, "B Hn Wn D"]
  coarse: Float[Array, "B H W D"]
  attended: Float[Array, "B H W D"]
  sizes: Int[Array, "B 2"]
  visual: VisualEmbedding | None = None


@struct.dataclass
class TextEmbedding(SavedRows):
  """Encoded phrases.

  Attributes:
    features: one vector a token.
    valid: False on padding.
  """

  features: Float[Array, "P T D"]
  valid: Bool[Array, "P T"]


@struct.dataclass
class Points(Rows):
  """Points inside a concept prompt (functional layer only; in the API a point is a visual prompt).

  Attributes:
    xy: x, y as fractions of the picture's width and height.
    positive: True on an example, False on a counterexample.
    valid: False on padding, wherever it stands.
  """

  xy: Float[Array, "P M 2"]
  positive: Bool[Array, "P M"]
  valid: Bool[Array, "P M"]


@struct.dataclass
class Prompts(Rows):
  """Concept prompts as the model takes them: padded, normalised, encoded.

  Attributes:
    image: row of the embedding that the prompt is about.
    first_id: identity of the prompt's query 0; query q has identity first_id + q.
    text: of the phrase; of the word "visual" for a prompt of boxes alone.
    boxes: cxcywh as fractions of the picture's width and height.
    positive: True on an example, False on a counterexample.
    valid: False on padding, wherever it stands.
    points: None, or points beside the boxes.
  """

  image: Int[Array, " P"]
  first_id: Int[Array, " P"]
  text: TextEmbedding
  boxes: Float[Array, "P N 4"]
  positive: Bool[Array, "P N"]
  valid: Bool[Array, "P N"]
  points: Points | None = None


@struct.dataclass
class Predictions:
  """Every decoder layer's raw prediction, and the last one's masks: what training needs.

  Attributes:
    logits: of the queries, clamped to +-12; without presence.
    boxes: cxcywh as fractions, not clipped.
    presence: logit that the image holds the concept at all.
    mask_logits: before the sigmoid, of the last layer.
    semantic_logits: of "this cell belongs to the concept", whichever instance.
    cell_logits: of the cells of the coarse map, scored as if they were queries; for a loss that
      no reference has.
  """

  logits: Float[Array, "L P Q"]
  boxes: Float[Array, "L P Q 4"]
  presence: Float[Array, "L P"]
  mask_logits: Float[Array, "P Q Hm Wm"]
  semantic_logits: Float[Array, "P Hm Wm"]
  cell_logits: Float[Array, "P HW"]


@struct.dataclass
class Scored(Rows):
  """Detections whose masks have not been made, and what those are made of.

  Attributes:
    scores, boxes, presence, image_index, sizes, ids: as in `Detections`.
    states: of the kept queries.
    memory: the coarse map, conditioned on the prompt.
    prompt: tokens of phrase and example boxes.
    valid: False on padding among them.
  """

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  presence: Float[Array, " P"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]
  ids: Int[Array, "P K"]
  states: Float[Array, "P K D"]
  memory: Float[Array, "P H W D"]
  prompt: Float[Array, "P S D"]
  valid: Bool[Array, "P S"]


@struct.dataclass
class Detections(SavedRows):
  """Every query's prediction, before any threshold; one row a prompt.

  Attributes:
    scores: sigmoid(query logit) * sigmoid(presence logit), in [0, 1].
    boxes: xyxy, as fractions of the picture; not clipped, so they may leave [0, 1].
    mask_logits: before the sigmoid, on the decoder's grid (288 x 288 for the released model).
    presence: logit that the image holds the concept at all.
    semantic_logits: of "this cell belongs to the concept", whichever instance.
    image_index: row of the embedding that the prompt was about.
    sizes: height and width of the source picture, in pixels.
    ids: unique in an image within one decode call, over all its prompts.
  """

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  mask_logits: Float[Array, "P K Hm Wm"]
  presence: Float[Array, " P"]
  semantic_logits: Float[Array, "P Hm Wm"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]
  ids: Int[Array, "P K"]

  def instances(self, threshold=0.5) -> "list[Instances]":
    """The instances that score above `threshold`; see `sam3_jax.postprocess.instances`."""
    from sam3_jax import postprocess  # a method for the user's sake: it uses what stands above

    return postprocess.instances(self, threshold)


@struct.dataclass
class VisualPrompts(Rows):
  """Visual prompts as the model takes them: padded and normalised.

  Attributes:
    image: row of the embedding that the prompt is about.
    xy: points and corners of boxes, x and y as fractions of the picture's width and height.
    labels: 1 on the object, 0 off it, 2 and 3 a box's first and last corner, -1 padding, wherever
      it stands.
    mask: logits of an earlier decoding, in [-32, 32]; None if no prompt has one.
    has_mask: False where `mask` is padding; None with it.
  """

  image: Int[Array, " P"]
  xy: Float[Array, "P M 2"]
  labels: Int[Array, "P M"]
  mask: Float[Array, "P Hm Wm"] | None = None
  has_mask: Bool[Array, " P"] | None = None


@struct.dataclass
class VisualPredictions(Rows):
  """All of a visual prompt's predictions: what training needs.

  The first of the K masks answers a prompt that leaves no doubt; the others are readings of one
  that does.

  Attributes:
    mask_logits: before the sigmoid.
    iou: of each mask with the object that was meant, as the model guesses it, in [0, 1].
    object_logit: that there is an object at all.
    tokens: of the masks, after the decoder.
  """

  mask_logits: Float[Array, "P K Hm Wm"]
  iou: Float[Array, "P K"]
  object_logit: Float[Array, " P"]
  tokens: Float[Array, "P K D"]


@struct.dataclass
class VisualMasks(SavedRows):
  """What visual prompts point at; one row a prompt.

  Attributes:
    mask_logits: before the sigmoid, on the decoder's grid (288 x 288 for the released model). Any
      of them can be the mask of the next prompt.
    iou: of each mask with the object that was meant, as the model guesses it, in [0, 1].
    object_logit: that there is an object at all.
    image_index: row of the embedding that the prompt was about.
    sizes: height and width of the source picture, in pixels.
  """

  mask_logits: Float[Array, "P K Hm Wm"]
  iou: Float[Array, "P K"]
  object_logit: Float[Array, " P"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]

  def best(self) -> "VisualMasks":
    """Each prompt's mask with the highest IoU, alone; ties to the first."""
    choice = self.iou.argmax(axis=1)[:, None]
    logits = jnp.take_along_axis(self.mask_logits, choice[:, :, None, None], axis=1)
    iou = jnp.take_along_axis(self.iou, choice, axis=1)
    return dataclasses.replace(self, mask_logits=logits, iou=iou)

  def masks(self, hole_area: int = 0) -> "list[Masks]":
    """Each prompt's K masks over the source picture; see `sam3_jax.postprocess.visual_masks`."""
    from sam3_jax import postprocess

    return postprocess.visual_masks(self, hole_area)

  def instances(self) -> "list[Instances]":
    """Each prompt's best mask, as `Detections.instances` has those of a concept; see
    `sam3_jax.postprocess.visual_instances`."""
    from sam3_jax import postprocess

    return postprocess.visual_instances(self)
