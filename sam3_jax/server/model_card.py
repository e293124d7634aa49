"""What `/v1/model` says of a model."""

import importlib.util
from importlib.metadata import version
from typing import Any

from sam3_jax.checkpoint.bundle import VIDEO, VISUAL
from sam3_jax.datasets.synthetic.drawings import concepts
from sam3_jax.inference.predictor import Sam3
from sam3_jax.server.settings import Settings

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
    "video": not no_videos(model),
    "image_size": model.config.image_size,
    "version": version("sam3-jax"),
    "limits": settings.limits,
  }


def no_videos(model: Sam3) -> str:
  """Why a model cannot track in videos here; "" if it can."""
  if VIDEO not in model.params:
    return "this checkpoint has no tracker: serve one that has, such as sam3-tiny."
  if importlib.util.find_spec("av") is None:
    return "videos need PyAV on the server: pip install 'sam3-jax[video]'."
  return ""
