"""What was typed after `sam3-jax`, checked before any work."""

import dataclasses
import glob
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sam3_jax.checkpoint.hf_hub import SCHEME
from sam3_jax.utils.console import Console, progress, say
from sam3_jax.utils.os_errors import error_text, remedy
from sam3_jax.utils.paths import require_local

if TYPE_CHECKING:
  from sam3_jax.inference.mask_generator import MaskGeneration
  from sam3_jax.inputs.prompts import Prompt
  from sam3_jax.inputs.visual_prompts import VisualPrompt
  from sam3_jax.utils.notes import ListingNotes


def find(checkpoint: str, quiet: bool) -> Path:
  """`registry.find_checkpoint`; what it downloads and converts shows."""
  from sam3_jax.registry import find_checkpoint

  if not checkpoint.startswith(SCHEME):
    return find_checkpoint(checkpoint)
  console = Console(stderr=True)

  def note(line: str) -> None:
    if not quiet:
      say(console, f"note: {line}")

  with progress(console, bar=True, quiet=quiet) as step:
    return find_checkpoint(checkpoint, progress=step, note=note)


class Asked(NamedTuple):
  """What to look for in each image."""

  prompts: "list[Prompt]"
  visual: "list[VisualPrompt]"


def asked(
  phrases: Sequence[str],
  boxes: Sequence[str],
  points: Sequence[str],
  visual: bool,
  everything: bool,
) -> Asked:
  """What --text, --box, --point, --visual and --everything ask for together."""
  if everything:
    if phrases or boxes or points or visual:
      raise ValueError(
        "--everything needs no --text, --box, --point or --visual; run once for each wish."
      )
    return Asked([], [])
  if visual and not (boxes or points):
    raise ValueError("--visual says how --box is meant; give --box X0,Y0,X1,Y1 or --point X,Y.")
  if points and boxes and not visual:
    raise ValueError(
      "--point beside --box is ambiguous: add --visual if the box is around the same thing; as an "
      "example, it needs a run of its own."
    )
  if not (visual or points):
    return Asked(prompts(phrases, boxes), [])
  if len(set(phrases)) > 1:
    raise ValueError(
      f"--point or --visual beside {len(set(phrases))} --text is ambiguous; clicks mend what a "
      "single phrase found. Run once for each phrase."
    )
  return Asked(prompts(phrases, []) if phrases else [], visual_prompts(points, boxes))


def prompts(phrases: Sequence[str], boxes: Sequence[str]) -> "list[Prompt]":
  """One prompt a phrase; boxes join a single one, or are a prompt of their own."""
  from sam3_jax.inputs.prompts import Prompt

  phrases = list(dict.fromkeys(phrase.strip() for phrase in phrases))
  if not phrases and not boxes:
    raise ValueError(
      "nothing to look for: give --text PHRASE, --box X0,Y0,X1,Y1, --point X,Y or --everything."
    )
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


def visual_prompts(points: Sequence[str], boxes: Sequence[str]) -> "list[VisualPrompt]":
  """What is pointed at: one thing by all points and at most one box, or a thing by each box."""
  from sam3_jax.inputs.visual_prompts import VisualPrompt

  places, corners = [_point(point) for point in points], [_box(box) for box in boxes]
  for box, typed in zip(corners, boxes, strict=True):
    if not box[4]:
      raise ValueError(
        f"--box {typed!r} with --visual is the box around one thing, no counterexample; leave ,0 "
        "out, or leave out --visual."
      )
  if not places:
    return [VisualPrompt(box=box[:4]) for box in corners]
  if len(corners) > 1:
    raise ValueError(
      f"--point and {len(corners)} --box with --visual are ambiguous: points and one box are one "
      "thing. Run once for each thing."
    )
  return [
    VisualPrompt(
      points=[place[:2] for place in places],
      point_labels=[int(place[2]) for place in places],
      box=corners[0][:4] if corners else None,
    )
  ]


def _point(value: str) -> list[float]:
  """x, y and the label."""
  try:
    numbers = [float(part) for part in value.split(",")]
  except ValueError:
    numbers = []
  if len(numbers) not in (2, 3):
    raise ValueError(
      f"--point {value!r} must be two numbers in pixels, X,Y, and may end in ,1 (on the thing) or "
      ",0 (off it)."
    )
  if len(numbers) == 3 and numbers[2] not in (0, 1):
    raise ValueError(f"--point {value!r} must end in ,1 (on the thing) or ,0 (off it).")
  return [*numbers, 1.0][:3]


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


def mask_generation(options: Sequence[str], threshold: float | None) -> "MaskGeneration":
  """How to look for everything, by --option NAME=VALUE and --threshold."""
  from sam3_jax.inference.mask_generator import MaskGeneration

  usual = {one.name: one.default for one in dataclasses.fields(MaskGeneration)}
  del usual["point_grids"]  # which are arrays
  given: dict[str, Any] = {} if threshold is None else {"pred_iou_thresh": threshold}
  for option in options:
    name, _, value = option.partition("=")
    if name not in usual:
      raise ValueError(f"--option {option!r} must be NAME=VALUE; names are {', '.join(usual)}.")
    if name in given:
      raise ValueError(
        f"--option {name} is given twice; --threshold is the same as pred_iou_thresh."
      )
    try:
      given[name] = _value(value, type(usual[name]))
    except ValueError:
      kind = {bool: "true or false", int: "a whole number"}.get(type(usual[name]), "a number")
      raise ValueError(f"--option {option!r} must be {kind}.") from None
  return MaskGeneration(**given)


def _value(text: str, kind: type) -> bool | int | float:
  if kind is bool:
    return ("false", "true").index(text.lower()) == 1
  return kind(text)


def images(given: Sequence[Path], notes: "ListingNotes") -> list[Path]:
  """The images that files, directories and patterns stand for, each once.

  Raises:
    FileNotFoundError: one of them is missing.
    ValueError: there is no image in them, or a directory cannot be read.
  """
  from sam3_jax.inputs.image_listing import find_files

  files: dict[Path, Path] = {}
  for one in map(str, given):
    if not os.path.exists(one) and not glob.has_magic(one):
      raise FileNotFoundError(f"there is no file {one}; check the spelling and the folder.")
    found = [Path(each.path) for each in find_files(one, notes)]
    if not found and not os.path.isfile(one):
      raise _no_image(one, notes)
    for path in found:
      files.setdefault(path.resolve(), path)
  if not files:
    raise _no_image(", ".join(map(str, given)), notes)
  return list(files.values())


def _no_image(given: str, notes: "ListingNotes") -> ValueError:
  line = notes.line()
  return ValueError(f"there is no image in {given}{line and f' ({line})'}; check the path.")


def say_notes(notes: "ListingNotes", quiet: bool) -> None:
  """Prints what a listing or an export left out: one line at the end, or none."""
  if line := notes.line():
    say(Console(stderr=True, quiet=quiet), f"note: {line}")


def check_share(option: str, value: float | None) -> None:
  """Raises ValueError unless a number lies in [0, 1]; None is none that was given."""
  if value is not None and not 0 <= value <= 1:  # NaN too
    raise ValueError(f"{option} must be between 0 and 1; got {value}.")


def check_writable(out: Path, option: str = "--out") -> None:
  """Raises unless a folder is there or can be made, and can be written to; leaves no trace. The
  message names the option that it was given by."""
  require_local(out, option)
  folder = out.absolute()
  while not folder.exists():
    folder = folder.parent
  try:
    tempfile.TemporaryFile(dir=folder).close()
  except OSError as error:
    raise ValueError(
      f"cannot write to {out} ({error_text(error)}); {remedy(error)} or choose another folder with "
      f"{option}."
    ) from error


def use_device(device: str | None) -> None:
  """Imports JAX on a platform; the error says which there are."""
  import jax

  if device == "cpu":
    jax.config.update("jax_platforms", "cpu")  # leaves the memory of other devices alone
    return
  found = local_devices()
  if device is None:
    return
  try:
    jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
  except Exception as error:  # RuntimeError, or an AssertionError where a plug-in is missing
    there = ", ".join(sorted({one.platform for one in found}))
    raise ValueError(
      f"--device {device}: JAX finds none here, only {there}; {_install(device)} on a machine that "
      "has one, or leave --device out."
    ) from error


def local_devices() -> list[Any]:
  """This process's devices; ValueError in words if JAX cannot start."""
  import jax

  try:
    return jax.local_devices()
  except Exception as error:  # RuntimeError, or an AssertionError where a plug-in is missing
    why = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].strip(" .")
    why = f" ({why:.120})" if why else ""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted:
      raise ValueError(
        f"JAX cannot start on this machine's devices{why}; use --device cpu."
      ) from error
    raise ValueError(
      f"JAX cannot start with JAX_PLATFORMS={wanted}{why}; {_install(wanted)} on a machine that "
      "has such a device, or unset JAX_PLATFORMS."
    ) from error


def _install(platform: str) -> str:
  extra = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}.get(platform.split(",")[0].lower())
  return f"pip install 'sam3-jax[{extra}]'" if extra else "install JAX's plug-in for it"
