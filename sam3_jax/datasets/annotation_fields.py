"""Loading annotation files, and validating single fields of their entries."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam3_jax.outputs.segmentations import pack
from sam3_jax.storage.objects import read_file
from sam3_jax.storage.urls import is_object, redact
from sam3_jax.utils.json_text import parse, shown

REMEDY = "give COCO's instances or SA-Co's annotations: an object with `images`, `annotations`."
_LISTS = ("images", "annotations")


def load(path: Path) -> dict[str, Any]:
  """Loads an annotation file, an object with lists of objects; polygons are packed.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is not JSON, or has another structure.
  """
  name = redact(path)
  try:
    if not is_object(path) and not path.is_file():
      raise FileNotFoundError
    data = read_file(path)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no annotation file {name}: check the path.") from None
  try:
    content = parse(data, name, convert=pack_polygons, check_numbers=False)
  except ValueError as error:
    raise ValueError(f"{error}; {REMEDY}") from error
  lists = [content.get(key) if isinstance(content, dict) else None for key in _LISTS]
  if not all(isinstance(one, list) and all(isinstance(e, dict) for e in one) for one in lists):
    raise ValueError(f"{name} is not an annotation file; {REMEDY}")
  return content


def pack_polygons(values: dict[str, Any]) -> dict[str, Any]:
  """Packs the polygons of a parsed object; a converter for `json_text.parse`."""
  polygons = values.get("segmentation")
  if type(polygons) is list:
    values["segmentation"] = [pack(one) for one in polygons]
  return values


def integer_field(values: dict[str, Any], key: str, what: str) -> int:
  """Reads an integer, which may be written as 1.0.

  Raises:
    ValueError: the field is missing or not an integer; `what` names the entry.
  """
  value = values.get(key)
  if type(value) is int:
    return value
  if type(value) is float and value.is_integer() and abs(value) <= 2**53:
    return int(value)
  if isinstance(value, str):
    number = value.strip().removesuffix(".0")
    remedy = f"the number {number}" if number.isdecimal() else "a whole number"
    raise ValueError(f"{what}: {key} is the string {value!r:.40}; write {remedy}")
  raise ValueError(f"{what}: {key} must be a whole number; got {shown(value, 40)}")


def flag_field(values: dict[str, Any], key: str, what: str, default: bool) -> bool:
  """Reads a flag: 0 or 1, true or false; raises ValueError otherwise, also for strings."""
  value = values.get(key, default)
  if type(value) in (bool, int, float) and value in (0, 1):
    return bool(value)
  if isinstance(value, str):
    raise ValueError(f"{what}: {key} is the string {value!r:.40}; write the number 0 or 1")
  raise ValueError(f"{what}: {key} must be 0 or 1; got {shown(value, 40)}")


def are_fractions(entries: Sequence[dict[str, Any]]) -> bool:
  """Whether the boxes of a file are fractions of width and height, as SA-Co's, or pixels.

  Args:
    entries: annotations or results, as in the file.

  Returns:
    True if there are boxes and no coordinate exceeds 1.
  """
  found = False
  for entry in entries:
    box = entry.get("bbox")
    if isinstance(box, list):
      for value in box:
        if type(value) in (int, float):
          if value > 1:
            return False
          found = True
  return found


def id_set_field(entry: dict[str, Any], key: str, what: str) -> set[int]:
  """Reads a list of category ids; empty if it is left out."""
  value = entry.get(key, [])
  try:
    if isinstance(value, list):
      return {integer_field({key: one}, key, what) for one in value}
  except ValueError:
    pass
  raise ValueError(
    f"{what}: {key} must be a list of category ids, or be left out; got {shown(value, 40)}"
  )
