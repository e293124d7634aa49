"""The jitted functions of a model, defined once for `Sam3`, batch inference, AOT and export.

Each function takes the parameters first. JAX compiles it at the first call with new shapes. On a
mesh it shards images and prompts over the devices; see `sharding.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array

from sam3_jax import types
from sam3_jax.config import Config
from sam3_jax.inference.sharding import AXES, REPLICATED, PartitionRules, shard_rows
from sam3_jax.inputs.preprocess import normalize
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.visual.head import VisualHead, select_masks, single_mask
from sam3_jax.outputs.detections import Detections

# The image embedding and the trunk's map, which the visual encoder takes.
SelectImage = Callable[[types.ImageEmbedding, Array], Any]
SelectDetections = Callable[[types.Detections], Any]


def _both(embedding: types.ImageEmbedding, features: Array) -> tuple[types.ImageEmbedding, Array]:
  return embedding, features


def _public(detections: types.Detections) -> Detections:
  return Detections(**vars(detections))


class PromptPrograms:
  """The jitted functions for concept prompts.

  On a mesh, `prompts.image` is the row of the embedding on the prompt's own device.

  Attributes:
    detect: (params, embedding, prompts, max_detections) to detections; `max_detections` is static.
    score: the same arguments; scores and boxes, without masks.
    mask: (params, embedding, scored) to detections, for any rows of the result of `score`.
  """

  def __init__(
    self,
    detector: Detector,
    select: SelectDetections,
    shard: Callable[[Callable[..., Any]], Callable[..., Any]],
  ):
    def apply(method: Callable[..., Any]) -> Callable[..., Any]:
      def program(params, embedding, prompts, max_detections):
        def apply(params, *rows):
          return detector.apply({"params": params}, *rows, max_detections, method=method)

        return shard(apply)(params, embedding, prompts)

      program.__name__ = method.__name__  # the name in profiles and in the compilation cache
      return jax.jit(program, static_argnames="max_detections")

    def detect(detector: Detector, *args: Any) -> Any:
      detections: Any = detector.detect(*args)
      return select(detections)

    def mask(params, embedding, scored):
      variables = {"params": params}
      detections: Any = detector.apply(variables, embedding, scored, method=Detector.mask)
      return select(detections)

    self.detect: Any = apply(detect)
    self.score: Any = apply(Detector.score)
    self.mask: Any = jax.jit(shard(mask))

  @property
  def compilations(self) -> int:
    """The number of compiled programs."""
    return sum(program._cache_size() for program in (self.detect, self.score, self.mask))


class Programs:
  """The jitted functions of a model.

  Attributes:
    config, dtype, mesh, rules: the arguments.
    encode: (params, pixels u8[B, Hi, Wi, 3], sizes i32[B, 2]) to an image embedding and the trunk's
      map. `sizes` is the height and width of the source images.
    encode_text: (params, tokens i32[P, T]) to a text embedding.
    encode_exemplars: (params, coarse maps, boxes, positive) to the tokens of exemplar boxes.
    prompts: functions for concept prompts, each computed on one device.
    split_prompts: on a mesh, functions for concept prompts that the devices of a group of the axis
      `model` compute together.
    encode_visual: (params, trunk's map) to a visual embedding; the parameters have a part `visual`.
    decode_visual: (params, visual embedding, prompts, multimask) to mask logits, their IoU and
      object logits; `multimask` is static. The embedding may have one row per device, which serves
      all prompts on it.
    decode_best: (params, visual embedding, prompts, ambiguous bool[P]) likewise, the best mask of
      each prompt.
  """

  def __init__(
    self,
    config: Config,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    rules: PartitionRules = REPLICATED,
    *,
    select_image: SelectImage = _both,
    select_detections: SelectDetections = _public,
  ):
    """
    Args:
      config: sizes of the model.
      dtype: of the computation.
      mesh: from `sharding.make_mesh`; None for one device.
      rules: how the mesh holds the parameters.
      select_image: maps the image embedding and the trunk's map to the result of `encode`. XLA
        removes the computation of what it leaves out.
      select_detections: likewise for the results of `detect` and `mask`.
    """
    self.config, self.dtype, self.mesh, self.rules = config, dtype, mesh, rules
    detector, head = Detector(config, dtype), VisualHead(config, dtype)
    shard = functools.partial(shard_rows, mesh=mesh, rules=rules)
    self.prompts = PromptPrograms(detector, select_detections, shard)
    split = functools.partial(shard, axes="data")
    self.split_prompts = PromptPrograms(detector.clone(axis=AXES[1]), select_detections, split)

    def encode_image(params, pixels, sizes):
      variables = {"params": params}
      method = Detector.encode_and_keep
      both: Any = detector.apply(variables, normalize(pixels), sizes, method=method)
      return select_image(*both)

    def encode_text(params, tokens):
      return detector.apply({"params": params}, tokens, method=Detector.encode_text)

    def encode_exemplars(params, *boxes):
      return detector.apply({"params": params}, *boxes, method=Detector.encode_exemplars)

    def encode_visual(params, features):
      return head.apply({"params": params["visual"]}, features, method=VisualHead.encode)

    def decode(params, embedding, prompts):
      variables = {"params": params["visual"]}
      return head.apply(variables, embedding, prompts, method=VisualHead.detect)

    def decode_visual(params, embedding, prompts, multimask):
      def apply(*rows):
        found: Any = decode(*rows)
        return *select_masks(found, multimask), found.object_logit

      return shard(apply)(params, embedding, prompts)

    def answer_visual(params, embedding, prompts, ambiguous):
      found: Any = decode(params, embedding, prompts)
      return *single_mask(found, ambiguous), found.object_logit

    self.encode: Any = jax.jit(shard(encode_image))
    self.encode_text: Any = jax.jit(encode_text)
    self.encode_exemplars: Any = jax.jit(shard(encode_exemplars))
    self.encode_visual: Any = jax.jit(shard(encode_visual))
    self.decode_visual: Any = jax.jit(decode_visual, static_argnames="multimask")
    self.decode_best: Any = jax.jit(shard(answer_visual))

  def selecting(self, image: SelectImage, detections: SelectDetections) -> "Programs":
    """The functions of the same model with other results; see `select_image`."""
    return Programs(
      self.config, self.dtype, self.mesh, self.rules,
      select_image=image, select_detections=detections,
    )  # fmt: skip
