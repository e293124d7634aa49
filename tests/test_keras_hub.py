"""KerasHub's presets: names, layouts, configuration, and files that are not what Keras writes."""

import dataclasses
import json
import os
import tracemalloc

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_bpe import merges as clip_merges
from conversions import assert_tree, converted, refused
from golden_model import CONFIG
from keras_preset import datasets, preset_config, write_file, write_preset
from layouts import TOKENIZER, layout, write_folder
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from sam3_jax.converters.layouts import keras_hub
from sam3_jax.converters.readers.hdf5 import open_hdf5
from sam3_jax.converters.readers.safetensors import open_safetensors
from sam3_jax.converters.sources import find_weights
from sam3_jax.converters.vocabulary import build_tokenizer
from sam3_jax.converters.writers.vocabulary import write_huggingface

from sam3_jax.checkpoint.bundle import inspect, load_unread

HUB = dataclasses.replace(CONFIG, concept_points=False)
TILED = "layers/sam3_vision_encoder/backbone/embeddings/vars/0"
LEVEL3 = "layers/sam3_vision_encoder/vision_neck/fpn_layers/sam3fpn_layer_3"


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
  return write_preset(tmp_path_factory.mktemp("keras") / "preset")


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_a_preset_gives_the_tree_made_by_hand(tmp_path, shards):
  source = write_preset(tmp_path / "preset", shards=shards)
  bundle = converted(source, tmp_path / "out")
  assert_tree(bundle.params, visual=False)
  assert bundle.config == HUB
  assert "434 tensors in the layout keras" in bundle.info["source"]
  pixels = "detector.segmentation_head.pixel_decoder"
  assert set(bundle.info["lacks"]) >= {"tracker", f"{pixels}.conv_layers.2.weight"}
  assert len(bundle.info["lacks"]) == 9
  summary = inspect(tmp_path / "out")
  assert {reason: sums["tensors"] for reason, sums in summary.dropped.items()} == {
    "recomputed": 8,
    "tiles of the position table": 1,
  }
  assert {name.rpartition("/vars")[0] for name in load_unread(tmp_path / "out")} == {
    f"{LEVEL3}/proj1",
    f"{LEVEL3}/proj2",
  }


@pytest.mark.slow
def test_bundles_of_a_preset_and_of_hugging_face_are_the_same(preset, tmp_path):
  """Bit-equal on every tensor that both layouts carry."""
  first = converted(preset, tmp_path / "keras")
  second = converted(write_folder(tmp_path / "hf", layout("detector")), tmp_path / "hub")
  assert first.config == second.config
  jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


@pytest.mark.slow
def test_back_to_hugging_face(preset, tmp_path):
  convert(preset, tmp_path / "bundle", tokenizer=TOKENIZER)
  done = export(tmp_path / "bundle", tmp_path / "out", "huggingface")
  found = open_safetensors(tmp_path / "out" / "model.safetensors")
  want = {f"detector_model.{name}": array for name, array in layout("detector").items()}
  zero = {
    "detector_model.text_encoder.text_projection.weight",
    *(f"detector_model.mask_decoder.pixel_decoder.{part}.2.{leaf}"
      for part in ("conv_layers", "norms") for leaf in ("weight", "bias")),
  }  # fmt: skip
  assert set(done.zero_filled) == zero
  assert found.keys() == want.keys()
  for name, array in want.items():
    expected = np.zeros_like(array) if name in zero else array
    np.testing.assert_array_equal(found[name].read(), expected, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["bfloat16", "float16"])
def test_half_precision(tmp_path, stored):
  arrays = {
    name: array if "rotary" in name else array.astype(jnp.dtype(stored))
    for name, array in datasets().items()
  }
  bundle = converted(write_preset(tmp_path / "preset", arrays), tmp_path / "out")
  assert_tree(bundle.params, visual=False, through=jnp.dtype(stored))


@pytest.mark.slow
def test_the_vocabulary_among_the_assets(tmp_path):
  assets = tmp_path / "assets" / "tokenizer"
  assets.mkdir(parents=True)
  write_huggingface(TOKENIZER.read_bytes(), assets, 32)
  (assets / "vocab.json").rename(assets / "vocabulary.json")
  lines = [" ".join(merge) for merge in clip_merges()]  # without a line for the version
  (assets / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  assert build_tokenizer(tmp_path) == TOKENIZER.read_bytes()


# --- configurations


def test_the_configuration():
  assert keras_hub.read_config(preset_config(), "x") == HUB


@pytest.mark.parametrize(
  ("part", "key", "value", "match"),
  [
    ("vision_encoder", "rope_theta", 500.0, "rope_theta = 500.0; only 10000.0 can be converted"),
    ("vision_encoder", "hidden_activation", "relu", "only 'gelu' can be converted"),
    ("vision_encoder", "hidden_dim", "64", "hidden_dim = '64'; expected a int"),
    ("vision_encoder", "num_heads", 0, "num_heads = 0; expected a int"),
    ("vision_encoder", "image_shape", [168, 112, 3], "expected a square image"),
    ("vision_encoder", "global_attn_indexes", [0, 3], "expected equal groups"),
    ("detr_encoder", "hidden_dim", 64, "must have one hidden_dim for these parts"),
    ("detr_decoder", "num_queries", None, "num_queries = None"),
    ("geometry_encoder", "roi_size", 5, "roi_size = 5; only 7"),
  ],
)
def test_configurations_that_cannot_be_converted(preset, tmp_path, part, key, value, match):
  config = preset_config()
  config["config"][part]["config"][key] = value
  source = write_preset(tmp_path / "source", {"x": np.ones(1)}, config=config)
  (source / "model.weights.h5").unlink()
  os.link(preset / "model.weights.h5", source / "model.weights.h5")
  refused(source, tmp_path, match)


def test_other_or_missing_configurations(preset, tmp_path):
  with pytest.raises(ValueError, match="has class_name 'GemmaBackbone'; expected SAM3Promptable"):
    keras_hub.read_config({"class_name": "GemmaBackbone"}, "x")
  with pytest.raises(ValueError, match=r"lacks vision_encoder\.hidden_activation"):
    keras_hub.read_config({"class_name": "SAM3PromptableConceptBackbone", "config": {}}, "x")
  source = tmp_path / "model.weights.h5"
  os.link(preset / "model.weights.h5", source)
  refused(source, tmp_path, "config.json is missing; it belongs beside", FileNotFoundError)


# --- files


def test_datasets_are_read_as_written(tmp_path):
  arrays = {
    "a/zero": np.zeros((0, 3), np.float32),
    "a/scalar": np.float32(2.5).reshape(()),
    "b/half": np.arange(5, dtype=np.float16),
    "b/c/brain": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "int": np.arange(3),
    "double": np.eye(2),
  }
  found = open_hdf5(write_file(tmp_path / "x.h5", arrays))
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert (found[name].shape, found[name].dtype) == (array.shape, str(array.dtype))
    np.testing.assert_array_equal(found[name].read(), array)


def test_a_position_table_that_was_trained_after_tiling(tmp_path):
  arrays = datasets()
  arrays[TILED] = arrays[TILED] + np.float32(0.01)
  source = write_preset(tmp_path / "source", arrays)
  refused(source, tmp_path, f"{TILED} differs from what its configuration gives")


def hostile(path, change):
  write_file(path, {"layers/sam3_vision_encoder/a/vars/0": np.ones(3, np.float32)})
  with h5py.File(path, "a") as file:
    change(file)
  return path


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (
      lambda f: f.__setitem__("x", h5py.ExternalLink("/etc/passwd", "/")),
      "x is a link to another object",
    ),
    (
      lambda f: f.__setitem__("x", h5py.SoftLink("/layers")),
      r"x is a link to another object \(SoftLink\)",
    ),
    (lambda f: f.__setitem__("x", f["layers"]), "x is a group that occurs twice"),
    (
      lambda f: f["layers"].__setitem__("loop", f["/"]),
      "loop is a group that occurs twice",
    ),
    (
      lambda f: f.__setitem__("y", f["layers/sam3_vision_encoder/a/vars/0"]),
      "share their",
    ),
    (lambda f: f.create_group("/".join("g" * 30)), "nested deeper than 20"),
    (lambda f: f.create_dataset("x", (1 << 40,), "f4"), "x .* were never written"),
    (lambda f: f.create_dataset("x", (1 << 40,), "f4", chunks=(1 << 20,)), "x is stored in chunks"),
    (
      lambda f: f.create_dataset("x", data=np.zeros(10**7), compression="gzip"),
      "x is stored in chunks, compressed",
    ),
    (
      lambda f: f.create_dataset("x", (4,), "f4", external=[("/etc/passwd", 0, 16)]),
      "the elements of x are in another file",
    ),
    (lambda f: f.create_virtual_dataset("x", h5py.VirtualLayout((4,), "f4")), "x is stored in"),
    (lambda f: f.create_dataset("x", data="text"), "x is of dtype object"),
    (lambda f: f.create_dataset("x", data=np.ones(2, ">f4")), "x is of dtype >f4"),
    (lambda f: f.create_dataset("x", data=h5py.Empty("f4")), "x is of dtype|never written"),
    (lambda f: f.__setitem__("x", np.dtype("f4")), "x is a Datatype, not a dataset"),
    (lambda f: f.create_dataset("a\nb", data=np.ones(2)), r"'a\\nb' is not a valid tensor name"),
  ],
)
def test_what_keras_does_not_write_is_refused(tmp_path, change, match):
  path = hostile(tmp_path / "model.weights.h5", change)
  for _ in range(2):  # the first call imports modules, which take memory too
    tracemalloc.start()
    with pytest.raises(ValueError, match=match) as caught:
      open_hdf5(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 1_000_000
  assert "\n" not in str(caught.value)


def test_truncated_anywhere(preset, tmp_path):
  source = tmp_path / "model.weights.h5"
  source.write_bytes((preset / "model.weights.h5").read_bytes())
  size = source.stat().st_size
  for length in sorted({0, 8, 100, *np.random.default_rng(0).integers(9, size, 100)})[::-1]:
    os.truncate(source, int(length))
    refused(source, tmp_path, "is truncated or damaged|is not a safetensors")


def test_shards_that_are_missing_or_elsewhere(tmp_path):
  source = write_preset(tmp_path / "source", shards=2)
  index = source / "model.weights.json"
  values = json.loads(index.read_text())
  shard = source / "model_00001.weights.h5"
  content = shard.read_bytes()
  shard.unlink()
  refused(
    source, tmp_path, "model_00001.weights.h5, one of 2 shards, is missing", FileNotFoundError
  )
  shard.write_bytes((source / "model_00000.weights.h5").read_bytes())
  refused(source, tmp_path, "and in another shard; download both")
  shard.write_bytes(content)
  values["weight_map"]["more"] = "../elsewhere.h5"
  index.write_text(json.dumps(values))
  refused(source, tmp_path, "must be in the directory of its index")
  for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
    index.write_text(text)
    refused(source, tmp_path, "is not an index of shards")
  assert find_weights(source) == index
