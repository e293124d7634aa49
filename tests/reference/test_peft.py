"""Adapters merged by `convert --base` equal PEFT's `merge_and_unload`."""

import json

import numpy as np
import pytest
from layouts import TOKENIZER, tiny_config

pytestmark = pytest.mark.reference


@pytest.mark.parametrize(
  "options",
  [
    {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": "all-linear"},
    {
      "r": 2,
      "target_modules": r".*(fc1|projection)",
      "rank_pattern": {"fc1": 3},
      "alpha_pattern": {r"layers\.\d+\.mlp\.fc1": 5},
      "bias": "lora_only",
    },
    {"r": 2, "lora_bias": True, "target_modules": ["o_proj"], "modules_to_save": ["text_proj"]},
  ],
)
def test_merged_adapter(tmp_path, options):
  peft = pytest.importorskip("peft")
  torch = pytest.importorskip("torch")
  import transformers
  from sam3_jax.converters import convert
  from sam3_jax.converters.base import Base
  from sam3_jax.converters.layouts.huggingface import TABLE

  torch.manual_seed(0)
  settings = tiny_config()["detector_config"] | {"model_type": "sam3"}
  (tmp_path / "config").mkdir()
  (tmp_path / "config" / "config.json").write_text(json.dumps(settings))
  config = transformers.AutoConfig.from_pretrained(tmp_path / "config")
  model = transformers.Sam3Model(config)
  model.save_pretrained(tmp_path / "source")
  convert(tmp_path / "source", tmp_path / "base", tokenizer=TOKENIZER)
  adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
  with torch.no_grad():
    for parameter in adapted.parameters():
      if parameter.requires_grad:
        parameter.normal_(std=0.1)
  adapted.save_pretrained(tmp_path / "adapter")
  convert(tmp_path / "adapter", tmp_path / "out", base=tmp_path / "base")
  got = Base(tmp_path / "out").sources(TABLE)
  expected = adapted.merge_and_unload().state_dict()
  for name, array in expected.items():
    np.testing.assert_allclose(
      got[f"detector_model.{name}"].read(), array.numpy(), rtol=0, atol=2e-6, err_msg=name
    )
