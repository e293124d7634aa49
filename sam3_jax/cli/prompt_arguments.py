"""Parses the prompts, the mask generator's options and the tiling of a command line."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  from sam3_jax.inference.mask_generator import MaskGeneration
  from sam3_jax.inputs.concept import ConceptFile
  from sam3_jax.inputs.prompts import Prompt
  from sam3_jax.inputs.tiling import Tiling
  from sam3_jax.inputs.visual_prompts import VisualPrompt


class PromptArguments(NamedTuple):
  """The prompts for each image."""

  prompts: "list[Prompt | ConceptFile]"
  visual: "list[VisualPrompt]"


def parse_prompts(
  phrases: Sequence[str],
  boxes: Sequence[str],
  points: Sequence[str],
  visual: bool,
  everything: bool,
  concepts: Sequence[str] = (),
) -> PromptArguments:
  """Parses --text, --box, --point, --visual, --everything and --concept; no prompts with
  --everything."""
  if concepts and (everything or points or visual):
    raise ValueError(
      "--concept cannot be combined with --everything, --point or --visual; run the command once "
      "for each."
    )
  if everything:
    if phrases or boxes or points or visual:
      raise ValueError(
        "--everything cannot be combined with --text, --box, --point or --visual; run the command "
        "once for each."
      )
    return PromptArguments([], [])
  if visual and not (boxes or points):
    raise ValueError("--visual needs --box X0,Y0,X1,Y1 or --point X,Y; add one, or leave it out.")
  if points and boxes and not visual:
    raise ValueError(
      "--point and --box are ambiguous: add --visual if both are on the same object; run the "
      "command once for each if the box is an exemplar."
    )
  if not (visual or points):
    prompts = _concept_prompts(phrases, boxes) if phrases or boxes or not concepts else []
    return PromptArguments([*prompts, *_read_concepts(concepts)], [])
  if len(set(phrases)) > 1:
    raise ValueError(
      f"--point or --visual with {len(set(phrases))} --text is ambiguous; points refine the "
      "result of a single phrase. Run the command once for each phrase."
    )
  return PromptArguments(
    [*_concept_prompts(phrases, [])] if phrases else [], _visual_prompts(points, boxes)
  )


def _read_concepts(paths: Sequence[str]) -> "list[ConceptFile]":
  if not paths:
    return []
  from sam3_jax.inputs.concept import ConceptFile

  return list(dict.fromkeys(map(ConceptFile.read, paths)))


def _concept_prompts(phrases: Sequence[str], boxes: Sequence[str]) -> "list[Prompt]":
  """One prompt for each phrase. Boxes join a single phrase, or are a prompt of their own."""
  from sam3_jax.inputs.prompts import Prompt

  phrases = list(dict.fromkeys(phrase.strip() for phrase in phrases))
  if not phrases and not boxes:
    raise ValueError(
      "there is no prompt: give --text PHRASE, --box X0,Y0,X1,Y1, --point X,Y, --concept FILE or "
      "--everything."
    )
  if boxes and len(phrases) > 1:
    raise ValueError(
      f"--box with {len(phrases)} --text is ambiguous; boxes join a single phrase. "
      "Run the command once for each phrase."
    )
  if not boxes:
    return [Prompt(text=phrase) for phrase in phrases]
  parsed = [_box(box) for box in boxes]
  return [
    Prompt(
      text=phrases[0] if phrases else None,
      boxes=[box[:4] for box in parsed],
      box_labels=[int(box[4]) for box in parsed],
    )
  ]


def _visual_prompts(points: Sequence[str], boxes: Sequence[str]) -> "list[VisualPrompt]":
  """One prompt with all points and at most one box; without points, one prompt for each box."""
  from sam3_jax.inputs.visual_prompts import VisualPrompt

  parsed_points, parsed_boxes = [_point(point) for point in points], [_box(box) for box in boxes]
  for box, typed in zip(parsed_boxes, boxes, strict=True):
    if not box[4]:
      raise ValueError(
        f"--box {typed!r} with --visual is the box around one object and cannot be negative; leave "
        "out ,0 or --visual."
      )
  if not parsed_points:
    return [VisualPrompt(box=box[:4]) for box in parsed_boxes]
  if len(parsed_boxes) > 1:
    raise ValueError(
      f"--point and {len(parsed_boxes)} --box with --visual are ambiguous: points and one box "
      "describe one object. Run the command once for each object."
    )
  return [
    VisualPrompt(
      points=[point[:2] for point in parsed_points],
      point_labels=[int(point[2]) for point in parsed_points],
      box=parsed_boxes[0][:4] if parsed_boxes else None,
    )
  ]


def _point(value: str) -> list[float]:
  """Returns x, y and the label."""
  numbers = _numbers(value)
  if len(numbers) not in (2, 3):
    raise ValueError(
      f"--point {value!r} must be two numbers in pixels, X,Y, optionally followed by ,1 (on the "
      "object) or ,0 (off it)."
    )
  if len(numbers) == 3 and numbers[2] not in (0, 1):
    raise ValueError(f"--point {value!r} must end in ,1 (on the object) or ,0 (off it).")
  return [*numbers, 1.0][:3]


def _box(value: str) -> list[float]:
  """Returns x0, y0, x1, y1 and the label."""
  numbers = _numbers(value)
  if len(numbers) not in (4, 5):
    raise ValueError(
      f"--box {value!r} must be four numbers in pixels, X0,Y0,X1,Y1, optionally followed by ,1 "
      "(positive) or ,0 (negative)."
    )
  if len(numbers) == 5 and numbers[4] not in (0, 1):
    raise ValueError(f"--box {value!r} must end in ,1 (positive) or ,0 (negative).")
  return [*numbers, 1.0][:5]


def _numbers(value: str) -> list[float]:
  """The numbers between commas; none if one of them is not a number."""
  try:
    return [float(part) for part in value.split(",")]
  except ValueError:
    return []


def parse_mask_generation(options: Sequence[str], threshold: float | None) -> "MaskGeneration":
  """The mask generator's options from --option NAME=VALUE and --threshold."""
  from sam3_jax.inference.mask_generator import MaskGeneration

  defaults = {field.name: field.default for field in dataclasses.fields(MaskGeneration)}
  del defaults["point_grids"]  # arrays
  given: dict[str, Any] = {} if threshold is None else {"pred_iou_thresh": threshold}
  for option in options:
    name, _, value = option.partition("=")
    if name not in defaults:
      raise ValueError(f"--option {option!r} must be NAME=VALUE; names are {', '.join(defaults)}.")
    if name in given:
      raise ValueError(
        f"--option {name} is given twice; --threshold is the same as pred_iou_thresh."
      )
    kind = type(defaults[name])
    try:
      given[name] = _value(value, kind)
    except ValueError:
      expected = {bool: "true or false", int: "a whole number"}.get(kind, "a number")
      raise ValueError(f"--option {option!r} must be {expected}.") from None
  return MaskGeneration(**given)


def _value(text: str, kind: type) -> bool | int | float:
  if kind is bool:
    return ("false", "true").index(text.lower()) == 1
  return kind(text)


def parse_tiling(tile: int | None, overlap: float | None) -> "Tiling | None":
  """The windows of --tile and --overlap; None without --tile."""
  from sam3_jax.inputs.tiling import OVERLAP, Tiling

  if tile is None:
    if overlap is not None:
      raise ValueError(f"--overlap {overlap:g} needs --tile PIXELS; add it, or leave it out.")
    return None
  try:
    return Tiling(tile, OVERLAP if overlap is None else overlap)
  except ValueError as error:
    raise ValueError(f"--{error}") from None
