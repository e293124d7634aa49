"""Rules for tensors with the same names in Meta's and Hugging Face's layouts."""

from ..rules import Rule, dense, norm, rule
from ..transforms import CONV


def geometry(source: str) -> tuple[Rule, ...]:
  """The geometry encoder's labels, class token and projections of boxes."""
  return (
    *rule(f"{source}.label_embed.weight", "geometry/label_embedding"),
    *rule(f"{source}.cls_embed.weight", "geometry/cls_token"),
    *dense(f"{source}.boxes_direct_project", "geometry/box_project"),
    *dense(f"{source}.boxes_pool_project", "geometry/box_pool_project", kernel=CONV),
    *dense(f"{source}.boxes_pos_enc_project", "geometry/box_position_project"),
    *dense(f"{source}.final_proj", "geometry/project"),
  )


def queries(source: str) -> tuple[Rule, ...]:
  """The decoder's queries, reference points and presence token."""
  return (
    *rule(f"{source}.query_embed.weight", "decoder/query_embedding"),
    *rule(f"{source}.reference_points.weight", "decoder/reference_points"),
    *rule(f"{source}.presence_token.weight", "decoder/presence_token"),
  )


def pixel_decoder(source: str) -> tuple[Rule, ...]:
  return (
    *dense(f"{source}.conv_layers.0", "masks/conv0", kernel=CONV),
    *dense(f"{source}.conv_layers.1", "masks/conv1", kernel=CONV),
    *norm(f"{source}.norms.0", "masks/norm0"),
    *norm(f"{source}.norms.1", "masks/norm1"),
  )


def prompt_tokens(source: str) -> tuple[Rule, ...]:
  """The embeddings of visual prompts for "no point" and "no mask"."""
  return (
    *rule(f"{source}.not_a_point_embed.weight", "visual/prompt/not_a_point"),
    *rule(f"{source}.no_mask_embed.weight", "visual/prompt/no_mask"),
  )


def mask_tokens(source: str) -> tuple[Rule, ...]:
  """The mask decoder's projections of the finer maps, and its tokens."""
  return (
    *dense(f"{source}.conv_s0", "visual/fine_project", kernel=CONV),
    *dense(f"{source}.conv_s1", "visual/middle_project", kernel=CONV),
    *rule(f"{source}.obj_score_token.weight", "visual/decoder/object_token"),
    *rule(f"{source}.iou_token.weight", "visual/decoder/iou_token"),
    *rule(f"{source}.mask_tokens.weight", "visual/decoder/mask_tokens"),
  )
