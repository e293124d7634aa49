"""`sam3-jax benchmark`: the options of what benchmarks/speed/ measures, in a clone."""

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
  tiny = "tiny"
  small = "small"
  base = "base"
  large = "large"


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
    typer.Option(metavar="DIR", help="Folder or name of a checkpoint; sam3-tiny, if left out."),
  ] = None,
  size: Annotated[
    Size | None, typer.Option(help="Seeded weights of this size instead; large is the release's.")
  ] = None,
  only: Annotated[
    list[Part] | None,
    typer.Option(
      help="What to measure; repeat for several. All but growth (1 to 128 prompts, 1 to 8 "
      "images) and start (the command as a whole), if left out."
    ),
  ] = None,
  most: Annotated[
    int | None,
    typer.Option(min=1, metavar="N", help="No more images, prompts or masks in a call."),
  ] = None,
  dtype: Annotated[
    list[Precision] | None,
    typer.Option(help="Of the computation; repeat for both. float32, if left out."),
  ] = None,
  peer: Annotated[
    list[Peer] | None, typer.Option(help="Compare with this too; repeat for several.")
  ] = None,
  peer_python: Annotated[
    list[str] | None,
    typer.Option(
      metavar="PATH", help="The interpreter that has the peer; one for each --peer, in order."
    ),
  ] = None,
  image: Annotated[
    Path | None, typer.Option(metavar="FILE", help="An image; that of the README, if left out.")
  ] = None,
  repeats: Annotated[int, typer.Option(min=1, metavar="N", help="Calls after the first.")] = 5,
  threads: Annotated[
    int | None, typer.Option(min=1, metavar="N", help="Cores of each side; all, if left out.")
  ] = None,
  out: Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where benchmark.json and benchmark.md go.")
  ] = None,
  plot: Annotated[
    Path | None, typer.Option(metavar="FILE", help="Draw the growth (a PNG or SVG).")
  ] = None,
  work: Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep seeded and converted weights here, and use them again."),
  ] = None,
  device: OnDevice = None,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Measure time and memory of every step, beside other packages if asked to; from a clone.

  Each side is a process of its own, gets the same image, prompts, weights and cores, and takes
  turns with the others. What could not be measured is listed with the reason.
  """
  if checkpoint is not None and size is not None:
    raise ValueError("--checkpoint and --size exclude each other; give one of them.")
  peers = _peers([one.value for one in peer or ()], peer_python or ())
  if not (CLONE / "benchmarks" / "speed").is_dir():
    raise ValueError(
      "benchmarks/ is not in the installed package: clone the repository, `pip install -e .` "
      "there, and run this again."
    )
  for folder in (out, work, plot and plot.parent):
    if folder is not None:
      arguments.check_writable(folder)
  source_image = image or CLONE / "docs" / "scene.jpg"
  if not source_image.is_file():
    raise FileNotFoundError(f"there is no file {image}; check --image.")
  if plot is not None:
    if Part.growth not in (only or ()):
      raise ValueError("--plot draws the growth: add --only growth, or leave it out.")
    from sam3_jax.training.log import require_matplotlib

    require_matplotlib()
  arguments.use_device("cpu")  # this process; the sides are told below
  sys.path.insert(0, str(CLONE / "benchmarks"))

  # Not of this package, and so unknown to pyright.
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
      image=source_image.absolute(),
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
      f"{len(names)} --peer need as many --peer-python, the interpreters that have them; got "
      f"{len(pythons)}."
    )
  # Each runs in another folder. A link is not followed: it says which environment is meant.
  found = [str(Path(shutil.which(python) or python).absolute()) for python in pythons]
  return list(zip(names, found, strict=True))
