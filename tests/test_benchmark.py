"""`sam3-jax benchmark`: its material, peers, runs, and the command itself."""

import json
import sys
from pathlib import Path

import benchmark_sides
import numpy as np
import pytest
from benchmark_sides import ROOT
from PIL import Image
from speed import run, side_transformers, start
from speed.material import Material, seeded
from speed.server import Unable
from training_model import CONFIG

from sam3_jax.checkpoint import bundle
from sam3_jax.cli import benchmark
from sam3_jax.cli.main import main
from sam3_jax.config import SIZES

opened = benchmark_sides.opened


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer_path) -> Path:
  """A toy checkpoint."""
  folder = tmp_path_factory.mktemp("bundle") / "toy"
  bundle.save(folder, seeded(CONFIG), CONFIG, tokenizer_path.read_bytes(), info={"name": "toy"})
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
  def test_of_a_checkpoint(self, saved, image, tmp_path):
    material = Material(saved, None, image, tmp_path)
    assert (material.bundle, material.config, material.name) == (saved, CONFIG, "toy")
    assert len(material.tokens) == 128
    assert {len(row) for row in material.tokens} == {CONFIG.text.context}
    with Image.open(material.image) as resized:
      assert (resized.size, resized.mode) == ((2000, 1500), "RGB")
    material.check_peers()

  def test_seeded(self, image, tmp_path, monkeypatch):
    monkeypatch.setitem(SIZES, "toy", CONFIG)
    material = Material(None, "toy", image, tmp_path)
    assert bundle.inspect(material.bundle).config == CONFIG
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
  def job(self, saved, image, work, **more) -> run.Job:
    return run.Job(
      checkpoint=saved, size=None, dtypes=["float32", "bfloat16"], repeats=1, image=image,
      work=work, **more,
    )  # fmt: skip

  @pytest.mark.slow
  def test_one_dtype_after_the_other(self, opened, saved, image, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_open", lambda *given: opened(f"{given[2]} {given[4]}"))
    shown = []
    measured = run.run(
      self.job(saved, image, tmp_path, only=["decode"]), lambda what, _: shown.append(what)
    )
    names = ["sam3-jax float32", "sam3-jax bfloat16"]
    assert [side["name"] for side in measured["sides"]] == names
    assert [(row["side"], row["count"]) for row in measured["rows"]] == [
      (name, count) for name in names for count in (1, 8, 64)
    ]
    assert shown[-1] == "decode 64 prompts, bfloat16"

  @pytest.mark.slow
  def test_a_command_that_fails(self, saved, image, tmp_path, monkeypatch):
    def fail(*_):
      raise Unable("why")

    monkeypatch.setattr(start, "segment", fail)
    measured = run.run(
      self.job(saved, image, tmp_path, only=["start"]), lambda what, fraction: None
    )
    assert measured["rows"] == measured["sides"] == []
    assert {"what": "start", "why": "why"} in measured["skipped"]


class TestCommand:
  @pytest.mark.slow
  def test_measures_and_says_what_it_skipped(self, saved, tmp_path, capsys):
    typed = ["benchmark", "--checkpoint", str(saved), "--repeats", "2", "--device", "cpu"]
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
