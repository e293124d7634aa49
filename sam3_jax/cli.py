"""The command `sam3-jax`: segment pictures, convert checkpoints, look into them.

JAX and everything that needs it is imported inside the commands, so that
help and usage errors come at once.
"""

import contextlib
import enum
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sam3_jax import arguments
from sam3_jax.terminal import (
  complain,
  forgive_encodings,
  interruptible,
  one_line,
  progress,
  say,
  silence,
)

if TYPE_CHECKING:
  from sam3_jax.checkpoint import Summary

FAILED = 2  # exit status of every error
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
  help="SAM 3 in JAX: find, box and mask every instance of a concept in a picture.",
  add_completion=False,
  rich_markup_mode="markdown",
  pretty_exceptions_enable=False,
  context_settings={"help_option_names": ["-h", "--help"]},
)
# The base of all errors of usage; typer exports it in some versions only.
_UsageError: Any = typer.BadParameter.__bases__[0]


class Device(enum.StrEnum):
  cpu = "cpu"
  gpu = "gpu"
  tpu = "tpu"


class Dtype(enum.StrEnum):
  auto = "auto"
  float32 = "float32"
  bfloat16 = "bfloat16"


class StoredDtype(enum.StrEnum):
  float32 = "float32"
  bfloat16 = "bfloat16"


class Ask(enum.StrEnum):
  text = "text"
  box = "box"
  both = "text+box"


class Format(enum.StrEnum):
  auto = "auto"
  meta = "meta"
  huggingface = "huggingface"


class Style(enum.StrEnum):
  train = "train"
  noto = "noto"
  noto_v1 = "noto-v1"
  fluent = "fluent"
  twemoji = "twemoji"


class New(enum.StrEnum):
  avocado = "avocado"
  crown = "crown"
  owl = "owl"


# An empty metavar, as a flag takes no value.
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", help="Print nothing but errors.")]
Debug = Annotated[
  bool, typer.Option("--debug", metavar="", help="Print the traceback of an error.")
]


def entry() -> NoReturn:
  """The program: `main`, and the process's end."""
  status = main()
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and said
  if status == INTERRUPTED:  # XLA, torn down in the middle of its work, would crash
    with contextlib.suppress(OSError):
      sys.stdout.flush()
      sys.stderr.flush()
    os._exit(status)
  sys.exit(status)


def main(typed: Sequence[str] | None = None) -> int:
  """Runs the command; returns its exit status: 0, 2 after an error, 130 when interrupted.

  Args:
    typed: what stands after `sam3-jax`; None takes it from the process.
  """
  typed = list(sys.argv[1:] if typed is None else typed) or ["--help"]
  debug, status = "--debug" in typed, FAILED
  forgive_encodings()
  with silence(debug), interruptible() as interrupted:
    try:
      status = app(typed, prog_name="sam3-jax", standalone_mode=False) or 0
      if interrupted.is_set():
        raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
      status = INTERRUPTED
    except _UsageError as error:
      command = error.ctx.command_path if error.ctx else "sam3-jax"
      complain(f"{error.format_message()} See `{command} --help`.")
    except Exception as error:
      if debug:
        traceback.print_exc()
      if interrupted.is_set():  # what XLA makes of it
        status = INTERRUPTED
      else:
        complain(one_line(error))
    if status == INTERRUPTED:
      complain("interrupted; files written before are complete.")
  return status


def _show_version(wanted: bool) -> None:
  if wanted:
    print(f"sam3-jax {version('sam3-jax')}")
    raise typer.Exit


@app.callback()
def _root(
  version: Annotated[
    bool,
    typer.Option(
      "--version",
      is_eager=True,
      callback=_show_version,
      metavar="",
      help="Print the version and exit.",
    ),
  ] = False,
) -> None:
  pass


@app.command()
def segment(
  images: Annotated[
    list[Path], typer.Argument(metavar="IMAGE", help="Pictures: JPEG, PNG, WebP, TIFF and so on.")
  ],
  text: Annotated[
    list[str] | None,
    typer.Option(metavar="PHRASE", help="What to find: a short noun phrase. Repeat for several."),
  ] = None,
  box: Annotated[
    list[str] | None,
    typer.Option(
      metavar="X0,Y0,X1,Y1[,0|1]",
      help="An example in pixels of the picture as displayed (1, the default) or a counterexample "
      "(0). Repeat for several. Joins a single --text; alone it finds all that looks like it.",
    ),
  ] = None,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Folder or name of a checkpoint.")
  ] = "sam3-tiny",
  threshold: Annotated[
    float, typer.Option(metavar="0..1", help="Keep instances that score above it.")
  ] = 0.5,
  out: Annotated[
    Path,
    typer.Option(metavar="DIR", help="Where NAME.sam3.png and NAME.sam3.json of a picture go."),
  ] = Path("out"),
  device: Annotated[
    Device | None, typer.Option(help="Where to compute; the fastest there is, if not given.")
  ] = None,
  dtype: Annotated[
    Dtype, typer.Option(help="Of the computation; auto is float32 on a CPU, else bfloat16.")
  ] = Dtype.auto,
  max_detections: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Keep the best N of each prompt.")
  ] = None,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Refuse pictures of more pixels.")
  ] = 300_000_000,  # preprocess.MAX_PIXELS, which would cost JAX's import
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Find, box and mask all instances of phrases or example boxes in pictures.

  Everything given is checked before any work, and a fault stops the run. A file that turns out to
  be no picture, or a damaged one, is reported and left out; the others are done, and the exit
  status is 2. Of pictures with the same name the second's results are called NAME-2, and so on.
  """
  if not 0 <= threshold <= 1:  # NaN too
    raise ValueError(f"--threshold must be between 0 and 1; got {threshold}.")
  arguments.check_writable(out)
  images = arguments.images(images)
  arguments.use_device(device)

  from sam3_jax.hub import find_checkpoint
  from sam3_jax.segment import Job, run

  job = Job(
    images=images,
    prompts=arguments.prompts(text or [], box or []),
    out=out,
    threshold=threshold,
    max_detections=max_detections,
    max_pixels=max_pixels,
  )
  found, precision = find_checkpoint(checkpoint), None if dtype is Dtype.auto else dtype.value
  if run(job, found, precision, Console(quiet=quiet), Console(stderr=True)):
    raise typer.Exit(FAILED)


@app.command()
def convert(
  source: Annotated[
    Path,
    typer.Argument(
      metavar="SOURCE",
      help="model.safetensors of a release, or its folder. config.json belongs in that folder, and "
      "the tokenizer: tokenizer.json, or vocab.json and merges.txt.",
    ),
  ],
  out: Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to make; it must not exist, or be empty.")
  ],
  format: Annotated[
    Format, typer.Option(help="Whose names and layout SOURCE has; auto looks.")
  ] = Format.auto,
  dtype: Annotated[StoredDtype, typer.Option(help="Of the parameters.")] = StoredDtype.float32,
  tokenizer: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="CLIP's vocabulary, if it is not beside the weights."),
  ] = None,
  verify: Annotated[
    bool, typer.Option(metavar="", help="Read everything back and compare checksums.")
  ] = True,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Make a checkpoint of released weights."""
  arguments.use_device("cpu")

  from sam3_jax.checkpoint import inspect

  # setuptools maps the folder converters/ to this name, which pyright cannot know.
  from sam3_jax.converters import convert as run  # pyright: ignore[reportMissingImports]

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    run(
      source,
      out,
      format=format.value,
      dtype=dtype.value,
      tokenizer=tokenizer,
      verify=verify,
      progress=step,
    )
  summary = inspect(out)
  say(Console(quiet=quiet), f"{out}: {summary.parameters:,} parameters, {summary.dtype}")


@app.command()
def evaluate(
  data: Annotated[
    list[Path],
    typer.Option(
      metavar="FILE",
      help="Annotations in SA-Co's or COCO's layout. Repeat for the truths of several annotators: "
      "the one that fits best counts.",
    ),
  ],
  images: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR", help="Folder of the pictures; that of the annotations, if left out."
    ),
  ] = None,
  checkpoint: Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder or name of a checkpoint; sam3-tiny, if left out."),
  ] = None,
  predictions: Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Score these, in COCO's results layout, without a model."),
  ] = None,
  prompt: Annotated[
    Ask,
    typer.Option(
      help="What the model is told: the phrase, the largest box of the objects (pairs without "
      "objects are left out), or both."
    ),
  ] = Ask.text,
  threshold: Annotated[
    float, typer.Option(metavar="0..1", help="Count predictions that score so much or more.")
  ] = 0.5,
  out: Annotated[
    Path, typer.Option(metavar="FILE", help="The figures; predictions.json goes beside it.")
  ] = Path("metrics.json"),
  worst: Annotated[
    int, typer.Option(min=0, metavar="N", help="Draw the N worst pairs, on a page in worst/.")
  ] = 0,
  device: Annotated[
    Device | None, typer.Option(help="Where to compute; the fastest there is, if not given.")
  ] = None,
  dtype: Annotated[
    Dtype, typer.Option(help="Of the computation; auto is float32 on a CPU, else bfloat16.")
  ] = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Score a checkpoint, or given predictions: cgF1 and its parts, average precision.

  All files appear when everything is done, or none of them.
  """
  if not 0 <= threshold <= 1:  # NaN too
    raise ValueError(f"--threshold must be between 0 and 1; got {threshold}.")
  if checkpoint is not None and predictions is not None:
    raise ValueError("--checkpoint and --predictions exclude each other; give one of them.")
  arguments.check_writable(out.parent)
  if out.is_dir():
    raise ValueError(f"--out {out} is a folder; name a file in it, {out / 'metrics.json'}.")
  arguments.use_device(device)

  from sam3_jax.evaluation.run import Job, run
  from sam3_jax.hub import find_checkpoint

  job = Job(
    data=data,
    images=images,
    checkpoint=None if predictions else find_checkpoint(checkpoint or "sam3-tiny"),
    predictions=predictions,
    prompt=prompt.value,
    threshold=threshold,
    out=out,
    worst=worst,
  )
  run(job, None if dtype is Dtype.auto else dtype.value, Console(quiet=quiet), Console(stderr=True))


@app.command()
def inspect(
  checkpoint: Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="Folder or name of a checkpoint.")
  ],
  as_json: Annotated[bool, typer.Option("--json", metavar="", help="Print JSON.")] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Say what a checkpoint holds, without reading its parameters.

  With --quiet the exit status alone says whether it is a checkpoint.
  """
  arguments.use_device("cpu")

  from sam3_jax.checkpoint import inspect
  from sam3_jax.hub import find_checkpoint

  summary = inspect(find_checkpoint(checkpoint))
  if quiet:
    return
  if as_json:
    print(json.dumps(summary.to_dict(), indent=2))
  else:
    Console().print(_describe(summary))


@app.command()
def scenes(
  out: Annotated[
    Path, typer.Option(metavar="DIR", help="Folder to make; it must not exist, or be empty.")
  ],
  count: Annotated[int, typer.Option(min=1, metavar="N", help="Pictures.")] = 100,
  seed: Annotated[int, typer.Option(min=0, metavar="S", help="Decides all of them.")] = 0,
  style: Annotated[
    list[Style] | None,
    typer.Option(
      help="Whose drawings; train, the default, is all that a model may be trained on. Repeat for "
      "several."
    ),
  ] = None,
  new: Annotated[
    New | None,
    typer.Option(
      help="Show this thing, of which other scenes know nothing, in half of the pictures, and ask "
      "for it in all; its pairs go to NAME.json too."
    ),
  ] = None,
  augment: Annotated[
    float, typer.Option(metavar="0..1", help="How strongly colours and shapes are changed.")
  ] = 0.0,
  unseen: Annotated[
    bool,
    typer.Option("--unseen", metavar="", help="Ask by words that training on scenes never uses."),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Compose pictures of drawings, with phrases and the masks that match, to train or to measure on.

  What an interrupted run left in the folder is done again.
  """
  arguments.check_writable(out)

  from sam3_jax.training.scene_files import write

  with progress(Console(stderr=True), bar=True, quiet=quiet) as step:
    done = write(
      out,
      count,
      seed,
      [one.value for one in style or [Style.train]],
      new=new and new.value,
      augment=augment,
      unseen=unseen,
      progress=step,
    )
  counts = ", ".join(f"{number:,} {what}" for what, number in done.items())
  say(Console(quiet=quiet), f"{out / 'annotations.json'}: {counts}")
  if new:
    say(
      Console(quiet=quiet), f"{out / new.value}.json: those of its pairs that ask for {new.value}"
    )


@app.command()
def train(
  config: Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="A TOML or JSON file with fields of TrainConfig."),
  ] = None,
  out: Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the run; needed.")
  ] = None,
  data: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Annotations, SA-Co's or COCO's layout.")
  ] = None,
  images: Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of the annotated pictures.")
  ] = None,
  checkpoint: Annotated[
    str | None, typer.Option(metavar="DIR", help="Folder or name of the checkpoint to start from.")
  ] = None,
  evaluation_data: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Annotations to score on while training.")
  ] = None,
  evaluation_images: Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder of their pictures.")
  ] = None,
  evaluate_every: Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Steps between evaluations.")
  ] = None,
  steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of the whole run.")] = None,
  batch: Annotated[int | None, typer.Option(min=1, metavar="N", help="Pictures a step.")] = None,
  learning_rate: Annotated[
    float | None, typer.Option(metavar="RATE", help="Of all but trunk, neck and text.")
  ] = None,
  pattern: Annotated[
    str | None,
    typer.Option(
      "--train",
      metavar="REGEX",
      help="Paths of the parameters to train; all but trunk/ and text/, if not given.",
    ),
  ] = None,
  lora: Annotated[
    int | None,
    typer.Option(min=0, metavar="RANK", help="Train low-rank factors of this rank instead."),
  ] = None,
  plot: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the metrics at the end (a PNG or SVG).")
  ] = None,
  device: Annotated[
    Device | None, typer.Option(help="Where to compute; the fastest there is, if not given.")
  ] = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Train or fine-tune a model; the same command again goes on where it was stopped.

  Options stand over what CONFIG says. The result is the checkpoint DIR/final, and DIR/best the one
  with the best evaluation.
  """
  if out is None:
    raise ValueError("--out DIR is needed: the folder of the run.")
  arguments.check_writable(out)
  arguments.use_device(device)

  from sam3_jax.training.command import run
  from sam3_jax.training.config import TrainConfig, overlaid, read
  from sam3_jax.training.log import require_matplotlib

  if plot is not None:
    require_matplotlib()
  typed = {
    "annotations": data,
    "images": images,
    "checkpoint": checkpoint,
    "evaluation_annotations": evaluation_data,
    "evaluation_images": evaluation_images,
    "evaluate_every": evaluate_every,
    "steps": steps,
    "data.batch": batch,
    "optimizer.learning_rate": learning_rate,
    "train": pattern,
    "lora.rank": lora,
  }
  values = overlaid({} if config is None else read(config), typed)
  final = run(TrainConfig.from_dict(values), out, Console(stderr=True, quiet=quiet), picture=plot)
  say(Console(quiet=quiet), f"{final}: the trained checkpoint")


def _describe(summary: "Summary") -> Table:
  info, config = summary.info, summary.config
  trunk, trained = config.trunk, str(info.get("trained"))
  rows = {
    "path": summary.path,
    "name": info.get("name", "?"),
    "source": info.get("source", "?"),
    "licence": info.get("licence", "?"),
    "trained": {"True": "yes", "False": "no: its parameters are random"}.get(trained, "?"),
    "parameters": f"{summary.parameters:,} in {summary.dtype}",
    **{f"  {part}": f"{count:,}" for part, count in summary.parts.items()},
    "picture": f"{config.image_size} x {config.image_size}, patches of {config.patch}",
    "trunk": f"{trunk.blocks} blocks of width {trunk.width}",
    "concept points": "yes" if config.concept_points else "no",
    "on disk": f"{summary.stored_bytes / 1e6:,.1f} MB",
  }
  for name, sums in summary.source_tensors.items():
    rows[f"source, {name}"] = f"{sums['tensors']:,} tensors, {sums['parameters']:,} parameters"
  for kind, reasons in (("unread", summary.unread), ("dropped", summary.dropped)):
    for reason, sums in reasons.items():
      line = f"{sums['tensors']:,} tensors: {reason}"
      rows[kind] = f"{rows[kind]}\n{line}" if kind in rows else line
  table = Table(show_header=False)
  table.add_column()
  table.add_column(overflow="fold")
  for name, value in rows.items():
    table.add_row(name, Text(str(value)))
  return table
