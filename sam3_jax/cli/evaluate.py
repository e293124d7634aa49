"""`sam3-jax evaluate`."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, MaskOptions, OnDevice, Quiet
from sam3_jax.cli.prompt_arguments import parse_mask_generation
from sam3_jax.utils.console import Console


class Assign(enum.StrEnum):
  id = "id"
  best = "best"


class PromptKind(enum.StrEnum):
  text = "text"
  box = "box"
  both = "text+box"
  click = "click"
  everything = "everything"


def evaluate(
  data: Annotated[
    list[Path],
    typer.Option(
      metavar="FILE",
      help="Annotation file in SA-Co's or COCO's format. Repeat for several annotators: for each "
      "pair, the annotation with the best score counts.",
    ),
  ],
  images: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR", help="Directory of the images. Default: the directory of the annotation file."
    ),
  ] = None,
  checkpoint: Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Directory or name of a checkpoint. Default: sam3-tiny."),
  ] = None,
  predictions: Annotated[
    Path | None,
    typer.Option(
      metavar="FILE", help="Evaluate predictions in COCO's results format instead of a checkpoint."
    ),
  ] = None,
  prompt: Annotated[
    PromptKind,
    typer.Option(
      help="Prompts: the phrase, the largest box of the objects (skips pairs without objects), or "
      "both; click: corrective clicks, and separately a box prompt, on each object; everything: no "
      "prompt, the mask generator segments all objects. With --video: text or click."
    ),
  ] = PromptKind.text,
  video: Annotated[
    bool,
    typer.Option(
      "--video",
      metavar="",
      help="Evaluate tracks in videos: --images is the directory of the frames, by default "
      "JPEGImages beside --data. In files with pairs of videos and phrases (SA-Co/VEval), tracks "
      "of each phrase: cgF1, phrase AP, HOTA and TETA. In other YouTube-VIS files, and with "
      "--prompt click, tracks of prompted objects: J&F as in DAVIS.",
    ),
  ] = False,
  assign: Annotated[
    Assign,
    typer.Option(
      help="For J&F of --predictions, how tracks are assigned to objects: by the id of the "
      "annotation, or one to one so that the sum of J&F is largest."
    ),
  ] = Assign.id,
  option: MaskOptions = None,
  threshold: Annotated[
    float, typer.Option(metavar="0..1", help="Count predictions with at least this score.")
  ] = 0.5,
  out: Annotated[
    Path,
    typer.Option(
      metavar="FILE", help="Output file for the metrics; predictions.json is written next to it."
    ),
  ] = Path("metrics.json"),
  worst: Annotated[
    int,
    typer.Option(
      min=0,
      metavar="N",
      help="Draw the N pairs with the most errors, on a page in worst/; of videos, as short films.",
    ),
  ] = 0,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Evaluate a checkpoint or predictions: cgF1 and its parts, and average precision; with --prompt
  click, the mean IoU over objects; with --prompt everything, the recall of objects; with --video,
  the same metrics of tracks and their HOTA and TETA, or region and contour accuracy (J&F).

  Output files are written at the end, either all or none.
  """
  arguments.check_fraction("--threshold", threshold)
  if checkpoint is not None and predictions is not None:
    raise ValueError("--checkpoint and --predictions exclude each other; give one of them.")
  if assign is not Assign.id and not video:
    raise ValueError(f"--assign {assign.value} needs --video; add it, or leave out --assign.")
  if prompt is PromptKind.click or prompt is PromptKind.everything:
    kind, visual = PromptKind.text, prompt.value
  else:
    kind, visual = prompt, None
  if visual and not video and (predictions is not None or worst or len(data) > 1):
    raise ValueError(
      f"--prompt {prompt.value} needs a model and one --data; leave out --predictions and --worst."
    )
  if option and prompt is not PromptKind.everything:
    raise ValueError(f"--option {option[0]!r} needs --prompt everything; leave it out.")
  arguments.check_writable(out.parent)
  if out.is_dir():
    raise ValueError(
      f"--out {out} is a directory; name a file in it, such as {out / 'metrics.json'}."
    )
  if video:
    if prompt not in (PromptKind.text, PromptKind.click) or len(data) > 1:
      raise ValueError(
        f"--video needs one --data, and --prompt text or click; got {len(data)} files and --prompt "
        f"{prompt.value}."
      )
    if assign is not Assign.id and predictions is None:
      raise ValueError(f"--assign {assign.value} needs --predictions; leave it out.")
  arguments.use_device(device)
  precision = None if dtype is Dtype.auto else dtype.value
  found = None if predictions else arguments.find(checkpoint or "sam3-tiny", quiet)
  if video:
    from sam3_jax.evaluation import run_video

    video_job = run_video.VideoJob(
      data=data[0],
      frames=images,
      checkpoint=found,
      predictions=predictions,
      concepts=prompt is PromptKind.text and assign is Assign.id,
      threshold=threshold,
      worst=worst,
      assign=assign.value,
      out=out,
    )
    run_video.run(video_job, precision, Console(quiet=quiet), Console(stderr=True))
    return

  from sam3_jax.evaluation.run import Job, run, run_visual

  job = Job(
    data=data,
    images=images,
    checkpoint=found,
    predictions=predictions,
    prompt=kind.value,
    visual=visual,
    generation=parse_mask_generation(option or [], None),
    threshold=threshold,
    out=out,
    worst=worst,
  )
  work = run_visual if visual else run
  work(job, precision, Console(quiet=quiet), Console(stderr=True))
