"""Parses the prompts of `sam3-jax track`, and assigns them to objects and frames."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
  import numpy as np
  from jaxtyping import Bool

  from sam3_jax.inference.video.clip import Clip
  from sam3_jax.inputs.visual_prompts import VisualPrompt

_PARTS = re.compile(r"(?:(\d+)@)?(?:(\d+|(?:\d+\.?\d*|\.\d+)s):)?(.*)", re.ASCII | re.DOTALL)
_DARK = 64  # masks whose values are all below it, and of several kinds, number their objects


class TypedPrompt(NamedTuple):
  """A prompt as it was typed: `[ID@][FRAME:]VALUE`.

  Attributes:
    option: such as "--point".
    text: the value of the option.
    identity: id of the object; None if it was not given.
    frame: number or time; None if it was not given.
    numbers: x, y and label of a point; x0, y0, x1, y1 of a box.
    file: of a mask.
  """

  option: str
  text: str
  identity: int | None
  frame: str | None
  numbers: tuple[float, ...] = ()
  file: str = ""

  @property
  def is_negative(self) -> bool:
    """Whether it is a point off its object."""
    return self.option == "--point" and not self.numbers[2]

  def error(self, what: object) -> ValueError:
    """An error that names the prompt."""
    return ValueError(f"{self.option} {self.text!r}: {what}")


class FramePrompt(NamedTuple):
  """All that is given for an object on a frame: a prompt, or a mask.

  Attributes:
    identity: of the object.
    frame: number of the frame in the video.
    prompt: points, at most one box, or both.
    mask: of the size of the frames.
    file: of the mask.
  """

  identity: int
  frame: int
  prompt: "VisualPrompt | None" = None
  mask: "Bool[np.ndarray, 'h w'] | None" = None
  file: str = ""


def parse_prompts(
  points: Sequence[str], boxes: Sequence[str], masks: Sequence[str], phrases: Sequence[str] = ()
) -> list[TypedPrompt]:
  """Parses the values of --point, --box and --mask.

  Raises:
    ValueError: there is none, and no phrase either; or one is malformed, or a phrase is repeated.
  """
  for phrase in phrases:
    if phrases.count(phrase) > 1:
      raise ValueError(f"--text {phrase!r:.60} is given twice; give each phrase once.")
  typed = [
    *(_point("--point", text) for text in points),
    *(_box("--box", text) for text in boxes),
    *(_mask("--mask", text) for text in masks),
  ]
  if not typed and not phrases:
    raise ValueError(
      "there is no object to track: give --text PHRASE, --point X,Y, --box X0,Y0,X1,Y1 or --mask "
      "FILE.png."
    )
  return typed


def objects_of(typed: Iterable[TypedPrompt]) -> dict[int, list[TypedPrompt]]:
  """The prompts of each object, by id.

  Prompts with the same id belong to one object. Each positive point, box and mask without an id is
  an object of its own, with the smallest free id. A negative point without an id belongs to the
  only object.

  Raises:
    ValueError: a negative point without an id, but there are several objects, or none.
  """
  typed = list(typed)
  named = {one.identity for one in typed}
  free = (identity for identity in itertools.count(1) if identity not in named)
  found: dict[int, list[TypedPrompt]] = {}
  for one in typed:
    if one.identity is not None or not one.is_negative:
      found.setdefault(next(free) if one.identity is None else one.identity, []).append(one)
  for one in typed:
    if one.identity is None and one.is_negative:
      if len(found) != 1:
        raise one.error(
          f"a point off an object, but there are {len(found)} objects. Name the object, as in "
          "--point 1@10,20 --point 1@30,40,0."
        )
      next(iter(found.values())).append(one)
  return dict(sorted(found.items()))


def frame_prompts(
  objects: Mapping[int, Sequence[TypedPrompt]], clip: "Clip", default: int
) -> list[FramePrompt]:
  """Joins the prompts of each object on each frame, in the order of frames and ids.

  Args:
    objects: from `objects_of`.
    clip: of a video with a known number of frames.
    default: number of the frame of prompts without one.

  Raises:
    ValueError: a frame outside the clip, a prompt outside the frame, two boxes or masks of one
      object on a frame, an object that only has points off it, or a mask that cannot be used.
  """
  by_frame: dict[tuple[int, int], list[TypedPrompt]] = {}
  for identity, typed in objects.items():
    if all(one.is_negative for one in typed):
      raise typed[0].error("a point off an object that has no point on it, no box and no mask.")
    for one in typed:
      number = default if one.frame is None else _frame_number(one, clip)
      by_frame.setdefault((number, identity), []).append(one)
  return [
    _joined(identity, number, typed, clip.size)
    for (number, identity), typed in sorted(by_frame.items())
  ]


def _joined(
  identity: int, frame: int, typed: list[TypedPrompt], size: tuple[int, int]
) -> FramePrompt:
  from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual

  masks = [one for one in typed if one.option == "--mask"]
  boxes = [one for one in typed if one.option == "--box"]
  if (masks and len(typed) > 1) or len(boxes) > 1:
    what = "a mask and other prompts" if masks else "two boxes"
    raise (masks or boxes)[-1].error(
      f"object {identity} has {what} on frame {frame}; give objects different ids."
    )
  if masks:
    return FramePrompt(identity, frame, mask=_read_mask(masks[0], size), file=masks[0].file)
  points = [one.numbers for one in typed if one.option == "--point"]
  for one in typed:  # one at a time, so that the error names it
    try:
      single: dict[str, Any] = (
        {"box": one.numbers} if one.option == "--box" else {"points": [one.numbers[:2]]}
      )
      check_visual(VisualPrompt(**single), *size)
    except ValueError as error:
      raise one.error(error) from error
  prompt = VisualPrompt(
    points=[point[:2] for point in points] or None,
    point_labels=[int(point[2]) for point in points] or None,
    box=boxes[0].numbers if boxes else None,
  )
  return FramePrompt(identity, frame, prompt)


def _read_mask(one: TypedPrompt, size: tuple[int, int]) -> "Bool[np.ndarray, 'h w']":
  """The pixels whose value is at least half of the largest one."""
  import numpy as np

  from sam3_jax.inputs.preprocess import read_image

  pixels = read_image(one.file, dark=True)
  height, width = pixels.shape[:2]
  if (height, width) != size:
    raise one.error(
      f"the mask is {width} x {height}, but the frames are {size[1]} x {size[0]}; give a mask over "
      "the whole frame."
    )
  values = pixels.max(axis=-1)
  if not values.any():
    raise one.error("the mask is empty: pixels of the object must not be black.")
  colors = np.unique(pixels.reshape(-1, 3), axis=0)
  colors = colors[colors.any(axis=1)]
  colored = (colors != colors[:, :1]).any()
  if len(colors) > 1 and (colored or values.max() < _DARK):
    raise one.error(
      f"the mask has {len(colors)} colors, one for each object: give a mask of its own for each."
    )
  return values * 2.0 >= values.max()


def _frame_number(one: TypedPrompt, clip: "Clip") -> int:
  numbers = clip.numbers or []
  try:
    return numbers[clip.position(one.frame or 0)]
  except ValueError as error:
    raise one.error(error) from error


def _point(option: str, text: str) -> TypedPrompt:
  identity, frame, rest = _split(option, text)
  numbers = _numbers(rest)
  if len(numbers) not in (2, 3) or (len(numbers) == 3 and numbers[2] not in (0, 1)):
    raise ValueError(
      f"{option} {text!r} must be X,Y in pixels, then ,1 (on the object, the default) or ,0 (off "
      "it); a frame or time and an id may precede it: 3@12.5s:X,Y."
    )
  x, y, label = (*numbers, 1.0)[:3]
  return _checked(TypedPrompt(option, text, identity, frame, (x, y, label)))


def _box(option: str, text: str) -> TypedPrompt:
  identity, frame, rest = _split(option, text)
  numbers = _numbers(rest)
  if len(numbers) != 4:
    raise ValueError(
      f"{option} {text!r} must be X0,Y0,X1,Y1 in pixels; a frame or time and an id may precede it: "
      "3@12.5s:X0,Y0,X1,Y1."
    )
  return _checked(TypedPrompt(option, text, identity, frame, tuple(numbers)))


def _mask(option: str, text: str) -> TypedPrompt:
  identity, frame, file = _split(option, text)
  if not file:
    raise ValueError(f"{option} {text!r} must name an image of the size of the frames.")
  return TypedPrompt(option, text, identity, frame, file=file)


def _checked(one: TypedPrompt) -> TypedPrompt:
  """Raises the errors of the prompt itself, such as a box without an area."""
  from sam3_jax.inputs.visual_prompts import VisualPrompt

  try:
    if one.option == "--box":
      VisualPrompt(box=one.numbers)
    else:
      VisualPrompt(points=[one.numbers[:2]])
  except ValueError as error:
    raise one.error(error) from error
  return one


def _split(option: str, text: str) -> tuple[int | None, str | None, str]:
  found = _PARTS.fullmatch(text)
  identity, frame, rest = found.groups() if found else (None, None, text)
  if identity is not None and not 0 < int(identity) < 2**31:
    raise ValueError(f"{option} {text!r}: ids of objects are whole numbers from 1.")
  return (None if identity is None else int(identity)), frame, rest


def _numbers(text: str) -> list[float]:
  """The numbers between commas; none if one of them is not a number."""
  try:
    return [float(part) for part in text.split(",")]
  except ValueError:
    return []
