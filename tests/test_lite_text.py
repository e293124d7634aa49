"""The text encoders of SAM 3 LiteText: round trip of their files, and the two kinds of padding."""

import dataclasses
import functools
import json
import math

import jax
import lite
import numpy as np
import pytest
from golden_model import GOLDENS
from layouts import TOKENIZER
from safetensors.numpy import load_file
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from typer.testing import CliRunner

from sam3_jax.checkpoint import bundle
from sam3_jax.cli.main import app
from sam3_jax.config import LITE_TEXTS, RELEASED, Config, LiteTextConfig
from sam3_jax.model.lite_text import LiteTextEncoder
from sam3_jax.utils.param_tree import flatten

MIXERS = pytest.mark.parametrize("mixers", [True, False], ids=["mixers", "plain"])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
  folder = tmp_path_factory.mktemp("lite")
  for mixers in (True, False):
    source = lite.write(folder / f"source-{mixers}", mixers)
    convert(source, folder / str(mixers), tokenizer=TOKENIZER)
  return folder


@functools.cache
def encode(folder, mask_padding):
  loaded = bundle.load(folder)
  text = dataclasses.replace(loaded.config.text, mask_padding=mask_padding)
  encoder = LiteTextEncoder(text, loaded.config.width)
  return jax.jit(lambda tokens: encoder.apply({"params": loaded.params["text"]}, tokens))


@pytest.mark.slow
@MIXERS
def test_round_trip_is_bit_equal(bundles, tmp_path, mixers):
  loaded = bundle.load(bundles / str(mixers), verify=True)
  assert loaded.config == lite.config(mixers)
  done = export(bundles / str(mixers), tmp_path / "out", "huggingface", verify=True)
  got = load_file(tmp_path / "out" / "model.safetensors")
  want = {f"detector_model.{n}": x for n, x in lite.all_weights(mixers).items()}
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype
    np.testing.assert_array_equal(got[name], array, err_msg=name)
  assert done.zero_filled == ()
  convert(tmp_path / "out", tmp_path / "again")
  again = bundle.load(tmp_path / "again")
  assert again.config == loaded.config
  for name, array in flatten(loaded.params).items():
    np.testing.assert_array_equal(array, flatten(again.params)[name], err_msg=name)


@pytest.mark.slow
@MIXERS
@pytest.mark.parametrize("mask_padding", [False, True])
def test_features_match_transformers(bundles, mixers, mask_padding):
  """tests/reference/test_transformers_lite.py computes the golden with transformers."""
  text = encode(bundles / str(mixers), mask_padding)(lite.phrases())
  with np.load(GOLDENS / "lite_text.npz") as golden:
    want = golden[f"{'mixers' if mixers else 'plain'}/{'masked' if mask_padding else 'attended'}"]
  valid = lite.phrases() != 0
  np.testing.assert_array_equal(text.valid, valid)
  np.testing.assert_allclose(
    np.asarray(text.features)[valid][:, ::8], want, rtol=0, atol=1e-5
  )  # measured 3.1e-6


@pytest.mark.slow
def test_padding_changes_features_unless_masked(bundles):
  """Masked padding still changes the features if there are mixers."""
  rows = lite.phrases()[:1]
  attended, masked = (encode(bundles / "False", mask_padding) for mask_padding in (False, True))
  first, second, short = (
    np.asarray(program(tokens).features)[:, :3]
    for program, tokens in ((attended, rows), (masked, rows), (masked, rows[:, :3]))
  )
  assert np.abs(first - second).max() > 0.1, np.abs(first - second).max()
  np.testing.assert_allclose(second, short, rtol=0, atol=1e-5)


# Of `Sam3LiteTextTextModel` with 77 positions, by torch: its 42.4, 63.4 and 123.7 M parameters,
# less 61 positions and the unread projection, with the mixers' statistics and the last projection.
@pytest.mark.parametrize(
  ("size", "parameters"), [("s0", 42_287_360), ("s1", 63_266_048), ("l", 123_210_496)]
)
def test_sizes(size, parameters):
  config = dataclasses.replace(RELEASED, text=LITE_TEXTS[size])
  encoder = LiteTextEncoder(config.text, config.width)
  tokens = jax.ShapeDtypeStruct((1, 16), np.int32)
  shapes = jax.tree.leaves(jax.eval_shape(encoder.init, jax.random.key(0), tokens))
  assert sum(math.prod(leaf.shape) for leaf in shapes) == parameters
  assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.slow
def test_refusals(bundles, tmp_path):
  with pytest.raises(ValueError, match=r"the text encoder of LiteText.* the layout meta; only"):
    export(bundles / "True", tmp_path / "out", "meta")
  with pytest.raises(ValueError, match=r"text kernel must be odd; got 4"):
    LiteTextConfig(kernel=4)
  source = lite.write(tmp_path / "source", mixers=False)
  (source / "config.json").unlink()
  with pytest.raises(FileNotFoundError, match=r"config.json is missing; it belongs beside"):
    convert(source, tmp_path / "out", tokenizer=TOKENIZER)


def test_inspect(bundles):
  result = CliRunner().invoke(app, ["inspect", str(bundles / "True")])
  assert "LiteText's, 1 layers of width 32, 16 tokens" in result.output
  cannot = bundle.inspect(bundles / "True").cannot
  assert "convert --to meta: no program of that layout has its text encoder" in cannot
