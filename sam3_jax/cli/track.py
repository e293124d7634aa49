"""Declares `sam3-jax track`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, OnDevice, Quiet
from sam3_jax.cli.track_prompts import parse_prompts
from sam3_jax.utils.console import Console
from sam3_jax.utils.signals import RESUME, terminable

DEADLINE = 60.0  # seconds after SIGTERM to finish the current frame and to save the session


class Direction(enum.StrEnum):
  forward = "forward"
  backward = "backward"
  both = "both"


class Format(enum.StrEnum):
  ytvis = "ytvis"
  coco_vid = "coco-vid"
  mot = "mot"
  davis_png = "davis-png"


def track(
  video: Annotated[
    Path,
    typer.Argument(metavar="VIDEO|DIR", help="A video file, or a directory of images as frames."),
  ],
  out: Annotated[
    Path,
    typer.Option(metavar="DIR", help="Output directory. Rerun with the same directory to resume."),
  ],
  text: Annotated[
    list[str] | None,
    typer.Option(
      metavar="PHRASE", help="Track every object that this phrase describes. May be repeated."
    ),
  ] = None,
  point: Annotated[
    list[str] | None,
    typer.Option(
      metavar="[ID@][F:]X,Y[,0|1]",
      help="Point prompt on an object (1, the default) or off it (0), in pixels of the frame. May "
      "be repeated.",
    ),
  ] = None,
  box: Annotated[
    list[str] | None,
    typer.Option(
      metavar="[ID@][F:]X0,Y0,X1,Y1", help="Box prompt around an object. May be repeated."
    ),
  ] = None,
  mask: Annotated[
    list[str] | None,
    typer.Option(
      metavar="[ID@][F:]FILE",
      help="Image of the size of the frames, in which the object is white and the rest is black. "
      "May be repeated.",
    ),
  ] = None,
  start: Annotated[
    str, typer.Option(metavar="F", help="First frame of the clip, as a number or a time.")
  ] = "0",
  stop: Annotated[
    str | None,
    typer.Option(metavar="F", help="The frame after the last one. Default: the end of the video."),
  ] = None,
  every: Annotated[
    str, typer.Option(metavar="N", help="Track each N-th frame, or one frame in a time (0.5s).")
  ] = "1",
  direction: Annotated[
    Direction,
    typer.Option(
      help="Track from the prompts to the end, to the start, or to the end and then to the start."
    ),
  ] = Direction.forward,
  to: Annotated[
    list[Format] | None,
    typer.Option(help="Also write the tracks in this format. May be repeated."),
  ] = None,
  overlay: Annotated[
    bool,
    typer.Option(
      "--overlay/--no-overlay",
      metavar="",
      help="Write NAME.sam3.mp4, the video with its objects drawn over it.",
    ),
  ] = True,
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Directory or name of a checkpoint with a tracker.")
  ] = "sam3-tiny",
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Track objects through a video. Needs PyAV: `pip install "sam3-jax[video]"`.

  --text finds all objects that a phrase describes, also those that appear later; each keeps its id.

  Each --box, each --mask and each --point on an object selects an object of its own; ids are 1, 2
  and so on, for points, then boxes, then masks. To give one object several prompts, put its id and
  @ before each of them: --point 1@80,60 --point 1@95,60,0. A point off an object (0) needs an id if
  there are several objects.

  F is a frame number from 0, or a time such as 12.5s; without it, a prompt is on the first frame of
  the clip (with --direction backward, on the last one). Later prompts of an object correct it:
  --point 1@80,60 --point 1@3.5s:90,70. Frames before the first prompt are not tracked, unless
  --direction is backward or both.

  Writes NAME.tracks.jsonl, a line for each frame with ids, scores, boxes and masks, and
  NAME.sam3.mp4. The command may be stopped or killed at any time. Rerun it to resume.

  Exit status: 0, done. 2, an error. 75, stopped by SIGTERM, rerun the same command. 130,
  interrupted.
  """
  typed = parse_prompts(point or [], box or [], mask or [], text or [])
  arguments.check_writable(out)
  arguments.use_device(device)

  from sam3_jax.cli.track_video import Job, run

  job = Job(
    video=video,
    prompts=typed,
    phrases=text or [],
    start=_position(start),
    stop=None if stop is None else _position(stop),
    every=_position(every),
    direction=direction.value,
    out=out,
    formats=[each.value for each in to or []],
    overlay=overlay,
  )
  directory = arguments.find(checkpoint, quiet)
  precision = None if dtype is Dtype.auto else dtype.value
  with terminable(DEADLINE) as stopping:
    done = run(job, directory, precision, Console(quiet=quiet), Console(stderr=True), stopping)
  if not done:
    raise typer.Exit(RESUME)


def _position(text: str) -> int | str:
  """A frame number, or the text of a time; checked when the video is open."""
  return int(text) if text.isdecimal() and text.isascii() else text
