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
image's width and height inside the model. All of these are `flax.struct` pytrees: they stay on
the device, and can be mapped, sharded, sliced and saved.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from sam3_jax.utils.identity import Origin

SAVED_VERSION = "2"  # of the files of `SavedRows`; those of version 1 have no header


class Rows:
  """Slicing along the first axis."""

  def __getitem__(self, index) -> Self:
    """The rows that `index` (a slice, an integer array or a bool array) selects; the axis stays.

    Raises:
      TypeError: `index` is a single integer.
      IndexError: a row that does not exist, or bools that are not one a row.
    """
    if not isinstance(index, slice):
      if isinstance(index, list):
        index = np.asarray(index, None if index else int)
      if np.ndim(index) == 0:
        raise TypeError(
          f"use [{index}:{index + 1}] rather than [{index}]: the first axis must stay."
        )
      _check_index(index, len(self))
    return jax.tree.map(lambda array: array[index], self)

  def __len__(self) -> int:
    return jax.tree.leaves(self)[0].shape[0]


def _check_index(index: Any, rows: int) -> None:
  """JAX takes the last row for every row beyond the end, and says nothing."""
  if isinstance(index, Tracer):
    return
  values = np.asarray(index)
  if values.dtype == bool and values.shape != (rows,):
    raise IndexError(f"there are {rows} rows; got bools of shape {list(values.shape)}.")
  if values.dtype.kind in "iu" and values.size and not -rows <= values.min() <= values.max() < rows:
    wrong = values.max() if values.max() >= rows else values.min()
    raise IndexError(f"there is no row {wrong}: there are {rows}.")


class SavedRows(Rows):
  """Slicing, and saving: of pytrees of arrays, some of which may be None.

  A file has a header: its class, the version of the file format, and the checkpoint that made the
  arrays, if the class has an `origin`.
  """

  OPTIONAL: ClassVar[Mapping[str, type["SavedRows"] | None]] = {}  # None: a single array

  def save(self, path: str | Path) -> None:
    """Writes a safetensors file, bit for bit, any dtype."""
    from safetensors.flax import save_file

    leaves = jax.tree_util.tree_leaves_with_path(self)
    header = {"class": type(self).__name__, "format_version": SAVED_VERSION}
    if (origin := getattr(self, "origin", None)) is not None:
      header |= {"checkpoint": origin.identity, "checkpoint_name": origin.name}
    save_file(
      {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves},
      str(path),
      header,
    )

  @classmethod
  def load(cls, path: str | Path) -> Self:
    """Reads what `save` wrote.

    Warns (UserWarning) of a file of version 1 that does not name the checkpoint that made it.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else, or was written by a later version of sam3-jax.
    """
    from safetensors import SafetensorError, safe_open

    try:
      with safe_open(str(path), framework="flax") as file:
        header = file.metadata() or {}
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
      raise ValueError(f"{path} is not a file that {cls.__name__}.save wrote: {error}.") from error
    version = header.get("format_version", "1")
    if version not in ("1", SAVED_VERSION):
      raise ValueError(
        f"{path} is of format version {version!r:.20}, and this sam3-jax reads versions up to "
        f"{SAVED_VERSION}: update it, or save the file again."
      )
    names = cls._names()
    parts = {
      part: {part} if kind is None else kind._names(f"{part}.")
      for part, kind in cls.OPTIONAL.items()
    }
    there = {part: inner for part, inner in parts.items() if inner <= set(arrays)}
    if set(arrays) != names.union(*there.values()):
      raise ValueError(
        f"{path} holds {sorted(arrays)}, but {cls.__name__} has {sorted(names)}; "
        "load it with the class that saved it."
      )
    fields: dict[str, Any] = {name: arrays[name] for name in names}
    for part, inner in there.items():
      values = {name.removeprefix(f"{part}."): arrays[name] for name in inner}
      kind = cls.OPTIONAL[part]
      fields[part] = arrays[part] if kind is None else kind(**values)
    if "origin" in cls._fields():
      fields["origin"] = Origin(header.get("checkpoint", ""), header.get("checkpoint_name", ""))
    loaded = cls(**fields)
    return loaded if header else loaded._upgrade(path)

  def _upgrade(self, path: str | Path) -> Self:
    """What a file of version 1 holds, as version 2 would have it."""
    if "origin" in self._fields():
      warnings.warn(
        f"{path} does not name the checkpoint that made it, so decode cannot check that it is its "
        "own: encode again with this version of sam3-jax, and save.",
        stacklevel=3,
      )
    return self

  @classmethod
  def _fields(cls) -> dict[str, bool]:
    """Of all fields, whether they are arrays."""
    fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
    return {field.name: field.metadata.get("pytree_node", True) for field in fields}

  @classmethod
  def _names(cls, prefix: str = "") -> set[str]:
    """Of the arrays that a file must hold."""
    fields = (name for name, is_array in cls._fields().items() if is_array)
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
    sizes: height and width of the source image in pixels, after EXIF rotation.
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
    sizes: height and width of the source image in pixels, after EXIF rotation.
    visual: for visual prompts, if they were asked for; else None.
    origin: the checkpoint that made it, which alone may decode it; unknown for what the functional
      layer makes. No array: embeddings of different checkpoints cannot be concatenated.
  """

  OPTIONAL: ClassVar[Mapping[str, type[SavedRows] | None]] = {"visual": VisualEmbedding}

  fine: Float[Array, "B Hf Wf D"]
  middle: Float[Array, "B Hn Wn D"]
  coarse: Float[Array, "B H W D"]
  attended: Float[Array, "B H W D"]
  sizes: Int[Array, "B 2"]
  visual: VisualEmbedding | None = None
  origin: Origin = struct.field(pytree_node=False, default=Origin())


@struct.dataclass
class TextEmbedding(SavedRows):
  """Encoded phrases.

  Attributes:
    features: one vector a token.
    valid: False on padding.
    tokens: ids of the phrases, by which `decode` knows them; None for what the functional layer
      makes.
    origin: the checkpoint that made it, as in `ImageEmbedding`.
  """

  OPTIONAL: ClassVar[Mapping[str, type[SavedRows] | None]] = {"tokens": None}

  features: Float[Array, "P T D"]
  valid: Bool[Array, "P T"]
  tokens: Int[Array, "P T"] | None = None
  origin: Origin = struct.field(pytree_node=False, default=Origin())


@struct.dataclass
class Points(Rows):
  """Points inside a concept prompt (functional layer only; in the API a point is a visual prompt).

  Attributes:
    xy: x, y as fractions of the image's width and height.
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
    boxes: cxcywh as fractions of the image's width and height.
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
    boxes: xyxy, as fractions of the image; not clipped, so they may leave [0, 1].
    mask_logits: before the sigmoid, on the decoder's grid (288 x 288 for the released model).
    presence: logit that the image holds the concept at all.
    semantic_logits: of "this cell belongs to the concept", whichever instance.
    image_index: row of the embedding that the prompt was about.
    sizes: height and width of the source image, in pixels.
    ids: unique in an image within one decode call, over all its prompts; they begin at 1 again in
      the next call.
    mask_min_score: of a prompt without masks (all 0), the `min_score` that none of its scores
      exceeds; 0 for a prompt with masks. None if all prompts have masks.
  """

  OPTIONAL: ClassVar[Mapping[str, type[SavedRows] | None]] = {"mask_min_score": None}

  scores: Float[Array, "P K"]
  boxes: Float[Array, "P K 4"]
  mask_logits: Float[Array, "P K Hm Wm"]
  presence: Float[Array, " P"]
  semantic_logits: Float[Array, "P Hm Wm"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]
  ids: Int[Array, "P K"]
  mask_min_score: Float[Array, " P"] | None = None

  def _upgrade(self, path: str | Path) -> Self:
    """Files of version 1 do not say which prompts have no masks: those whose masks are all 0."""
    blank = ~np.array([np.asarray(logits).any() for logits in self.semantic_logits], bool)
    if not blank.any():
      return self
    best = np.maximum(np.asarray(self.scores, np.float32).max(axis=1), np.finfo(np.float32).tiny)
    return dataclasses.replace(self, mask_min_score=jnp.asarray(np.where(blank, best, 0)))


@struct.dataclass
class VisualPrompts(Rows):
  """Visual prompts as the model takes them: padded and normalised.

  Attributes:
    image: row of the embedding that the prompt is about.
    xy: points and corners of boxes, x and y as fractions of the image's width and height.
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
    sizes: height and width of the source image, in pixels.
  """

  mask_logits: Float[Array, "P K Hm Wm"]
  iou: Float[Array, "P K"]
  object_logit: Float[Array, " P"]
  image_index: Int[Array, " P"]
  sizes: Int[Array, "P 2"]

  def best(self) -> Self:
    """Each prompt's mask with the highest IoU, alone; ties to the first."""
    choice = self.iou.argmax(axis=1)[:, None]
    logits = jnp.take_along_axis(self.mask_logits, choice[:, :, None, None], axis=1)
    iou = jnp.take_along_axis(self.iou, choice, axis=1)
    return dataclasses.replace(self, mask_logits=logits, iou=iou)
