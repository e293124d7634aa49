"""The start of a training run: a model with the parameters of a checkpoint, or random ones."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3_jax.checkpoint.bundle import load
from sam3_jax.checkpoint.parameters import VIDEO, VISUAL
from sam3_jax.checkpoint.stored import load_unread, open_stored
from sam3_jax.config import Config, VideoConfig
from sam3_jax.inputs.tokenizer import Tokenizer, trim
from sam3_jax.registry import find_checkpoint
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.tracker_init import new_tracker
from sam3_jax.training.visual_init import new_head
from sam3_jax.utils.console import Console, loading
from sam3_jax.utils.param_tree import flatten


@dataclasses.dataclass(frozen=True)
class Start:
  """The start of a training run.

  Attributes:
    model: sizes.
    parameters: of the model, by path.
    tokenizer: bytes of the SentencePiece model.
    info: the starting checkpoint's description.
    unread: tensors of the starting checkpoint that the model does not use, for exports.
    untrained: trees of the optional parts that are not trained, such as the head for visual
      prompts: they are saved as they were.
    identity: of the starting checkpoint; "" if there is none.
  """

  model: Config
  parameters: Mapping[str, Any]
  tokenizer: bytes
  info: Mapping[str, Any]
  unread: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
  untrained: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  identity: str = ""

  def checksum(self) -> str:
    """A checksum of model, tokenizer and parameters, which a resumed run must start from again."""
    digest = hashlib.sha256(json.dumps(self.model.to_dict(), sort_keys=True).encode())
    digest.update(self.tokenizer)
    for path, array in sorted(self.parameters.items()):
      digest.update(path.encode())
      digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def load_start(config: TrainConfig, console: Console | None = None) -> Start:
  """Loads parameters and tokenizer on the host; the console shows progress."""
  if config.checkpoint:
    # Each process loads all parameters on its own device.
    local = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    path = find_checkpoint(config.checkpoint)
    with loading(console or Console(quiet=True), path) as step:
      bundle = load(path, dtype="float32", sharding=local, verify=True, progress=step)
    parts, unread = jax.device_get(bundle.params), load_unread(path)
    model = resized(bundle.config, config)
    fixed: tuple[str, ...] = VISUAL, VIDEO
    if config.objective == "visual":
      if VISUAL not in parts:
        parts[VISUAL] = new_head(model, parts, config.seed)
      fixed = (VIDEO,)
    if config.objective == "video":
      if VISUAL not in parts:
        raise ValueError(
          f"the tracker decodes its masks with the head for visual prompts, which {path} has not: "
          "train it first, with objective visual."
        )
      if VIDEO not in parts:
        parts[VIDEO] = new_tracker(model, parts, config.seed)
      fixed = ()
    untrained = {part: parts.pop(part) for part in fixed if part in parts}
    details = bundle.tokenizer, bundle.info, unread, untrained, bundle.identity
    return Start(model, flatten(parts), *details)
  from sam3_jax.model.sam3 import init

  model, vocabulary = random_model(config)
  parameters = flatten(jax.device_get(init(model, jax.random.key(config.seed))))
  return Start(model, parameters, vocabulary, {})


def load_model(config: TrainConfig) -> tuple[Config, bytes]:
  """The model's sizes and its tokenizer, without reading parameters."""
  if config.checkpoint:
    stored = open_stored(find_checkpoint(config.checkpoint))
    return resized(stored.config, config), stored.tokenizer
  return random_model(config)


def random_model(config: TrainConfig) -> tuple[Config, bytes]:
  """Sizes and tokenizer of a run that starts from random parameters."""
  if config.model is None:
    raise ValueError("a run without a checkpoint needs a model.")
  vocabulary = Path(config.tokenizer)
  if not vocabulary.is_file():
    vocabulary = find_checkpoint(config.tokenizer) / "tokenizer.model"
  return config.model, trim(Tokenizer(vocabulary).model, config.model.text.vocabulary)


def resized(model: Config, config: TrainConfig) -> Config:
  """The model at the run's image size and window, with a tracker for objective "video"."""
  trunk = dataclasses.replace(model.trunk, window=config.window or model.trunk.window)
  sizes: dict[str, Any] = {"image_size": config.image_size or model.image_size, "trunk": trunk}
  if config.objective == "video":
    if model.video is not None and config.tracker not in (None, model.video):
      raise ValueError("the checkpoint has a tracker of other sizes: remove tracker.")
    sizes["video"] = model.video or config.tracker or VideoConfig()
  return dataclasses.replace(model, **sizes)
