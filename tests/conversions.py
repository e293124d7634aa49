"""Conversions of the seeded model, and checks of their results and of their errors."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from golden_model import CONFIG, VIDEO_CONFIG, parameters, video_parameters, visual_parameters
from layouts import TOKENIZER, layout, write_folder
from sam3_jax.converters import convert

from sam3_jax.checkpoint import bundle
from sam3_jax.utils.param_tree import flatten

HUB = dataclasses.replace(CONFIG, concept_points=False)
HUB_VIDEO = dataclasses.replace(VIDEO_CONFIG, concept_points=False)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("source") / "hub", layout("hub"))


def converted(source, out, **options):
  convert(source, out, tokenizer=TOKENIZER, **options)
  return bundle.load(out, verify=True)


def assert_tree(params, points=False, visual=True, dtype="float32", through=None):
  tracker = {"visual": visual_parameters(), "video": video_parameters()}
  whole = parameters() | (tracker if visual else {})
  want = flatten(jax.tree.map(np.asarray, whole))
  want = {name: x for name, x in want.items() if points or not name.startswith("geometry/point_")}
  got = flatten(params)
  assert got.keys() == want.keys()
  for name, array in want.items():
    expected = array.astype(through or array.dtype).astype(dtype)
    np.testing.assert_array_equal(np.asarray(got[name]), expected, err_msg=name)


def refused(source, tmp_path, match, error=ValueError, **options):
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(error, match=match) as caught:
    convert(source, tmp_path / "out", tokenizer=TOKENIZER, **options)
  assert "\n" not in str(caught.value)
  assert type(caught.value) is error
  assert sorted(tmp_path.rglob("*")) == before


def write_safetensors(path, header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return path


def header_entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}
