"""KerasHub on JAX as a side of the benchmark: the whole prediction, the only step of its API.

Its parameters are random, as there is no converter from our layout; that does not affect the time.
The image is resized beforehand, outside the measurement, as its preprocessor needs TensorFlow.
"""

import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from speed.server import serve

PADDING_LABEL = -10


class KerasHub:
  def __init__(self, settings: dict[str, Any]):
    os.environ["KERAS_BACKEND"] = "jax"
    if settings["device"] == "cpu":
      os.environ["JAX_PLATFORMS"] = "cpu"
    start = time.perf_counter()
    import jax
    import keras
    import keras_hub
    from PIL import Image

    keras.config.set_dtype_policy(
      "mixed_bfloat16" if settings["dtype"] == "bfloat16" else "float32"
    )
    imported = time.perf_counter()
    self.model = keras_hub.models.SAM3PromptableConceptImageSegmenter(
      backbone=build(keras_hub, settings["config"]), preprocessor=None
    )
    side = settings["config"]["image_size"]
    photo = Image.open(settings["image"]).convert("RGB").resize((side, side))
    self.pixels = np.asarray(photo, np.float32) / 127.5 - 1
    self.tokens = np.array(settings["tokens"], np.int32)
    self.facts = {
      "import": imported - start,
      "load": time.perf_counter() - imported,
      "dtype": settings["dtype"],
      "device": str(jax.devices()[0].device_kind),
      "versions": {m.__name__: m.__version__ for m in (keras_hub, keras, jax)},
    }

  def predict(self, count: int) -> Callable[[], Any]:
    ids = self.tokens[:count]
    inputs = {
      "pixel_values": np.repeat(self.pixels[None], count, axis=0),
      "token_ids": ids,
      "padding_mask": (ids != 0).astype(np.int32),
      "boxes": np.zeros((count, 1, 5), np.float32),
      "box_labels": np.full((count, 1), PADDING_LABEL, np.int32),
    }
    return lambda: self.model.predict(inputs, verbose=0)


def build(keras_hub: Any, config: dict[str, Any]) -> Any:
  """The model with our sizes and random parameters."""
  trunk, text, layers = config["trunk"], config["text"], keras_hub.layers
  side, patch, group = config["image_size"], config["patch"], trunk["windowed"] + 1
  blocks = trunk["groups"] * group
  attending = {
    "hidden_dim": config["width"],
    "intermediate_dim": config["mlp_width"],
    "num_heads": config["heads"],
  }
  return keras_hub.models.SAM3PromptableConceptBackbone(
    vision_encoder=layers.SAM3VisionEncoder(
      image_shape=(side, side, 3),
      patch_size=patch,
      num_layers=blocks,
      hidden_dim=trunk["width"],
      intermediate_dim=trunk["mlp_width"],
      num_heads=trunk["heads"],
      fpn_hidden_dim=config["width"],
      fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
      pretrain_image_shape=(patch * trunk["pretrain_grid"],) * 2 + (3,),
      window_size=trunk["window"],
      global_attn_indexes=list(range(group - 1, blocks, group)),
    ),
    text_encoder=layers.SAM3TextEncoder(
      vocabulary_size=text["vocabulary"],
      embedding_dim=text["width"],
      hidden_dim=text["width"],
      num_layers=text["layers"],
      num_heads=text["heads"],
      intermediate_dim=text["mlp_width"],
    ),
    geometry_encoder=layers.SAM3GeometryEncoder(
      num_layers=config["geometry_layers"], roi_size=7, **attending
    ),
    detr_encoder=layers.SAM3DetrEncoder(num_layers=config["fusion_layers"], **attending),
    detr_decoder=layers.SAM3DetrDecoder(
      image_shape=(side, side, 3),
      patch_size=patch,
      num_layers=config["decoder_layers"],
      num_queries=config["queries"],
      **attending,
    ),
    mask_decoder=layers.SAM3MaskDecoder(
      num_upsampling_stages=3, hidden_dim=config["width"], num_heads=config["heads"]
    ),
  )


if __name__ == "__main__":
  serve(KerasHub)
