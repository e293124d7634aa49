"""`sam3-jax benchmark`: runs benchmarks/speed/ of a clone of the repository."""

import contextlib
import enum
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Debug, OnDevice, Quiet
from sam3_jax.utils.atomic_files import write_bytes, write_json
from sam3_jax.utils.console import Console, progress, say

CLONE = Path(__file__).parents[2]


class Size(enum.StrEnum):
  vit_tiny = "vit-tiny"
  vit_small = "vit-small"
  vit_base = "vit-base"
  vit_large = "vit-large"


class Part(enum.StrEnum):
  preprocess = "preprocess"
  encode = "encode"  # pyright: ignore[reportAssignmentType] - a method of str
  encode_visual = "encode_visual"
  text = "text"
  decode = "decode"
  visual = "visual"
  predict = "predict"
  postprocess = "postprocess"
  growth = "growth"
  start = "start"


class Precision(enum.StrEnum):
  float32 = "float32"
  bfloat16 = "bfloat16"


class Peer(enum.StrEnum):
  transformers = "transformers"
  meta = "meta"
  keras_hub = "keras-hub"


def benchmark(
  checkpoint: Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Directory or name of a checkpoint. Default: sam3-tiny."),
  ] = None,
  size: Annotated[
    Size | None,
    typer.Option(help="Use seeded weights of this size instead; vit-large is the released size."),
  ] = None,
  only: Annotated[
    list[Part] | None,
    typer.Option(
      help="Step to measure. May be repeated. Default: all except growth (1 to 128 prompts, 1 to 8 "
      "images) and start (the whole command)."
    ),
  ] = None,
  most: Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="At most N images, prompts or masks per call."),
  ] = None,
  dtype: Annotated[
    list[Precision] | None,
    typer.Option(help="Dtype of the computation. May be repeated. Default: float32."),
  ] = None,
  peer: Annotated[
    list[Peer] | None, typer.Option(help="Package to compare with. May be repeated.")
  ] = None,
  peer_python: Annotated[
    list[str] | None,
    typer.Option(
      metavar="PATH", help="Python interpreter with the package; one for each --peer, in order."
    ),
  ] = None,
  image: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Image to use. Default: docs/scene.jpg.")
  ] = None,
  repeats: Annotated[
    int, typer.Option(min=1, metavar="N", help="Calls to measure after the first one.")
  ] = 5,
  threads: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="CPU cores for each package. Default: all.")
  ] = None,
  out: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Output directory, for benchmark.json and benchmark.md."),
  ] = None,
  plot: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Plot the growth to a PNG or SVG file.")
  ] = None,
  work: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR", help="Directory to keep seeded and converted weights in, for reuse."
    ),
  ] = None,
  device: OnDevice = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Measure time and memory of each step, optionally compared with other packages. Needs a clone of
  the repository.

  Each package runs in its own process, with the same image, prompts, weights and cores, in turns
  with the others. Steps that cannot be measured are listed with the reason.
  """
  if checkpoint is not None and size is not None:
    raise ValueError("--checkpoint and --size exclude each other; give one of them.")
  peers = _peers([one.value for one in peer or ()], peer_python or ())
  if not (CLONE / "benchmarks" / "speed").is_dir():
    raise ValueError(
      "benchmarks/ is not in the installed package: clone the repository, `pip install -e .` "
      "there, and run this again."
    )
  for directory in (out, work, plot and plot.parent):
    if directory is not None:
      arguments.check_writable(directory)
  scene = image or CLONE / "docs" / "scene.jpg"
  if not scene.is_file():
    raise FileNotFoundError(f"there is no file {image}; check --image.")
  if plot is not None:
    if Part.growth not in (only or ()):
      raise ValueError("--plot needs --only growth; add it, or leave out --plot.")
    from sam3_jax.training.log import require_matplotlib

    require_matplotlib()
  arguments.use_device("cpu")  # for this process only
  sys.path.insert(0, str(CLONE / "benchmarks"))

  # Outside the package, and so unknown to pyright.
  from speed import cases, plots, report, run  # pyright: ignore[reportMissingImports]

  from sam3_jax.registry import find_checkpoint

  with contextlib.ExitStack() as stack:
    if work is None:
      work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sam3-jax-benchmark-")))
    work.mkdir(parents=True, exist_ok=True)
    job = run.Job(
      checkpoint=None if size else find_checkpoint(checkpoint or "sam3-tiny"),
      size=size and size.value,
      dtypes=list(dict.fromkeys(one.value for one in dtype or [Precision.float32])),
      only=[one.value for one in only] if only else cases.DEFAULT,
      most=most,
      peers=peers,
      repeats=repeats,
      threads=threads,
      device=device and device.value,
      image=scene.absolute(),
      work=work.absolute(),
    )
    step = stack.enter_context(progress(Console(stderr=True), bar=True, quiet=quiet))
    measured = run.run(job, step)
  text = report.markdown(measured)
  if out is not None:
    write_json(out / "benchmark.json", measured, indent=1)
    write_bytes(out / "benchmark.md", f"{text}\n".encode())
  if plot is not None:
    plots.draw(measured, plot)
  console = Console(quiet=quiet)
  for line in text.splitlines():
    say(console, line)


def _peers(names: Sequence[str], pythons: Sequence[str]) -> list[tuple[str, str]]:
  if len(pythons) != len(names):
    raise ValueError(
      f"each --peer needs a --peer-python, an interpreter that has it; got {len(names)} --peer and "
      f"{len(pythons)} --peer-python."
    )
  # Absolute, as each runs in another directory. Links are kept, as they identify the environment.
  found = [str(Path(shutil.which(python) or python).absolute()) for python in pythons]
  return list(zip(names, found, strict=True))
