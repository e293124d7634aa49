"""`sam3-jax benchmark`: the pipe to a side, turns, fitted lines, tables, and the command itself."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from speed import cases, growth, report, run, side_transformers, start
from speed.client import Side
from speed.inputs import mask_logits, phrases
from speed.material import Material, seeded
from speed.server import Unable
from training_model import CONFIG

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.cli import benchmark
from sam3_jax.cli.main import main
from sam3_jax.config import SIZES
from sam3_jax.utils.param_tree import flatten

ROOT = Path(__file__).parents[1]
FAKE = """
import os, sys, time
from speed.server import Unable, serve

class Fake:
  def __init__(self, settings):
    print("noise on standard output")
    if settings["dtype"] == "float16":
      raise Unable("no such dtype")
    self.log = open(settings["log"], "a", buffering=1)
    self.name = settings["name"]
    self.cores = len(os.sched_getaffinity(0))
    self.facts = {
      "import": 0.1, "load": 0.2, "versions": {"fake": "1"}, "device": "none", "cores": self.cores
    }

  def decode(self, count):
    block = bytearray(count * 10**6)
    def call():
      print("more noise")
      print(self.name, count, file=self.log)
      block[:] = bytes(len(block))
    return call

  def encode(self, count):
    if count > 1:
      raise ValueError("two lines:\\nof reasons")
    return lambda: sys.exit("the end of the world")

serve(Fake)
"""


@pytest.fixture
def opened(tmp_path):
  """Starts a fake side; ends all of them."""
  script, sides = tmp_path / "fake.py", []
  script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}){FAKE}")

  def start(name: str = "fake float32", **settings) -> Side:
    given = {"dtype": "float32", "threads": None, "name": name, "log": str(tmp_path / "log")}
    sides.append(Side(name, [sys.executable, str(script)], given | settings))
    return sides[-1]

  yield start
  for side in sides:
    side.__exit__()


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
    wanted = checkpoint.expected_shapes(CONFIG, visual=True)
    assert {k: x.shape for k, x in drawn.items()} == wanted
    assert all(x.dtype == np.float32 and x.std() > 0 for x in drawn.values() if x.size > 1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, tokenizer_path) -> Path:
  """A toy checkpoint."""
  folder = tmp_path_factory.mktemp("bundle") / "toy"
  checkpoint.save(folder, seeded(CONFIG), CONFIG, tokenizer_path.read_bytes(), info={"name": "toy"})
  return folder


@pytest.fixture
def image(tmp_path) -> Path:
  path = tmp_path / "photo.png"
  Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3)).save(path)
  return path


class TestPeers:
  @pytest.mark.parametrize(
    ("wanted", "cuda", "name"),
    [(None, False, "cpu"), (None, True, "cuda"), ("cpu", True, "cpu"), ("gpu", True, "cuda")],
  )
  def test_a_gpu_as_ours(self, wanted, cuda, name):
    assert side_transformers.device(wanted, cuda) == name

  @pytest.mark.parametrize(("wanted", "cuda"), [("gpu", False), ("tpu", True)])
  def test_no_such_device(self, wanted, cuda):
    with pytest.raises(Unable, match=f"^its PyTorch finds no {wanted}$"):
      side_transformers.device(wanted, cuda)


class TestMaterial:
  def test_of_a_checkpoint(self, bundle, image, tmp_path):
    material = Material(bundle, None, image, tmp_path)
    assert (material.bundle, material.config, material.name) == (bundle, CONFIG, "toy")
    assert len(material.tokens) == 128
    assert {len(row) for row in material.tokens} == {CONFIG.text.context}
    with Image.open(material.image) as resized:
      assert (resized.size, resized.mode) == ((2000, 1500), "RGB")
    material.check_peers()

  def test_seeded(self, image, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "toy", CONFIG)
    material = Material(None, "toy", image, tmp_path)
    assert checkpoint.inspect(material.bundle).config == CONFIG
    written = material.bundle.stat().st_mtime_ns
    assert Material(None, "toy", image, tmp_path).bundle.stat().st_mtime_ns == written

  def test_an_unknown_size(self, image, tmp_path):
    with pytest.raises(
      ValueError, match="size must be one of vit-tiny, vit-small, vit-base, vit-large; got 'x'"
    ):
      Material(None, "x", image, tmp_path)

  def test_a_stem_is_no_peers(self, image, tmp_path):
    material = Material(ROOT / "checkpoints" / "sam3-tiny", None, image, tmp_path)
    with pytest.raises(ValueError, match="convolutional stem"):
      material.check_peers()


class TestRun:
  def job(self, bundle, image, work, **more) -> run.Job:
    return run.Job(
      checkpoint=bundle, size=None, dtypes=["float32", "bfloat16"], repeats=1, image=image,
      work=work, **more,
    )  # fmt: skip

  @pytest.mark.slow
  def test_one_dtype_after_the_other(self, opened, bundle, image, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_open", lambda *given: opened(f"{given[2]} {given[4]}"))
    shown = []
    measured = run.run(
      self.job(bundle, image, tmp_path, only=["decode"]), lambda what, _: shown.append(what)
    )
    names = ["sam3-jax float32", "sam3-jax bfloat16"]
    assert [side["name"] for side in measured["sides"]] == names
    assert [(row["side"], row["count"]) for row in measured["rows"]] == [
      (name, count) for name in names for count in (1, 8, 64)
    ]
    assert shown[-1] == "decode 64 prompts, bfloat16"

  @pytest.mark.slow
  def test_a_command_that_fails(self, bundle, image, tmp_path, monkeypatch):
    def fail(*_):
      raise Unable("why")

    monkeypatch.setattr(start, "segment", fail)
    measured = run.run(
      self.job(bundle, image, tmp_path, only=["start"]), lambda what, fraction: None
    )
    assert measured["rows"] == measured["sides"] == []
    assert {"what": "start", "why": "why"} in measured["skipped"]


class TestCommand:
  @pytest.mark.slow
  def test_measures_and_says_what_it_skipped(self, bundle, tmp_path, capsys):
    typed = ["benchmark", "--checkpoint", str(bundle), "--repeats", "2", "--device", "cpu"]
    typed += ["--only", "preprocess", "--only", "postprocess", "--out", str(tmp_path / "out")]
    typed += ["--peer", "keras-hub", "--peer-python", str(tmp_path / "nowhere")]
    assert main(typed) == 0
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    text = (tmp_path / "out" / "benchmark.md").read_text()
    assert capsys.readouterr().out == text
    assert [(row["case"], row["count"]) for row in written["rows"]] == [
      ("preprocess", 1), *(("postprocess", n) for n in (1, 10, 50, 200)),
    ]  # fmt: skip
    assert all(len(row["seconds"]) == 2 for row in written["rows"])
    [side] = written["sides"]
    assert side["name"] == "sam3-jax float32"
    assert side["import"] > 0
    assert side["load"] > 0
    skipped = {row["what"]: row["why"] for row in written["skipped"]}
    assert skipped.keys() == {
      "encode", "encode_visual", "text", "decode", "visual", "predict", "growth", "start",
      "keras-hub float32",
    }  # fmt: skip
    assert skipped["keras-hub float32"].endswith("cannot be run: No such file or directory")

  def test_interpreters_are_found_from_where_the_command_runs(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "env").mkdir()
    (tmp_path / "env" / "python").symlink_to(sys.executable)
    [(_, given)] = benchmark._peers(["meta"], ["env/python"])
    assert given == str(tmp_path / "env" / "python")
    [(_, named)] = benchmark._peers(["meta"], ["sh"])
    assert Path(named).is_absolute()
    assert Path(named).exists()

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--checkpoint", "a", "--size", "vit-tiny"], "--checkpoint and --size exclude each other"),
      (["--peer", "meta"], "got 1 --peer and 0 --peer-python"),
      (["--peer-python", "x"], "got 0 --peer and 1 --peer-python"),
      (["--plot", "x.png"], "--plot needs --only growth; add it"),
      (["--image", "nowhere.png"], "there is no file nowhere.png"),
      (["--repeats", "0"], "Invalid value for '--repeats'"),
      (["--only", "everything"], "'everything' is not one of"),
      (
        ["--size", "large"],
        "'large' is not one of 'vit-tiny', 'vit-small', 'vit-base', 'vit-large'",
      ),
      (["--checkpoint", "nowhere", "--only", "text"], "no checkpoint 'nowhere'"),
    ],
  )
  def test_faults(self, typed, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *typed]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert list(tmp_path.iterdir()) == []

  def test_without_a_clone(self, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(benchmark, "CLONE", tmp_path)
    assert main(["benchmark"]) == 2
    assert "clone the repository" in capsys.readouterr().err
