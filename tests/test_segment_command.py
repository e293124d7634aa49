"""`sam3-jax segment`: what it writes and prints."""

import contextlib
import io
import json
import shutil
import signal
import sys

import command_runs
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from sam3_jax import Prompt
from sam3_jax.cli import segment_images
from sam3_jax.cli.main import main
from sam3_jax.outputs import visualize

model = command_runs.model
folder = command_runs.folder
ready = command_runs.ready
fails = command_runs.fails

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Full:
  """An image that does not fit on the disk."""

  def save(self, file, *args, **options):
    file.write(b"half")
    raise OSError(28, "No space left on device")


class TestSegment:
  @pytest.mark.slow
  def test_from_the_embedded_checkpoint(self, folder, capsys):
    typed = ["segment", "photo.png", "--text", "cat", "--text", "dog"]
    assert main([*typed, "--threshold", "0", "--max-detections", "4"]) == 0
    out, err = capsys.readouterr()
    record = json.loads((folder / "out" / "photo.sam3.json").read_text())
    assert record["images"] == [{"id": 1, "file_name": "photo.png", "width": 200, "height": 120}]
    assert [category["name"] for category in record["categories"]] == ["cat", "dog"]
    trained = record["info"]["checkpoint"]["trained"]
    assert ("untrained" in err) == (not trained)
    with Image.open(folder / "out" / "photo.sam3.png") as image:
      assert image.width == 800
      assert image.height > 480  # a legend below
    assert out.count("photo.sam3.png") == out.count("photo.sam3.json") == 1
    assert "sam3-tiny, float32 on cpu" in out
    assert sorted(path.name for path in folder.rglob("*.sam3.*")) == [
      "photo.sam3.json",
      "photo.sam3.png",
    ]

  @pytest.mark.slow
  def test_json_is_what_the_api_gives(self, ready, model):
    typed = ["segment", "photo.png", "--text", "cat", "--box", "10,20,90,80", "--box=5,5,9,9,0"]
    assert main([*typed, "--threshold=0", "--max-detections=5", "--out", "new/folder"]) == 0
    prompt = Prompt(text="cat", boxes=[[10, 20, 90, 80], [5, 5, 9, 9]], box_labels=[1, 0])
    detections = model.decode(model.encode("photo.png"), prompt, max_detections=5)
    [found] = detections.instances(0)
    record = json.loads((ready / "new" / "folder" / "photo.sam3.json").read_text())
    assert len(record["annotations"]) == len(found) == 5
    for i, annotation in enumerate(record["annotations"]):
      mask = rle.decode(annotation["segmentation"]).astype(bool)
      assert np.array_equal(mask, found.masks[i])
      assert annotation["area"] == mask.sum()
      x0, y0, x1, y1 = np.clip(found.boxes[i], 0, [200, 120, 200, 120])
      assert np.allclose(annotation["bbox"], [x0, y0, x1 - x0, y1 - y0], atol=0.011)
      assert annotation["id"] == found.ids[i]
    assert record["info"]["threshold"] == 0
    asked = {"text": "cat", "boxes": [[10, 20, 90, 80], [5, 5, 9, 9]], "box_labels": [1, 0]}
    assert record["info"]["prompts"] == [asked]

  @pytest.mark.slow
  def test_a_box_alone_and_rotated_images(self, ready, capsys):
    assert main(["segment", "turned.jpg", "--box", "10,150,90,190"]) == 0
    record = json.loads((ready / "out" / "turned.sam3.json").read_text())
    assert record["categories"] == [{"id": 1, "name": "exemplar box"}]
    asked = {"text": None, "boxes": [[10, 150, 90, 190]], "box_labels": [1]}
    assert record["info"]["prompts"] == [asked]
    assert "exemplar box" in capsys.readouterr().out
    assert (record["images"][0]["width"], record["images"][0]["height"]) == (120, 200)

  @pytest.mark.slow
  def test_a_directory_and_what_is_left_out_of_it(self, ready, fails, capsys):
    """Counted in one line at the end; with --strict nothing is done."""
    (ready / "more" / "deep").mkdir(parents=True)
    shutil.copy("photo.png", "more/deep/photo.png")
    for name in ("a.txt", ".hidden.jpg", "photo.sam3.png"):
      (ready / "more" / name).write_bytes(b"x")
    left_out = "skipped 3 files: 1 .txt, 1 hidden, 1 result of segment"
    assert f"--strict: {left_out}" in fails("segment", "more", "--text", "a", "--strict")
    assert main(["segment", "more", "*.png", "--text", "a"]) == 0
    out, err = capsys.readouterr()
    assert err == f"note: {left_out}\n"
    assert out.count(".sam3.png") == 2
    assert main(["segment", "more", "--text", "a", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_several_images_of_one_name(self, ready, capsys):
    (ready / "more").mkdir()
    shutil.copy("photo.png", "more/photo.png")
    shutil.copy("photo.png", "more/Photo.PNG")
    names = ["photo.png", "more/photo.png", "more/Photo.PNG", "./photo.png"]
    assert main(["segment", *names, "--text", "cat"]) == 0
    files = {path.name: json.loads(path.read_text()) for path in (ready / "out").glob("*.json")}
    assert {name: record["images"][0]["file_name"] for name, record in files.items()} == {
      "photo.sam3.json": "photo.png",
      "photo-2.sam3.json": "more/photo.png",
      "Photo-3.sam3.json": "more/Photo.PNG",
    }

  def test_a_broken_image_among_others(self, ready, capsys):
    (ready / "broken.jpg").write_bytes((ready / "turned.jpg").read_bytes()[:2000])
    (ready / "notes.txt").write_text("no image")
    images = ["broken.jpg", "photo.png", "notes.txt", "turned.jpg"]
    assert main(["segment", *images, "--text", "cat", "--quiet"]) == 2
    captured = capsys.readouterr()
    faults = [line for line in captured.err.splitlines() if "error" in line]
    assert len(faults) == 2
    assert "broken.jpg is truncated or damaged" in faults[0]
    assert "notes.txt is not an image" in faults[1]
    assert {path.name for path in (ready / "out").iterdir()} == {
      f"{name}.sam3.{kind}" for name in ("photo", "turned") for kind in ("png", "json")
    }

  def test_quiet(self, ready, capsys):
    assert main(["segment", "photo.png", "--text", "cat", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_odd_phrases_are_printed_as_they_are(self, ready, capsys):
    assert main(["segment", "photo.png", "--text", "[red]cat[/red] :cat:"]) == 0
    assert "[red]cat[/red]" in capsys.readouterr().out

  def test_a_terminal_with_ascii_encoding(self, ready, monkeypatch):
    """Phrases and file names that stdout cannot encode must not end a run."""
    path = ready / "caf\udce9.png"  # a name that is not UTF-8
    (ready / "photo.png").rename(path)
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["segment", str(path), "--text", "crème"]) == 0
    stdout.seek(0)
    assert "cr?me" in stdout.read()
    [file] = (ready / "out").glob("*.json")
    assert json.loads(file.read_bytes())["categories"][0]["name"] == "crème"

  def test_phrases_given_twice_count_once(self, ready):
    assert main(["segment", "photo.png", "--text", "cat", "--text", " cat"]) == 0
    record = json.loads((ready / "out" / "photo.sam3.json").read_text())
    assert [category["name"] for category in record["categories"]] == ["cat"]

  @pytest.mark.slow
  def test_many_images_are_not_listed_one_by_one(self, ready, capsys):
    names = [f"{i}.png" for i in range(12)]
    for name in names:
      Image.new("RGB", (8, 8)).save(name)
    assert main(["segment", *names, "--text", "cat"]) == 0
    assert "... and 4 more files in out" in capsys.readouterr().out

  def test_a_full_disk(self, ready, monkeypatch, capsys):
    """The second image's drawing fails: nothing of it stays, and the first is shown."""
    drawn = []

    def overlay(*args):
      drawn.append(Full() if drawn else visualize.overlay(*args))
      return drawn[-1]

    monkeypatch.setattr(segment_images, "overlay", overlay)
    assert main(["segment", "photo.png", "turned.jpg", "--text", "cat"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == (
      "sam3-jax: error: cannot write out/turned.sam3.png: No space left on device; "
      "free some space or choose another --out."
    )
    assert "photo.png" in out
    assert "out/photo.sam3.json" in out
    assert "turned" not in out
    files = sorted(path.name for path in (ready / "out").iterdir())
    assert files == ["photo.sam3.json", "photo.sam3.png"]

  def test_control_c(self, ready, monkeypatch, capsys):
    def interrupt(*args, **options):
      raise KeyboardInterrupt

    monkeypatch.setattr(segment_images, "read_image", interrupt)
    assert main(["segment", "photo.png", "--text", "cat"]) == 130
    assert capsys.readouterr().err.count("\n") == 1

  def test_control_c_that_others_catch(self, ready, monkeypatch, capsys, request):
    """As XLA's callbacks do: the next step ends the run, and so does an exception made of it."""
    # A shell's background jobs start with the signal ignored, and so would this test.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    read, calls = segment_images.read_image, []

    def swallow(*args, **options):
      calls.append(args)
      with contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
      return read(*args, **options)

    def replace(*args, **options):
      try:
        signal.raise_signal(signal.SIGINT)
      except KeyboardInterrupt:
        raise RuntimeError("INTERNAL: a callback failed") from None

    for read_image in (swallow, replace):
      monkeypatch.setattr(segment_images, "read_image", read_image)
      assert main(["segment", "photo.png", "turned.jpg", "--text", "cat"]) == 130
      message = "sam3-jax: error: interrupted; files written before are complete.\n"
      assert capsys.readouterr().err.endswith(message)
      assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(calls) == 1

  def test_traceback_only_with_debug(self, ready, monkeypatch, capsys):
    def fault(*args, **options):
      raise RuntimeError("two\nlines")

    monkeypatch.setattr(segment_images, "read_image", fault)
    assert main(["segment", "photo.png", "--text", "cat"]) == 2
    err = capsys.readouterr().err
    assert err == "sam3-jax: error: RuntimeError: two lines (--debug shows where)\n"
    assert main(["segment", "photo.png", "--text", "cat", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err
