"""Meta's side of `train.py`: its own modules, losses and matchers in one training step on a CPU.

Needs torch, torchvision and Meta's package `sam3` (0.1.4); its builder has the released sizes only,
so the model is assembled here as in the builder. Parts that need a GPU are replaced: the Triton
kernels of the focal loss by the formula in their own file, pinned memory by ordinary memory.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import serve
from weights import weights

torch.Tensor.pin_memory = lambda self, *_: self  # it needs a GPU

from sam3.model import data_misc  # noqa: E402
from sam3.model.decoder import TransformerDecoder, TransformerDecoderLayer  # noqa: E402
from sam3.model.encoder import TransformerEncoderFusion, TransformerEncoderLayer  # noqa: E402
from sam3.model.geometry_encoders import SequenceGeometryEncoder  # noqa: E402
from sam3.model.maskformer_segmentation import (  # noqa: E402
  PixelDecoder,
  UniversalSegmentationHead,
)
from sam3.model.model_misc import MLP, DotProductScoring, TransformerWrapper  # noqa: E402
from sam3.model.model_misc import MultiheadAttentionWrapper as Attention  # noqa: E402
from sam3.model.necks import Sam3DualViTDetNeck  # noqa: E402
from sam3.model.position_encoding import PositionEmbeddingSine  # noqa: E402
from sam3.model.sam3_image import Sam3Image  # noqa: E402
from sam3.model.text_encoder_ve import VETextEncoder  # noqa: E402
from sam3.model.vitdet import ViT  # noqa: E402
from sam3.model.vl_combiner import SAM3VLBackbone  # noqa: E402
from sam3.train.loss import loss_fns  # noqa: E402
from sam3.train.loss.sam3_loss import Sam3LossWrapper  # noqa: E402
from sam3.train.matcher import BinaryHungarianMatcherV2, BinaryOneToManyMatcher  # noqa: E402


def focal(inputs, targets, alpha: float, gamma: float):
  """The loss that the Triton kernel computes."""
  probability, targets = inputs.sigmoid(), targets.to(inputs)
  bce = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
  right = probability * targets + (1 - probability) * (1 - targets)
  return (alpha * targets + (1 - alpha) * (1 - targets)) * bce * (1 - right) ** gamma


loss_fns.triton_sigmoid_focal_loss = focal
loss_fns.triton_sigmoid_focal_loss_reduce = lambda *args: focal(*args).sum()


def build(config: dict[str, Any], tokens: torch.Tensor) -> Sam3Image:
  """Assembles the image model as Meta's `model_builder` does; each phrase becomes `tokens`."""
  width, hidden, heads = config["width"], config["mlp_width"], config["heads"]
  trunk, text, drop = config["trunk"], config["text"], config["dropout"]
  blocks = trunk["groups"] * (trunk["windowed"] + 1)

  def sine():
    return PositionEmbeddingSine(num_pos_feats=width, normalize=True, scale=None, temperature=10000)

  def attention(batch_first: bool, dropout: float = drop):
    return Attention(num_heads=heads, dropout=dropout, embed_dim=width, batch_first=batch_first)

  def layer(batch_first: bool, **settings: Any):
    return TransformerEncoderLayer(
      activation="relu", d_model=width, dim_feedforward=hidden, dropout=drop, pre_norm=True,
      self_attention=attention(batch_first), cross_attention=attention(batch_first),
      pos_enc_at_cross_attn_queries=False, **settings,
    )  # fmt: skip

  vit = ViT(
    img_size=config["image_size"], pretrain_img_size=trunk["pretrain_grid"] * config["patch"],
    patch_size=config["patch"], embed_dim=trunk["width"], depth=blocks, num_heads=trunk["heads"],
    mlp_ratio=trunk["mlp_width"] / trunk["width"], norm_layer="LayerNorm",
    drop_path_rate=trunk["drop_path"], qkv_bias=True, use_abs_pos=True, tile_abs_pos=True,
    global_att_blocks=tuple(range(trunk["windowed"], blocks, trunk["windowed"] + 1)),
    rel_pos_blocks=(), use_rope=True, use_interp_rope=True, window_size=trunk["window"],
    pretrain_use_cls_token=True, retain_cls_token=False, ln_pre=True, ln_post=False,
    return_interm_layers=False, bias_patch_embed=False,
  )  # fmt: skip
  neck = Sam3DualViTDetNeck(
    position_encoding=sine(), d_model=width, scale_factors=[4.0, 2.0, 1.0, 0.5], trunk=vit
  )
  language = VETextEncoder(
    d_model=width, tokenizer=lambda *_, **__: tokens, width=text["width"], heads=text["heads"],
    layers=text["layers"], context_length=text["context"], vocab_size=text["vocabulary"],
  )  # fmt: skip
  encoder = TransformerEncoderFusion(
    layer=layer(True, pos_enc_at_attn=True, pos_enc_at_cross_attn_keys=False),
    num_layers=config["fusion_layers"], d_model=width, num_feature_levels=1, frozen=False,
    use_act_checkpoint=True, add_pooled_text_to_img_feat=False, pool_text_with_mask=True,
  )  # fmt: skip
  decoder = TransformerDecoder(
    layer=TransformerDecoderLayer(
      activation="relu", d_model=width, dim_feedforward=hidden, dropout=drop,
      cross_attention=attention(False), n_heads=heads, use_text_cross_attention=True,
    ),
    num_layers=config["decoder_layers"], num_queries=config["queries"], return_intermediate=True,
    box_refine=True, num_o2m_queries=0, dac=True, boxRPB="log", d_model=width, frozen=False,
    interaction_layer=None, dac_use_selfatt_ln=True, use_act_checkpoint=True, presence_token=True,
  )  # fmt: skip
  geometry = SequenceGeometryEncoder(
    pos_enc=sine(), encode_boxes_as_points=False, points_direct_project=True, points_pool=True,
    points_pos_enc=True, boxes_direct_project=True, boxes_pool=True, boxes_pos_enc=True,
    d_model=width, num_layers=config["geometry_layers"],
    layer=layer(False, pos_enc_at_attn=False, pos_enc_at_cross_attn_keys=True),
    use_act_ckpt=True, add_cls=True, add_post_encode_proj=True,
  )  # fmt: skip
  masks = UniversalSegmentationHead(
    hidden_dim=width, upsampling_stages=3, aux_masks=False, presence_head=False,
    dot_product_scorer=None, act_ckpt=True, cross_attend_prompt=attention(False, 0.0),
    pixel_decoder=PixelDecoder(
      num_upsampling_stages=3, interpolation_mode="nearest", hidden_dim=width
    ),
  )  # fmt: skip
  norm = torch.nn.LayerNorm(width)
  mlp = MLP(width, hidden, width, num_layers=2, dropout=drop, residual=True, out_norm=norm)
  return Sam3Image(
    backbone=SAM3VLBackbone(visual=neck, text=language, scalp=1),
    transformer=TransformerWrapper(encoder=encoder, decoder=decoder, d_model=width),
    input_geometry_encoder=geometry, segmentation_head=masks, num_feature_levels=1,
    o2m_mask_predict=True, use_instance_query=False, multimask_output=True, matcher=hungarian(),
    dot_prod_scoring=DotProductScoring(d_model=width, d_proj=width, prompt_mlp=mlp),
  )  # fmt: skip


def hungarian() -> BinaryHungarianMatcherV2:
  return BinaryHungarianMatcherV2(
    focal=True, cost_class=2.0, cost_bbox=5.0, cost_giou=2.0, alpha=0.25, gamma=2, stable=False
  )


def make_loss() -> Sam3LossWrapper:
  """The losses of Meta's fine-tuning configurations, with masks and the semantic map."""
  classes = loss_fns.IABCEMdetr(
    pos_weight=10.0, weight_dict={"loss_ce": 20.0, "presence_loss": 20.0}, gamma=2, alpha=0.25,
    weak_loss=False, pad_n_queries=200, use_presence=True,
  )  # fmt: skip
  return Sam3LossWrapper(
    [
      loss_fns.Boxes(weight_dict={"loss_bbox": 5.0, "loss_giou": 2.0}),
      classes,
      loss_fns.Masks(weight_dict={"loss_mask": 200.0, "loss_dice": 10.0}),
    ],
    normalization="local",
    matcher=hungarian(),
    o2m_matcher=BinaryOneToManyMatcher(alpha=0.3, threshold=0.4, topk=4),
    o2m_weight=2.0,
    use_o2m_matcher_on_o2m_aux=False,
    loss_fn_semantic_seg=loss_fns.SemanticSegCriterion(
      weight_dict={"loss_semantic_seg": 20.0, "loss_semantic_dice": 30.0},
      focal=True, focal_alpha=0.6, focal_gamma=2.0, downsample=False, presence_head=True,
      presence_loss=False,
    ),
    scale_by_find_batch_size=True,
  )  # fmt: skip


def make_input(batch: dict[str, np.ndarray]) -> data_misc.BatchedDatapoint:
  """Converts the batch of `train_batch` to the output of Meta's collator, ordered by image."""
  images, prompts, slots = batch["valid"].shape
  rows = images * prompts
  flat = {
    name: torch.from_numpy(x.reshape(rows, *x.shape[2:]))
    for name, x in batch.items()
    if name != "images"
  }
  valid = flat["valid"]
  number = torch.where(valid, torch.arange(rows * slots).reshape(rows, slots), -1)
  stage = data_misc.FindStage(
    img_ids=torch.arange(rows) // prompts, text_ids=torch.arange(rows),
    input_boxes=flat["exemplars"].transpose(0, 1), input_boxes_mask=~flat["given"],
    input_boxes_label=torch.ones_like(flat["given"], dtype=torch.long).T,
    input_points=None, input_points_mask=None,
  )  # fmt: skip
  padded = torch.where(valid[..., None], flat["boxes"], 0)
  target = data_misc.BatchedFindTarget(
    num_boxes=valid.sum(1), boxes=flat["boxes"][valid], boxes_padded=padded,
    repeated_boxes=flat["boxes"][valid], segments=flat["masks"][valid], semantic_segments=None,
    is_valid_segment=torch.ones(int(valid.sum()), dtype=torch.bool),
    is_exhaustive=torch.ones(rows, dtype=torch.bool),
    object_ids=number[valid], object_ids_padded=number,
  )  # fmt: skip
  pixels = torch.from_numpy(batch["images"]).permute(0, 3, 1, 2).float() / 127.5 - 1
  return data_misc.BatchedDatapoint(pixels, ["phrase"] * rows, [stage], [target], [None])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("work", type=Path, help="has config.json and batch.npz; names.json goes here")
  parser.add_argument("--remat", choices=("none", "full"), default="none")
  parser.add_argument("--learning-rate", type=float, required=True)
  arguments = parser.parse_args()
  if arguments.remat == "none":
    torch.utils.checkpoint.checkpoint = lambda function, *args, use_reentrant=None, **kwargs: (
      function(*args, **kwargs)
    )
  config = json.loads((arguments.work / "config.json").read_text())
  batch = dict(np.load(arguments.work / "batch.npz"))
  tokens = torch.from_numpy(batch["tokens"]).long().flatten(0, 1)
  model = build(config, tokens).train()
  state = {k: v for k, v in model.state_dict().items() if v.is_floating_point()}
  for name, tensor in state.items():
    tensor.copy_(torch.from_numpy(weights(f"detector.{name}", tuple(tensor.shape))))
  shapes = {f"detector.{name}": list(tensor.shape) for name, tensor in state.items()}
  (arguments.work / "names.json").write_text(json.dumps(shapes))

  norms = {
    id(p) for m in model.modules() if isinstance(m, torch.nn.LayerNorm) for p in m.parameters()
  }
  groups: dict[bool, list] = {True: [], False: []}
  for name, parameter in model.named_parameters():
    groups["bias" not in name and id(parameter) not in norms].append(parameter)
  optimizer = torch.optim.AdamW(
    [{"params": groups[True], "weight_decay": 0.1}, {"params": groups[False], "weight_decay": 0.0}],
    lr=arguments.learning_rate,
  )
  data, criterion = make_input(batch), make_loss()

  def step() -> float:
    optimizer.zero_grad(set_to_none=True)
    found = model(data)
    targets = [model.back_convert(target) for target in data.find_targets]
    total = criterion(found, targets)[loss_fns.CORE_LOSS_KEY]
    total.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    return float(total.detach())

  versions = {"torch": torch.__version__, "sam3": "0.1.4"}
  serve(step, versions, {"threads": torch.get_num_threads()})


if __name__ == "__main__":
  main()
