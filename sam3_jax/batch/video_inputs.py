"""The list of videos of a job, from a directory, a pattern, a list, or a bucket.

The list and its order are the same for every process. Each video is in it once: a video that was
given several times has the phrases of all occurrences.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.input_list import Input
from sam3_jax.batch.listed_images import check_name, readable
from sam3_jax.batch.local_video import identify_video
from sam3_jax.batch.object_inputs import check_allowed, identify_objects, list_objects, open_text
from sam3_jax.batch.prompt_schema import (
  AnyPrompt,
  parse_json,
  parse_prompts,
  unique_prompts,
)
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.video_listing import find_videos, is_video
from sam3_jax.storage.store import locate
from sam3_jax.storage.urls import is_url, join, parent, redact
from sam3_jax.utils.identity import FileIdentity, named
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.notes import ListingNotes
from sam3_jax.utils.param_tree import raise_faults

LISTS = (".txt", ".jsonl")  # suffixes of lists of videos
LINE_FORMAT = '{"video": "a.mp4", "prompts": ["player", "ball"]}'


class _Listed(NamedTuple):
  """A listed video, or a `fault`; `prompts` is None for a video without its own."""

  name: str
  path: str
  prompts: tuple[AnyPrompt, ...] | None = None
  identity: FileIdentity | None = None
  fault: str = ""


def list_videos(
  videos: str,
  phrases: tuple[Prompt, ...],
  notes: ListingNotes | None = None,
  *,
  allow_https: bool = False,
) -> list[Input]:
  """The inputs, each video once.

  Args:
    videos: a directory, a video or a pattern (see `find_videos`); a .txt file with one path or URL
      per line; a .jsonl file with a `LINE_FORMAT` per line; or a URL of one of these, where only
      files are videos. Paths in a list are relative to its directory.
    phrases: for videos without prompts of their own.
    notes: counts files that are left out, and missing or empty videos, which will fail.
    allow_https: whether `videos` and the lines of a list may be addresses on web servers.

  Raises:
    FileNotFoundError: there is no such video, directory or list.
    ValueError: there is no video, lines or prompts are faulty (all are named), videos have no
      prompts, or a directory or list cannot be read.
  """
  notes = ListingNotes() if notes is None else notes
  positions: dict[str, int] = {}
  inputs: list[Input] = []
  faults: list[str] = []
  without_prompts: list[str] = []
  for found in _identified(list(_listed(videos, notes, allow_https))):
    own = phrases if found.prompts is None else found.prompts
    fault = found.fault or _prompt_fault(found.name, own)
    if fault:
      faults.append(fault)
      continue
    if not own:
      without_prompts.append(found.name)
      continue
    path = found.path if is_url(found.path) else os.path.abspath(found.path)
    position = positions.setdefault(path, len(inputs))
    if position == len(inputs):
      if found.identity is None:
        notes.remark("video does not exist", "videos do not exist", found.name)
      elif not found.identity.size:
        notes.remark("video is empty", "videos are empty", found.name)
      inputs.append(Input(found.name, found.path, own, None, found.identity))
    elif own is not inputs[position].prompts:
      union = unique_prompts(inputs[position].prompts + own)
      inputs[position] = dataclasses.replace(inputs[position], prompts=union)
  if without_prompts:
    what = named("video has no prompts", "videos have no prompts", without_prompts)
    faults.append(f"{what}, and neither --text nor --prompts is given")
  give = ", or give --text" if without_prompts else ""
  raise_faults(faults, redact(videos), f"Correct the files or the options{give}.")
  if not inputs:
    line = notes.line()
    where = f"{redact(videos)}{line and f' ({line})'}"
    raise ValueError(f"there is no video in {where}; check --videos.")
  return inputs


def frozen_video(
  videos: str, phrases: tuple[Prompt, ...]
) -> Callable[[str, FileIdentity | None], Input] | None:
  """How to make an input from its entry in the list of a job; see `inputs.frozen_input`.

  Returns:
    A function of the name and the identity in the list; None if `videos` is local, or a list.
  """
  if not is_url(videos) or _is_list(videos):
    return None
  store, where = locate(videos)
  root = store.pin(where).url
  return lambda name, identity: Input(name, join(root, name), phrases, None, identity)


def _is_list(path: str) -> bool:
  return Path(redact(path)).suffix.lower() in LISTS


def _listed(videos: str, notes: ListingNotes, allow_https: bool) -> Iterator[_Listed]:
  if is_url(videos):
    check_allowed(videos, allow_https)
  if _is_list(videos) and not os.path.isdir(videos):
    yield from _in_list(videos, allow_https)
  elif is_url(videos):
    listing = list_objects(
      videos, notes, allow_https=allow_https, wanted=is_video, option="--videos"
    )
    for one in listing.objects:
      yield _Listed(one.name, one.url, identity=one.identity)
  else:
    for found in find_videos(videos, notes):
      yield _Listed(*found)


def _in_list(path: str, allow_https: bool) -> Iterator[_Listed]:
  folder = parent(path) if is_url(path) else Path(path).parent
  lines = Path(redact(path)).suffix.lower() == ".jsonl"
  if not is_url(path) and not os.path.exists(path):
    raise FileNotFoundError(f"there is no list {path}; check --videos.")
  with readable(path, "--videos"), open_text(path) as file:
    for number, line in enumerate(file, start=1):
      if not line.strip():
        continue
      try:
        name, prompts = _line(line) if lines else (line.strip(), None)
        check_name(name)
        where = join(folder, name)
        if is_url(where):
          check_allowed(where, allow_https)
      except (ValueError, TypeError) as error:
        fault = f"line {number}: {str(error).rstrip('.')}"
        yield _Listed(redact(path), "", fault=fault)
      else:
        yield _Listed(redact(name), where, prompts)


def _line(line: str) -> tuple[str, tuple[AnyPrompt, ...] | None]:
  values: Any = parse_json(line, f"a line must be {LINE_FORMAT}")
  if not isinstance(values, dict) or not isinstance(values.get("video"), str):
    raise ValueError(f"a line must be {LINE_FORMAT}; got {shown(values)}")
  if unknown := set(values) - {"video", "prompts"}:
    raise ValueError(f"unknown {sorted(unknown)}; a line has only video and prompts")
  return values["video"], parse_prompts(values)


def _prompt_fault(name: str, prompts: Sequence[AnyPrompt]) -> str:
  """Why prompts cannot be used for a video; empty if they can."""
  for prompt in prompts:
    if not isinstance(prompt, Prompt) or prompt.boxes or not prompt.text:
      return (
        f"{name} has a prompt with boxes or points, and videos have phrases only; track it with "
        "`sam3-jax track`"
      )
  return ""


def _identified(listed: Sequence[_Listed]) -> Iterator[_Listed]:
  """Adds the identities of videos; those of objects in lists are asked for in parallel."""
  unknown = [i for i, one in enumerate(listed) if one.identity is None and not one.fault]
  remote = [i for i in unknown if is_url(listed[i].path)]
  known = dict(zip(remote, identify_objects([listed[i].path for i in remote]), strict=True))
  for i, one in enumerate(listed):
    if i in known:
      url, identity = known[i]
      yield one._replace(path=url, identity=identity)
    elif one.identity is None and not one.fault:
      yield one._replace(identity=_identity(one.path))
    else:
      yield one


def _identity(path: str) -> FileIdentity | None:
  try:
    return identify_video(path)
  except OSError:  # like a missing video, it stays pending until it can be read
    return None
