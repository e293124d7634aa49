"""Parity with transformers of LiteText's text encoders, alone and in the whole model.

  SAM3_JAX_WRITE_GOLDENS=1 python -m pytest -m reference tests/reference/test_transformers_lite.py

writes the golden of test_lite_text.py.
"""

import dataclasses
import importlib.util
import os

import jax.numpy as jnp
import lite
import numpy as np
import pytest
from golden_model import GOLDENS
from layouts import TOKENIZER
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from support import difference, quick

from sam3_jax import Prompt, Sam3, Tokenizer
from sam3_jax.checkpoint import bundle
from sam3_jax.model.lite_text import LiteTextEncoder

MISSING = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
END = 49407

pytestmark = [
  pytest.mark.reference,
  pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: the extra `reference`"),
  pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module", params=[True, False], ids=["mixers", "plain"])
def both(request, tmp_path_factory):
  """Whether there are mixers; a bundle, and the model that transformers loads from its export."""
  from transformers import Sam3LiteTextModel

  folder = tmp_path_factory.mktemp("lite")
  convert(lite.write(folder / "source", request.param), folder / "bundle", tokenizer=TOKENIZER)
  export(folder / "bundle", folder / "out", "huggingface", verify=True)
  model, loading = Sam3LiteTextModel.from_pretrained(folder / "out", output_loading_info=True)
  assert not any(loading.values()), loading
  return request.param, bundle.load(folder / "bundle"), model.eval()


def theirs(model, tokens, mask_padding):
  """Text features, computed as transformers' processor does or as LiteText's authors do."""
  import torch

  ids = np.where(tokens != 0, tokens, END) if mask_padding else tokens
  mask = torch.tensor((tokens != 0).astype(np.int64)) if mask_padding else None
  with torch.no_grad():
    return model.get_text_features(torch.tensor(ids).long(), attention_mask=mask)


def padded(loaded, mask_padding):
  """The bundle's configuration, with this kind of padding."""
  text = dataclasses.replace(loaded.config.text, mask_padding=mask_padding)
  return dataclasses.replace(loaded.config, text=text)


def test_text_features_of_bundle_and_export(both):
  mixers, loaded, model = both
  golden, valid = {}, lite.phrases() != 0
  for mask_padding in (False, True):
    config = padded(loaded, mask_padding)
    encoder = LiteTextEncoder(config.text, config.width)
    ours = encoder.apply({"params": loaded.params["text"]}, jnp.asarray(lite.phrases()))
    want = theirs(model, lite.phrases(), mask_padding).pooler_output.numpy()
    np.testing.assert_allclose(
      np.asarray(ours.features)[valid], want[valid], rtol=0, atol=1e-5
    )  # measured 3.1e-6
    name = f"{'mixers' if mixers else 'plain'}/{'masked' if mask_padding else 'attended'}"
    golden[name] = want[valid][:, ::8]
  if "SAM3_JAX_WRITE_GOLDENS" in os.environ:
    path = GOLDENS / "lite_text.npz"
    others = dict(np.load(path)) if path.exists() else {}
    np.savez_compressed(path, **(others | golden))


@pytest.mark.parametrize("mask_padding", [False, True], ids=["attended", "masked"])
@pytest.mark.parametrize("box", [None, [30, 40, 120, 140]], ids=["text", "text + box"])
def test_whole_model(both, mask_padding, box):
  """For transformers, a prompt without boxes gets a padding box, as in hf_patches."""
  import torch

  _, loaded, model = both
  side, phrase = loaded.config.image_size, "yellow school bus"
  tokenizer = Tokenizer(loaded.tokenizer, context=loaded.config.text.context)
  image = np.random.default_rng(0).integers(0, 256, (side, side, 3)).astype(np.uint8)
  sam3 = quick(Sam3(padded(loaded, mask_padding), loaded.params, tokenizer, dtype="float32"))
  got = sam3.decode(sam3.encode(image), Prompt(phrase, [box] if box else None))

  tokens = tokenizer([phrase])
  corners = np.array(box or [0, 0, side, side], np.float32).reshape(2, 2) / side
  boxes = np.concatenate([corners.mean(0), corners[1] - corners[0]])[None, None]
  with torch.no_grad():
    want = model(
      pixel_values=torch.tensor(image.transpose(2, 0, 1)[None] / np.float32(127.5) - 1),
      text_embeds=theirs(model, tokens, mask_padding),
      attention_mask=torch.tensor((tokens != 0).astype(np.int64)),
      input_boxes=torch.tensor(boxes),
      input_boxes_labels=torch.tensor([[1 if box else -10]]),
    )
  presence = np.clip(np.asarray(got.presence_logit), -10, 10)  # as in transformers
  scores = torch.sigmoid(want.pred_logits) * torch.sigmoid(
    torch.tensor(np.asarray(got.presence_logit))
  )
  for ours, wanted in (
    (presence, want.presence_logits[:, 0]),
    (got.scores, scores),
    (got.boxes, want.pred_boxes),
    (got.mask_logits, want.pred_masks),
    (got.semantic_logits, want.semantic_seg[:, 0]),
  ):
    assert difference(ours, wanted.numpy()) <= 1e-4  # measured 2.6e-5
