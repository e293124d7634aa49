"""Patches transformers' SAM 3 where it differs from Meta's released code.

The weights were trained with Meta's code, which we follow. Needs the extra `reference`; torch and
transformers are imported on the first call.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

EPSILON = 1e-5  # of the trunk's LayerNorm in Meta's code; transformers' default is 1e-6
PADDING_LABEL = -10
PADDING_BOX = (0.5, 0.5, 0.5, 0.5)
PRESENCE_CLAMP = 10.0  # transformers clamps presence logits, Meta does not


def load_detector(directory: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """Loads the detector; also returns its missing and unexpected tensors."""
  import transformers  # pyright: ignore[reportMissingImports]

  config = detector_config(directory)
  lite = config.model_type == "sam3_lite_text"
  kind = transformers.Sam3LiteTextModel if lite else transformers.Sam3Model
  return _load(kind, directory, config, dtype)


def load_tracker(directory: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """Loads the model of visual prompts; also returns its missing and unexpected tensors."""
  import transformers  # pyright: ignore[reportMissingImports]

  values = tracker_values(detector_config(directory).vision_config)
  config = transformers.Sam3TrackerConfig(**values)
  return _load(transformers.Sam3TrackerModel, directory, config, dtype)


def load_video_tracker(directory: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """Loads the tracker of videos, from a directory with config.json of the whole model; also returns
  its missing and unexpected tensors."""
  import transformers  # pyright: ignore[reportMissingImports]

  config = transformers.AutoConfig.from_pretrained(directory).tracker_config
  config.vision_config.backbone_config.layer_norm_eps = EPSILON
  return _load(transformers.Sam3TrackerVideoModel, directory, config, dtype)


def detector_config(directory: Path) -> Any:
  """The detector's configuration in a directory with or without a tracker."""
  import transformers  # pyright: ignore[reportMissingImports]

  config = transformers.AutoConfig.from_pretrained(directory)
  config = getattr(config, "detector_config", config)
  config.vision_config.backbone_config.layer_norm_eps = EPSILON
  return config


def tracker_values(vision: Any) -> dict[str, Any]:
  """Values of the tracker's configuration that follow from the detector's vision config."""
  width, side = vision.fpn_hidden_size, vision.backbone_config.image_size
  return {
    "vision_config": vision.to_dict(),
    "prompt_encoder_config": {"hidden_size": width, "image_size": side},
    "mask_decoder_config": {"hidden_size": width},
  }


def concept_inputs(
  model: Any,
  ids: Sequence[int],
  boxes: Sequence[Sequence[float]] = (),
  labels: Sequence[int] = (),
  mask_padding: bool = False,
) -> dict[str, Any]:
  """Returns the model's keyword arguments for one prompt.

  A prompt without boxes gets one padding box: without any box transformers skips the geometry
  encoder, and thus the class token that Meta's code always appends.

  Args:
    model: from `load_detector`.
    ids: the phrase's token ids, padded with 0.
    boxes: cxcywh, as fractions of the image.
    labels: of the boxes, 1 or 0.
    mask_padding: for LiteText; see `LiteTextConfig`.
  """
  import torch  # pyright: ignore[reportMissingImports]

  tokens = torch.tensor([list(ids)])
  attended = (tokens != 0).long()
  if model.config.model_type == "sam3_lite_text":
    text = {"text_embeds": _lite_text(model, tokens, attended, mask_padding)}
  else:
    text = {"input_ids": tokens}
  return {
    **text,
    "attention_mask": attended,
    "input_boxes": torch.tensor([list(boxes) or [PADDING_BOX]], dtype=model.dtype),
    "input_boxes_labels": torch.tensor([list(labels) or [PADDING_LABEL]]),
  }


def visual_embedding(model: Any, pixels: Any) -> list[Any]:
  """Returns the feature maps that the model from `load_tracker` takes as `image_embeddings`.

  transformers adds the embedding for "no memory" to a level of the neck that is not read. Meta adds
  it to the coarsest of the other three levels, and so does this function.
  """
  fine, middle, coarse, _ = model.get_image_features(pixels, return_dict=True).fpn_hidden_states
  levels = fine, middle, coarse + model.no_memory_embedding
  sizes = model.backbone_feature_sizes
  return [
    level.permute(1, 2, 0).view(1, -1, *size) for level, size in zip(levels, sizes, strict=True)
  ]


def _load(kind: Any, directory: Path, config: Any, dtype: str) -> tuple[Any, dict[str, Any]]:
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  transformers.logging.set_verbosity_error()  # avoids a table of unexpected tensors
  transformers.logging.disable_progress_bar()
  model, loading = kind.from_pretrained(
    directory, config=config, dtype=getattr(torch, dtype), output_loading_info=True
  )
  return model.eval(), loading


def _lite_text(model: Any, tokens: Any, attended: Any, mask_padding: bool) -> Any:
  """Text features as transformers' processor computes them, or as LiteText's authors do."""
  end = tokens.max()  # the vocabulary's last entry
  ids = tokens.where(tokens != 0, end) if mask_padding else tokens
  return model.get_text_features(ids, attention_mask=attended if mask_padding else None)
