"""A directory in which commands run, and commands that must fail."""

import functools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sam3_jax.cli import segment_images
from sam3_jax.cli.main import main
from sam3_jax.inference.predictor import Sam3

CHECKPOINT = Path(__file__).parent.parent / "checkpoints" / "sam3-tiny"


@functools.cache
def load_model() -> Sam3:
  """One for all tests of a process."""
  return Sam3.from_checkpoint(CHECKPOINT)


@pytest.fixture
def model() -> Sam3:
  return load_model()


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


def listing(folder: Path) -> list[tuple[str, bytes]]:
  return sorted((str(p), p.read_bytes() if p.is_file() else b"") for p in folder.rglob("*"))


def expect_error(folder, capsys, *typed: object) -> str:
  """Runs a command, which must fail in one line and leave the folder as it was; the line."""
  before = listing(folder)
  status = main([str(one) for one in typed])
  captured = capsys.readouterr()
  assert status == 2, captured
  assert captured.out == ""
  assert captured.err.startswith("sam3-jax: error: ")
  assert captured.err.count("\n") == 1, captured.err
  assert listing(folder) == before
  return captured.err


@pytest.fixture
def fails(folder, capsys):
  """Runs a command that must fail; see `expect_error`."""
  return functools.partial(expect_error, folder, capsys)
