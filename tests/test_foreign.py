"""Files of other models are recognized and rejected; SAM 3.1's detector is read."""

import numpy as np
import pytest
from conversions import assert_tree, converted, refused
from golden_model import CONFIG, meta_weights
from layouts import TOKENIZER, layout
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.identify import identify_model, identify_variant
from sam3_jax.converters.layouts import meta

from sam3_jax.checkpoint import bundle

TEXT = "detector.backbone.language_backbone.encoder"
NECK = "detector.backbone.vision_backbone"

# A few names of each, from the state_dict() of the model that is named.
NAMES = {
  r"SAM 1 \(Meta's": (
    "image_encoder.pos_embed",
    "image_encoder.patch_embed.proj.weight",
    "image_encoder.blocks.0.attn.rel_pos_h",
    "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    "mask_decoder.transformer.layers.0.self_attn.q_proj.weight",
  ),
  r"SAM 1 \(Hugging Face's": (
    "shared_image_embedding.positional_embedding",
    "vision_encoder.patch_embed.projection.weight",
    "vision_encoder.layers.0.attn.rel_pos_h",
    "prompt_encoder.mask_embed.conv1.weight",
    "mask_decoder.iou_token.weight",
  ),
  r"SAM 2 or 2.1 \(Meta's": (
    "maskmem_tpos_enc",
    "image_encoder.trunk.pos_embed",
    "image_encoder.trunk.blocks.0.attn.qkv.weight",
    "image_encoder.neck.convs.0.conv.weight",
    "memory_attention.layers.0.self_attn.q_proj.weight",
    "sam_mask_decoder.iou_token.weight",
  ),
  r"SAM 2 or 2.1 \(Hugging Face's": (
    "vision_encoder.backbone.pos_embed",
    "vision_encoder.backbone.patch_embed.projection.weight",
    "vision_encoder.backbone.blocks.0.attn.qkv.weight",
    "prompt_encoder.point_embed.weight",
    "mask_decoder.iou_token.weight",
  ),
  "EfficientSAM or MobileSAM": (
    "image_encoder.layers.0.conv1.c.weight",
    "prompt_encoder.point_embeddings.0.weight",
    "mask_decoder.iou_token.weight",
  ),
  "LoRA adapter": ("base_model.model.vision.q_proj.lora_A.weight",),
  "CLIP": ("text_model.embeddings.token_embedding.weight", "vision_model.post_layernorm.weight"),
  "DETR": ("model.decoder.layers.0.fc1.weight", "bbox_embed.0.layers.0.weight"),
  "YOLO": ("model.0.conv.weight", "model.22.cv1.conv.weight"),
  "BERT": ("bert.embeddings.word_embeddings.weight",),
  "language model": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
  "an unknown model": ("a", "b"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_other_models(tmp_path, kind):
  save_file({name: np.ones(2, np.float32) for name in NAMES[kind]}, tmp_path / "x.safetensors")
  refused(tmp_path / "x.safetensors", tmp_path, rf"any known layout; it looks like .*{kind}")


def test_lite_text_in_the_authors_layout(tmp_path):
  """The layout of transformers can be read, see test_lite_text.py."""
  arrays = {f"{TEXT}.transformer.0.fc1.bias": np.ones(2, np.float32)}
  save_file(arrays, tmp_path / "x.safetensors")
  refused(tmp_path / "x.safetensors", tmp_path, "LiteText in its authors' .* Sam3LiteTextModel")
  assert identify_variant([f"{TEXT}.transformer.resblocks.0.ln_1.weight"]) is None


@pytest.mark.parametrize("kind", ["meta", "hub", "doubled", "detector"])
def test_sam3_itself_is_not_taken_for_another(kind):
  assert identify_variant(layout(kind)) is None
  assert identify_model([]) is None


def multiplex():
  """SAM 3.1's parameter names, as far as known, with the sizes of the tiny model."""
  arrays = {
    name: array for name, array in meta_weights().items()
    if "sam2_convs" not in name and ".convs.3." not in name
  }  # fmt: skip
  for name, array in meta_weights().items():
    if "sam2_convs" in name and "sam2_convs.3" not in name:
      for neck in ("interactive_convs", "propagation_convs"):
        arrays[name.replace("sam2_convs", neck)] = array
  return arrays | {"tracker.model.anything.weight": np.ones((2, 3), np.float32)}


def test_detector_of_sam_3_1(tmp_path):
  save_file(multiplex(), tmp_path / "sam3.1_multiplex.safetensors")
  loaded = converted(tmp_path / "sam3.1_multiplex.safetensors", tmp_path / "out", config=CONFIG)
  assert_tree(loaded.params, points=True, visual=False)
  assert "layout meta, SAM 3.1" in loaded.info["source"]
  unread = bundle.inspect(tmp_path / "out").unread
  assert unread["neck of video"]["tensors"] == unread["neck of visual prompts"]["tensors"] == 18
  kept = bundle.load_unread(tmp_path / "out")
  np.testing.assert_array_equal(kept["tracker.model.anything.weight"], np.ones((2, 3)))


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda a: a.pop(f"{NECK}.interactive_convs.1.conv_1x1.weight"), "interactive_convs.1"),
    (lambda a: a.pop(f"{NECK}.trunk.ln_pre.bias"), "ln_pre.bias is missing"),
    (lambda a: a.update({f"{NECK}.propagation_convs.2.conv_1x1.bias": np.ones(1, np.float32)}),
     r"propagation_convs.2.conv_1x1.bias is \[1\]; expected \[128\]"),
    (lambda a: a.update({"tracker.other": np.ones(1, np.float32)}), "tracker.other .* not a name"),
  ],
)  # fmt: skip
def test_invalid_files_of_sam_3_1(tmp_path, change, match):
  arrays = multiplex()
  change(arrays)
  save_file(arrays, tmp_path / "x.safetensors")
  refused(tmp_path / "x.safetensors", tmp_path, match, config=CONFIG)


def test_necks_may_be_absent(tmp_path):
  arrays = {n: a for n, a in multiplex().items() if "propagation_convs" not in n}
  save_file(arrays, tmp_path / "x.safetensors")
  convert(tmp_path / "x.safetensors", tmp_path / "out", tokenizer=TOKENIZER, config=CONFIG)
  assert meta.is_multiplex(arrays)
  assert not meta.is_multiplex(meta_weights(""))
