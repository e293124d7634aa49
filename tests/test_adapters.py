"""Merging LoRA into a base checkpoint, against the formula in float64; misfits are named."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from conversions import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import TOKENIZER, layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import adapters, convert
from sam3_jax.converters.adapter_config import LoraSettings
from sam3_jax.converters.source import Source
from torch_archive import save, views

from sam3_jax.checkpoint import bundle
from sam3_jax.utils.param_tree import flatten

ATTENTION = "vision_encoder.backbone.layers.1.attention"
QUERY, OUT = f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj"
LAYER = "detr_decoder.layers.0.mlp.fc1"
PATCHES = "vision_encoder.backbone.embeddings.patch_embeddings.projection"
TOKENS = "text_encoder.text_model.embeddings.token_embedding"
SETTINGS = {
  "peft_type": "LORA",
  "r": 4,
  "lora_alpha": 8,
  "base_model_name_or_path": "facebook/sam3",
}
START = "base_model.model."


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp("base")
  convert(write_folder(folder / "hub", layout("hub")), folder / "base", tokenizer=TOKENIZER)
  return folder / "base"


@pytest.fixture(scope="module")
def parameters(base):
  return {name: np.asarray(x) for name, x in flatten(bundle.load(base).params).items()}


def factors(module, rank=4, seed=0, name=""):
  rng, shape = np.random.default_rng(seed), layout("detector")[f"{module}.weight"].shape
  return {
    f"{module}.lora_A{name}.weight": rng.normal(size=(rank, *shape[1:])).astype(np.float32),
    f"{module}.lora_B{name}.weight": rng.normal(
      size=(shape[0], rank, *[1] * (len(shape) - 2))
    ).astype(np.float32),
  }


def write_adapter(folder, tensors, prefix=START, **changes):
  folder.mkdir()
  save_file({prefix + n: a for n, a in tensors.items()}, folder / "adapter_model.safetensors")
  (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | changes))
  return folder


def merged(tensors, module, scale):
  """W + scale * B @ A in float64, rounded once to float32."""
  a, b = (tensors[f"{module}.lora_{kind}.weight"].astype(np.float64) for kind in "AB")
  weight = layout("detector")[f"{module}.weight"].astype(np.float64)
  product = np.einsum("or,r...->o...", b.reshape(len(b), -1), a)
  return (weight + scale * product).astype(np.float32)


def written(source, base, tmp_path, **options):
  """The merged checkpoint's tensors under Hugging Face's names."""
  from sam3_jax.converters.base import Base
  from sam3_jax.converters.layouts.huggingface import TABLE

  convert(source, tmp_path / "out", base=base, **options)
  found = Base(tmp_path / "out").sources(TABLE)
  return {name.removeprefix("detector_model."): source.read() for name, source in found.items()}


@pytest.mark.slow
def test_merged_weights(base, tmp_path):
  """Dense layers, a convolution, patterns, biases and whole modules; the rest equals the base."""
  tensors = factors(QUERY) | factors(OUT, seed=1) | factors(LAYER, 2, 2) | factors(PATCHES, seed=3)
  whole = {
    f"{QUERY}.base_layer.bias": np.full(64, 0.5, np.float32),
    "detr_decoder.output_layer_norm.bias": np.full(128, 0.25, np.float32),
    "mask_decoder.instance_projection.modules_to_save.default.bias": np.ones(128, np.float32),
    "dot_product_scoring.text_proj.modules_to_save.bias": np.ones(128, np.float32),
    "dot_product_scoring.query_proj.bias": np.full(128, 2, np.float32),
  }
  folder = write_adapter(
    tmp_path / "adapter",
    tensors | whole,
    rank_pattern={r"layers\.\d+\.mlp\.fc1": 2},
    alpha_pattern={"o_proj": 3, "^detr_decoder.*fc1": 5},
  )
  notes = []
  got = written(folder, base, tmp_path, note=notes.append)
  expected = dict(layout("detector"))
  for module, scale in ((QUERY, 2), (OUT, 3 / 4), (LAYER, 5 / 2), (PATCHES, 2)):
    expected[f"{module}.weight"] = merged(tensors, module, scale)
  for name, array in whole.items():
    for part in (".base_layer", ".modules_to_save.default", ".modules_to_save"):
      name = name.replace(part, "")
    assert expected[name].shape == array.shape
    expected[name] = array
  for name, array in expected.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)
  assert notes == ["merged LoRA into 4 weights"]
  info = bundle.inspect(tmp_path / "out").info
  assert info["base"]["identity"] == bundle.begin(base)[0].identity


@pytest.mark.slow
def test_zero_adapter_leaves_the_base_unchanged(base, parameters, tmp_path):
  tensors = {n: np.zeros_like(a) if "lora_B" in n else a for n, a in factors(QUERY).items()}
  folder = write_adapter(tmp_path / "adapter", tensors)
  convert(folder, tmp_path / "out", base=base)
  for name, array in flatten(bundle.load(tmp_path / "out").params).items():
    np.testing.assert_array_equal(np.asarray(array), parameters[name], err_msg=name)
  assert bundle.load_unread(tmp_path / "out").keys() == bundle.load_unread(base).keys()


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_random_factors(data):
  """Any shape, rank, scale and dtype, in memory."""
  outputs, inputs, rank = (data.draw(st.integers(1, 6)) for _ in range(3))
  transposed, rslora = data.draw(st.booleans()), data.draw(st.booleans())
  alpha = data.draw(st.floats(0.5, 64))
  dtype = jnp.dtype(data.draw(st.sampled_from(["float32", "bfloat16", "float16"])))
  rng = np.random.default_rng(data.draw(st.integers(0, 99)))
  a, b, shift = (
    rng.normal(size=size).astype(dtype) for size in ((rank, inputs), (outputs, rank), outputs)
  )
  weight = rng.normal(size=(inputs, outputs) if transposed else (outputs, inputs)).astype(dtype)
  arrays = {"m.lora_A.weight": a, "m.lora_B.weight": b, "m.lora_B.bias": shift}
  found, plain = adapters.split([*arrays, "m.weight"])
  assert plain == {"m.weight": "m.weight"}
  chosen = LoraSettings(r=rank, alpha=alpha, rslora=rslora, fan_in_fan_out=transposed)
  model = {"m.weight": Source.of(weight), "m.bias": Source.of(shift)}
  got = adapters.merge(
    found, {n: Source.of(x) for n, x in arrays.items()}, {"m": "m.weight"}, model, chosen, "x"
  )
  scale = alpha / (math.sqrt(rank) if rslora else rank)
  product = b.astype(np.float64) @ a.astype(np.float64)
  expected = weight.astype(np.float64) + scale * (product.T if transposed else product)
  np.testing.assert_array_equal(got["m.weight"].read(), expected.astype(np.float32))
  np.testing.assert_array_equal(
    got["m.bias"].read(), (shift.astype(np.float64) * (1 + scale)).astype(np.float32)
  ) if scale == 1 else np.testing.assert_allclose(
    got["m.bias"].read(), shift.astype(np.float64) * (1 + scale), rtol=1e-6, atol=1e-6
  )


def test_embedding_factors():
  rng = np.random.default_rng(0)
  a, b, weight = (rng.normal(size=s).astype(np.float32) for s in ((2, 7), (5, 2), (7, 5)))
  arrays = {"m.lora_embedding_A": a, "m.lora_embedding_B": b}
  found, _ = adapters.split(arrays)
  got = adapters.merge(
    found,
    {n: Source.of(x) for n, x in arrays.items()},
    {"m": "m.weight"},
    {"m.weight": Source.of(weight)},
    LoraSettings(r=2, alpha=4),
    "x",
  )
  expected = weight.astype(np.float64) + 2 * (b.astype(np.float64) @ a.astype(np.float64)).T
  np.testing.assert_array_equal(got["m.weight"].read(), expected.astype(np.float32))


class TestUnmerged:
  """LoRA layers in a file with the whole model."""

  def write(self, tmp_path, settings):
    tensors = factors(QUERY, name=".default")
    whole = {
      n.replace(QUERY, f"{QUERY}.base_layer"): a for n, a in layout("detector").items()
    } | tensors
    folder = write_folder(tmp_path / "source", {START + n: a for n, a in whole.items()})
    if settings:
      (folder / "adapter_config.json").write_text(json.dumps(SETTINGS))
    return folder

  @pytest.mark.slow
  @pytest.mark.parametrize(("alpha", "scale"), [(None, 2), (16, 4)])
  def test_layers_are_merged(self, tmp_path, alpha, scale):
    folder = self.write(tmp_path, alpha is None)
    got = written(folder, None, tmp_path, tokenizer=TOKENIZER, lora_alpha=alpha)
    np.testing.assert_array_equal(got[f"{QUERY}.weight"], merged(factors(QUERY), QUERY, scale))
    np.testing.assert_array_equal(got[f"{OUT}.weight"], layout("detector")[f"{OUT}.weight"])

  def test_unknown_scale_is_refused(self, tmp_path):
    match = "its scale is unknown; put adapter_config.json .* or give --lora-alpha"
    refused(self.write(tmp_path, False), tmp_path, match)


class TestRefused:
  @pytest.mark.slow
  @pytest.mark.parametrize(
    ("changes", "match"),
    [
      ({"peft_type": "LOHA"}, "adapter of type 'LOHA'; only LORA"),
      ({"peft_type": "IA3"}, "adapter of type 'IA3'"),
      (
        {"use_dora": True},
        r"asks for DoRA \(use_dora\), which cannot be merged. Merge it",
      ),
      ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa_niter_4'"),
      ({"layer_replication": [[0, 4]]}, "asks for layer_replication"),
      ({"lora_alpha": None}, "its scale is unknown"),
      ({"lora_alpha": "8"}, "lora_alpha = '8'; expected a number"),
      ({"r": 8}, r"q_proj: its rank is 4, but adapter_config.json says 8"),
      (
        {"rank_pattern": {"(a+)+": 4}},
        r"pattern '\(a\+\)\+' in rank_pattern, which is too complex",
      ),
      ({"alpha_pattern": {"(": 4}}, "in alpha_pattern: missing"),
    ],
  )
  def test_unsupported_settings(self, base, tmp_path, changes, match):
    folder = write_adapter(tmp_path / "adapter", factors(QUERY), **changes)
    refused(folder, tmp_path, match, base=base)

  def test_missing_base(self, tmp_path):
    folder = write_adapter(tmp_path / "adapter", factors(QUERY))
    refused(folder, tmp_path, "is a LoRA adapter of facebook/sam3, .* use --base CHECKPOINT")

  @pytest.mark.slow
  @pytest.mark.parametrize(
    ("tensors", "match"),
    [
      (
        {f"{QUERY}.lora_A.weight": np.ones((4, 1024), np.float32),
         f"{QUERY}.lora_B.weight": np.ones((1024, 4), np.float32)},
        r"do not give the model's weight \[64, 64\]: the adapter is of a model of another size",
      ),
      ({f"{QUERY}.lora_A.weight": np.ones((4, 64), np.float32)}, "it has no lora_B"),
      (factors(QUERY) | {f"{QUERY}.lora_magnitude_vector": np.ones(64, np.float32)}, "is of DoRA"),
      (
        factors(QUERY) | {n.replace("layers.1", "layers.9"): a for n, a in factors(QUERY).items()},
        "1 of its 2 modules are not in the model, base_model.model.vision_encoder.*layers.9",
      ),
      (
        {"model.layers.0.q_proj.lora_A.weight": np.ones((4, 64), np.float32),
         "model.layers.0.q_proj.lora_B.weight": np.ones((64, 4), np.float32)},
        "looks like a LoRA adapter of another model",
      ),
      (
        {**factors(QUERY, name=".one"), **factors(OUT, name=".two")},
        "it holds 2 adapters",
      ),
    ],
  )  # fmt: skip
  def test_tensors_that_do_not_fit(self, base, tmp_path, tensors, match):
    refused(write_adapter(tmp_path / "adapter", tensors), tmp_path, match, base=base)

  @pytest.mark.slow
  def test_adapter_in_a_pytorch_file(self, base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", factors(QUERY))
    (folder / "adapter_model.safetensors").unlink()
    save(folder / "adapter_model.bin", views({START + n: a for n, a in factors(QUERY).items()}))
    got = written(folder, base, tmp_path)
    np.testing.assert_array_equal(got[f"{QUERY}.weight"], merged(factors(QUERY), QUERY, 2))
