"""What the training benchmarks compute beside running things: batches, collectives, tables."""

import numpy as np
import pytest
import tpu
import train
import train_batch

from sam3_jax.config import Config

HLO = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %gather = bf16[4,128]{1,0} all-gather(%x), dimensions={0}, metadata={op_name="jit(step)/trunk/dot"}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%inner_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %loop = (s32[], f32[8]) while(%p), condition=%inner_condition, body=%inner
}

%outer_condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  ROOT %less = pred[] compare(%p, %p), direction=LT
}

%all-reduce-scatter.3 (q: bf16[16]) -> bf16[4] {
  %q = bf16[16]{0} parameter(0)
  %sums = bf16[16]{0} all-reduce(%q), to_apply=%add, metadata={op_name="jit(step)/neck/dot"}
  ROOT %cut = bf16[4]{0} dynamic-slice(%sums, %o), dynamic_slice_sizes={4}
}

%fused.1 (q: f32[8]) -> f32[64] {
  %fused = f32[64]{0} all-gather(%q), channel_id=5, metadata={op_name="jit(step)/masks/dot"}
}

%fused.2 (q: f32[8]) -> f32[64] {
  %fused = f32[64]{0} all-gather(%q), channel_id=5, metadata={op_name="jit(step)/masks/dot"}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %first = f32[64]{0} fusion(%q), kind=kCustom, calls=%fused.1
  %second = f32[64]{0} fusion(%q), kind=kCustom, calls=%fused.2
  %scattered = bf16[4]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3
  %loop = (s32[], f32[8]) while(%t), condition=%outer_condition, body=%outer, backend_config={"known_trip_count":{"n":"4"}}
  %start = (f32[8]{0}, f32[32]{0}) all-gather-start(%p), dimensions={0}, metadata={op_name="jit(step)/text/dot"}
  %done = f32[32]{0} all-gather-done(%start), metadata={op_name="jit(step)/text/dot"}
  ROOT %all = f32[8]{0} all-reduce(%p), to_apply=%add, metadata={op_name="jit(step)/loss"}
}
"""  # noqa: E501


def test_collectives_are_counted_through_loops_and_once_if_asynchronous_or_fused():
  assert tpu.collectives(HLO) == [
    ("all-gather", 64 * 4, 1, "jit(step)/masks/dot"),
    ("reduce-scatter", 16 * 2, 1, "jit(step)/neck/dot"),
    ("all-gather", 4 * 128 * 2, 28, "jit(step)/trunk/dot"),
    ("all-gather", 32 * 4, 1, "jit(step)/text/dot"),
    ("all-reduce", 8 * 4, 1, "jit(step)/loss"),
  ]


def test_collectives_by_part():
  rows = tpu.by_part(tpu.collectives(HLO), tpu.PARTS)
  assert [(row["part"], row["kind"], row["times"], row["bytes"]) for row in rows] == [
    ("trunk", "all-gather", 28, 28 * 1024),
    ("masks", "all-gather", 1, 256),
    ("text", "all-gather", 1, 128),
    ("neck", "reduce-scatter", 1, 32),
    ("the rest", "all-reduce", 1, 32),
  ]


def test_a_program_without_collectives():
  assert (
    tpu.collectives("ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} x(%p)\n}") == []
  )


@pytest.mark.parametrize("size", train_batch.SIZES)
@pytest.mark.parametrize(("images", "prompts"), [(1, 1), (2, 3)])
def test_batch(size, images, prompts):
  values = train.full_config(train_batch.SIZES[size])
  config = Config.from_dict(values)
  batch = train_batch.make_batch(values, images, prompts, mask_side=40)
  valid, masks, boxes = batch["valid"], batch["masks"], batch["boxes"]
  assert batch["images"].shape == (images, config.image_size, config.image_size, 3)
  assert masks.shape == (images, prompts, train_batch.OBJECTS, 40, 40)
  assert not valid[:, -1].any()
  assert valid[:, :-1].any(axis=2).all()
  assert (masks.any(axis=(3, 4)) == valid).all()
  # Each mask fills its box to a cell, and so much of it as an ellipse does.
  for x, axis in ((0, 3), (1, 4)):
    cells = masks.any(axis=axis)
    assert np.abs(cells.sum(axis=3) / 40 - boxes[..., 2 + x])[valid].max(initial=0) < 1.5 / 40
  area = masks.mean(axis=(3, 4))[valid]
  assert np.allclose(area, (np.pi / 4 * boxes[..., 2] * boxes[..., 3])[valid], atol=0.01)
  assert batch["tokens"].max() < config.text.vocabulary
  same = train_batch.make_batch(values, images, prompts, mask_side=40)
  assert all((same[name] == batch[name]).all() for name in batch)


def test_table_of_speeds():
  steps = [
    {"loss": 10.0, "seconds": s, "processor": 2 * s, "memory": 1e9} for s in (9.0, 2.0, 1.0, 4.0)
  ]
  row = {"name": "one", "steps": steps, "versions": {"jax": "1"}, "off": 0.0}
  row |= train._figures(steps, images=4)
  assert (row["first"], row["seconds"], row["least"], row["processor"]) == (9, 2, 1, 4)
  twice = row | {"name": "two", "images_per_second": 2 * row["images_per_second"]}
  report = {"rows": [row, twice], "machine": "m", "load": 0, "images": 4, "prompts": 3, "size": "s"}
  lines = train.markdown(report).splitlines()
  assert lines[0].endswith("medians of 3 steps in turns.")
  assert lines[-2].startswith(
    "| one | 2.00, 1.00 | 4.00 | 2.00 | 1.00 | 1.00 GB | 9.0 s | 0.0e+00 |"
  )
  assert lines[-1].startswith("| two | 2.00, 1.00 | 4.00 | 4.00 | 2.00 |")
