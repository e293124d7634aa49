"""Checked access to the values of a source's config.json."""

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

from sam3_jax.utils.json_text import shown

Made = TypeVar("Made")


class ConfigReader(abc.ABC):
  """Reads a config.json; `where` is its name in messages."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values, self.where = values, where

  @abc.abstractmethod
  def get(self, path: str, like: Any) -> Any:
    """Returns the value at `a.b.c`; raises ValueError if its type is not that of `like`."""

  def require(self, expected: Mapping[str, Any]) -> None:
    """Refuses settings that our code does not support."""
    for path, value in expected.items():
      if (found := self.get(path, value)) != value:
        raise ValueError(
          f"{self.where} has {path} = {shown(found)}; only {value!r} can be converted."
        )

  def same(self, key: str, like: Any, *parts: str) -> Any:
    """Returns the value of `key`, which must be equal in all these parts."""
    found = {part: self.get(f"{part}.{key}", like) for part in parts}
    if len(set(found.values())) > 1:
      listed = ", ".join(f"{part}: {shown(value)}" for part, value in found.items())
      raise ValueError(f"{self.where} must have one {key} for these parts, has {listed}.")
    return found[parts[0]]

  def groups(self, blocks: int, ends: list[Any]) -> dict[str, int]:
    """Returns the trunk's groups and windowed blocks per group, given its global blocks."""
    group = blocks // max(len(ends), 1)
    if group < 2 or blocks % group or ends != list(range(group - 1, blocks, group)):
      raise ValueError(
        f"{self.where} has global_attn_indexes {shown(ends)} of {blocks} blocks; expected equal "
        "groups, each ending with its global block."
      )
    return {"groups": len(ends), "windowed": group - 1}

  def make(self, cls: type[Made], **fields: Any) -> Made:
    """Makes one of our configurations; its errors name this file."""
    try:
      return cls(**fields)
    except ValueError as error:
      raise ValueError(f"{self.where}: {error}") from error
