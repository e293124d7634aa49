"""The commands `convert` and `inspect`, usage, help, and the end of the process."""

import inspect
import json
import shutil
import subprocess
import sys
from importlib.metadata import version

import command_runs
import layouts
import pytest
from command_runs import CHECKPOINT

from sam3_jax.cli import arguments, segment
from sam3_jax.cli.main import app, entry, main
from sam3_jax.inputs.preprocess import MAX_PIXELS
from sam3_jax.utils.console import INTERRUPTED

folder = command_runs.folder
fails = command_runs.fails

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


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
  def test_progress_of_the_hub_is_shown_unless_quiet(self, monkeypatch):
    monkeypatch.setattr("sam3_jax.registry.find_checkpoint", lambda name, **more: (name, [*more]))
    assert arguments.find("hf://org/name", quiet=True) == ("hf://org/name", ["progress", "note"])
    assert arguments.find("name", quiet=True) == ("name", [])

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
  def test_usage_errors_are_whole_sentences(self, fails, typed, message):
    line = fails(*typed)
    assert line.rstrip().endswith(message)
    assert ".. See" not in line

  def test_the_default_of_max_pixels(self):
    default = inspect.signature(segment.segment).parameters["max_pixels"].default
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
