"""Configurations of transformers: which are converted, and how the others are refused."""

import dataclasses
import json
import shutil

import conversions
import pytest
from conversions import HUB, refused
from layouts import tiny_config
from sam3_jax.converters.layouts import huggingface

from sam3_jax.config import RELEASED

hub = conversions.hub


def test_configurations_of_detector_and_video_model():
  values = tiny_config()
  assert huggingface.read_config(values, "x") == HUB
  assert huggingface.read_config(values["detector_config"], "x") == HUB
  released = dataclasses.replace(RELEASED, concept_points=False)
  assert huggingface.read_config({"model_type": "sam3"}, "x") == released
  assert huggingface.read_config({"model_type": "sam3_video"}, "x") == released


BACKBONE = ("vision_config", "backbone_config")


@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    (("model_type",), "sam2", "model_type 'sam2'; expected one of sam3"),
    (("model_type",), None, "model_type None"),
    ((*BACKBONE, "hidden_act"), "relu", "hidden_act = 'relu'; only 'gelu' can be converted"),
    ((*BACKBONE, "rope_parameters", "rope_theta"), 500.0, "rope_theta = 500.0; only 10000.0"),
    ((*BACKBONE, "global_attn_indexes"), [1, 2], r"global_attn_indexes \[1, 2\] of 4 blocks"),
    ((*BACKBONE, "global_attn_indexes"), [], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), ["x"], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), [-1], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), [0, 1, 2, 3], "expected equal groups"),
    ((*BACKBONE, "num_hidden_layers"), 5, "of 5 blocks; expected equal groups"),
    ((*BACKBONE, "patch_size"), 0, "patch_size = 0; expected at least 1"),
    ((*BACKBONE, "hidden_size"), "64", "hidden_size = '64'; expected something like 1024"),
    ((*BACKBONE, "hidden_size"), 66, "trunk width 66 must be a multiple of 4"),
    ((*BACKBONE, "window_size"), 5, "must be a multiple of the window"),
    (("detr_encoder_config", "hidden_size"), 64, "one hidden_size for these parts"),
    (("text_config",), 3, "has text_config = 3; expected an object"),
  ],
)
def test_unsupported_configurations(hub, tmp_path, path, value, match):
  config = tiny_config()["detector_config"] | {"model_type": "sam3"}
  node = config
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(json.dumps(config))
  refused(source, tmp_path, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_configuration(hub, tmp_path, text):
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(text)
  refused(source, tmp_path, "config.json (is not readable JSON|has model_type None)")


def test_a_configuration_of_another_size(hub, tmp_path):
  config = tiny_config()
  config["detector_config"]["detr_decoder_config"]["num_queries"] = 11
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(json.dumps(config))
  refused(source, tmp_path, r"query_embed.weight is \[10, 128\]; expected \[11, 128\]")


@pytest.mark.slow
def test_no_configuration(hub, tmp_path):
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").unlink()
  refused(source, tmp_path, "do not determine its heads and windows; put the model's config.json")
