"""Reference of the command line, read from the signatures of the commands."""

import enum
import inspect
import types
import typing
from collections.abc import Callable
from typing import Any

import typer
from cells import cell

from sam3_jax.cli.main import app


def pages() -> str:
  """Markdown of all commands: their help, and a table of their options."""
  parts = []
  for command in app.registered_commands:
    name = (command.name or command.callback.__name__).replace("_", "-")
    parts.append(_command(f"sam3-jax {name}", command.callback))
  parts.append(_command("sam3-jax", app.registered_callback.callback))
  return "\n".join(parts)


def options() -> dict[str, set[str]]:
  """The options of each command, such as `--text`, by the command's name."""
  found = {}
  for command in app.registered_commands:
    name = (command.name or command.callback.__name__).replace("_", "-")
    hints = _hints(command.callback)
    rows = [(one, *typing.get_args(hints[one])[:2]) for one in hints if one != "return"]
    named = [_names(name, info) for name, _, info in rows]
    found[name] = {option for names in named for option in names}
  return found


def _hints(function: Callable) -> dict[str, Any]:
  """The annotations of a command, except that of its context."""
  hints = typing.get_type_hints(function, include_extras=True)
  return {name: hint for name, hint in hints.items() if hint is not typer.Context}


def _names(name: str, info: Any) -> list[str]:
  """An option's spellings, the long one first unless it is declared otherwise."""
  if isinstance(info, typer.models.ArgumentInfo):
    return [info.metavar or name.upper()]
  declared = (info.default, *(info.param_decls or ()))  # inside Annotated, `default` is the first
  named = (one for one in declared if isinstance(one, str) and one.startswith("-"))
  given = [one.partition("/")[0] for one in named]  # --name/--no-name
  has_long = any(one.startswith("--") for one in given)
  return given if has_long else [f"--{name.replace('_', '-')}", *given]


def _command(path: str, function: Callable) -> str:
  hints = _hints(function)
  rows, words = [], [path, "[OPTIONS]"]
  for name, parameter in inspect.signature(function).parameters.items():
    if name not in hints:
      continue
    kind, info = typing.get_args(hints[name])[:2]
    if isinstance(info, typer.models.ArgumentInfo):
      words.append(f"{info.metavar or name.upper()}{'...' if 'list' in str(kind) else ''}")
    rows.append(_row(name, kind, info, parameter.default))
  text = inspect.cleandoc(function.__doc__ or "") or "Options before the name of a command."
  table = ["| option | value | default | meaning |", "|---|---|---|---|", *rows]
  return "\n".join([f"## `{path}`", "", f"    {' '.join(words)}", "", text, "", *table, ""])


def _row(name: str, kind: Any, info: Any, default: Any) -> str:
  argument = isinstance(info, typer.models.ArgumentInfo)
  names = ", ".join(f"`{one}`" for one in _names(name, info))
  cells = (names, "" if argument else _value(kind, info), _default(info, default), info.help or "")
  return f"| {' | '.join(map(cell, cells))} |"


def _value(kind: Any, info: Any) -> str:
  literal = typing.get_origin(kind) is typing.Literal
  inner = [] if literal else [x for x in typing.get_args(kind) if x is not types.NoneType]
  if inner:  # X | None, or a list of X
    return _value(inner[0], info)
  if literal:
    return ", ".join(f"`{one}`" for one in typing.get_args(kind))
  if isinstance(kind, enum.EnumMeta):
    return ", ".join(f"`{one.value}`" for one in kind)
  if kind is bool or info.metavar == "":
    return ""
  return f"`{info.metavar or kind.__name__.upper()}`"


def _default(info: Any, default: Any) -> str:
  if default is inspect.Parameter.empty:
    return "required"
  if isinstance(info.show_default, str):
    return info.show_default
  if default in (None, False, "", ()) or info.show_default is False:
    return ""
  return f"`{getattr(default, 'value', default)}`"
