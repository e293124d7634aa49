"""`sam3-jax convert`."""

import contextlib
import enum
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, Quiet
from sam3_jax.storage.urls import parse, redact
from sam3_jax.utils.console import Console, progress, say
from sam3_jax.utils.paths import require_local, resolve_path, scheme_of


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
      help="Weights to convert: model.safetensors or sam3.pt, released or fine-tuned; their "
      "directory; a KerasHub preset; a LoRA adapter (with --base); or a repository on the hub, "
      "hf://facebook/sam3. The directory must also contain config.json and the tokenizer: "
      "tokenizer.json, or vocab.json and merges.txt, or bpe_simple_vocab_16e6.txt.gz. With --to, "
      "the directory or name of a checkpoint.",
    ),
  ],
  out: Annotated[
    Path,
    typer.Argument(
      metavar="OUT",
      help="Output directory; must not exist, or be empty. A checkpoint can be written to "
      "gs://bucket/path.",
    ),
  ],
  format: Annotated[Format, typer.Option(help="Layout of SOURCE; auto detects it.")] = Format.auto,
  to: Annotated[
    Target,
    typer.Option(
      help="Layout to write. bundle is a checkpoint of sam3-jax; the others export a checkpoint."
    ),
  ] = Target.bundle,
  dtype: Annotated[
    StoredDtype, typer.Option(help="Dtype of the stored parameters.")
  ] = StoredDtype.float32,
  tokenizer: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="CLIP's vocabulary, if it is not next to the weights."),
  ] = None,
  base: Annotated[
    str | None,
    typer.Option(
      metavar="CHECKPOINT",
      help="Directory or name of a converted checkpoint: merge the LoRA adapter SOURCE into it, or "
      "take from it the parts that SOURCE lacks, such as the segmentation head.",
    ),
  ] = None,
  key: Annotated[
    str | None,
    typer.Option(
      metavar="KEY",
      help="Model to convert if a file contains several: the key or prefix of its tensors, such as "
      "ema. Default: the first of model, state_dict, model_state_dict, module, net, network and "
      "student, or the only model.",
    ),
  ] = None,
  lora_alpha: Annotated[
    float | None,
    typer.Option(
      metavar="ALPHA", help="lora_alpha of the adapter, if it has no adapter_config.json."
    ),
  ] = None,
  verify: Annotated[
    bool,
    typer.Option(
      "--verify",
      metavar="",
      help="Run the model once, store a fingerprint of its output for `inspect --verify`, and "
      "compare it with transformers if that is installed. With --to, read the file back and "
      "compare every tensor. Checksums are always compared.",
    ),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Convert released weights to a checkpoint, or export a checkpoint to another layout."""
  arguments.use_device("cpu")
  if to is not Target.bundle:
    options = ("--base", base), ("--key", key), ("--lora-alpha", lora_alpha)
    if given := [name for name, value in options if value is not None]:
      raise ValueError(f"{given[0]} is for converting to a checkpoint; leave it out with --to.")
    require_local(out, "what --to writes")
    _export(source, out, to.value, verify, quiet)
    return

  console, notes = Console(quiet=quiet), []
  options = {"dtype": dtype.value, "tokenizer": tokenizer, "key": key, "lora_alpha": lora_alpha}
  if base is not None:
    options["base"] = arguments.find(base, quiet)
  options |= {"format": format.value, "trial": _trial(verify), "note": notes.append}
  with _local(out) as folder:
    line = _convert(source, folder, quiet, **options)

    from sam3_jax.checkpoint.bundle import inspect

    summary = inspect(folder)
  say(console, f"{redact(out)}: {summary.parameters:,} parameters, {summary.dtype}")
  for text in [*notes, *([line] if line else [])]:
    say(console, text)


@contextlib.contextmanager
def _local(out: Path) -> Iterator[Path]:
  """The directory to convert into: `out`, or one that is uploaded to `out` at the end."""
  if scheme_of(out) != "s3":
    yield resolve_path(out) if scheme_of(out) else out
    return
  from sam3_jax.checkpoint.mirror import check_absent, upload

  where = parse(out)
  check_absent(where.url)
  with tempfile.TemporaryDirectory(prefix="sam3-jax-") as folder:
    local = Path(folder) / (where.name.rpartition("/")[2] or where.bucket)
    yield local
    upload(local, where.url)


def _trial(verify: bool) -> Callable[..., str] | None:
  if not verify:
    return None
  from sam3_jax.inference.verify import verify_conversion

  return verify_conversion


def _convert(source: str, out: Path, quiet: bool, **options: Any) -> str | None:
  # setuptools maps the directory converters/ to this name, which pyright cannot know.
  from sam3_jax.checkpoint.hf_hub import SCHEME, download
  from sam3_jax.converters import convert  # pyright: ignore[reportMissingImports]

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    directory = source
    if source.startswith(SCHEME):
      step(f"downloading {source}", 0.0)
      directory = download(source)
    return convert(directory, out, **options, progress=step)


def _export(checkpoint: str, out: Path, layout: str, verify: bool, quiet: bool) -> None:
  # setuptools maps the directory converters/ to this name, which pyright cannot know.
  from sam3_jax.converters.export import export  # pyright: ignore[reportMissingImports]

  directory = arguments.find(checkpoint, quiet)
  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = export(directory, out, layout, verify=verify, progress=step)
  console = Console(quiet=quiet)
  say(console, f"{out / done.file}: {done.tensors:,} tensors, {done.parameters:,} parameters")
  if verify:
    say(console, f"read back: all {done.tensors:,} tensors are bit-equal to the checkpoint's")
  for name in done.zero_filled:
    say(console, f"filled with zeros, as the checkpoint lacks it: {name}")
  for name, why in done.left_out.items():
    say(console, f"left out: {name} ({why})")
