"""`sam3-jax segment` with wrong input: status 2, one line, and no file is changed."""

import json
import shutil

import command_runs
import pytest
from command_runs import CHECKPOINT

from sam3_jax.checkpoint import checksums

model = command_runs.model
folder = command_runs.folder
ready = command_runs.ready
fails = command_runs.fails

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class TestBadInput:
  @pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"text", "is not an image"), (None, "is truncated or damaged")],
  )
  def test_a_single_file_that_is_no_image(self, ready, fails, content, message):
    whole = (ready / "photo.png").read_bytes()
    (ready / "bad.png").write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert f"bad.png {message}" in fails("segment", "bad.png", "--text", "cat")

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      ([], "there is no prompt: give --text PHRASE, --box X0,Y0,X1,Y1, --point"),
      (["--text", ""], "the phrase is empty"),
      (["--text", "  "], "the phrase is empty"),
      (["--text", "cat", "--text", ""], "the phrase is empty"),
      (["--box", "1,2,3"], "'1,2,3' must be four numbers"),
      (["--box", "1,2,3,4,1,1"], "must be four numbers"),
      (["--box", "1,2,3,x"], "must be four numbers"),
      (["--box", ""], "must be four numbers"),
      (["--box", "1,2,nan,4"], "must be finite"),
      (["--box", "1,2,inf,4"], "must be finite"),
      (["--box", "50,2,3,40"], "has a negative extent"),
      (["--box", "1,2,30,40,7"], "must end in ,1 (positive) or ,0"),
      (["--box", "500,2,600,40"], "is completely outside the 200 x 120 image"),
      (["--box", "-5,-5,-1,-1"], "is completely outside the 200 x 120 image"),
      (["--text", "a", "--text", "b", "--box", "1,2,30,40"], "--box with 2 --text is ambiguous"),
      (["--text", "a", "--threshold", "1.5"], "--threshold must be between 0 and 1; got 1.5"),
      (["--text", "a", "--threshold", "-0.1"], "--threshold must be between 0 and 1; got -0.1"),
      (["--text", "a", "--threshold", "nan"], "--threshold must be between 0 and 1; got nan"),
      (["--text", "a", "--threshold", "high"], "--threshold"),
      (["--text", "a", "--max-detections", "0"], "--max-detections"),
      (["--text", "a", "--max-pixels", "100"], "24,000 pixels, more than 100"),
      (["--text", "a", "--tile", "0"], "--tile must be a whole number of pixels, at least 32"),
      (["--text", "a", "--tile", "64", "--overlap", "1"], "--overlap must be a fraction"),
      (["--text", "a", "--overlap", "0.5"], "--overlap 0.5 needs --tile"),
      (["--everything", "--tile", "64"], "--tile takes --text, --concept and exemplar boxes"),
      (["--point", "5,5", "--tile", "64"], "--tile takes --text, --concept and exemplar boxes"),
      (["--text", "a", "--dtype", "float16"], "'float32'"),
      (["--text", "a", "--device", "npu"], "'cpu'"),
      (["--text", "a", "--device", "tpu"], "JAX finds only cpu; pip install"),
      (["--text", "a", "--nonsense"], "--nonsense"),
      (["--text"], "--text"),
      (["--text", "a", "--checkpoint", "nowhere"], "sam3-jax convert"),
      (["--text", "a", "--out", "photo.png"], "cannot write to photo.png"),
      (["--text", "a", "--out", "photo.png/deeper"], "cannot write to photo.png/deeper"),
      (["--text", "a", "--out", "/proc/none"], "cannot write to /proc/none"),
      (["missing.jpg", "--text", "a"], "there is no file missing.jpg"),
      (["nothing", "--text", "a"], "there is no file nothing"),
      (["no*.jpg", "--text", "a"], "there is no image in no*.jpg"),
      (["gs://b/a.jpg", "--text", "a"], "gs://b/a.jpg: images of this command (`batch` reads"),
    ],
  )
  def test_options(self, ready, fails, typed, message):
    assert message in fails("segment", "photo.png", *typed)

  def test_boxes_must_touch_every_image(self, ready, fails):
    fails("segment", "photo.png", "turned.jpg", "--box", "10,150,90,190")

  def test_results_never_replace_an_image(self, ready, fails):
    shutil.copy("turned.jpg", "photo.sam3.png")
    line = fails("segment", "photo.png", "photo.sam3.png", "--text", "a", "--out", ".")
    assert "photo.sam3.png is an input and would be overwritten" in line

  @pytest.mark.slow
  def test_checkpoints(self, folder, fails):
    (folder / "empty").mkdir()
    shutil.copytree(CHECKPOINT, folder / "half", ignore=shutil.ignore_patterns("manifest.json"))
    for name, edit in {
      "version": lambda values: values.update(format_version=99),
      "missing": lambda values: values["parameters"].popitem(),
      "extra": lambda values: values["parameters"].update(
        new={"shape": [1], "dtype": "float32", "sha256": "0" * 64}
      ),
      "shape": lambda values: values["parameters"]["text/position"].update(shape=[3, 3]),
    }.items():
      shutil.copytree(CHECKPOINT, folder / name)
      values = json.loads((folder / name / "manifest.json").read_text())
      edit(values)
      (folder / name / "manifest.json").write_text(json.dumps(values))
      checksums.write(folder / name)
    for name, message in {
      "empty": "is an empty directory",
      "half": "it lacks manifest.json",
      "version": "is of format version 99",
      "missing": "does not fit the model",
      "extra": "new",
      "shape": "text/position",
      "photo.png": "photo.png",
      "hf:/": "hf:/",
    }.items():
      assert message in fails("segment", "photo.png", "--text", "a", "--checkpoint", name)
      assert message in fails("inspect", name)
