"""Opens video files with PyAV (FFmpeg), and says in one line why a file is not a video."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sam3_jax.inputs.file_signatures import unsupported_format
from sam3_jax.utils.os_errors import error_text, remedy
from sam3_jax.utils.paths import scheme_of

_GIVE = "give a video such as MP4, WebM or MKV, or a directory of images"
_IMAGES = ("image2", "_pipe")  # in the names of FFmpeg's formats of single images
_PLAYLISTS = ("hls", "concat", "dash", "imf")  # FFmpeg's formats of text that names other files
_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip")  # MP4 and MOV start with one


def import_av() -> Any:
  """PyAV; raises ImportError with the command to install it."""
  try:
    import av
  except ImportError as error:
    raise ImportError("videos need PyAV: pip install 'sam3-jax[video]'.") from error
  return av


@contextlib.contextmanager
def open_container(path: str | os.PathLike) -> Iterator[tuple[Any, Any]]:
  """Opens a video file; gives its container and its video stream.

  Of several video streams, FFmpeg's choice is used. Cover images of audio files are not videos.

  Raises:
    FileNotFoundError: no such file.
    ImportError: PyAV is not installed.
    ValueError: not a regular file, not a video, no video stream, or a codec without a decoder.
  """
  av = import_av()
  file = _regular(path)
  try:
    # Playlists may name other files and addresses: only files are opened, and none is decoded.
    container = av.open(str(file), options={"protocol_whitelist": "file"})
  except av.error.FFmpegError as error:
    raise ValueError(_refusal(file, str(path), error)) from None
  with container:
    yield container, _choose_stream(container, str(path), av.stream.Disposition.attached_pic)


def _regular(path: str | os.PathLike) -> Path:
  """The absolute path of a regular file."""
  if scheme_of(os.fspath(path)):
    raise ValueError(f"{path} is an address, not a local file: download it first.")
  try:
    mode = os.stat(path).st_mode
  except (FileNotFoundError, NotADirectoryError):
    raise FileNotFoundError(f"there is no video {path}: check the path.") from None
  except (OSError, ValueError) as error:  # ValueError: a null byte
    text = error_text(error) if isinstance(error, OSError) else str(error)
    raise ValueError(f"{path} cannot be read ({text}): check the path.") from None
  if not stat.S_ISREG(mode):
    raise ValueError(
      f"{path} is not a regular file (a pipe, socket or device): save it as a file, or pass an "
      "iterator of its frames in Python."
    )
  return Path(path).absolute()


def _refusal(file: Path, name: str, error: Any) -> str:
  """Why FFmpeg cannot open a file."""
  try:
    with file.open("rb") as opened:
      start = opened.read(512)
  except OSError as failed:
    return f"{name} cannot be read ({error_text(failed)}); {remedy(failed)}."
  if not start:
    return f"{name} is empty (0 bytes): get the file again."
  found = unsupported_format(start)
  if start[4:8] in _BOXES or (found is not None and "video" in found.kind):
    return (
      f"{name} is a video that is cut off or damaged, and nothing in it can be read: get it again."
    )
  if found is not None:
    return f"{name} is {found.kind}, not a video: {_GIVE}."
  return f"{name} is not a video ({error.strerror or type(error).__name__}): {_GIVE}."


def _choose_stream(container: Any, name: str, cover: Any) -> Any:
  kind = container.format.name
  if any(part in kind for part in _IMAGES):
    raise ValueError(f"{name} is an image, not a video: {_GIVE}.")
  if any(part in kind.split(",") for part in _PLAYLISTS):
    raise ValueError(f"{name} is a playlist, which names other files: give one of those.")
  if kind == "tty":  # FFmpeg draws text files
    raise ValueError(f"{name} is a text file, not a video: {_GIVE}.")
  streams = [one for one in container.streams.video if not one.disposition & cover]
  if not streams:
    what = "it is an audio file" if container.streams.audio else "nor audio"
    raise ValueError(f"{name} has no video stream ({what}): {_GIVE}.")
  best = container.streams.best("video")
  stream = next((one for one in streams if best and one.index == best.index), streams[0])
  if stream.codec_context is None:
    raise ValueError(f"{name} has a codec that this PyAV cannot decode: convert it to H.264.")
  return stream
