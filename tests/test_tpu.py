"""The released model compiled for TPUs: it fits into memory, and logits stay out of it. Run times
are estimated by `benchmarks/tpu_parts.py`."""

import re

import hlo
import jax
import pytest
import training_model

from sam3_jax.config import RELEASED
from sam3_jax.inference import aot
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.model.sam3 import parameter_shapes

pytestmark = [pytest.mark.tpu, pytest.mark.filterwarnings("default")]
CHIPS = ("v5e:1x1", "v6e:1x1")
PROMPTS = 4  # per call


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request, tokenizer_path):
  """The programs that encode an image and decode prompts on it."""
  sharding = jax.sharding.SingleDeviceSharding(aot.described_tpu(request.param))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=sharding),
    parameter_shapes(RELEASED),
  )
  tokenizer = Tokenizer(tokenizer_path, context=RELEASED.text.context)
  model = Sam3(RELEASED, params, tokenizer, dtype="bfloat16")
  lowered = aot.lowered(model.programs, model.params, images=[1], prompts=[PROMPTS])
  return [program.compile() for program in lowered.values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_have_highest_precision(tokenizer_path, dtype):
  """All products of a float32 model; in bfloat16, only those of boxes and scores."""
  sharding = jax.sharding.SingleDeviceSharding(aot.described_tpu(CHIPS[0]))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding),
    parameter_shapes(training_model.CONFIG),
  )
  tokenizer = Tokenizer(tokenizer_path, context=training_model.CONFIG.text.context)
  model = Sam3(training_model.CONFIG, params, tokenizer, dtype=dtype)
  wide = r"/(BoxBias|layers\.step/Mlp|query_project|neck/level[01]/dot_general)\b"
  found = set()
  one = {"images": [1], "phrases": [1], "prompts": [1]}
  for lowered in aot.lowered(model.programs, model.params, **one).values():
    for line in lowered.compile().as_text().splitlines():
      if re.search(r" (convolution|dot)\(", line):
        exact = dtype == "float32" or re.search(wide, line) is not None
        assert exact == ("operand_precision={highest,highest}" in line), line
        found.add(exact)
  assert found == ({True} if dtype == "float32" else {True, False})


def test_peak_memory(compiled):
  """Encodes an image and decodes 32 prompts on it."""
  encode, decode = (program.memory_analysis() for program in compiled)
  kept = (32 - PROMPTS) * decode.output_size_in_bytes / PROMPTS
  assert max(encode.peak_memory_in_bytes, decode.peak_memory_in_bytes + kept) < 8e9


def test_no_collectives(compiled):
  for program in compiled:
    assert not hlo.read(program.as_text()).collectives


def test_no_logits_in_memory(compiled):
  """Attention logits would be by far the largest float32 arrays: 191 MB for the heads of a windowed
  block, 107 MB per head for a global block or for the self-attention of the fusion encoder."""
  for program in compiled:
    for op in hlo.read(program.as_text()).ops:
      for array in re.findall(r"f32\[[\d,]+\]\{[^}]*\}", op.result):
        assert hlo.size(array, in_memory=True) < 100e6, f"{op.opcode} {op.scope}: {array}"
