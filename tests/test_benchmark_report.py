"""Cases, inputs, fitted lines and the tables of a benchmark's report."""

import numpy as np
import pytest
from speed import cases, growth, report, run
from speed.inputs import mask_logits, phrases
from speed.material import seeded
from training_model import CONFIG

from sam3_jax.checkpoint import bundle
from sam3_jax.cli import benchmark
from sam3_jax.config import SIZES
from sam3_jax.utils.param_tree import flatten


class TestCases:
  def test_chosen(self):
    assert cases.chosen(["text"]) == [("text", 1)]
    assert cases.chosen(["start"]) == cases.chosen([]) == []
    assert [n for name, n in cases.chosen(["growth"]) if name == "decode"] == [
      1, 2, 4, 8, 16, 32, 64, 128,
    ]  # fmt: skip
    assert {name for name, _ in cases.chosen(["growth"])} == {"encode", "decode"}
    assert [n for name, n in cases.chosen(cases.DEFAULT) if name == "decode"] == [1, 8, 64]
    assert len(set(cases.chosen(cases.CHOICES))) == len(cases.chosen(cases.CHOICES))

  def test_the_command_offers_all_of_them(self):
    assert [one.value for one in benchmark.Part] == list(cases.CHOICES)
    assert [one.value for one in benchmark.Peer] == list(run.PEERS)
    assert [one.value for one in benchmark.Size] == list(SIZES)

  def test_labels(self):
    assert cases.label("decode", 1) == "decode 1 prompt"
    assert cases.label("decode", 8) == "decode 8 prompts"
    assert cases.label("postprocess", 50) == "50 masks to the image's size"
    assert cases.label("encode", 2) == "encode 2 images"
    assert cases.label("segment, filled cache", 1) == "segment, filled cache"


class TestGrowth:
  @pytest.mark.parametrize(("start", "each"), [(0.5, 0.25), (0.0, 1.0), (3.0, 0.0)])
  def test_a_line_is_found(self, start, each):
    counts = [1, 2, 4, 128]
    line = growth.fit(counts, [start + each * n for n in counts])
    assert np.allclose([line["start"], line["each"]], [start, each], atol=1e-12)
    assert line["steps"] == []

  def test_a_step_is_named(self):
    counts = [1, 2, 4, 8, 16, 32]
    seconds = [1.0 + n for n in counts]
    seconds[3] *= 1.6
    [step] = growth.fit(counts, seconds)["steps"]
    assert step["count"] == 8
    assert 1.3 < step["ratio"] < 1.6

  def test_fits_need_all_counts(self):
    rows = [
      {"case": case, "side": side, "count": n, "median": n / 10, "memory": 100 + n}
      for case, side, counts in (
        ("encode", "a", (1, 2, 4, 8)),
        ("encode", "b", (1, 2, 4)),
        ("decode", "a", (1, 8, 64)),
        ("postprocess", "a", (1, 10, 50, 200)),
        ("segment, filled cache", "a", (1,)),
      )
      for n in counts
    ]
    [fitted] = growth.fits(rows)
    assert (fitted["case"], fitted["side"]) == ("encode", "a")
    assert np.isclose(fitted["memory"]["start"], 100)


class TestReport:
  def row(self, side: str, count: int = 1, **more):
    seconds = [0.2, 0.1, 0.4]
    return {
      "case": "decode", "count": count, "side": side, "first": 3.0, "seconds": seconds,
      "median": 0.2, "processor": 0.35, "memory": 2.5e9,
    } | more  # fmt: skip

  def whole(self, **more):
    return {
      "machine": "m", "cores": 2, "load": [0.1, 1.9], "checkpoint": "c", "image": [1500, 2000],
      "repeats": 3, "sides": [], "rows": [], "growth": [], "skipped": [],
    } | more  # fmt: skip

  def test_of_nothing(self):
    text = report.markdown(self.whole())
    assert text.count("\n") == 0
    assert "load 0.1 before and 1.9 after" in text

  def test_times_and_ratios(self):
    rows = [
      self.row("sam3-jax float32"),
      self.row("transformers float32", median=0.5),
      self.row("transformers bfloat16"),
      self.row("sam3-jax float32", count=8),
    ]
    lines = report.markdown(self.whole(rows=rows)).splitlines()
    first = "200 ms (100 ms to 400 ms)"
    assert (
      f"| decode 1 prompt | {first} | 500 ms (100 ms to 400 ms), 2.50 x sam3-jax | {first} |"
      in lines
    )
    assert f"| decode 8 prompts | {first} | - | - |" in lines
    assert "| decode 8 prompts | 3 s, 350 ms, 2.50 GB | - | - |" in lines

  def test_growth_and_what_was_skipped(self):
    rows = [
      self.row("s", n, case="encode", median=0.1 * n * (1 + (n == 2)), memory=1e8)
      for n in (1, 2, 4, 8)
    ]
    skipped = [{"what": "a", "why": "because"}, {"what": "b", "why": "because"}]
    fitted = growth.fits(rows)
    text = report.markdown(self.whole(rows=rows, growth=fitted, skipped=skipped))
    assert f"2: {fitted[0]['median']['steps'][0]['ratio']:.2f} x" in text
    assert "- a, b: because" in text

  @pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 us"), (2.5e-6, "2.5 us"), (0.0123456, "12.3 ms"), (1, "1 s"), (213.4, "213 s")],
  )
  def test_duration(self, seconds, text):
    assert report.duration(seconds) == text


class TestInputs:
  def test_phrases_are_different_and_short(self):
    every = phrases(128)
    assert len(set(every)) == len(every) == 128
    assert phrases(0) == []
    assert phrases(2) == every[:2]

  @pytest.mark.parametrize("count", [0, 1, 200])
  def test_masks_cover_a_part_of_the_image(self, count):
    logits = mask_logits(count, 48)
    assert logits.shape == (count, 48, 48)
    assert logits.dtype == np.float32
    covered = (logits > 0).mean(axis=(1, 2))
    assert ((covered > 0) & (covered < 0.2)).all()

  @pytest.mark.slow
  def test_seeded_weights_fit_the_model(self):
    drawn = flatten(seeded(CONFIG))
    wanted = bundle.expected_shapes(CONFIG, visual=True)
    assert {k: x.shape for k, x in drawn.items()} == wanted
    assert all(x.dtype == np.float32 and x.std() > 0 for x in drawn.values() if x.size > 1)
