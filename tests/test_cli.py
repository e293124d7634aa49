"""The command: what it writes and prints; one line and status 2 for everything that is wrong."""

import contextlib
import inspect
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import layouts
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle
from rich.console import Console

from sam3_jax import Prompt
from sam3_jax.checkpoint import checksums
from sam3_jax.cli import arguments, segment_images
from sam3_jax.cli import segment as command
from sam3_jax.cli.main import app, entry, main
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.preprocess import MAX_PIXELS
from sam3_jax.outputs import visualize
from sam3_jax.utils import console as terminal
from sam3_jax.utils.console import INTERRUPTED, progress

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "sam3-tiny"

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="session")
def model() -> Sam3:
  return Sam3.from_checkpoint(CHECKPOINT)


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
  """Where the command runs: a photo, and one that stands on its side."""
  monkeypatch.chdir(tmp_path)
  y, x = np.mgrid[:120, :200]
  image = np.stack([x, y, (x // 20 + y // 20) % 2 * 200], -1).astype(np.uint8)
  Image.fromarray(image).save("photo.png")
  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(image).save("turned.jpg", exif=exif)
  return tmp_path


@pytest.fixture
def ready(folder, model, monkeypatch) -> Path:
  """The folder, and the model loaded and compiled once for all tests."""
  monkeypatch.setattr(segment_images.Sam3, "from_checkpoint", lambda *_, **__: model)
  return folder


class Full:
  """An image whose output does not fit on the disk."""

  def save(self, file, *args, **options):
    file.write(b"half")
    raise OSError(28, "No space left on device")


def listing(folder: Path) -> list[tuple[str, bytes]]:
  return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))


@pytest.fixture
def fails(folder, capsys):
  """Runs the command, which must fail in one line and leave the folder as it was; the line."""

  def run(*typed: object) -> str:
    before = listing(folder)
    status = main([str(one) for one in typed])
    captured = capsys.readouterr()
    assert status == 2, captured
    assert captured.out == ""
    assert captured.err.startswith("sam3-jax: error: ")
    assert captured.err.count("\n") == 1, captured.err
    assert listing(folder) == before
    return captured.err

  return run


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
  def test_a_box_alone_and_images_that_are_turned(self, ready, capsys):
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

  def test_a_terminal_of_few_letters(self, ready, monkeypatch):
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
    ],
  )
  def test_options(self, ready, fails, typed, message):
    assert message in fails("segment", "photo.png", *typed)

  def test_boxes_must_touch_every_image(self, ready, fails):
    fails("segment", "photo.png", "turned.jpg", "--box", "10,150,90,190")

  def test_results_never_replace_a_image(self, ready, fails):
    shutil.copy("turned.jpg", "photo.sam3.png")
    line = fails("segment", "photo.png", "photo.sam3.png", "--text", "a", "--out", ".")
    assert "photo.sam3.png is an input and would be overwritten" in line

  @pytest.mark.parametrize("typed", [["segment"], ["inspect"], ["convert", "x"], ["nonsense"]])
  def test_usage(self, fails, typed):
    assert "--help`." in fails(*typed)

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["scenes", "--out", "x", "--count", "0"], ". See `sam3-jax scenes --help`."),
      (["scenes"], "'--out'. See `sam3-jax scenes --help`."),
      (["nonsense"], "'nonsense'. See `sam3-jax --help`."),
    ],
  )
  def test_usage_is_told_in_whole_sentences(self, fails, typed, message):
    line = fails(*typed)
    assert line.rstrip().endswith(message)
    assert ".. See" not in line

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


class TestConvert:
  @pytest.mark.slow
  def test_and_inspect(self, folder, capsys):
    layouts.write_folder(folder / "source", layouts.layout("hub"))
    typed = ["convert", "source", "new", "--dtype", "bfloat16", "--tokenizer", layouts.TOKENIZER]
    assert main([str(one) for one in typed]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("new: ")
    assert "bfloat16" in out
    assert err == ""
    assert main(["inspect", "new", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["dtype"] == "bfloat16"
    assert summary["info"]["trained"] is True
    assert f"{summary['parameters']:,} parameters" in out
    assert main(["inspect", str(folder / "new")]) == 0
    table = capsys.readouterr().out
    assert f"{summary['parameters']:,} in bfloat16" in table
    [(name, file)] = summary["info"]["origin"]["files"].items()
    assert name == "model.safetensors"
    assert file["sha256"] in table.replace("│", "").replace(" ", "").replace("\n", "")
    assert main(["convert", "new", "back", "--to", "meta"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("back/sam3.pt: 623 tensors")
    assert "filled with zeros, as the checkpoint lacks it: detector.geometry_encoder.points_" in out
    assert err == ""

  def test_from_the_hub(self, folder, monkeypatch, capsys):
    asked = []
    layouts.write_folder(folder / "snapshot", layouts.layout("detector"))
    monkeypatch.setattr(
      "sam3_jax.checkpoint.hf_hub.download", lambda name: asked.append(name) or folder / "snapshot"
    )
    typed = ["convert", "hf://facebook/sam3", "new", "--tokenizer", layouts.TOKENIZER]
    assert main([str(one) for one in typed]) == 0
    assert asked == ["hf://facebook/sam3"]
    assert capsys.readouterr().out.startswith("new: ")

  def test_bad_input(self, folder, fails):
    (folder / "notes.txt").write_text("This is no checkpoint.")
    (folder / "empty").mkdir()
    assert "notes.txt" in fails("convert", "notes.txt", "new")
    assert "nowhere" in fails("convert", "nowhere", "new")
    assert "empty" in fails("convert", "empty", "new")
    assert "--format" in fails("convert", "empty", "new", "--format", "tf")
    assert "--dtype" in fails("convert", "empty", "new", "--dtype", "float64")


class TestProgress:
  @pytest.mark.parametrize("large", [False, True])
  def test_a_bar_while_a_large_checkpoint_is_read(self, monkeypatch, large):
    monkeypatch.setattr(terminal, "LARGE", 0 if large else 2**40)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100)
    with terminal.loading(console, CHECKPOINT) as step:
      step("trunk", 0.25)
      time.sleep(0.3)  # it is drawn ten times a second
    assert "loading sam3-tiny: trunk" in out.getvalue()
    assert ("25%" in out.getvalue()) == large
    quiet = io.StringIO()
    with terminal.loading(Console(file=quiet, force_terminal=True), CHECKPOINT, quiet=True) as step:
      step("trunk", 0.25)
    assert quiet.getvalue() == ""

  def test_the_hub_tells_what_it_does(self, monkeypatch):
    monkeypatch.setattr("sam3_jax.registry.find_checkpoint", lambda name, **more: (name, [*more]))
    assert arguments.find("hf://org/name", quiet=True) == ("hf://org/name", ["progress", "note"])
    assert arguments.find("name", quiet=True) == ("name", [])


class TestInspect:
  def test_the_embedded_checkpoint(self, folder, capsys):
    assert main(["inspect", "sam3-tiny"]) == 0
    table = capsys.readouterr().out
    assert "sam3-tiny" in table
    assert "trunk" in table
    assert main(["inspect", str(CHECKPOINT), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert sum(summary["parts"].values()) == summary["parameters"]

  def test_quiet(self, fails, capsys):
    assert main(["inspect", "sam3-tiny", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    fails("inspect", "nowhere", "--quiet")

  def test_a_long_path_is_shown_whole(self, folder, capsys):
    path = folder / ("long" * 30)
    shutil.copytree(CHECKPOINT, path)
    assert main(["inspect", str(path)]) == 0
    cells = [line.split("│")[2].strip() for line in capsys.readouterr().out.splitlines()[1:-1]]
    assert str(path) in "".join(cells)


class TestProgram:
  def test_help_and_version(self, folder, capsys):
    commands = [command.callback.__name__ for command in app.registered_commands]
    assert len(commands) >= 6
    for typed in ([], ["-h"], *([name, "-h"] for name in commands)):
      assert main(typed) == 0
      out = capsys.readouterr().out
      assert "Usage: sam3-jax" in out
      assert all("--help" in line for line in out.splitlines() if "<bool>" in line)  # typer's own
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"sam3-jax {version('sam3-jax')}\n"

  def test_the_default_of_max_pixels(self):
    default = inspect.signature(command.segment).parameters["max_pixels"].default
    assert default == MAX_PIXELS

  @pytest.mark.slow
  def test_as_a_process(self, folder):
    """Nothing but the table on stdout, nothing but the note on stderr, and the exit status."""
    command = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
    typed = ["segment", "photo.png", "--text", "cat", "--device", "cpu"]
    done = subprocess.run([*command, *typed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("note:") for line in done.stderr.splitlines()), done.stderr
    assert (folder / "out" / "photo.sam3.png").exists()
    failed = subprocess.run([*command, "segment"], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1

  @pytest.mark.parametrize("status", [0, 2, INTERRUPTED])
  def test_the_end_of_the_process(self, monkeypatch, status):
    """After Ctrl-C nothing is torn down: XLA would crash, and the status be that of a crash."""
    ended = []
    monkeypatch.setattr("sam3_jax.cli.main.main", lambda: status)
    monkeypatch.setattr("sam3_jax.cli.main.os._exit", ended.append)
    monkeypatch.setattr("sam3_jax.cli.main.signal.signal", lambda *args: None)
    with pytest.raises(SystemExit) as end:
      entry()
    assert end.value.code == status
    assert ended == ([status] if status == INTERRUPTED else [])


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_progress_is_for_terminals_only(terminal, quiet):
  file = io.StringIO()
  with progress(Console(file=file, force_terminal=terminal), bar=True, quiet=quiet) as step:
    step("[loading]", 0.5)
  assert ("[loading]" in file.getvalue()) == (terminal and not quiet)
