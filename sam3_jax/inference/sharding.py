"""Where inference runs: a mesh with the axes `data` and `model`, and the model's programs on it.

Rows (images, prompts) are shared out over all devices of a mesh, and each device answers prompts
about the images it holds: with whole parameters nothing crosses between devices at all. That
takes `jax.shard_map`: under jit alone, the walk over heads in `ops.attention` would gather what is
cut (108 all-gathers in one window attention, as XLA compiles it for four chips of v6e).

Where there are fewer prompts than devices, those of a group of `model` can share the work on one:
the fusion encoder's tokens, three fifths of a prompt's operations. Each of its layers but the first
then brings the tokens together once (2.7 MB in bfloat16 for the released model), as does its end.

The rest of a prompt is computed whole on each device of a group. Attention of queries to cells is a
twentieth of a prompt's time on v6e (by its compiler's estimates): cut by cells it would need an
all-reduce in each of six layers, of 0.2 MB of partial sums in float32 and the softmax's statistics.
The masks are two fifths: cut by rows, their convolutions would need their neighbours' rows, and the
masks of a prompt (17 MB of 100) would be brought together at the end, as many bytes as all of
fusion moves.

Parameters are whole everywhere, or cut along `model` by rules: the devices of a group of `model`
then keep one copy between them, and bring it together when a program starts.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import VisualHead, select_masks, single_mask
from sam3_jax.types import (
  Detections,
  ImageEmbedding,
  Prompts,
  ScoredQueries,
  VisualEmbedding,
  VisualPrompts,
)

AXES = ("data", "model")

# Where a parameter is cut: a pattern for all of its path, and the axes, of which only `model` makes
# sense. The first that fits counts.
Rules = Sequence[tuple[str, P]]
WHOLE: Rules = ((r".*", P()),)
# The kernels of trunk and text encoder, most of the parameters, by their outputs.
BY_OUTPUTS: Rules = (
  (r"trunk/groups/windowed/.*/kernel", P(None, None, None, "model")),
  (r"(trunk/groups/global|text/blocks)/.*/kernel", P(None, None, "model")),
  *WHOLE,
)


def make_mesh(devices: Sequence[Any] | None = None, model: int = 1) -> Mesh:
  """This process's devices, or the given ones, `model` of them to a group of that axis.

  Other processes have meshes of their own: nothing of theirs is waited for.

  Raises:
    ValueError: the devices cannot be grouped so.
  """
  return mesh_of(jax.local_devices() if devices is None else devices, AXES, model)


def mesh_of(devices: Sequence[Any], axes: tuple[str, str], size: int) -> Mesh:
  """A mesh of devices, `size` of them to a group of the second axis.

  Raises:
    ValueError: they cannot be grouped so.
  """
  if size < 1 or len(devices) % size:
    raise ValueError(
      f"{axes[1]} must divide the number of devices, {len(devices)}; got {size}. Use 1 for none."
    )
  grid = np.asarray(devices).reshape(-1, size)
  return Mesh(grid, axes, axis_types=(AxisType.Auto, AxisType.Auto))


def whole(mesh: Mesh) -> NamedSharding:
  """The same on every device."""
  return NamedSharding(mesh, P())


def by_rows(mesh: Mesh) -> NamedSharding:
  """The first axis over all devices, in the mesh's order."""
  return NamedSharding(mesh, P(AXES))


def by_groups(mesh: Mesh) -> NamedSharding:
  """The first axis over `data`, the same on all devices of a group of `model`."""
  return NamedSharding(mesh, P("data"))


def parameter_sharding(
  mesh: Mesh, rules: Rules = WHOLE
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
  """A function of a parameter's path and shape, as `checkpoint.load` takes it.

  Raises:
    ValueError: (the function) no rule fits, or the axis that one cuts cannot be cut.
  """

  def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
    spec = next((spec for pattern, spec in rules if re.fullmatch(pattern, path)), None)
    if spec is None:
      raise ValueError(f"no rule says where the parameter {path} goes; end the rules with '.*'.")
    for axis, name in enumerate(spec):
      if name is not None and (axis >= len(shape) or shape[axis] % mesh.shape[name]):
        raise ValueError(
          f"the parameter {path}, {list(shape)}, cannot be cut by {spec} into {mesh.shape[name]} "
          "pieces; change the rule, or the mesh."
        )
    return NamedSharding(mesh, spec)

  return sharding


def place(mesh: Mesh, params: Any, rules: Rules = WHOLE) -> Any:
  """Parameters on a mesh, or how they will lie there; what lies there already stays."""
  sharding = parameter_sharding(mesh, rules)

  def put(keys: Any, x: Any) -> Any:
    placed = sharding("/".join(key.key for key in keys), x.shape)
    if isinstance(x, jax.ShapeDtypeStruct):
      return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)
    return jax.device_put(x, placed)

  return jax.tree_util.tree_map_with_path(put, params)


# Of parameters, square pixels u8[B, Hi, Wi, 3], and height and width of the sources i32[B, 2].
Encode = Callable[[Any, Any, Any], Any]
# Of parameters, embedding, prompts, and static `max_detections`. On a mesh `prompts.image` counts
# the rows of the embedding on the prompt's own device.
Detect = Callable[[Any, ImageEmbedding, Prompts, int | None], Any]
# Of parameters, embedding and any rows of what was scored, whose `image_index` counts likewise.
Mask = Callable[[Any, ImageEmbedding, ScoredQueries], Detections]
# Of parameters that have a part `visual`, and the trunk's map.
EncodeVisual = Callable[[Any, Array], VisualEmbedding]
# Of the same, embedding, prompts, and static `multimask`: mask logits, their IoU, object logit. The
# embedding may have one row a device, which serves all prompts there.
DecodeVisual = Callable[[Any, VisualEmbedding, VisualPrompts, bool], tuple[Array, Array, Array]]
# Of the same, and for each prompt whether it leaves doubt, bool[P]: its best mask alone.
AnswerVisual = Callable[[Any, VisualEmbedding, VisualPrompts, Any], tuple[Array, Array, Array]]


def image_encoder(
  detector: Detector,
  mesh: Mesh | None = None,
  rules: Rules = WHOLE,
  keep: Callable[[ImageEmbedding, Array], Any] = lambda embedding, features: embedding,
) -> Encode:
  """The jitted program that encodes images; on a mesh, as many rows as its devices divide.

  Args:
    detector, mesh, rules: the model and where it runs.
    keep: says what is wanted of the embedding and the trunk's map.
  """

  def encode_image(params, pixels, sizes):
    images = normalize(pixels)
    variables = {"params": params}
    both: Any = detector.apply(variables, images, sizes, method=Detector.encode_and_keep)
    return keep(*both)

  return jax.jit(_over_rows(encode_image, mesh, rules))


def prompt_decoder(
  detector: Detector,
  mesh: Mesh | None = None,
  rules: Rules = WHOLE,
  keep: Callable[[Detections], Any] = lambda found: found,
  split: bool = False,
) -> Detect:
  """The jitted program that decodes prompts, each on the device that holds its image.

  Args:
    detector, mesh, rules: the model and where it runs.
    keep: says what of the result is wanted; what is not is not computed either.
    split: rows are shared out over `data` alone (`by_groups`), and the devices of a group of
      `model` share the work on each.
  """

  def detect(detector: Detector, *rows: Any) -> Any:
    found: Any = detector.detect(*rows)
    return keep(found)

  return _asked(detector, detect, mesh, rules, split)


def prompt_scorer(
  detector: Detector, mesh: Mesh | None = None, rules: Rules = WHOLE, split: bool = False
) -> Detect:
  """As `prompt_decoder`, without the masks."""
  return _asked(detector, Detector.score, mesh, rules, split)


def mask_maker(
  detector: Detector, mesh: Mesh | None = None, rules: Rules = WHOLE, split: bool = False
) -> Mask:
  """The jitted program that makes the masks of what a `prompt_scorer` found."""
  detector, axes = _sharing(detector, split)

  def mask(params, embedding, scored):
    return detector.apply({"params": params}, embedding, scored, method=Detector.mask)

  return jax.jit(_over_rows(mask, mesh, rules, axes))


def visual_encoder(
  head: VisualHead, mesh: Mesh | None = None, rules: Rules = WHOLE
) -> EncodeVisual:
  """The jitted program that makes the trunk's maps ready for visual prompts."""

  def encode_visual(params, features):
    return head.apply({"params": params["visual"]}, features, method=VisualHead.encode)

  return jax.jit(_over_rows(encode_visual, mesh, rules))


def visual_decoder(
  head: VisualHead, mesh: Mesh | None = None, rules: Rules = WHOLE
) -> DecodeVisual:
  """The jitted program that decodes visual prompts, each on the device that holds its image."""

  def decode_visual(params, embedding, prompts, multimask):
    def apply(params, *rows):
      found: Any = head.apply({"params": params["visual"]}, *rows, method=VisualHead.detect)
      return *select_masks(found, multimask), found.object_logit

    return _over_rows(apply, mesh, rules)(params, embedding, prompts)

  return jax.jit(decode_visual, static_argnames="multimask")


def visual_answerer(
  head: VisualHead, mesh: Mesh | None = None, rules: Rules = WHOLE
) -> AnswerVisual:
  """As `visual_decoder`, for prompts of which some want the best of three readings, others not."""

  def answer_visual(params, embedding, prompts, doubt):
    found: Any = head.apply(
      {"params": params["visual"]}, embedding, prompts, method=VisualHead.detect
    )
    return *single_mask(found, doubt), found.object_logit

  return jax.jit(_over_rows(answer_visual, mesh, rules))


def _asked(
  detector: Detector, method: Callable[..., Any], mesh: Mesh | None, rules: Rules, split: bool
) -> Detect:
  """The jitted program of a method that takes embedding, prompts and static `max_detections`."""
  detector, axes = _sharing(detector, split)

  def ask(params, embedding, prompts, max_detections):
    def apply(params, *rows):
      return detector.apply({"params": params}, *rows, max_detections, method=method)

    return _over_rows(apply, mesh, rules, axes)(params, embedding, prompts)

  ask.__name__ = method.__name__  # the program's, in profiles and caches
  return jax.jit(ask, static_argnames="max_detections")


def _sharing(detector: Detector, split: bool) -> tuple[Detector, Any]:
  """The detector, and the axes that rows are cut over."""
  return (detector.clone(axis="model"), "data") if split else (detector, AXES)


def _over_rows(
  function: Callable[..., Any], mesh: Mesh | None, rules: Rules, axes: Any = AXES
) -> Callable[..., Any]:
  """`function(params, *rows)` of each device's rows, on that device; rows are cut over `axes`."""
  if mesh is None:
    return function
  sharding = parameter_sharding(mesh, rules)

  def spec(keys: Any, x: Any) -> P:
    return sharding("/".join(key.key for key in keys), x.shape).spec

  @functools.wraps(function)
  def mapped(params, *rows):
    specs = jax.tree_util.tree_map_with_path(spec, params)

    def local(params, *rows):
      return function(jax.tree.map(_gather, params, specs), *rows)

    # Loops start from constants, which are the same everywhere, and go on with what is not: that
    # the check would refuse.
    return jax.shard_map(
      local, mesh=mesh, in_specs=(specs, *[P(axes)] * len(rows)), out_specs=P(axes), check_vma=False
    )(params, *rows)

  return mapped


def _gather(x: Array, spec: P) -> Array:
  """A whole parameter from its pieces."""
  for axis, name in enumerate(spec):
    if name is not None:
      x = jax.lax.all_gather(x, name, axis=axis, tiled=True)
  return x
