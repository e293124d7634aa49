"""Lists the videos of a directory: video files, and directories of frames."""

import os
from collections.abc import Iterator
from pathlib import Path

from sam3_jax.inputs.image_listing import Found, find_files, is_hidden, is_image, walk
from sam3_jax.utils.notes import ListingNotes

VIDEO_SUFFIXES = frozenset(
  {
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".mxf", ".ogv", ".ts", ".webm", ".wmv",
  }
)  # fmt: skip
OVERLAY = ".sam3.mp4"  # suffix of the results of `sam3-jax track`


def find_videos(given: str, notes: ListingNotes) -> Iterator[Found]:
  """Finds the videos of a path or a pattern, in an order that depends only on names.

  Args:
    given: a directory, for all videos in its tree: files by their suffixes (`VIDEO_SUFFIXES`), and
      directories that contain images and no video files, whose images are frames; a video file; or
      a pattern such as `a/*.mp4`, whose matches may have any suffix.
    notes: counts skipped files. Overlays of `sam3-jax track` are skipped.

  Raises:
    FileNotFoundError: there is no such directory or file, and `given` is not a pattern.
    ValueError: a directory cannot be read.
  """
  if not os.path.isdir(given):
    for found in find_files(given, notes):
      if not _is_overlay(found.name, notes):
        yield found
    return
  names = _in_directory(given, notes)
  for name in sorted(names):
    if name:
      yield Found(name, os.path.join(given, name))
    else:  # the frames are in the directory itself
      yield Found(os.path.basename(os.path.abspath(given)), given)


def is_video(name: str, notes: ListingNotes) -> bool:
  """Whether a file is a video by its name; counts it in `notes` if not."""
  if is_hidden(name, notes) or _is_overlay(name, notes):
    return False
  if Path(name).suffix.lower() not in VIDEO_SUFFIXES:
    notes.skip_suffix(name)
    return False
  return True


def _in_directory(top: str, notes: ListingNotes) -> Iterator[str]:
  """Names of the videos in a directory tree, relative to `top`; "" for `top` itself."""
  for base, entries in walk(top, notes):
    known = [entry.name for entry, mode in entries if mode is not None]
    if broken := len(entries) - len(known):
      notes.skip("broken link", "broken links", broken)
    videos = [name for name in known if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    images, others = [], ListingNotes()
    if not videos:
      images = [name for name in known if is_image(name, others)]
    if images:
      yield base
      if len(images) < len(known):
        notes.skip("beside frames", count=len(known) - len(images))
      continue
    for name in known:
      if is_video(name, notes):
        yield f"{base}/{name}" if base else name


def _is_overlay(name: str, notes: ListingNotes) -> bool:
  if not name.lower().endswith(OVERLAY):
    return False
  notes.skip("result of track", "results of track")
  return True
