"""Checks that embeddings of images and phrases, and concepts, belong to the model that uses
them."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from sam3_jax.config import Config
from sam3_jax.inputs.concept import Concept, check_exemplars
from sam3_jax.inputs.prompts import ConceptPrompt
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.types import ImageEmbedding, TextEmbedding
from sam3_jax.utils.identity import Origin


def check_origin(what: str, found: Origin, model: Origin, remedy: str = "encode again") -> None:
  """Raises ValueError if something is known to be from another checkpoint than the model's."""
  if found.identity and found != model:
    raise ValueError(
      f"{what} was made by another checkpoint, {found}, than this model's, {model}: {remedy} with "
      "this model, or load the other checkpoint."
    )


def check_concept(concept: Concept, model: Origin, config: Config) -> None:
  """Raises ValueError if a concept is from another checkpoint, has no or too many exemplars, or
  values that are not finite."""
  check_origin("the concept", concept.origin, model, "make it again")
  tokens, labels = np.shape(concept.tokens), np.shape(concept.positive)
  if len(tokens) != 2 or tokens[1] != config.width or labels != tokens[:1] or not tokens[0]:
    raise ValueError(
      f"the concept's tokens are {list(tokens)} and its labels {list(labels)}; a concept of this "
      f"model has at least one row of {config.width} channels, and a label for each. Make it again."
    )
  check_exemplars(tokens[0])
  if not np.isfinite(np.asarray(concept.tokens, np.float32)).all():
    raise ValueError("the concept has values that are not finite (NaN or infinity). Make it again.")


def own_concept(concept: Concept, model: Origin, config: Config, dtype: DTypeLike) -> Concept:
  """A concept as the programs take it: checked, in the model's dtype, on the host."""
  check_concept(concept, model, config)
  return jax.device_get(_cast(concept, dtype))


def own_embedding(
  embedding: ImageEmbedding, model: Origin, config: Config, dtype: DTypeLike
) -> ImageEmbedding:
  """An embedding as the programs take it: in the model's dtype and without its origin, which would
  make JAX compile another program.

  Raises:
    ValueError: the embedding is from another checkpoint, or its maps have other sizes than the
      model's.
  """
  check_origin("the embedding of the image", embedding.origin, model)
  side, grid = config.image_size, config.image_size // config.patch
  shapes = {"coarse": grid, "attended": grid, "middle": 2 * grid, "fine": 4 * grid}
  for name, cells in shapes.items():
    found = np.shape(getattr(embedding, name))[1:]
    if found != (cells, cells, config.width):
      raise ValueError(
        f"the embedding is of a model of another size: its map {name} is {list(found)}, and this "
        f"model's images are {side} x {side}. Encode again with this model."
      )
  return dataclasses.replace(_cast(embedding, dtype), origin=Origin())


def own_text(
  text: Any,
  prompts: Sequence[ConceptPrompt],
  tokenizer: Tokenizer,
  model: Origin,
  dtype: DTypeLike,
) -> TextEmbedding:
  """Encoded phrases as the programs take them: in the model's dtype, without tokens and origin.

  Raises:
    TypeError: `text` is not a `TextEmbedding`.
    ValueError: it is from another checkpoint, or of other prompts.
  """
  if not isinstance(text, TextEmbedding):
    raise TypeError(f"text must be what encode_text returns, or None; got {type(text)}.")
  if len(text) != len(prompts):
    raise ValueError(f"text has {len(text)} rows for {len(prompts)} prompts; pass one per prompt.")
  check_origin("the embedding of the phrases", text.origin, model)
  if text.tokens is not None:
    wanted, found = tokenizer([prompt.phrase for prompt in prompts]), np.asarray(text.tokens)
    same = wanted.shape == found.shape and (wanted == found).all(axis=1)
    if not np.all(same):
      row = int(np.argmin(np.broadcast_to(same, len(prompts))))
      raise ValueError(
        f"row {row} of text is of another phrase than prompt {row}, {prompts[row].phrase!r:.60}; "
        "pass encode_text(prompts) of the same prompts in the same order."
      )
  return dataclasses.replace(_cast(text, dtype), tokens=None, origin=Origin())


def _cast(tree: Any, dtype: DTypeLike) -> Any:
  def cast(x: Any) -> Any:
    wrong = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype != dtype
    return x.astype(dtype) if wrong else x

  return jax.tree.map(cast, tree)
