"""Files with huge sizes, deep nesting etc. are rejected with a one-line error and little memory.

Faults that only one format allows are in the tests of that format: test_safetensors.py,
test_torch_files.py, test_keras_hub.py.
"""

import gzip
import json
import tracemalloc

import numpy as np
import pytest
from conversions import header_entry, refused, write_safetensors
from golden_model import CONFIG
from keras_preset import preset_config, write_preset
from layouts import layout, tiny_config, write_folder
from sam3_jax.converters import convert
from sam3_jax.converters.layouts import meta
from sam3_jax.converters.readers.hdf5 import open_hdf5
from sam3_jax.converters.readers.safetensors import open_safetensors
from sam3_jax.converters.readers.torch_files import open_torch
from sam3_jax.converters.vocabulary import build_tokenizer
from torch_archive import View, save, save_arrays

MEMORY = 60_000_000  # measured 41 million, for a vocabulary of the largest size allowed
DEEP = b"[" * 200_000
BACKBONE = ("vision_config", "backbone_config")


@pytest.fixture
def bounded_memory():
  tracemalloc.start()
  yield
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < MEMORY


def changed(values, path, value):
  node = values
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  return values


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("source") / "hub", layout("detector"))


@pytest.mark.slow
@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    ((*BACKBONE, "hidden_size"), 2**40, "config.json: trunk width must be at most 65,536"),
    ((*BACKBONE, "image_size"), 14 * 2**30, "config.json: image_size must be at most 65,536"),
    ((*BACKBONE, "image_size"), 14 * 4680, "config.json: a grid of 4680 patches per side with 16"),
    (
      BACKBONE,
      {"num_hidden_layers": 200_000_000, "global_attn_indexes": [99_999_999, 199_999_999]},
      "trunk windowed must be at most 65,536",
    ),
    ((*BACKBONE, "global_attn_indexes"), [[0] * 10**5], r"indexes \[\[0, 0, 0.* of 4 blocks"),
    (("text_config", "num_hidden_layers"), 10**9, "text layers must be at most 65,536"),
    (("text_config", "num_hidden_layers"), 2**16, r"tensors, but its configuration needs 1,\d+"),
    (("text_config", "vocab_size"), 2**62, "text vocabulary must be at most 65,536"),
    (("detr_encoder_config", "num_layers"), "9" * 10**6, "num_layers = '9999.*expected something"),
    (("detr_encoder_config", "num_layers"), 10**50, "not readable JSON .* a number of 51 digits"),
  ],
)
def test_configurations_with_huge_sizes(hub, tmp_path, path, value, match):
  source = tmp_path / "source"
  source.mkdir()
  (source / "model.safetensors").symlink_to(hub / "model.safetensors")
  config = changed(tiny_config()["detector_config"] | {"model_type": "sam3"}, path, value)
  (source / "config.json").write_text(json.dumps(config))
  refused(source, tmp_path, match)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
  ("part", "key", "value", "match"),
  [
    ("vision_encoder", "hidden_dim", 2**40, "config.json: trunk width must be at most 65,536"),
    ("vision_encoder", "image_shape", [2**40, 2**40, 3], "image_size must be at most 65,536"),
    ("text_encoder", "num_layers", 10**9, "text layers must be at most 65,536"),
    ("detr_encoder", "num_layers", 2**16, "has 1 tensors, but its configuration needs 1,"),
    ("detr_encoder", "num_layers", [0] * 10**5, r"num_layers = \[0, 0, 0"),
  ],
)
def test_presets_with_huge_sizes(tmp_path, part, key, value, match):
  config = changed(preset_config(), ("config", part, "config", key), value)
  name = "layers/sam3_vision_encoder/x/vars/0"
  write_preset(tmp_path / "source", {name: np.ones(1, np.float32)}, config=config)
  refused(tmp_path / "source", tmp_path, match)


def test_huge_layer_index_in_a_name(tmp_path):
  name = f"detector.backbone.vision_backbone.trunk.blocks.{'9' * 30}.norm1.weight"
  arrays = layout("meta") | meta.rope_tables(CONFIG) | {name: np.ones(3, np.float32)}
  save_arrays(tmp_path / "sam3.pt", arrays)
  refused(tmp_path / "sam3.pt", tmp_path, "sam3.pt: trunk groups must be at most 65,536; got 5")


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("text", [DEEP, b" " * 16_000_001])
@pytest.mark.parametrize(
  "name",
  [
    "config.json",
    "tokenizer.json",
    "model.safetensors.index.json",
    "model.weights.json",
    "header",
  ],
)
def test_json_that_is_nested_deeply_or_too_long(hub, tmp_path, name, text):
  source, match = tmp_path / "source", "nested too deeply|larger than 16 MB|not a safetensors file"
  source.mkdir()
  if name == "header":
    write_safetensors(source / "model.safetensors", b'{"a":' + text)
  elif not name.startswith("model."):
    (source / "model.safetensors").symlink_to(hub / "model.safetensors")
  if name != "header":
    (source / name).write_bytes(text)
  if name == "tokenizer.json":
    with pytest.raises(ValueError, match=f"{name} .*({match})"):
      build_tokenizer(source)
  else:
    refused(source, tmp_path, f"{'model.safetensors' if name == 'header' else name}.*({match})")


@pytest.mark.usefixtures("bounded_memory")
def test_vocabulary_decompression_bomb(tmp_path):
  path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
  with gzip.open(path, "wb") as file:
    for _ in range(100):
      file.write(bytes(1_000_000))
  with pytest.raises(ValueError, match="holds more than 16 MB; CLIP's vocabulary"):
    build_tokenizer(path)


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
  ("shape", "match"),
  [
    ((0, 2**40, 2**40), r"a has the shape \[0, 1099.* which no tensor can have"),
    ((0, *[1] * 40), "a has 41 axes, more than 32"),
  ],
)
def test_impossible_tensor_shapes(tmp_path, shape, match):
  path = write_safetensors(
    tmp_path / "x.safetensors", {"a": header_entry(shape=shape, offsets=(0, 0))}
  )
  with pytest.raises(ValueError, match=f"a in the header of {path} is damaged: {match}"):
    open_safetensors(path)
  if len(shape) < 32:
    view = View(np.ones(1, np.float32), "0", shape, (1,) * len(shape))
    with pytest.raises(ValueError, match=match):
      open_torch(save(tmp_path / "x.pt", {"a": view}))


@pytest.mark.usefixtures("bounded_memory")
def test_impossible_hdf5_shapes(tmp_path):
  import h5py

  with h5py.File(tmp_path / "x.h5", "w") as file:
    file.create_dataset("a", (0, 2**40, 2**20), "f4")
  with pytest.raises(ValueError, match=r"x\.h5 .*a has the shape \[0, 1099"):
    open_hdf5(tmp_path / "x.h5")


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize(
  ("places", "match"),
  [
    ({"a": "b\nc"}, "is not an index of shards"),
    ({"a\nb": "c"}, "is not an index of shards"),
    ({"a": "x" * 10**6}, "is not an index of shards"),
  ],
)
def test_index_with_invalid_file_names(tmp_path, places, match):
  (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
  refused(tmp_path, tmp_path, match)


@pytest.mark.parametrize(
  ("source", "match"),
  [
    (
      "https://huggingface.co/facebook/sam3/blob/main/sam3.pt",
      "`sam3-jax convert hf://facebook/sa",
    ),
    (
      "https://example.com/sam3.pt",
      "https://example.com/sam3.pt is not a path; run `sam3-jax convert",
    ),
    ("hf://me/sam3", "run `sam3-jax convert hf://me/sam3 OUT`"),
    ("sam3-tiny", "sam3-tiny is the name of a checkpoint of sam3-jax .*it needs no conversion"),
    ("sam3-huge", "sam3-huge does not exist; give model.safetensors"),
  ],
)
def test_names_of_wrong_files(tmp_path, source, match):
  with pytest.raises(FileNotFoundError, match=match) as caught:
    convert(source, tmp_path / "out")
  assert "\n" not in str(caught.value)
