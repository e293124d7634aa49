"""transformers' SAM 3 with what departs from Meta's released code set right.

The weights were trained with Meta's code, which we follow. Needs the extra `reference`; torch and
transformers are imported when something is called.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

EPSILON = 1e-5  # of the trunk's LayerNorm in Meta's code; transformers' default is 1e-6
PADDING_LABEL = -10
PADDING_BOX = (0.5, 0.5, 0.5, 0.5)
PRESENCE_CLAMP = 10.0  # of presence logits, which Meta does not clamp


def load_detector(folder: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """The model of concepts, and what loading it missed and did not expect."""
  import transformers  # pyright: ignore[reportMissingImports]

  config = detector_config(folder)
  lite = config.model_type == "sam3_lite_text"
  kind = transformers.Sam3LiteTextModel if lite else transformers.Sam3Model
  return _load(kind, folder, config, dtype)


def load_tracker(folder: Path, dtype: str = "float32") -> tuple[Any, dict[str, Any]]:
  """Likewise, of visual prompts."""
  import transformers  # pyright: ignore[reportMissingImports]

  values = tracker_values(detector_config(folder).vision_config)
  config = transformers.Sam3TrackerConfig(**values)
  return _load(transformers.Sam3TrackerModel, folder, config, dtype)


def detector_config(folder: Path) -> Any:
  """Of a folder with detector and tracker, or with a detector alone."""
  import transformers  # pyright: ignore[reportMissingImports]

  config = transformers.AutoConfig.from_pretrained(folder)
  config = getattr(config, "detector_config", config)
  config.vision_config.backbone_config.layer_norm_eps = EPSILON
  return config


def tracker_values(vision: Any) -> dict[str, Any]:
  """What its configuration has of a detector's."""
  width, side = vision.fpn_hidden_size, vision.backbone_config.image_size
  return {
    "vision_config": vision.to_dict(),
    "prompt_encoder_config": {"hidden_size": width, "image_size": side},
    "mask_decoder_config": {"hidden_size": width},
  }


def concept(
  model: Any,
  ids: Sequence[int],
  boxes: Sequence[Sequence[float]] = (),
  labels: Sequence[int] = (),
  mask_padding: bool = False,
) -> dict[str, Any]:
  """Arguments of the model for one prompt.

  A prompt of text alone gets one box of padding: without it transformers leaves out the geometry
  encoder, and with it the class token that Meta's code always appends.

  Args:
    model: of `load_detector`.
    ids: of the phrase, then 0.
    boxes: cxcywh, as fractions.
    labels: of the boxes, 1 or 0.
    mask_padding: of LiteText; see `LiteTextConfig`.
  """
  import torch  # pyright: ignore[reportMissingImports]

  tokens = torch.tensor([list(ids)])
  there = (tokens != 0).long()
  if model.config.model_type == "sam3_lite_text":
    text = {"text_embeds": _lite_text(model, tokens, there, mask_padding)}
  else:
    text = {"input_ids": tokens}
  return {
    **text,
    "attention_mask": there,
    "input_boxes": torch.tensor([list(boxes) or [PADDING_BOX]], dtype=model.dtype),
    "input_boxes_labels": torch.tensor([list(labels) or [PADDING_LABEL]]),
  }


def visual_embedding(model: Any, pixels: Any) -> list[Any]:
  """The maps that the model of `load_tracker` takes as `image_embeddings`.

  transformers adds what stands for the memory of earlier frames to a level of the neck that nothing
  reads; Meta adds it to the coarsest of the other three, as is done here.
  """
  fine, middle, coarse, _ = model.get_image_features(pixels, return_dict=True).fpn_hidden_states
  levels = fine, middle, coarse + model.no_memory_embedding
  sizes = model.backbone_feature_sizes
  return [
    level.permute(1, 2, 0).view(1, -1, *size) for level, size in zip(levels, sizes, strict=True)
  ]


def _load(kind: Any, folder: Path, config: Any, dtype: str) -> tuple[Any, dict[str, Any]]:
  import torch  # pyright: ignore[reportMissingImports]
  import transformers  # pyright: ignore[reportMissingImports]

  transformers.logging.set_verbosity_error()  # else it prints a table of what it did not expect
  transformers.logging.disable_progress_bar()
  model, loading = kind.from_pretrained(
    folder, config=config, dtype=getattr(torch, dtype), output_loading_info=True
  )
  return model.eval(), loading


def _lite_text(model: Any, tokens: Any, there: Any, mask_padding: bool) -> Any:
  """Features as transformers' processor has them, or as LiteText's authors do."""
  end = tokens.max()  # the vocabulary's last entry
  ids = tokens.where(tokens != 0, end) if mask_padding else tokens
  return model.get_text_features(ids, attention_mask=there if mask_padding else None)
