"""The program of a tracked frame at the released size, compiled for TPUs: it fits into memory, and
overwrites the bank in place. Run times are estimated by `benchmarks/tpu_video.py`."""

import re

import hlo
import jax
import pytest
import video_parts

from sam3_jax.inference import aot

pytestmark = [pytest.mark.tpu, pytest.mark.filterwarnings("default")]
OBJECTS = 64
BANK = video_parts.bank_type(OBJECTS)
FREE_BYTES = 13e9  # of a v5e's 16 GB, without the 1.7 GB of the other parameters and a frame


@pytest.fixture(scope="module", params=["v5e:1x1", "v6e:1x1"])
def compiled(request):
  sharding = jax.sharding.SingleDeviceSharding(aot.described_tpu(request.param))
  with video_parts.quick_resize():
    function, arguments = video_parts.track(video_parts.CONFIG, "bfloat16", OBJECTS, sharding)
    return function.lower(*arguments).compile()


def test_peak_memory(compiled):
  assert compiled.memory_analysis().peak_memory_in_bytes < FREE_BYTES


def test_bank_is_overwritten_in_place(compiled):
  """Outputs 0 and 1, memories and pointers, take the place of arguments, and no instruction of the
  program copies all memories."""
  text = compiled.as_text()
  assert {"0", "1"} <= hlo.aliases(text).keys()
  assert compiled.memory_analysis().alias_size_in_bytes >= hlo.size(BANK)
  listing = hlo.read(text)
  assert any(BANK in op.result for op in listing.ops)
  assert not hlo.rewrites(listing, BANK)


def test_no_logits_in_memory(compiled):
  """Those of an object's cross-attention, in float32, would take 754 MB."""
  for op in hlo.read(compiled.as_text()).ops:
    for array in re.findall(r"f32\[[\d,]+\]\{[^}]*\}", op.result):
      assert hlo.size(array, in_memory=True) < 700e6, f"{op.opcode} {op.scope}: {array}"
