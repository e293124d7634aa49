"""What a list asks about an image: all things of a kind, or the one thing that is pointed at."""

from collections.abc import Iterable, Sequence
from typing import Any

from sam3_jax.inputs.prompts import Prompt, check_boxes, prompt_as_json
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual, visual_as_json
from sam3_jax.utils.json_text import parse, shown

AnyPrompt = Prompt | VisualPrompt
# What either has in a line.
CONCEPT = ("text", "boxes", "box_labels")
POINTING = ("points", "point_labels", "box", "visual")


def from_json(text: Any, wanted: str) -> Any:
  """Values of JSON; raises ValueError, which says what was wanted, if it is none."""
  if not isinstance(text, str | bytes | bytearray):
    raise ValueError(f"{wanted}; {shown(text)} is not JSON")
  text = text.strip()
  try:
    return parse(text, shown(text))
  except ValueError as error:
    raise ValueError(f"{wanted}; {error}") from error


def own_prompts(values: dict[str, Any]) -> tuple[AnyPrompt, ...] | None:
  """The prompts of a line; None where it has none."""
  given = values.get("prompts")
  if given is None:
    return None
  if not isinstance(given, list) or not given:
    raise ValueError(f"prompts must be a list of phrases or prompts; got {shown(given)}")
  return distinct([_prompt(one) for one in given])


def _prompt(given: Any) -> AnyPrompt:
  if isinstance(given, str):
    given = {"text": given}
  if not isinstance(given, dict):
    raise ValueError(f"a prompt must be a phrase or an object; got {shown(given)}")
  if unknown := set(given) - {*CONCEPT, *POINTING}:
    raise ValueError(
      f"unknown {sorted(unknown)}; a prompt has {', '.join(CONCEPT)}, or {', '.join(POINTING)}"
    )
  given = {name: value for name, value in given.items() if value is not None}
  check_text(given.get("text"))
  if not (named := [name for name in POINTING if name in given]):
    return Prompt(**given)
  if others := [name for name in CONCEPT if name in given]:
    raise ValueError(
      f"{named[0]} is of a visual prompt, about one thing, and {others[0]} of one about all of "
      "a kind; make them two prompts"
    )
  marked = given.pop("visual", None)
  if marked is not True and (marked is not None or not given.get("points")):
    raise ValueError(
      'a visual prompt without points needs "visual": true, which says that its box is around one '
      f"thing; examples of a kind are boxes, [[x0, y0, x1, y1]]; got visual {marked!r:.20}"
    )
  return VisualPrompt(**given)


def check_text(phrase: Any) -> None:
  """Refuses halves of surrogate pairs, which JSON can name but no text can hold."""
  if isinstance(phrase, str) and any("\ud800" <= character <= "\udfff" for character in phrase):
    raise ValueError(f"the phrase {shown(phrase)} holds half of a surrogate pair; write it again")


def as_json(prompt: AnyPrompt) -> dict[str, Any]:
  """A prompt as plain values; in a line they are the prompt again."""
  if isinstance(prompt, VisualPrompt):
    return visual_as_json(prompt) | {"visual": True}
  return prompt_as_json(prompt)


def distinct(prompts: Sequence[AnyPrompt]) -> tuple[AnyPrompt, ...]:
  """Each prompt once; visual ones, which are not equal to each other, by what they say."""
  keys = [
    (one.points, one.point_labels, one.box) if isinstance(one, VisualPrompt) else one
    for one in prompts
  ]
  return tuple(dict(zip(keys, prompts, strict=True)).values())


def check_places(prompts: Sequence[AnyPrompt], height: int, width: int) -> None:
  """Raises ValueError unless boxes and points fit an image of this size."""
  for prompt in prompts:
    if isinstance(prompt, VisualPrompt):
      check_visual(prompt, height, width)
    else:
      check_boxes(prompt, height, width)


def concepts(prompts: Iterable[AnyPrompt]) -> list[Prompt]:
  """Those that are about all things of a kind."""
  return [prompt for prompt in prompts if isinstance(prompt, Prompt)]


def pointing(prompts: Iterable[AnyPrompt]) -> list[VisualPrompt]:
  """Those that point at one thing."""
  return [prompt for prompt in prompts if isinstance(prompt, VisualPrompt)]
