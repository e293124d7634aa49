"""Configurations: round trip through JSON, and errors."""

import dataclasses
import json
import math
import re

import pytest

from sam3_jax.config import (
  RELEASED,
  SIZES,
  Config,
  Rules,
  TextConfig,
  TrunkConfig,
  VideoConfig,
)

VIDEO = dataclasses.replace(RELEASED, video=VideoConfig())


@pytest.mark.parametrize("size", SIZES)
def test_round_trip_through_json(size):
  config = SIZES[size]
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
  assert hash(config) == hash(dataclasses.replace(config))  # a static argument of jit


def test_tracker_is_optional():
  """A configuration without it is stored as by earlier versions, so that identities stay."""
  assert "video" not in RELEASED.to_dict()
  values = json.loads(json.dumps(VIDEO.to_dict()))
  assert Config.from_dict(values) == VIDEO
  assert Config.from_dict(values | {"video": None}) == RELEASED
  del values["video"]
  assert Config.from_dict(values) == RELEASED


def test_missing_rules_of_the_tracker_have_their_defaults():
  values = VIDEO.to_dict()
  values["video"]["rules"] = {"fill_hole_area": 0}
  assert Config.from_dict(values).video == VideoConfig(rules=Rules(fill_hole_area=0))


def test_defaults_are_the_released_sizes():
  assert SIZES["vit-large"] is RELEASED
  assert (RELEASED.grid, RELEASED.mask_size, RELEASED.trunk.blocks) == (72, 288, 32)
  assert RELEASED.trunk.mlp_width == 4.625 * RELEASED.trunk.width
  assert RELEASED.text.mlp_width == 4 * RELEASED.text.width


@pytest.mark.parametrize(
  ("size", "width", "heads", "depth"),
  [
    ("vit-tiny", 192, 3, 12),
    ("vit-small", 384, 6, 12),
    ("vit-base", 768, 12, 12),
    ("vit-large", 1024, 16, 32),
  ],
)
def test_trunk_sizes(size, width, heads, depth):
  trunk = SIZES[size].trunk
  assert (trunk.width, trunk.heads, trunk.blocks, trunk.groups) == (width, heads, depth, 4)
  assert trunk.mlp_width == 4.625 * width
  assert dataclasses.replace(SIZES[size], trunk=RELEASED.trunk) == RELEASED


def test_configurations_are_frozen_and_keyword_only():
  with pytest.raises(dataclasses.FrozenInstanceError):
    RELEASED.width = 1
  with pytest.raises(TypeError):
    TextConfig(32)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (
      lambda: TrunkConfig(width=100, heads=4),
      "trunk width 100 must be a multiple of 4 * heads = 16 (two rotated axes of channel pairs in "
      "each head); change width or heads.",
    ),
    (
      lambda: TextConfig(width=100, heads=8),
      "text width 100 must be a multiple of the heads, 8; change either.",
    ),
    *[
      (
        lambda width=width, heads=heads: Config(width=width, heads=heads),
        f"width {width} must be a multiple of the heads, {heads}, and of 8 (the groups of the "
        "masks' GroupNorm; sine encodings need 4); change width or heads.",
      )
      for width, heads in [(250, 5), (256, 3), (4, 1), (100, 1)]
    ],
    (lambda: Config(dropout=1.0), "dropout must be in [0, 1); got 1.0."),
    (lambda: TrunkConfig(drop_path=-0.1), "trunk drop_path must be in [0, 1); got -0.1."),
    (lambda: _changed(dropout=float("nan")), "dropout must be in [0, 1); got nan."),
    (
      lambda: Config(image_size=1000),
      "image_size 1000 must be a multiple of the patch, 14 pixels.",
    ),
    (
      lambda: Config(image_size=350),
      "the grid of 25 patches (image_size / patch) must be a multiple of the window, 24 patches; "
      "change image_size or window.",
    ),
    (
      lambda: Config.from_dict([]),
      "config must be an object with the fields of Config; got [].",
    ),
    (
      lambda: _changed(trunk=7),
      "config.trunk must be an object with the fields of TrunkConfig; got 7.",
    ),
    (
      lambda: _changed(depth=3),
      "config must have exactly the fields of Config; unknown: ['depth'], missing: []. "
      "Convert the checkpoint again with this version of sam3-jax.",
    ),
    (
      lambda: _changed(text={"width": 3}),
      "config.text must have exactly the fields of TextConfig; unknown: [], missing: ['context', "
      "'heads', 'layers', 'mlp_width', 'vocabulary']. "
      "Convert the checkpoint again with this version of sam3-jax.",
    ),
    (lambda: _changed(width="256"), "config.width must be of type int; got '256'."),
    (lambda: _changed(width=True), "config.width must be of type int; got True."),
    (lambda: _changed(concept_points=1), "config.concept_points must be of type bool; got 1."),
    (lambda: _changed(dropout=None), "config.dropout must be of type float; got None."),
    (
      lambda: VideoConfig(memory_channels=6),
      "video memory_channels must be a multiple of 4 (a sine code for each of two axes); got 6.",
    ),
    (
      lambda: VideoConfig(mask_widths=(4, 16, 0, 256)),
      "video mask_widths must be 1 to 65,536 each; got (4, 16, 0, 256).",
    ),
    (
      lambda: Config(video=VideoConfig(memory_channels=96)),
      "width 256 must be a multiple of video memory_channels, 96 (an object pointer is cut into "
      "tokens of that size); change either.",
    ),
    (
      lambda: Rules(min_memory_score=1.5),
      "rules min_memory_score must be in [0, 1]; got 1.5.",
    ),
    (
      lambda: Rules(fill_hole_area=-1),
      "rules fill_hole_area must be a whole number from 0 to 65536; got -1.",
    ),
    (
      lambda: _changed(video=VIDEO.to_dict()["video"] | {"mask_widths": [1, 2]}),
      "config.video.mask_widths must have 4 values; got [1, 2].",
    ),
    (
      lambda: _changed(video=VIDEO.to_dict()["video"] | {"rules": {"speed": 1}}),
      "config.video.rules must have exactly the fields of Rules; unknown: ['speed'], "
      "missing: []. Convert the checkpoint again with this version of sam3-jax.",
    ),
  ],
)
def test_invalid_values(make, message):
  with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
    make()


@pytest.mark.parametrize(
  ("name", "value", "wanted"),
  [
    ("max_points", 2.5, "a whole number from 1 to 65536"),
    ("fill_hole_area", True, "a whole number from 0 to 65536"),
    ("max_lost_frames", "300", "a whole number from 0 to 65536"),
    ("max_num_objects", 129, "a whole number from 1 to 128"),
    ("memory_selection", 3, "True or False"),
    ("new_det_thresh", "a", "a finite number"),
    ("det_nms_thresh", None, "a finite number"),
    ("high_iou_thresh", math.nan, "a finite number"),
    ("recondition_min_logit", 101, "in [-100, 100]"),
  ],
)
def test_rules_of_another_type_or_range(name, value, wanted):
  with pytest.raises(ValueError, match=f"^{re.escape(f'rules {name} must be {wanted}; got ')}"):
    Rules(**{name: value})


def test_logits_of_rules_may_exceed_1():
  assert Rules(recondition_min_logit=-2.5).recondition_min_logit == -2.5
  assert Rules(recondition_min_logit=2).recondition_min_logit == 2


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
  ("cls", "of"),
  [(Config, ""), (TrunkConfig, "trunk "), (TextConfig, "text "), (VideoConfig, "video ")],
)
def test_integers_must_be_positive(cls, of, value):
  names = [field.name for field in dataclasses.fields(cls) if field.type is int]
  assert len(names) >= 6
  for name in names:
    with pytest.raises(ValueError, match=rf"^{of}{name} must be at least 1; got {value}\.$"):
      cls(**{name: value})


@pytest.mark.parametrize("value", [2**16 + 1, 2**63, 10**50])
def test_integers_have_an_upper_limit(value):
  with pytest.raises(ValueError, match=rf"^queries must be at most 65,536; got {value}\.$"):
    Config(queries=value)
  with pytest.raises(
    ValueError, match="a grid of 4608 patches per side with 64 channels per head need"
  ):
    Config(image_size=4608 * 14)


def test_integer_is_accepted_for_a_float():
  assert _changed(dropout=0).dropout == 0


def _changed(**values):
  return Config.from_dict(RELEASED.to_dict() | values)
