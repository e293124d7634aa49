"""Loads exports with transformers and with Meta's package, and compares outputs.

To install Meta's package, see the first lines of benchmarks/train.py.
"""

import contextlib
import importlib.util
import io

import jax
import numpy as np
import pytest
from golden_model import CONFIG
from keras_preset import write_preset
from layouts import TOKENIZER, layout, write_folder
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from sam3_jax.converters.layouts import meta
from support import quick
from torch_archive import save_arrays

from sam3_jax import Sam3
from sam3_jax.checkpoint import bundle, fingerprint
from sam3_jax.inference import verify
from sam3_jax.utils.param_tree import flatten, nest

MISSING = [n for n in ("torch", "transformers") if not importlib.util.find_spec(n)]
TOLERANCE = 5e-5  # of each array's largest value; measured 1.1e-5

pytestmark = [
  pytest.mark.reference,
  pytest.mark.skipif(bool(MISSING), reason=f"{MISSING} not installed: the extra `reference`"),
  pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
  """The tiny model converted from each layout, and one with merged LoRA factors."""
  folder = tmp_path_factory.mktemp("bundles")
  save_arrays(folder / "sam3.pt", layout("meta") | meta.rope_tables(CONFIG))
  sources = {
    "hub": write_folder(folder / "source", layout("hub")),
    "meta": folder / "sam3.pt",
    "keras": write_preset(folder / "preset"),
  }
  for name, source in sources.items():
    config = CONFIG if name == "meta" else None
    convert(source, folder / name, config=config, tokenizer=TOKENIZER)
  _merge_lora(folder / "hub", folder / "lora")
  return folder


def _merge_lora(source, out):
  """As the last step of training with `--lora` saves a checkpoint."""
  from sam3_jax.training import lora

  stored = bundle.load(source)
  flat = flatten(stored.params)
  factors = lora.adapt(flat, lora.LoraConfig(rank=2), jax.random.key(1))
  merged = lora.merge(flat | {path: x + 0.02 for path, x in factors.items()}, scale=1.0)
  changed = [path for path, x in merged.items() if not np.array_equal(x, flat[path])]
  assert len(changed) > 20
  unread = bundle.load_unread(source)
  bundle.save(out, nest(merged), stored.config, stored.tokenizer, unread=unread)


@pytest.mark.parametrize("kind", ["hub", "meta", "keras", "lora"])
def test_transformers_loads_all_tensors_and_outputs_match(bundles, tmp_path, kind):
  from sam3_jax.converters import hf_patches, verify_hf

  source, out = bundles / kind, tmp_path / "out"
  export(source, out, "huggingface", verify=True)
  loads = (
    [hf_patches.load_detector]
    if kind == "keras"
    else [hf_patches.load_detector, hf_patches.load_tracker]
  )
  for load in loads:
    _, loading = load(out)
    assert not any(loading.values()), loading
  if kind != "keras":  # a preset has no tracker
    from transformers import Sam3VideoModel

    _, loading = Sam3VideoModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
  answers = verify.run(quick(Sam3.from_checkpoint(source, dtype="float32")))
  errors = dict(verify_hf.differences(source, out, answers))
  assert len(errors) == 10 + 3 * (kind != "keras")
  assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("kind", ["hub", "meta", "keras", "lora"])
def test_meta_package_loads_strictly_and_outputs_match(bundles, tmp_path, kind):
  pytest.importorskip("sam3", reason="Meta's package: see benchmarks/train.py")
  import torch

  with contextlib.redirect_stdout(io.StringIO()):
    from train_meta import build

  source, out = bundles / kind, tmp_path / "out"
  export(source, out, "meta")
  model = quick(Sam3.from_checkpoint(source, dtype="float32"))
  answers = verify.run(model)
  tokens = torch.tensor(model.tokenizer([fingerprint.PHRASE])).long()
  theirs = build(CONFIG.to_dict(), tokens).eval()
  stored = torch.load(out / "sam3.pt", weights_only=True)["model"]
  own = {
    name.removeprefix("detector."): x
    for name, x in stored.items()
    if name.startswith("detector.") and "sam2_convs" not in name  # of the tracker's neck
  }
  theirs.load_state_dict(own, strict=True)
  expected = _run_meta(theirs, model.config.image_size)
  for name in ("boxes", "mask_logits"):
    got = np.asarray(getattr(answers.found, name)[0], np.float64)
    assert np.abs(got - expected[name]).max() <= TOLERANCE * np.abs(expected[name]).max(), name


def _run_meta(model, side):
  """Meta's outputs for the fingerprint's phrase and image."""
  import torch
  from sam3.model.data_misc import FindStage

  from sam3_jax.inputs.preprocess import resize

  pixels = resize(fingerprint.image(), side).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
  row = torch.zeros(1, dtype=torch.long)
  stage = FindStage(
    img_ids=row, text_ids=row, input_boxes=None, input_boxes_mask=None,
    input_boxes_label=None, input_points=None, input_points_mask=None,
  )  # fmt: skip
  with torch.no_grad():
    encoded = model.backbone.forward_image(torch.from_numpy(pixels))
    encoded |= model.backbone.forward_text([fingerprint.PHRASE], device="cpu")
    found = model.forward_grounding(
      backbone_out=encoded,
      find_input=stage,
      find_target=None,
      geometric_prompt=model._get_dummy_prompt(1),
    )
  return {
    "boxes": found["pred_boxes_xyxy"][0].double().numpy(),
    "mask_logits": found["pred_masks"][0].double().numpy(),
  }
