"""Live parity of LiteText's text encoders with transformers; test_lite_text.py's golden.

  SAM3_JAX_WRITE_GOLDENS=1 python -m pytest -m reference tests/reference/test_transformers_lite.py

writes that golden anew.
"""

import dataclasses
import importlib.util
import os

import jax
import jax.numpy as jnp
import lite
import numpy as np
import pytest
from layouts import TOKENIZER
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from tiny import GOLDENS

from sam3_jax import checkpoint
from sam3_jax.model.lite_text import LiteTextEncoder

MISSING = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
END = 49407

pytestmark = [
  pytest.mark.reference,
  pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: the extra `reference`"),
  pytest.mark.filterwarnings("ignore"),
]


def theirs(model, mask_padding):
  """Text features: as their processor calls the model, or as LiteText's authors do."""
  import torch

  tokens = lite.phrases()
  ids = np.where(tokens != 0, tokens, END) if mask_padding else tokens
  mask = torch.tensor((tokens != 0).astype(np.int64)) if mask_padding else None
  with torch.no_grad():
    found = model.get_text_features(torch.tensor(ids).long(), attention_mask=mask)
  return found.pooler_output.numpy()


@pytest.mark.parametrize("mixers", [True, False], ids=["mixers", "plain"])
def test_text_features_and_the_way_back(tmp_path, mixers):
  from transformers import Sam3LiteTextModel

  convert(lite.write(tmp_path / "source", mixers), tmp_path / "bundle", tokenizer=TOKENIZER)
  export(tmp_path / "bundle", tmp_path / "out", "huggingface")
  model, loading = Sam3LiteTextModel.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not any(loading.values()), loading
  bundle, golden = checkpoint.load(tmp_path / "bundle"), {}
  valid = lite.phrases() != 0
  for mask_padding in (False, True):
    text = dataclasses.replace(bundle.config.text, mask_padding=mask_padding)
    encoder = LiteTextEncoder(text, bundle.config.width)
    with jax.default_matmul_precision("highest"):
      ours = encoder.apply({"params": bundle.params["text"]}, jnp.asarray(lite.phrases()))
    want = theirs(model.eval(), mask_padding)
    np.testing.assert_allclose(
      np.asarray(ours.features)[valid], want[valid], rtol=0, atol=1e-5
    )  # measured 3.1e-6
    name = f"{'mixers' if mixers else 'plain'}/{'masked' if mask_padding else 'attended'}"
    golden[name] = want[valid][:, ::8]
  if "SAM3_JAX_WRITE_GOLDENS" in os.environ:
    path = GOLDENS / "lite_text.npz"
    others = dict(np.load(path)) if path.exists() else {}
    np.savez_compressed(path, **(others | golden))
