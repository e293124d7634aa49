"""`sam3-jax convert` and `inspect`."""

import dataclasses
import enum
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from sam3_jax.checkpoint import checksums
from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, Quiet
from sam3_jax.utils.console import Console, progress, say
from sam3_jax.utils.paths import require_local, resolve_path, scheme_of

if TYPE_CHECKING:
  from sam3_jax.checkpoint.bundle import Summary
  from sam3_jax.checkpoint.fingerprint import Fingerprint
  from sam3_jax.config import LiteTextConfig, TextConfig


LISTED = 5  # files that a line names; the others are counted
SHOWN = 16  # hexadecimal digits of an identity; --json has all 64
HINTS = {"none": "; `sam3-jax convert --verify` keeps one", "not compared": "; --verify does"}


class Format(enum.StrEnum):
  auto = "auto"
  meta = "meta"
  huggingface = "huggingface"
  keras = "keras"


class Target(enum.StrEnum):
  bundle = "bundle"
  huggingface = "huggingface"
  meta = "meta"


class StoredDtype(enum.StrEnum):
  float32 = "float32"
  bfloat16 = "bfloat16"


def convert(
  source: Annotated[
    str,
    typer.Argument(
      metavar="SOURCE",
      help="model.safetensors or sam3.pt of a release or of a training, its folder, a preset of "
      "KerasHub, a LoRA adapter (with --base), or a "
      "repository on the hub: hf://facebook/sam3. config.json belongs in that "
      "folder, and the tokenizer: tokenizer.json, or vocab.json and merges.txt, or "
      "bpe_simple_vocab_16e6.txt.gz. With --to, folder or name of a checkpoint.",
    ),
  ],
  out: Annotated[
    Path,
    typer.Argument(
      metavar="OUT",
      help="Folder to make; it must not exist, or be empty. A checkpoint may be gs://bucket/path.",
    ),
  ],
  format: Annotated[
    Format, typer.Option(help="Whose names and layout SOURCE has; auto looks.")
  ] = Format.auto,
  to: Annotated[
    Target, typer.Option(help="What to write; another layout than bundle takes a checkpoint back.")
  ] = Target.bundle,
  dtype: Annotated[StoredDtype, typer.Option(help="Of the parameters.")] = StoredDtype.float32,
  tokenizer: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="CLIP's vocabulary, if it is not beside the weights."),
  ] = None,
  base: Annotated[
    str | None,
    typer.Option(
      metavar="CHECKPOINT",
      help="Folder or name of a converted checkpoint: merge the LoRA adapter SOURCE into it, or "
      "take from it the parts that SOURCE lacks, such as the segmentation head.",
    ),
  ] = None,
  key: Annotated[
    str | None,
    typer.Option(
      metavar="KEY",
      help="Which model of a file with several: the key or prefix of its tensors, such as ema. "
      "Default: model, state_dict, model_state_dict, module, in this order, or the only one.",
    ),
  ] = None,
  lora_alpha: Annotated[
    float | None,
    typer.Option(metavar="ALPHA", help="lora_alpha of LoRA, if no adapter_config.json says it."),
  ] = None,
  verify: Annotated[
    bool,
    typer.Option(
      "--verify",
      metavar="",
      help="Run the model once, keep a fingerprint of what it gave, for `inspect --verify`, and "
      "compare it with transformers, if that is installed; with --to, read the file back and "
      "compare every tensor. Checksums are always compared.",
    ),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Make a checkpoint of released weights, or write one back in their layouts."""
  arguments.use_device("cpu")
  if to is not Target.bundle:
    options = ("--base", base), ("--key", key), ("--lora-alpha", lora_alpha)
    if given := [name for name, x in options if x is not None]:
      raise ValueError(f"{given[0]} is for reading another layout; leave it out with --to.")
    require_local(out, "what --to writes")
    _export(source, out, to.value, verify, quiet)
    return

  if scheme_of(out):
    out = resolve_path(out)

  console, notes = Console(quiet=quiet), []
  options = {"dtype": dtype.value, "tokenizer": tokenizer, "key": key, "lora_alpha": lora_alpha}
  if base is not None:
    options["base"] = arguments.find(base, quiet)
  options |= {"format": format.value, "trial": _trial(verify), "note": notes.append}
  line = _convert(source, out, quiet, **options)

  from sam3_jax.checkpoint.bundle import inspect

  summary = inspect(out)
  say(console, f"{out}: {summary.parameters:,} parameters, {summary.dtype}")
  for text in [*notes, *([line] if line else [])]:
    say(console, text)


def _trial(verify: bool) -> Callable[..., str] | None:
  if not verify:
    return None
  from sam3_jax.inference.verify import verify_conversion

  return verify_conversion


def _convert(source: str, out: Path, quiet: bool, **options: Any) -> str | None:
  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.checkpoint.hf_hub import SCHEME, download
  from sam3_jax.converters import convert  # pyright: ignore[reportMissingImports]

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    folder = source
    if source.startswith(SCHEME):
      step(f"downloading {source}", 0.0)
      folder = download(source)
    return convert(folder, out, **options, progress=step)


def _export(checkpoint: str, out: Path, layout: str, verify: bool, quiet: bool) -> None:
  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.converters.export import export  # pyright: ignore[reportMissingImports]

  folder = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = export(folder, out, layout, verify=verify, progress=step)
  console = Console(quiet=quiet)
  say(console, f"{out / done.file}: {done.tensors:,} tensors, {done.parameters:,} parameters")
  if verify:
    say(console, f"read back: all {done.tensors:,} tensors are bit-equal to the checkpoint's")
  for name in done.zero_filled:
    say(console, f"zero, as the checkpoint has none: {name}")
  for name, why in done.left_out.items():
    say(console, f"left out: {name} ({why})")


def inspect(
  checkpoint: Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder or name of a checkpoint.")
  ],
  verify: Annotated[
    bool,
    typer.Option(
      "--verify",
      metavar="",
      help="Compare all checksums; run the model on the CPU and compare its fingerprint.",
    ),
  ] = False,
  add_checksums: Annotated[
    bool,
    typer.Option(
      "--add-checksums",
      metavar="",
      help="Write SHA256SUMS for the checkpoint as it is now: for one of an earlier version, or "
      "after config.json was edited. Every tensor is compared with the manifest first.",
    ),
  ] = False,
  as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Say what a checkpoint holds, without reading its parameters unless told to verify them.

  With --quiet the exit status alone says whether it is a checkpoint.
  """
  arguments.use_device("cpu")

  from sam3_jax.checkpoint import bundle as checkpoints

  folder = arguments.find(checkpoint, quiet)
  if add_checksums:
    changed = checkpoints.add_checksums(folder)
    names = ", ".join(changed[:LISTED])
    more = f" and {len(changed) - LISTED:,} more" if len(changed) > LISTED else ""
    news = f"new checksums of {names}{more}" if changed else "no new checksums"
    line = f"{folder}: {checksums.FILE} has {news}"
    say(Console(stderr=True, quiet=quiet), line)
  with progress(Console(stderr=True), bar=True, quiet=quiet or not verify) as step:
    told = functools.partial(step, "comparing checksums")
    summary = checkpoints.inspect(folder, verify=verify, progress=told)
  if verify and summary.fingerprint:
    summary = _compare_fingerprint(summary, summary.fingerprint)
  if quiet:
    return
  if as_json:
    print(json.dumps(summary.to_dict(), indent=2))
  else:
    Console().print(_describe(summary))


def _compare_fingerprint(summary: "Summary", kept: "Fingerprint") -> "Summary":
  """Runs the model; the summary with what came of it."""
  from sam3_jax.checkpoint import fingerprint
  from sam3_jax.inference.predictor import Sam3
  from sam3_jax.inference.verify import compute_fingerprint

  model = Sam3.from_checkpoint(summary.path, dtype=kept.dtype)
  try:
    off = fingerprint.compare(compute_fingerprint(model), kept)
  except ValueError as error:
    raise ValueError(f"{summary.path}: {error}") from error
  line = f"equal within {off:.1e}, {fingerprint.TOLERANCES[kept.dtype]:.0e} allowed"
  return dataclasses.replace(summary, checks=summary.checks | {"fingerprint": line})


def _describe_text(text: "TextConfig | LiteTextConfig") -> str:
  from sam3_jax.config import LiteTextConfig

  sizes = f"{text.layers} layers of width {text.width}, {text.context} tokens"
  if not isinstance(text, LiteTextConfig):
    return sizes
  mixers = ", a mixer before and after them" if text.mixers else ""
  return f"LiteText's, {sizes}{mixers}; padding {'masked' if text.mask_padding else 'attended to'}"


def _describe_origin(origin: Any) -> dict[str, str]:
  """The rows of where the weights came from, if the bundle says that."""
  if not isinstance(origin, dict) or not isinstance(origin.get("files"), dict):
    return {}
  lines = [str(origin["repository"])] if "repository" in origin else []
  for name, file in origin["files"].items():
    if isinstance(file, dict):
      lines.append(f"{name}, {file.get('bytes')} bytes, SHA-256 {file.get('sha256')}")
  return {"origin": "\n".join(lines)}


def _describe_base(info: dict[str, Any]) -> dict[str, str]:
  """The rows of the checkpoint that others were merged into, and of what `convert` decided."""
  rows, base = {}, info.get("base")
  if isinstance(base, dict):
    parts = base.get("parts")
    taken = f"; parts from it: {', '.join(map(str, parts))}" if isinstance(parts, list) else ""
    rows["base"] = f"{base.get('name')}, identity {str(base.get('identity'))[:16]}{taken}"
  if isinstance(notes := info.get("notes"), list):
    rows["notes"] = "\n".join(map(str, notes))
  return rows


def _describe(summary: "Summary") -> Table:
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
