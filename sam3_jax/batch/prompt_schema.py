"""The prompts of an input list: concept prompts and visual prompts, from JSON and back, and
concepts from files."""

from collections.abc import Iterable, Sequence
from typing import Any

from sam3_jax.inputs.concept import ConceptFile
from sam3_jax.inputs.prompts import Prompt, check_boxes, prompt_as_json
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual, visual_as_json
from sam3_jax.utils.json_text import parse, shown

AnyPrompt = Prompt | ConceptFile | VisualPrompt
# Keys of the two kinds of prompts in JSON.
CONCEPT_KEYS = ("text", "boxes", "box_labels")
VISUAL_KEYS = ("points", "point_labels", "box", "visual")


def parse_json(text: Any, expected: str) -> Any:
  """Values from JSON; raises ValueError, with what was expected, if the text is not JSON."""
  if not isinstance(text, str | bytes | bytearray):
    raise ValueError(f"{expected}; {shown(text)} is not JSON")
  text = text.strip()
  try:
    return parse(text, shown(text))
  except ValueError as error:
    raise ValueError(f"{expected}; {error}") from error


def parse_prompts(values: dict[str, Any]) -> tuple[AnyPrompt, ...] | None:
  """The prompts of a line; None if the line has none."""
  given = values.get("prompts")
  if given is None:
    return None
  if not isinstance(given, list) or not given:
    raise ValueError(f"prompts must be a list of phrases or prompts; got {shown(given)}")
  return unique_prompts([_prompt(value) for value in given])


def _prompt(given: Any) -> AnyPrompt:
  if isinstance(given, str):
    given = {"text": given}
  if not isinstance(given, dict):
    raise ValueError(f"a prompt must be a phrase or an object; got {shown(given)}")
  if unknown := set(given) - {*CONCEPT_KEYS, *VISUAL_KEYS}:
    raise ValueError(
      f"unknown {sorted(unknown)}; the keys of a prompt are {', '.join(CONCEPT_KEYS)}, or "
      f"{', '.join(VISUAL_KEYS)}"
    )
  given = {name: value for name, value in given.items() if value is not None}
  check_unicode(given.get("text"))
  visual_keys = [name for name in VISUAL_KEYS if name in given]
  if not visual_keys:
    return Prompt(**given)
  if concept_keys := [name for name in CONCEPT_KEYS if name in given]:
    raise ValueError(
      f"{visual_keys[0]} is for visual prompts, which segment one object, and {concept_keys[0]} "
      "for concept prompts, which find all instances; make them two prompts"
    )
  marked = given.pop("visual", None)
  if marked is not True and (marked is not None or not given.get("points")):
    raise ValueError(
      'a visual prompt without points needs "visual": true, so that its box is not taken for an '
      f"exemplar; exemplar boxes of a concept are boxes, [[x0, y0, x1, y1]]; got visual "
      f"{marked!r:.20}"
    )
  return VisualPrompt(**given)


def check_unicode(phrase: Any) -> None:
  """Refuses unpaired surrogates, which JSON can escape but UTF-8 cannot encode."""
  if isinstance(phrase, str) and any("\ud800" <= character <= "\udfff" for character in phrase):
    raise ValueError(f"the phrase {shown(phrase)} has an unpaired surrogate; write it again")


def prompt_to_json(prompt: AnyPrompt) -> dict[str, Any]:
  """A prompt as plain values, which `parse_prompts` reads back, except those of a concept."""
  if isinstance(prompt, ConceptFile):
    return prompt.to_json()
  if isinstance(prompt, VisualPrompt):
    return visual_as_json(prompt) | {"visual": True}
  return prompt_as_json(prompt)


def unique_prompts(prompts: Sequence[AnyPrompt]) -> tuple[AnyPrompt, ...]:
  """Removes duplicates; visual prompts, which have no equality, are compared by their fields."""
  keys = [
    (prompt.points, prompt.point_labels, prompt.box) if isinstance(prompt, VisualPrompt) else prompt
    for prompt in prompts
  ]
  return tuple(dict(zip(keys, prompts, strict=True)).values())


def check_coordinates(prompts: Sequence[AnyPrompt], height: int, width: int) -> None:
  """Raises ValueError unless boxes and points fit an image of this size."""
  for prompt in prompts:
    if isinstance(prompt, VisualPrompt):
      check_visual(prompt, height, width)
    elif isinstance(prompt, Prompt):
      check_boxes(prompt, height, width)


def concept_prompts(prompts: Iterable[AnyPrompt]) -> list[Prompt | ConceptFile]:
  """The prompts and concepts, which find all instances of a concept."""
  return [prompt for prompt in prompts if isinstance(prompt, Prompt | ConceptFile)]


def visual_prompts(prompts: Iterable[AnyPrompt]) -> list[VisualPrompt]:
  """The visual prompts, which segment one object each."""
  return [prompt for prompt in prompts if isinstance(prompt, VisualPrompt)]
