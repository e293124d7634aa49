"""Terminal output: no control characters from untrusted text, and one line for each error."""

import dataclasses
import errno
import io
import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text
from waiting import wait_until

from sam3_jax.checkpoint import bundle
from sam3_jax.cli.inspect import describe
from sam3_jax.cli.main import main
from sam3_jax.registry import find_checkpoint
from sam3_jax.utils import console
from sam3_jax.utils.console import Console, one_line, print_error, printable, say
from sam3_jax.utils.os_errors import reason, remedy

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "sam3-tiny"
# Clears the screen, sets the title (C0 and C1), rings, moves back, turns the direction, breaks.
HOSTILE = "a\x1b[2J\x1b]0;b\x07\x9b31m\x85c\r\u202ed\u2066e\u2028f\b\x7f\nsam3-jax: done\udcff"
KEPT = "caf\u00e9 \u65e5\u672c\u3000\u8a9e \U0001f468\u200d\U0001f469 [red]cat[/red] \\ \u00a0|"


def control_characters(text: str) -> str:
  """The characters that a terminal would interpret."""
  bad = ("Cc", "Cf", "Cs", "Zl", "Zp")
  return "".join(c for c in text if unicodedata.category(c) in bad and c not in "\n\u200c\u200d")


@given(st.text())
def test_printable(text):
  once = printable(text)
  assert control_characters(once) == ""
  assert "\n" not in once
  assert printable(once) == once


def test_printable_keeps_text():
  assert printable(KEPT) == KEPT
  assert printable("a\x1b[2J\nb", keep="\n") == "a\\x1b[2J\nb"


def test_consoles_escape_control_characters():
  file = io.StringIO()
  shown = Console(file=file, width=400, force_terminal=False)
  table = Table(title=Text(HOSTILE), caption=HOSTILE)
  table.add_column(HOSTILE)
  table.add_row(HOSTILE)
  table.add_row(Text(HOSTILE))
  shown.print(table)
  shown.print(HOSTILE, markup=False)
  say(shown, HOSTILE)
  print_error(HOSTILE, shown)
  text = file.getvalue()
  assert control_characters(text) == ""
  assert "\\x1b[2J" in text
  assert text.splitlines()[-1].startswith("sam3-jax: error: a\\x1b")
  styled = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
  styled.print("[red]a[/red]")
  assert styled.file.getvalue() == "\x1b[31ma\x1b[0m\n"  # styles remain


@pytest.mark.parametrize(
  "typed",
  [
    ["segment", HOSTILE, "--text", "cat"],
    ["segment", "a.png", "--text", "cat", "--checkpoint", HOSTILE],
    ["segment", "a.png", "--text", "cat", "--out", f"a.png/{HOSTILE}"],
    ["segment", "a.png", "--text", "cat", f"--{HOSTILE}"],
    ["segment", "a.png", "--box", HOSTILE],
    ["segment", "a.png", "--point", HOSTILE],
    ["segment", "a.png", "--everything", "--option", HOSTILE],
    ["batch", "--images", HOSTILE, "--prompts", "cat", "--out", "o"],
    ["batch", "--images", "a.png", "--prompts", f"{HOSTILE}.txt", "--out", "o"],
    ["train", HOSTILE, "--out", "o"],
    ["evaluate", "--data", HOSTILE, "--images", HOSTILE],
    ["inspect", HOSTILE],
    ["convert", HOSTILE, "o"],
    ["export", HOSTILE, "o"],
    [HOSTILE],
  ],
)
def test_commands_print_no_control_characters(typed, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.png").write_bytes(b"none")
  assert main(typed) == 2
  out, err = capsys.readouterr()
  assert control_characters(out + err) == ""
  assert err.startswith("sam3-jax: error: ")
  assert err.count("\n") == 1


def test_checkpoint_description_is_escaped(capsys):
  summary = bundle.inspect(find_checkpoint("sam3-tiny"))
  info = {"name": HOSTILE, "licence": HOSTILE, "source": [HOSTILE], "origin": {HOSTILE: HOSTILE}}
  Console(width=300).print(describe(dataclasses.replace(summary, info=summary.info | info)))
  out = capsys.readouterr().out
  assert control_characters(out) == ""
  assert "x1b" in out


def test_tracebacks_are_escaped(monkeypatch, capsys):
  def fail(*_, **__):
    raise RuntimeError(HOSTILE)

  monkeypatch.setattr("sam3_jax.cli.main.app", fail)
  assert main(["--debug"]) == 2
  err = capsys.readouterr().err
  assert "Traceback" in err
  assert control_characters(err) == ""


@pytest.mark.parametrize(
  "error", [MemoryError(), RecursionError("deep"), AssertionError(), ValueError()]
)
def test_unexpected_errors(error, monkeypatch, capsys):
  def fail(*_, **__):
    raise error

  monkeypatch.setattr("sam3_jax.cli.main.app", fail)
  assert main(["segment"]) == 2
  err = capsys.readouterr().err
  assert err.count("\n") == 1
  assert "Traceback" not in err
  expected = "not enough memory" if isinstance(error, MemoryError) else "(--debug shows where)"
  assert expected in err


def test_remedies_of_os_errors():
  remedies = {
    name: remedy(OSError(getattr(errno, name), "")) for name in dir(errno) if name[0] == "E"
  }
  assert remedies["ENAMETOOLONG"] == "choose a shorter name"
  assert [name for name, one in remedies.items() if "free some space" in one] == ["ENOSPC"]
  assert "quota" in remedies["EDQUOT"]
  assert "permissions" in remedies["EACCES"]
  assert remedies["ENOENT"] == "check the path"
  error = OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), "a" * 10)
  assert one_line(error) == "aaaaaaaaaa: File name too long; choose a shorter name"
  assert reason(OSError("odd")) == "odd; check the path"


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "nonsense"])
def test_devices_that_jax_cannot_find(platforms, monkeypatch, capsys, tmp_path):
  import jax

  def local_devices(*_, **__):
    raise AssertionError if platforms == "cuda" else RuntimeError("Unable to initialize\nmore")

  monkeypatch.setenv("JAX_PLATFORMS", platforms)
  monkeypatch.setattr(jax, "local_devices", local_devices)
  (tmp_path / "a.png").write_bytes(b"none")
  typed = ["segment", str(tmp_path / "a.png"), "--text", "cat", "--out", str(tmp_path / "o")]
  assert main(typed) == 2
  err = capsys.readouterr().err
  assert f"JAX_PLATFORMS={platforms}" in err
  assert err.count("\n") == 1
  assert ("sam3-jax[cuda]" in err) == (platforms == "cuda")


@pytest.mark.parametrize("large", [False, True])
def test_a_bar_while_a_large_checkpoint_is_read(monkeypatch, large):
  monkeypatch.setattr(console, "LARGE", 0 if large else 2**40)
  out = io.StringIO()
  shown = Console(file=out, force_terminal=True, width=100)
  with console.loading(shown, CHECKPOINT) as step:
    step("trunk", 0.25)
    wait_until(lambda: "loading sam3-tiny: trunk" in out.getvalue())  # drawn ten times a second
  assert "loading sam3-tiny: trunk" in out.getvalue()
  assert ("25%" in out.getvalue()) == large
  quiet = io.StringIO()
  with console.loading(Console(file=quiet, force_terminal=True), CHECKPOINT, quiet=True) as step:
    step("trunk", 0.25)
  assert quiet.getvalue() == ""


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (True, True), (False, False)])
def test_progress_is_for_terminals_only(terminal, quiet):
  file = io.StringIO()
  with console.progress(Console(file=file, force_terminal=terminal), bar=True, quiet=quiet) as step:
    step("[loading]", 0.5)
  assert ("[loading]" in file.getvalue()) == (terminal and not quiet)
