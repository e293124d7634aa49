"""The values of a source's config.json, each checked when it is asked for."""

import abc
from collections.abc import Mapping
from typing import Any, TypeVar

from sam3_jax.utils.json_text import shown

Made = TypeVar("Made")


class Settings(abc.ABC):
  """A config.json; `where` is what messages call it."""

  def __init__(self, values: Mapping[str, Any], where: str):
    self.values, self.where = values, where

  @abc.abstractmethod
  def get(self, path: str, like: Any) -> Any:
    """The value at `a.b.c`; ValueError if it is not of the kind of `like`."""

  def require(self, wanted: Mapping[str, Any]) -> None:
    """Refuses what asks for anything else than our code does."""
    for path, value in wanted.items():
      if (found := self.get(path, value)) != value:
        raise ValueError(
          f"{self.where} has {path} = {shown(found)}; only {value!r} can be converted."
        )

  def same(self, key: str, like: Any, *parts: str) -> Any:
    """The one value of all these parts."""
    found = {part: self.get(f"{part}.{key}", like) for part in parts}
    if len(set(found.values())) > 1:
      told = ", ".join(f"{part}: {shown(value)}" for part, value in found.items())
      raise ValueError(f"{self.where} must have one {key} for these parts, has {told}.")
    return found[parts[0]]

  def groups(self, blocks: int, ends: list[Any]) -> dict[str, int]:
    """The trunk's groups and windowed blocks in each, from the numbers of the global blocks."""
    group = blocks // max(len(ends), 1)
    if group < 2 or blocks % group or ends != list(range(group - 1, blocks, group)):
      raise ValueError(
        f"{self.where} has global_attn_indexes {shown(ends)} of {blocks} blocks; expected equal "
        "groups, each ending with its global block."
      )
    return {"groups": len(ends), "windowed": group - 1}

  def make(self, cls: type[Made], **fields: Any) -> Made:
    """A configuration of ours; what it refuses is told of this file."""
    try:
      return cls(**fields)
    except ValueError as error:
      raise ValueError(f"{self.where}: {error}") from error
