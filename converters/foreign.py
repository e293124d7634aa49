"""Says what a checkpoint is that cannot be converted, from the names of its tensors."""

import re
from collections.abc import Iterable

# The first row of which every pattern begins some name. Sources: the state_dict() of
# facebookresearch/segment-anything, sam2 and sam3, and of transformers' models of these names.
VARIANTS = (  # look like SAM 3
  (
    "SAM 3 LiteText in its authors' layout",
    (r".*language_backbone\.encoder\.(embedding_layer|positional_embedding\.|transformer\.\d)",),
  ),
)
KINDS = (
  (
    "the tracker of SAM 3 alone",
    (r"(tracker\.|tracker_model\.)?(sam_mask_decoder|maskmem_backbone)\.", r".*sam2_convs\."),
  ),
  (
    "SAM 2 or 2.1 (Meta's)",
    (r"(module\.)?image_encoder\.trunk\.", r"(module\.)?(memory_attention|sam_mask_decoder)\."),
  ),
  (
    "SAM 2 or 2.1 (Hugging Face's)",
    (r"vision_encoder\.backbone\.(patch_embed|blocks)\.", r"(mask_decoder|prompt_encoder)\."),
  ),
  (
    "SAM 1 (Meta's segment-anything)",
    (r"image_encoder\.(blocks|patch_embed)\.", r"mask_decoder\.", r"prompt_encoder\."),
  ),
  (
    "SAM 1 (Hugging Face's)",
    (r"vision_encoder\.(layers|patch_embed)\.", r"mask_decoder\.", r"shared_image_embedding\."),
  ),
  ("an EfficientSAM or MobileSAM", (r"image_encoder\.", r"mask_decoder\.", r"prompt_encoder\.")),
  ("a LoRA adapter; merge it into its model first", (r".*\.lora_[AB]\.",)),
  ("a CLIP", (r"(text_model|transformer\.resblocks)", r"(vision_model|visual)\.")),
  ("a DETR or Grounding DINO", (r"(model\.)?.*decoder\.layers\.0\.", r".*(backbone|bbox_embed)\.")),
  ("a YOLO", (r"model\.\d+\.(conv|cv1)\.",)),
  ("a BERT", (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.0)\.",)),
  ("a language model", (r"(model\.)?(layers|h|blocks)\.0\.",)),
)


def recognise_variant(names: Iterable[str]) -> str | None:
  """Which relative of SAM 3 these are the tensors of, though many names are those of SAM 3."""
  return _first(VARIANTS, list(names))


def recognise(names: Iterable[str]) -> str | None:
  """What these are the tensors of, in words; None if nothing is known like it."""
  return _first(KINDS, list(names))


def _first(kinds: Iterable[tuple[str, tuple[str, ...]]], names: list[str]) -> str | None:
  for kind, patterns in kinds:
    if all(any(re.match(pattern, name) for name in names) for pattern in patterns):
      return kind
  return None
