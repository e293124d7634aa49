"""Dense pretraining: each cell of the neck's maps is to say which of the picture's phrases it shows.

A small model trained from scratch first learns so what things look like and what they are called,
at a fraction of the cost of a training step with prompts: the trunk and the neck run once a picture
and the text encoder once a phrase, nothing else does.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sam3_jax.training.batch import Batch, flatten
from sam3_jax.types import ImageEmbedding, TextEmbedding

WEIGHTS = {"coarse": 1.0, "middle": 0.5, "fine": 0.5}


def dense_loss(
  embedding: ImageEmbedding, text: TextEmbedding, batch: Batch
) -> tuple[Float[Array, ""], dict[str, Array]]:
  """Cross-entropy of each cell over the picture's phrases and "none of them".

  A cell's logit for a phrase is the scaled product of its features with the mean of the phrase's;
  for none of them it is 0. Cells on an edge are shared by coverage, and those of two phrases for
  the same thing between them.

  Args:
    embedding: of the batch's images.
    text: of its tokens, flattened.
    batch: masks of the size of `embedding.fine`, or larger by a whole number.

  Returns:
    The weighted sum over the three maps, and its terms: `coarse`, `middle`, `fine`, and `accuracy`
    of the coarse cells that show an object.
  """
  images, rows = batch.prompt_valid.shape
  targets = flatten(batch).targets
  covered = jnp.where(targets.valid[..., None, None], targets.masks, 0).max(axis=1)
  covered = covered.astype(jnp.float32) / (255 if targets.masks.dtype == jnp.uint8 else 1)
  covered = covered.reshape(images, rows, *covered.shape[1:])
  phrases = jnp.mean(text.features, axis=1, where=text.valid[..., None]).astype(jnp.float32)
  phrases = phrases.reshape(images, rows, -1)

  terms = {}
  for name in WEIGHTS:
    features = getattr(embedding, name).astype(jnp.float32)
    logits = jnp.einsum("bhwd,brd->brhw", features, phrases) / features.shape[-1] ** 0.5
    logits = jnp.where(batch.prompt_valid[..., None, None], logits, -1e9)
    logits = jnp.concatenate([jnp.zeros_like(logits[:, :1]), logits], axis=1)
    wanted = _shares(_shrunk(covered, logits.shape[-1]))
    terms[name] = -(wanted * jax.nn.log_softmax(logits, axis=1)).sum(axis=1).mean()
    if name == "coarse":
      shown = wanted[:, 0] < 0.5
      right = shown & (logits.argmax(axis=1) == wanted.argmax(axis=1))
      terms["accuracy"] = right.sum() / jnp.maximum(shown.sum(), 1)
  return sum(weight * terms[name] for name, weight in WEIGHTS.items()), terms


def _shrunk(maps: Float[Array, "B R Ht Wt"], side: int) -> Float[Array, "B R H W"]:
  """Means over squares of cells."""
  factor = maps.shape[-1] // side
  return maps.reshape(*maps.shape[:2], side, factor, side, factor).mean(axis=(3, 5))


def _shares(covered: Float[Array, "B R H W"]) -> Float[Array, "B R1 H W"]:
  """Each cell's distribution over none and the phrases; it adds up to 1."""
  total = covered.sum(axis=1, keepdims=True)
  none = 1 - covered.max(axis=1, keepdims=True)
  return jnp.concatenate([none, covered * (1 - none) / jnp.maximum(total, 1e-6)], axis=1)
