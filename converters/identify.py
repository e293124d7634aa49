"""Identifies files that cannot be converted, by the names of their tensors or their first bytes."""

import re
from collections.abc import Iterable

# The first row whose patterns each match the start of some name decides. Sources: state_dict() of
# facebookresearch/segment-anything, sam2 and sam3, of SimonZeng7108/efficientsam3, and of
# transformers' models of these names.
# Not where "model" is only a wrapper of SAM 3's own image encoder.
_IMAGE_ENCODER = (
  r".*vision_backbone\.trunk\.model\.(?!pos_embed|ln_pre\.|patch_embed\.proj\.|blocks\.)"
)
VARIANTS = (  # relatives of SAM 3 with many of its names
  (
    "EfficientSAM3 with a RepViT as its image encoder",
    (_IMAGE_ENCODER, rf"{_IMAGE_ENCODER}backbone\.(model\.)?features\."),
  ),
  (
    "EfficientSAM3 with a TinyViT as its image encoder",
    (_IMAGE_ENCODER, rf"{_IMAGE_ENCODER}backbone\.(model\.)?(patch_embed|layers)\."),
  ),
  (
    "EfficientSAM3 with an EfficientViT as its image encoder",
    (_IMAGE_ENCODER, rf"{_IMAGE_ENCODER}backbone\.(model\.)?(input_stem|stages)\."),
  ),
  ("EfficientSAM3 with another image encoder than SAM 3's", (_IMAGE_ENCODER,)),
  (
    "EfficientSAM3 with another image encoder than SAM 3's",
    (
      r".*vision_encoder\.(trunk|backbone)\."
      r"(student_trunk|projector|stages|features|stem"
      r"|model(?!\.(embeddings\.|layer_norm\.|layers\.\d+\.(attention|mlp|layer_norm))))",
      r".*(detr_decoder|dot_product_scoring)\.",
    ),
  ),
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
  ("a LoRA adapter of another model", (r".*\.lora_[AB]\b",)),
  ("an adapter of another kind than LoRA", (r".*\.(hada_w1|lokr_w|oft_r|ia3_l|vera_lambda)",)),
  ("a CLIP", (r"(text_model|transformer\.resblocks)", r"(vision_model|visual)\.")),
  ("a DETR or Grounding DINO", (r"(model\.)?.*decoder\.layers\.0\.", r".*(backbone|bbox_embed)\.")),
  ("a YOLO", (r"model\.\d+\.(conv|cv1)\.",)),
  ("a BERT", (r"(bert\.)?(embeddings\.word_embeddings|encoder\.layer\.0)\.",)),
  ("a language model", (r"(model\.)?(layers|h|blocks)\.0\.",)),
)
# Suffixes that quantization adds to the name of a tensor. Sources: bitsandbytes, GPTQ, AWQ, and
# formats of scaled float8.
QUANTIZED = (
  (
    "bitsandbytes to 4 or 8 bits",
    r".*\.(absmax|quant_map|nested_\w+|quant_state\.\S+|SCB|weight_format)",
  ),
  ("GPTQ or AWQ to 4 bits", r".*\.(qweight|qzeros|g_idx)"),
  ("a scaled float8 or int8 format", r".*\.(weight_scale(_inv)?|input_scale|scale_weight)"),
)
# The first bytes of files that are not weights, and what to do.
_BEGINNINGS = (
  (
    rb"version https://git-lfs",
    "it is a Git LFS pointer, not the file; run `git lfs pull`, or download the file itself",
  ),
  (
    rb"\s*(<!doctype|<html|<\?xml)",
    "it is a web page, perhaps a login page or an error page; download the file itself, for "
    "example by `hf://facebook/sam3` with a token",
  ),
  (rb"\s*[\[{]", "it is a JSON file; give the file of the weights beside it"),
  (rb"GGUF", "it is a GGUF file, with quantized weights; give model.safetensors or sam3.pt"),
  (
    rb"\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd",
    "it is a compressed archive; unpack it",
  ),
  (rb"\x93NUMPY", "it is a NumPy array"),
  (rb"\xff\xd8\xff|\x89PNG|GIF8|RIFF|II\*\0|MM\0\*|BM", "it is an image"),
  (rb"%PDF", "it is a PDF"),
)


def identify_variant(names: Iterable[str]) -> str | None:
  """Names the relative of SAM 3 that has these tensors; None if it is SAM 3 or unrelated."""
  names = list(names)
  return next((kind for kind in VARIANTS if _matches(kind, names)), (None,))[0]


def identify_model(names: Iterable[str]) -> str | None:
  """Names the model that has these tensors; None if it is unknown."""
  names = list(names)
  bare = without_prefix(names)
  return next((kind for kind in KINDS if _matches(kind, names) or _matches(kind, bare)), (None,))[0]


def identify_quantization(names: Iterable[str]) -> tuple[str, str] | None:
  """Names the program that quantized these tensors, and the first tensor that shows it."""
  names = list(names)
  for kind, pattern in QUANTIZED:
    for name in names:
      if re.fullmatch(pattern, name):
        return kind, name
  return None


def describe_content(start: bytes) -> str:
  """A clause that says what a file is, judged by its first bytes, and what to do."""
  if not start.strip(b"\0"):
    return "it is empty or all zero, perhaps a failed download; download it again"
  for pattern, words in _BEGINNINGS:
    if re.match(pattern, start, re.IGNORECASE):
      return words
  if start[257:262] == b"ustar":
    return "it is a tar archive; unpack it"
  if _is_text(start):
    return "it is a text file; give model.safetensors or sam3.pt, or the directory of either"
  return "it is of an unknown kind; give model.safetensors or sam3.pt, or the directory of either"


def without_prefix(names: list[str]) -> list[str]:
  """Removes the leading segments that all names share."""
  while names and all("." in name for name in names):
    first = names[0].partition(".")[0]
    if first.isdigit() or not all(name.startswith(f"{first}.") for name in names):
      break
    if first in ("model", "image_encoder", "vision_encoder"):  # they identify the model
      break
    names = [name.partition(".")[2] for name in names]
  return names


def _is_text(start: bytes) -> bool:
  text = start.decode("utf-8", "ignore")
  return len(text.encode()) > len(start) - 4 and all(c.isprintable() or c in "\t\r\n" for c in text)


def _matches(kind: tuple[str, tuple[str, ...]], names: list[str]) -> bool:
  return all(any(re.match(pattern, name) for name in names) for pattern in kind[1])
