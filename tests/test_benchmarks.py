"""What the benchmarks compute beside running things: batches, collectives, rates, tables."""

import hlo
import numpy as np
import parity_video
import pytest
import scaling
import tpu_batch
import tpu_phrase
import tpu_train
import train
import train_batch
import video_sides
import video_speed

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
  assert hlo.read(HLO).collectives == [
    ("all-gather", 64 * 4, 1, "jit(step)/masks/dot"),
    ("reduce-scatter", 16 * 2, 1, "jit(step)/neck/dot"),
    ("all-gather", 4 * 128 * 2, 28, "jit(step)/trunk/dot"),
    ("all-gather", 32 * 4, 1, "jit(step)/text/dot"),
    ("all-reduce", 8 * 4, 1, "jit(step)/loss"),
  ]


def test_collectives_by_part():
  rows = tpu_train.by_part(hlo.read(HLO).collectives, tpu_train.PARTS)
  assert [(row["part"], row["kind"], row["times"], row["bytes"]) for row in rows] == [
    ("trunk", "all-gather", 28, 28 * 1024),
    ("masks", "all-gather", 1, 256),
    ("text", "all-gather", 1, 128),
    ("neck", "reduce-scatter", 1, 32),
    ("the rest", "all-reduce", 1, 32),
  ]


def test_a_program_without_collectives():
  assert (
    hlo.read("ENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %p = f32[8]{0} x(%p)\n}").collectives
    == []
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


PROGRAM = """HloModule jit_f, is_scheduled=true

%body (p: (s32[], bf16[8,128])) -> (s32[], bf16[8,128]) {
  %p = (s32[], bf16[8,128]) parameter(0)
  %x = bf16[8,128]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %square = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%x), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/mul"}, backend_config={"window_config":{"estimated_cycles":"900"},"bundle_analysis_data":{"estimated_cycles":"300"}}
  ROOT %t = (s32[], bf16[8,128]) tuple(%i, %square)
}

%fused (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  ROOT %m = bf16[8,128]{1,0} multiply(%q, %q)
}

%condition (p: (s32[], bf16[8,128])) -> pred[] {
  %p = (s32[], bf16[8,128]) parameter(0)
  %limit = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (x: bf16[8,100]) -> bf16[8,100] {
  %x = bf16[8,100]{1,0:T(8,128)(2,1)} parameter(0)
  %loop = (s32[], bf16[8,128]) while(%t), condition=%condition, body=%body
  ROOT %copy = bf16[8,100]{1,0:T(8,128)(2,1)} copy(%x), metadata={op_name="jit(f)/copy"}, backend_config={"window_config":{"estimated_cycles":"70"}}
}
"""  # noqa: E501


def test_instructions_with_cycles_and_traffic():
  ops = {op.scope: op for op in hlo.read(PROGRAM).ops if op.cycles or op.planned}
  square, copy = ops["jit(f)/mul"], ops["jit(f)/copy"]
  assert (square.times, square.cycles, square.planned) == (5, 300, 900)
  # What lies in vector memory, the result here, is no traffic; 100 lanes are padded to 128.
  assert square.traffic == 8 * 128 * 2
  assert (copy.times, copy.cycles, copy.planned) == (1, 0, 70)
  assert copy.traffic == 2 * 8 * 128 * 2
  assert square.seconds(clock=100.0, bandwidth=1e9) == 15.0
  assert copy.seconds(clock=1e9, bandwidth=4096.0) == 1.0


def test_a_loop_that_does_not_tell_its_trips():
  assert hlo.read(PROGRAM.replace("constant(5)", "add(%p)")).unknown == 1


BANK = """HloModule jit_write, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias) }

%written (a: bf16[4,8,128], i: s32[1], b: bf16[1,8,128]) -> bf16[4,8,128] {
  %a = bf16[4,8,128]{2,1,0} parameter(0)
  %i = s32[1]{0} parameter(1)
  %b = bf16[1,8,128]{2,1,0} parameter(2)
  ROOT %scatter = bf16[4,8,128]{2,1,0} scatter(%a, %i, %b), to_apply=%last
}

ENTRY %main (row: bf16[1,8,128], bank: bf16[4,8,128], rows: s32[1]) -> (bf16[4,8,128], bf16[1,8,128]) {
  %row = bf16[1,8,128]{2,1,0} parameter(0)
  %bank = bf16[4,8,128]{2,1,0} parameter(1)
  %rows = s32[1]{0} parameter(2)
  %read = bf16[1,8,128]{2,1,0} gather(%bank, %rows), slice_sizes={1,8,128}
  %update = bf16[4,8,128]{2,1,0} fusion(%bank, %rows, %row), kind=kCustom, calls=%written
  ROOT %t = (bf16[4,8,128], bf16[1,8,128]) tuple(%update, %read)
}
"""  # noqa: E501


def test_updates_in_place_and_copies():
  assert hlo.aliases(BANK) == {"0": 1}
  assert hlo.aliases("HloModule jit_write") == {}
  listing = hlo.read(BANK)
  row = 2 * 8 * 128
  traffic = {op.opcode: op.traffic for op in listing.ops if op.opcode in ("gather", "fusion")}
  assert traffic == {"gather": 2 * row, "fusion": 2 * row + 4}
  assert not hlo.rewrites(listing, "bf16[4,8,128]")
  for copy in (" copy(%bank)", " add(%bank, %bank)"):
    moved = BANK.replace(" fusion(%bank, %rows, %row)", copy)
    [op] = hlo.rewrites(hlo.read(moved), "bf16[4,8,128]")
    assert op.opcode == copy.split("(")[0].strip()


def test_rates_of_a_pod():
  """By hand: a chip takes 0.1 s an image, a host 0.05 s of a core."""
  host = scaling.Host((480, 640), 100_000, reading=0.02, mask=0.01, record_bytes=1000)
  job = scaling.Job(0.06, 0.02, prompts=2, instances=3, chips_per_host=4, cores_per_host=8)
  found = scaling.rates(host, job, chips=16)
  wanted = {
    "device": 160, "rate": 160, "cores_per_chip": 0.5, "bytes_in": 16e6, "bytes_out": 480e3,
    "chip_hours_per_million": 1e6 / 160 * 16 / 3600,
  }  # fmt: skip
  assert found == pytest.approx(wanted)
  slow = host._replace(reading=0.37)  # 0.4 s of a core: 32 cores do 80 images a second
  assert scaling.rates(slow, job, chips=16)["rate"] == pytest.approx(80)
  lines = scaling.markdown([host], job, price=2.0).splitlines()
  assert lines[-2] == "| 640 x 480 | 16 | 160 | 160 | 0.5 | 16.0 | 0.48 | 27.8 | 55.56 |"
  lines = scaling.markdown([host], job, price=None).splitlines()
  assert lines[-2] == "| 640 x 480 | 16 | 160 | 160 | 0.5 | 16.0 | 0.48 | 27.8 |"


def test_host_figures():
  host = scaling.measure((48, 64), repeats=1)
  assert host.size == (48, 64)
  assert min(host.file_bytes, host.record_bytes) > 100
  assert host.reading > 0


def test_table_of_programs_for_a_tpu():
  row = {"program": "encode, 1 a chip", "peak": 4e9, "collectives": []}
  split = {"program": "decode", "peak": 8e9}
  split["collectives"] = tpu_train.by_part(hlo.read(HLO).collectives, tpu_train.PARTS)[:1]
  lines = tpu_batch.markdown([row, split], "v5e", 16e9).splitlines()
  assert lines[-2] == "| encode, 1 a chip | 4.00 | 25% | none |"
  assert lines[-1] == "| decode | 8.00 | 50% | 28 all-gather in trunk, 0.0 MB |"


def test_differences_of_tracking_beyond_their_limits():
  row = {"memory": 9e-6, "iou": 9e-8, "mask_iou": 1.0, "reads_equal": True, "reads": {}}
  measured = {"memory": 1e-6, "iou": 1e-8, "conditioned": 1e-6}  # frame 0 has no `conditioned`
  assert not list(parity_video.broken({"click": [row]}, measured))
  worse = [{"memory": 2e-5}, {"iou": float("nan")}, {"mask_iou": 0.9}, {"reads_equal": False}]
  faults = list(parity_video.broken({"box": [row, *(row | x for x in worse)]}, measured))
  assert [fault.split(":")[0] for fault in faults] == [f"box, frame {t}" for t in (1, 2, 3, 4)]
  assert faults[0] == "box, frame 1: memory differs by 2.0e-05, limit 1.0e-05"


def test_frames_of_the_comparison_of_tracking():
  photo = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
  frames = parity_video.crops(photo, 5)
  assert frames.shape == (5, 320, 480, 3)
  assert (frames[1] == photo[20:340, 30:510]).all()


def test_threshold_for_three_objects():
  assert video_sides.threshold([0.1, 0.9, 0.3, 0.5, 0.7]) == pytest.approx(0.4)
  assert video_sides.threshold([0.9, 0.8, 0.5, 0.5, 0.3]) == pytest.approx(0.4)  # a fourth is equal
  for scores in ([0.9, 0.8, 0.7], [0.9, 0.8, 0.7, 1e-5]):
    with pytest.raises(SystemExit, match="no threshold keeps 3 objects"):
      video_sides.threshold(scores)


def test_parts_of_a_frame():
  """A call within a part belongs to that part."""

  class Model:
    def inner(self):
      return 1

    def outer(self):
      return self.inner() + 1

  model, waited = Model(), []
  watch = video_sides.Stopwatch(lambda result: waited.append(result) or result)
  watch.watch(model, "inner", "encode")
  watch.watch(model, "outer", "track")
  assert model.outer() == 2
  assert list(watch.seconds) == list(watch.processor) == ["track"]
  assert model.inner() == 1
  assert list(watch.seconds) == ["track", "encode"]
  assert waited == [2, 1]


def test_report_of_tracking_side_by_side():
  def rows(seconds, objects=3):
    parts = dict.fromkeys((*video_sides.PARTS, "host"), seconds / 5)
    times = {"seconds": seconds, "processor": 2 * seconds}
    times |= {f"{kind}_of": parts for kind in ("seconds", "processor")}
    return [times | {"objects": objects, "memory": 2**30}] * 4

  class Side:
    def __init__(self, rows):
      self.rows, self.about = rows, {"versions": {"numpy": "2"}}

  report = video_speed.summary([Side(rows(2.0)), Side(rows(3.0, 4))], "tiny", "float32")
  assert list(video_speed.faults(report)) == ["transformers tracks [4] objects, not 3"]
  lines = video_speed.markdown(report).splitlines()
  assert lines[2].startswith("One phrase, 3 objects; medians of frames 2 to 3,")
  assert "| **all** | 3.000 | 2.000 | **1.50** | 6.000 | 4.000 | **1.50** |" in lines
  assert lines[-1] == "Peak memory: 1.0 GiB (sam3-jax) and 1.0 GiB (transformers)."


def test_frames_per_second_on_a_tpu():
  parts = dict.fromkeys(tpu_phrase.ROWS, 0.005)
  report = {"what": "v6e", "versions": "jax", "frames": {1: parts, 5: parts | {"attention": 0.015}}}
  report["parts"] = {"second neck, 1 slots": {"grade": "planned"}}
  lines = tpu_phrase.markdown(report).splitlines()
  assert lines[2] == "| ms, by objects | 1 | 5 |"
  assert lines[-2:] == ["| **all** | **30.0** | **40.0** |", "| frames per second | 33.3 | 25.0 |"]
