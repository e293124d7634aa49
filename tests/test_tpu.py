"""The released programs as a TPU's compiler makes them: they fit, and logits stay out of memory.
Never how long they take: `benchmarks/tpu_parts.py` tells that, with all its doubts."""

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
PROMPTS = 4  # of a program


@pytest.fixture(scope="module", params=CHIPS)
def compiled(request, tokenizer_path):
  """Of an image's encoding and of prompts about it."""
  place = jax.sharding.SingleDeviceSharding(aot.described_tpu(request.param))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=place), parameter_shapes(RELEASED)
  )
  tokenizer = Tokenizer(tokenizer_path, context=RELEASED.text.context)
  model = Sam3(RELEASED, params, tokenizer, dtype="bfloat16")
  lowered = aot.lowered(model.programs, model.params, images=[1], prompts=[PROMPTS])
  return [program.compile() for program in lowered.values()]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_products_take_all_passes(tokenizer_path, dtype):
  """Of a small model: all its products in float32; in bfloat16 those of boxes and scores alone."""
  place = jax.sharding.SingleDeviceSharding(aot.described_tpu(CHIPS[0]))
  params = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=place),
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


def test_memory(compiled):
  """An image encoded, and 32 prompts about it decoded."""
  encode, decode = (program.memory_analysis() for program in compiled)
  kept = (32 - PROMPTS) * decode.output_size_in_bytes / PROMPTS
  assert max(encode.peak_memory_in_bytes, decode.peak_memory_in_bytes + kept) < 8e9


def test_no_collectives(compiled):
  for program in compiled:
    assert not hlo.read(program.as_text()).collectives


def test_no_logits_in_memory(compiled):
  """Attention's logits would be the largest float32 arrays by far: those of a window group's heads
  take 191 MB, those of a global block, or of cells to cells, 107 MB a head."""
  for program in compiled:
    for op in hlo.read(program.as_text()).ops:
      for array in re.findall(r"f32\[[\d,]+\]\{[^}]*\}", op.result):
        assert hlo.size(array, in_memory=True) < 100e6, f"{op.opcode} {op.scope}: {array}"
