"""What `/v1/model` says of a model."""

from importlib.metadata import version
from typing import Any

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.datasets.synthetic.drawings import concepts
from sam3_jax.inference.predictor import Sam3
from sam3_jax.server.settings import Settings
from sam3_jax.server.video.service import unsupported

TINY = "sam3-tiny"


def model_card(model: Sam3, settings: Settings) -> dict[str, Any]:
  """A value as `schemas.ModelResponse`."""
  name, trained = str(model.info.get("name", "")), bool(model.info.get("trained", False))
  known = [concept.phrases[0] for concept in concepts()] if name == TINY else None
  if known is not None:
    description = (
      f"A small model that knows {len(known)} drawn objects and nothing else. It is not intended "
      "for photographs."
    )
  elif trained:
    description = "Finds every instance of a concept that a short noun phrase or a box names."
  else:
    description = "An untrained model: its parameters are random, and its results meaningless."
  return {
    "name": name,
    "licence": str(model.info.get("licence", "")),
    "trained": trained,
    "description": description,
    "concepts": known,
    "visual": VISUAL in model.params,
    "video": not unsupported(model),
    "image_size": model.config.image_size,
    "version": version("sam3-jax"),
    "limits": settings.limits,
  }
