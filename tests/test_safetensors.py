"""Reading safetensors files and their shards; inconsistent ones are refused in one line."""

import json
import os
import shutil
from pathlib import Path

import conversions
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import header_entry, refused, write_safetensors
from layouts import layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters.readers.safetensors import open_safetensors
from sam3_jax.converters.sources import open_weights

hub = conversions.hub
SCALE = "detector_model.vision_encoder.backbone.layer_norm.weight"


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"", "is not a safetensors"),
    (b"hello, this is a text file\n", "is not a safetensors"),
    (b"12345678{", "is not a safetensors"),
    (b"PK\x03\x04 and so on", "cannot be used: it is truncated or damaged"),
    (b"\x80\x02ctorch", "cannot be used: it is in the format of PyTorch before 1.6"),
    ((1 << 60).to_bytes(8, "little") + b"{}", "is not a safetensors"),
    ((50).to_bytes(8, "little") + b"{}", "is truncated at 10 bytes"),
    ((2).to_bytes(8, "little") + b"{]", "header of .* is damaged"),
    ((2).to_bytes(8, "little") + b"{}", "holds no tensors, only a header"),
    ((2).to_bytes(8, "little") + b"{}abc", "3 bytes that belong to no tensor"),
  ],
)
def test_files_of_another_kind(tmp_path, content, match):
  (tmp_path / "model.safetensors").write_bytes(content)
  refused(tmp_path / "model.safetensors", tmp_path, match)


@pytest.mark.parametrize(
  ("header", "match"),
  [
    ({"a": header_entry(shape=[3])}, r"a in the header .*float32 \[3\] does not take 8 bytes"),
    ({"a": header_entry(dtype="F4")}, "dtype 'F4' is unknown"),
    ({"a": header_entry(shape=[-2])}, "a size is not an integer of 0 or more"),
    ({"a": header_entry(shape=[2.0])}, "a size is not an integer of 0 or more"),
    ({"a": header_entry(shape=[1 << 62, 4], offsets=(0, 1 << 66))}, "is truncated"),
    ({"a": header_entry(offsets=(0,))}, "a in the header .* is damaged"),
    ({"a": {"dtype": "F32"}}, "a in the header .* is damaged: 'shape'"),
    ({"a": 3}, "a in the header .* is damaged"),
    (
      {"a": header_entry(), "b": header_entry()},
      "b in .* does not begin where the tensor before it ends",
    ),
    ({"a": header_entry(offsets=(4, 12))}, "does not begin where"),
    (b'{"a": {"dtype": "F32"}, "a": 3}', "'a' is given twice"),
    (b"\xff\xfe", "is not a safetensors"),
  ],
)
def test_inconsistent_header(tmp_path, header, match):
  path = write_safetensors(tmp_path / "model.safetensors", header, bytes(8))
  with pytest.raises(ValueError, match=match):
    open_safetensors(path)


def test_tensors_are_read_as_written(tmp_path):
  arrays = {
    "zero": np.zeros((0, 3), np.float32),
    "one": np.float32([[1.5]]),
    "half": np.arange(5, dtype=np.float16),
    "brain": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "int": np.arange(3),
  }
  save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
  found = open_safetensors(tmp_path / "x.safetensors")
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert (found[name].shape, found[name].dtype) == (array.shape, str(array.dtype))
    assert found[name].parameters == array.size
    np.testing.assert_array_equal(found[name].read(), array)


def test_header_length_that_looks_like_another_file_type(tmp_path):
  """The first byte of the length may be that of a zip archive or of a pickle."""
  header = {"a": header_entry()}
  for first in (0x50, 0x80):
    text = json.dumps(header).encode()
    text += b" " * ((first - len(text)) % 256)
    path = write_safetensors(tmp_path / "x.safetensors", text, bytes(8))
    assert path.read_bytes()[0] == first
    assert list(open_weights(path)) == ["a"]


def test_truncation_at_any_length_is_refused(hub, tmp_path):
  source = Path(shutil.copy(hub / "model.safetensors", tmp_path))
  lengths = [8, 9, 100, *np.random.default_rng(0).integers(101, source.stat().st_size, 100)]
  for length in sorted(lengths, reverse=True):
    os.truncate(source, int(length))
    refused(source, tmp_path, "is truncated at|is not a safetensors")


def test_missing_and_misplaced_shards(tmp_path):
  source = write_folder(tmp_path / "source", layout("hub"), shards=3)
  index = source / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  shard = source / "model-00002-of-00003.safetensors"
  content = shard.read_bytes()
  shard.unlink()
  refused(source, tmp_path, "00002-of-00003.safetensors, one of 3 shards", FileNotFoundError)
  shard.write_bytes(content)
  values["weight_map"][SCALE] = "model-00001-of-00003.safetensors"
  values["weight_map"]["more"] = "model-00001-of-00003.safetensors"
  index.write_text(json.dumps(values))
  refused(source, tmp_path, "disagree about .* more tensors")
  values["weight_map"][SCALE] = "../elsewhere.safetensors"
  index.write_text(json.dumps(values))
  refused(source, tmp_path, "a shard must be in the directory of its index")
  for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
    index.write_text(text)
    refused(source, tmp_path, "is not an index of shards")


def test_source_tensors_are_views_of_a_memory_map(hub):
  sources = open_safetensors(Path(hub) / "model.safetensors")
  array = sources[SCALE].read()
  while array.base is not None and not isinstance(array, np.memmap):
    array = array.base
  assert isinstance(array, np.memmap)
  assert not sources[SCALE].read().flags.writeable
  assert os.path.samefile(array.filename, hub / "model.safetensors")
