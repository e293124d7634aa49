"""Measuring in another process: the pipe to a side, the start of a command, and turns."""

import sys

import benchmark_sides
import pytest
from speed import run, start
from speed.client import Side
from speed.server import Unable

opened = benchmark_sides.opened


class TestPipe:
  def test_facts_then_figures(self, opened):
    side = opened()
    assert side.facts["versions"] == {"fake": "1"}
    assert side.facts["memory"] > 10**6
    answer = side.call("decode", 1)
    assert 0 < answer["first"] < 10
    assert answer["processor"] >= 0

  @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it begins with the parent's")
  def test_the_peak_is_not_of_the_process_that_starts_it(self, opened):
    large = bytearray(2 * 10**8)
    large[:] = b"x" * len(large)
    assert opened().call("decode", 1)["memory"] < 1e8

  @pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a peak cannot be reset")
  def test_the_peak_is_of_the_case_and_not_of_those_before(self, opened):
    side = opened()
    least = side.call("decode", 1)["memory"]
    most = side.call("decode", 200)["memory"]
    assert most > least + 1.9e8
    assert side.call("decode", 1)["memory"] < least + 1e8

  def test_what_a_side_cannot_do(self, opened):
    side = opened()
    with pytest.raises(Unable, match=r"^it has no such step$"):
      side.call("predict", 1)
    with pytest.raises(Unable, match=r"^ValueError: two lines:$"):
      side.call("encode", 2)
    assert side.call("decode", 1)["first"] > 0

  def test_a_side_that_ends_is_started_anew(self, opened):
    side = opened()
    for _ in range(2):
      with pytest.raises(Unable, match="ended with status 1: the end of the world"):
        side.call("encode", 1)
    assert side.call("decode", 1)["first"] > 0

  def test_a_side_that_does_not_start(self, opened, tmp_path):
    with pytest.raises(Unable, match=r"^no such dtype$"):
      opened(dtype="float16")
    with pytest.raises(Unable, match="nowhere cannot be run: No such file"):
      Side("x", [str(tmp_path / "nowhere")], {})
    with pytest.raises(Unable, match="ended with status 0: it printed no error"):
      Side("x", [sys.executable, "-c", ""], {})

  @pytest.mark.skipif(sys.platform != "linux", reason="cores are chosen on Linux only")
  def test_threads(self, opened):
    assert opened(threads=1).facts["cores"] == 1


class TestStart:
  def test_figures(self):
    """Of another program than the command."""
    program = start.PROGRAM.replace("sam3_jax.cli.main import", "platform import machine as")
    figures = start._run([sys.executable, "-c", program], {})
    assert figures.keys() == {"first", "processor", "memory"}
    assert 0 < figures["processor"] < 10
    assert 10**6 < figures["memory"] < 10**8

  def test_a_run_that_fails(self):
    program = "import sys; print('why', file=sys.stderr); sys.exit(3)"
    with pytest.raises(Unable, match=r"^it ended with status 3: why$"):
      start._run([sys.executable, "-c", program], {})


class TestTurns:
  def test_sides_take_turns(self, opened, tmp_path):
    skipped = []
    sides = [opened("a float32"), opened("b float32")]
    rows = run.take_turns(sides, "decode", 8, 3, skipped)
    assert (tmp_path / "log").read_text().split("\n")[:-1] == 4 * ["a float32 8", "b float32 8"]
    assert [(row["case"], row["count"], row["side"]) for row in rows] == [
      ("decode", 8, "a float32"),
      ("decode", 8, "b float32"),
    ]
    assert [len(row["seconds"]) for row in rows] == [3, 3]
    assert skipped == []

  def test_who_cannot_is_named(self, opened):
    skipped = []
    assert run.take_turns([opened()], "predict", 1, 1, skipped) == []
    assert skipped == [
      {
        "what": "fake float32: image and 1 prompt to masks",
        "why": "it has no such step",
      }
    ]

  def test_no_sides(self):
    assert run.take_turns([], "decode", 1, 1, []) == []

  def test_figures_leave_out_the_first_call_unless_it_is_alone(self):
    calls = [{"first": s, "processor": 2 * s, "memory": 10 - s} for s in (9.0, 1.0, 3.0, 2.0)]
    assert run.figures(calls) == {
      "first": 9, "seconds": [1, 3, 2], "median": 2, "processor": 4, "memory": 9,
    }  # fmt: skip
    assert run.figures(calls[:1])["median"] == 9
