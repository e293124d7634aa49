"""What was typed after `sam3-jax`, checked before any work."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from sam3_jax.prompts import Prompt


def prompts(phrases: Sequence[str], boxes: Sequence[str]) -> "list[Prompt]":
  """One prompt a phrase; boxes join a single one, or are a prompt of their own."""
  from sam3_jax.prompts import Prompt

  phrases = list(dict.fromkeys(phrase.strip() for phrase in phrases))
  if not phrases and not boxes:
    raise ValueError("nothing to look for: give --text PHRASE or --box X0,Y0,X1,Y1.")
  if boxes and len(phrases) > 1:
    raise ValueError(
      f"--box beside {len(phrases)} --text is ambiguous; boxes join a single phrase. "
      "Run once for each phrase."
    )
  if not boxes:
    return [Prompt(text=phrase) for phrase in phrases]
  rows = [_box(box) for box in boxes]
  return [
    Prompt(
      text=phrases[0] if phrases else None,
      boxes=[row[:4] for row in rows],
      box_labels=[int(row[4]) for row in rows],
    )
  ]


def _box(value: str) -> list[float]:
  """x0, y0, x1, y1 and the label."""
  try:
    numbers = [float(part) for part in value.split(",")]
  except ValueError:
    numbers = []
  if len(numbers) not in (4, 5):
    raise ValueError(
      f"--box {value!r} must be four numbers in pixels, X0,Y0,X1,Y1, and may end in ,1 (an "
      "example) or ,0 (a counterexample)."
    )
  if len(numbers) == 5 and numbers[4] not in (0, 1):
    raise ValueError(f"--box {value!r} must end in ,1 (an example) or ,0 (a counterexample).")
  return [*numbers, 1.0][:5]


def images(paths: Sequence[Path]) -> list[Path]:
  """The files, each once; raises where one is missing."""
  files: dict[Path, Path] = {}
  for path in paths:
    if path.is_dir():
      raise ValueError(f"{path} is a folder; name the pictures in it: {path}/*.jpg.")
    if not path.exists():
      raise FileNotFoundError(f"there is no file {path}; check the spelling and the folder.")
    files.setdefault(path.resolve(), path)
  return list(files.values())


def check_writable(out: Path, option: str = "--out") -> None:
  """Raises unless a folder is there or can be made, and can be written to; leaves no trace. The
  message names the option that it was given by."""
  folder = out.absolute()
  while not folder.exists():
    folder = folder.parent
  try:
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise ValueError(
      f"cannot write to {out} ({error.strerror}); choose another folder with {option}."
    ) from error


def use_device(device: str | None) -> None:
  """Imports JAX on a platform; the error says which there are."""
  import jax

  if device == "cpu":
    jax.config.update("jax_platforms", "cpu")  # leaves the memory of other devices alone
  elif device is not None:
    try:
      jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
    except RuntimeError as error:
      there = ", ".join(sorted({one.platform for one in jax.devices()}))
      extra = {"gpu": "cuda"}.get(device, device)
      raise ValueError(
        f"--device {device}: JAX finds none here, only {there}; pip install 'sam3-jax[{extra}]' "
        "on a machine that has one, or leave --device out."
      ) from error
