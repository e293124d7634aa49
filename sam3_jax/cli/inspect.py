"""`sam3-jax inspect`."""

import dataclasses
import functools
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sam3_jax.checkpoint import checksums
from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, Quiet
from sam3_jax.utils.console import Console, progress, say

if TYPE_CHECKING:
  from sam3_jax.checkpoint.bundle import Summary
  from sam3_jax.checkpoint.fingerprint import Fingerprint
  from sam3_jax.config import LiteTextConfig, TextConfig, VideoConfig


LISTED = 5  # files that are named in a line; the others are counted
SHOWN = 16  # hexadecimal digits of an identity; --json prints all 64
HINTS = {"none": "; `sam3-jax convert --verify` stores one", "not compared": "; --verify does"}


def inspect(
  checkpoint: Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Directory or name of a checkpoint.")
  ],
  verify: Annotated[
    bool,
    typer.Option(
      "--verify",
      metavar="",
      help="Compare all checksums, run the model on the CPU and compare its fingerprint.",
    ),
  ] = False,
  add_checksums: Annotated[
    bool,
    typer.Option(
      "--add-checksums",
      metavar="",
      help="Write SHA256SUMS for the current files, for a checkpoint of an earlier version or "
      "after editing config.json. Every tensor is compared with the manifest first.",
    ),
  ] = False,
  as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Describe a checkpoint; reads its parameters only with --verify.

  With --quiet, only the exit status shows whether the checkpoint is valid.
  """
  arguments.use_device("cpu")

  from sam3_jax.checkpoint import bundle

  directory = arguments.find(checkpoint, quiet)
  if add_checksums:
    changed = bundle.add_checksums(directory)
    names = ", ".join(changed[:LISTED])
    more = f" and {len(changed) - LISTED:,} more" if len(changed) > LISTED else ""
    news = f"new checksums of {names}{more}" if changed else "no new checksums"
    line = f"{directory}: {checksums.FILE} has {news}"
    say(Console(stderr=True, quiet=quiet), line)
  with progress(Console(stderr=True), bar=True, quiet=quiet or not verify) as step:
    report = functools.partial(step, "comparing checksums")
    summary = bundle.inspect(directory, verify=verify, progress=report)
  if verify and summary.fingerprint:
    summary = _compare_fingerprint(summary, summary.fingerprint)
  if quiet:
    return
  if as_json:
    print(json.dumps(summary.to_dict(), indent=2))
  else:
    Console().print(describe(summary))


def _compare_fingerprint(summary: "Summary", stored: "Fingerprint") -> "Summary":
  """Runs the model and adds the result of the comparison to the summary."""
  from sam3_jax.checkpoint import fingerprint
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inference.verify import compute_fingerprint

  model = Sam3.from_checkpoint(summary.path, dtype=stored.dtype)
  try:
    off = fingerprint.compare(compute_fingerprint(model), stored)
  except ValueError as error:
    raise ValueError(f"{summary.path}: {error}") from error
  line = f"equal within {off:.1e}, {fingerprint.TOLERANCES[stored.dtype]:.0e} allowed"
  return dataclasses.replace(summary, checks=summary.checks | {"fingerprint": line})


def describe(summary: "Summary") -> Table:
  """A table of the checkpoint's properties."""
  info, config = summary.info, summary.config
  trunk, trained = config.trunk, str(info.get("trained"))
  rows = {
    "path": summary.path,
    "identity": summary.identity[:SHOWN],
    "name": info.get("name", "?"),
    "source": info.get("source", "?"),
    **_describe_origin(info.get("origin")),
    **_describe_base(info),
    "licence": info.get("licence", "?"),
    "trained": {"True": "yes", "False": "no: its parameters are random"}.get(trained, "?"),
    "parameters": f"{summary.parameters:,} in {summary.dtype}",
    **{f"  {part}": f"{count:,}" for part, count in summary.parts.items()},
    "image": f"{config.image_size} x {config.image_size}, patches of {config.patch}",
    "trunk": f"{trunk.blocks} blocks of width {trunk.width}",
    "text encoder": _describe_text(config.text),
    "video": _describe_video(config.video),
    "on disk": f"{summary.stored_bytes / 1e6:,.1f} MB",
    "in memory": "parameters of "
    + ", ".join(f"{n / 1e6:,.1f} MB in {dtype}" for dtype, n in summary.memory.items()),
    **{name: f"{state}{HINTS.get(state, '')}" for name, state in summary.checks.items()},
  }
  for name, sums in summary.source_tensors.items():
    rows[f"source, {name}"] = f"{sums['tensors']:,} tensors, {sums['parameters']:,} parameters"
  for kind, reasons in (("unread", summary.unread), ("dropped", summary.dropped)):
    for reason, sums in reasons.items():
      line = f"{sums['tensors']:,} tensors: {reason}"
      rows[kind] = f"{rows[kind]}\n{line}" if kind in rows else line
  if lacks := info.get("lacks"):
    rows["lacks"] = "\n".join(lacks)
  if summary.cannot:
    rows["cannot"] = "\n".join(summary.cannot)
  table = Table(show_header=False)
  table.add_column()
  table.add_column(overflow="fold")
  for name, value in rows.items():
    table.add_row(name, Text(str(value)))
  return table


def _describe_text(text: "TextConfig | LiteTextConfig") -> str:
  from sam3_jax.config import LiteTextConfig

  sizes = f"{text.layers} layers of width {text.width}, {text.context} tokens"
  if not isinstance(text, LiteTextConfig):
    return sizes
  mixers = ", a mixer before and after them" if text.mixers else ""
  return f"LiteText's, {sizes}{mixers}; padding {'masked' if text.mask_padding else 'attended to'}"


def _describe_video(video: "VideoConfig | None") -> str:
  if video is None:
    return "no tracker"
  return (
    f"tracker with {video.memories} memories of {video.memory_channels} channels, "
    f"{video.layers} layers"
  )


def _describe_origin(origin: Any) -> dict[str, str]:
  """The row about the source files, if the checkpoint records them."""
  if not isinstance(origin, dict) or not isinstance(origin.get("files"), dict):
    return {}
  lines = [str(origin["repository"])] if "repository" in origin else []
  for name, file in origin["files"].items():
    if isinstance(file, dict):
      lines.append(f"{name}, {file.get('bytes')} bytes, SHA-256 {file.get('sha256')}")
  return {"origin": "\n".join(lines)}


def _describe_base(info: dict[str, Any]) -> dict[str, str]:
  """The rows about the checkpoint that was merged into, and about decisions of `convert`."""
  rows, base = {}, info.get("base")
  if isinstance(base, dict):
    parts = base.get("parts")
    taken = f"; parts from it: {', '.join(map(str, parts))}" if isinstance(parts, list) else ""
    rows["base"] = f"{base.get('name')}, identity {str(base.get('identity'))[:16]}{taken}"
  if isinstance(notes := info.get("notes"), list):
    rows["notes"] = "\n".join(map(str, notes))
  return rows
