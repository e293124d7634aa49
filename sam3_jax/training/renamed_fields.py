"""Fields of training configurations that were renamed in format version 2."""

from collections.abc import Iterator, Mapping
from typing import Any

FORMAT_VERSION = 2

# Old name -> new name, by table; "" is the top.
RENAMED = {
  "": {
    "train": "trainable",
    "accumulate": "gradient_accumulation_steps",
    "average": "ema_decay",
    "duplicate": "one_to_many",
    "masked": "mask_prompts",
    "keep": "max_to_keep",
    "best": "best_metric",
    "stored": "save_dtype",
  },
  "data": {
    "batch": "batch_size",
    "ahead": "prefetch",
    "prompts": "prompts_per_image",
    "present": "present_prompts",
    "objects": "max_objects",
    "examples": "max_exemplars",
    "smallest": "min_scale",
    "flip": "flip_probability",
    "crop": "crop_probability",
    "crop_side": "min_crop_size",
    "box_only": "box_only_probability",
    "text_and_box": "text_and_box_probability",
    "counterexample": "negative_box_probability",
  },
  "optimizer": {
    "multipliers": "learning_rate_multipliers",
    "clip": "max_grad_norm",
    "warmup": "warmup_steps",
    "cooldown": "cooldown_steps",
    "final": "min_learning_rate_ratio",
  },
  "losses": {
    "negative_power": "focal_gamma",
    "many_weight": "one_to_many_weight",
    "many_masks": "one_to_many_masks",
    "many_alpha": "one_to_many_alpha",
    "many_threshold": "one_to_many_threshold",
    "many_top": "one_to_many_top_k",
    "match_class": "cost_class",
    "match_box": "cost_box",
    "match_giou": "cost_giou",
    "mask_alpha": "mask_focal_alpha",
    "semantic_alpha": "semantic_focal_alpha",
  },
  "dense": {"objects": "sampled_objects", "inside": "min_coverage"},
  "visual": {
    "prompts": "prompts_per_image",
    "boxed": "box_probability",
    "nothing": "background_click_probability",
  },
  "scenes": {
    "mixed": "mixed_style_probability",
    "variety": "variety_probability",
    "absent": "absent_per_present",
    "usual": "usual_name_probability",
  },
}


def check_renamed(values: Any) -> None:
  """Raises ValueError, with all the new names, if nested values have names of version 1."""
  if found := renames(values):
    raise ValueError(
      f"the configuration has field names of format version 1; rename {found} for version "
      f"{FORMAT_VERSION}."
    )


def renames(values: Any) -> str:
  """The old and new names of all fields of version 1 in nested values, as "a to b, c to d"."""
  return ", ".join(f"{old} to {new}" for old, new in _renames(values))


def _renames(values: Any) -> Iterator[tuple[str, str]]:
  if not isinstance(values, Mapping):
    return
  for table, names in RENAMED.items():
    fields = values.get(table) if table else values
    prefix = f"{table}." if table else ""
    for old, new in names.items():
      if isinstance(fields, Mapping) and old in fields:
        yield prefix + old, prefix + new
