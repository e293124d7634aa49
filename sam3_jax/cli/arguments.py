"""Checks of command-line arguments, done before any work."""

import glob
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam3_jax.checkpoint.hf_hub import SCHEME
from sam3_jax.utils.console import Console, progress, say
from sam3_jax.utils.os_errors import error_text, remedy
from sam3_jax.utils.paths import require_local, scheme_of

if TYPE_CHECKING:
  from sam3_jax.utils.notes import ListingNotes


def find(checkpoint: str, quiet: bool) -> Path:
  """`registry.find_checkpoint`, with the progress of downloads and conversions on stderr."""
  from sam3_jax.registry import find_checkpoint

  if not checkpoint.startswith(SCHEME):
    return find_checkpoint(checkpoint)
  console = Console(stderr=True)

  def note(line: str) -> None:
    if not quiet:
      say(console, f"note: {line}")

  with progress(console, bar=True, quiet=quiet) as step:
    return find_checkpoint(checkpoint, progress=step, note=note)


def images(given: Sequence[Path], notes: "ListingNotes") -> list[Path]:
  """Expands files, directories and patterns to a list of images without duplicates.

  Raises:
    FileNotFoundError: a file or directory does not exist.
    ValueError: no image was found, a directory cannot be read, or a URL is given.
  """
  from sam3_jax.inputs.image_listing import find_files

  files: dict[Path, Path] = {}
  for pattern in map(str, given):
    require_local(pattern, "images of this command (`batch` reads buckets)")
    if not os.path.exists(pattern) and not glob.has_magic(pattern):
      raise FileNotFoundError(f"there is no file {pattern}; check the spelling and the directory.")
    found = [Path(file.path) for file in find_files(pattern, notes)]
    if not found and not os.path.isfile(pattern):
      raise _no_image(pattern, notes)
    for path in found:
      files.setdefault(path.resolve(), path)
  if not files:
    raise _no_image(", ".join(map(str, given)), notes)
  return list(files.values())


def _no_image(given: str, notes: "ListingNotes") -> ValueError:
  line = notes.line()
  return ValueError(f"there is no image in {given}{line and f' ({line})'}; check the path.")


def say_notes(notes: "ListingNotes", quiet: bool) -> None:
  """Prints one line about the files that a listing or an export skipped, if any."""
  if line := notes.line():
    say(Console(stderr=True, quiet=quiet), f"note: {line}")


def check_fraction(option: str, value: float | None) -> None:
  """Raises ValueError unless the value of an option is in [0, 1] or None."""
  if value is not None and not 0 <= value <= 1:  # NaN too
    raise ValueError(f"{option} must be between 0 and 1; got {value}.")


def check_writable(out: Path, option: str = "--out") -> None:
  """Raises ValueError, naming the option, unless a directory is writable or can be created; creates
  nothing."""
  require_local(out, option)
  existing = out.absolute()
  while not existing.exists():
    existing = existing.parent
  try:
    tempfile.TemporaryFile(dir=existing).close()
  except OSError as error:
    raise ValueError(
      f"cannot write to {out} ({error_text(error)}); {remedy(error)} or choose another "
      f"directory with {option}."
    ) from error


def output(out: Path, option: str = "--out") -> Path:
  """A directory or a prefix in a bucket for results, after checking that it can be used.

  Raises:
    ImportError: the package for the scheme is missing.
    ValueError: it is not writable, or the bucket cannot be read; names the option.
  """
  if not scheme_of(out):
    check_writable(out, option)
    return out
  from sam3_jax.storage.faults import is_transient
  from sam3_jax.storage.objects import resolve
  from sam3_jax.storage.urls import WRITABLE, parse

  where = parse(out)
  if where.scheme not in WRITABLE:
    schemes = " or ".join(f"{scheme}://" for scheme in WRITABLE)
    raise ValueError(f"{where} is read only; choose a directory, {schemes} with {option}.")
  found = resolve(out)
  try:
    (found / "job.json").exists()
  except OSError as error:
    if not is_transient(error):  # the job tries again, and then reports it
      raise ValueError(f"{error}; check {option}.") from error
  return found


def use_device(device: str | None) -> None:
  """Imports JAX and selects a platform; the error names the platforms that JAX finds."""
  import jax

  if device == "cpu":
    jax.config.update("jax_platforms", "cpu")  # allocates no memory on other devices
    return
  found = local_devices()
  if device is None:
    return
  try:
    jax.config.update("jax_default_device", jax.local_devices(backend=device)[0])
  except Exception as error:  # RuntimeError, or an AssertionError where a plug-in is missing
    platforms = ", ".join(sorted({each.platform for each in found}))
    raise ValueError(
      f"--device {device}: JAX finds only {platforms}; {_install(device)} on a machine that has "
      f"a {device.upper()}, or leave out --device."
    ) from error


def local_devices() -> list[Any]:
  """Returns the local devices; raises ValueError with the reason if JAX cannot start."""
  import jax

  try:
    return jax.local_devices()
  except Exception as error:  # RuntimeError, or an AssertionError where a plug-in is missing
    why = str(error).partition("\n")[0].partition(" (set JAX_PLATFORMS")[0].strip(" .")
    why = f" ({why:.120})" if why else ""
    wanted = os.environ.get("JAX_PLATFORMS", "")
    if not wanted:
      raise ValueError(
        f"JAX cannot start on this machine's devices{why}; use --device cpu."
      ) from error
    raise ValueError(
      f"JAX cannot start with JAX_PLATFORMS={wanted}{why}; {_install(wanted)} on a machine that "
      "has such a device, or unset JAX_PLATFORMS."
    ) from error


def _install(platform: str) -> str:
  extra = {"gpu": "cuda", "cuda": "cuda", "tpu": "tpu"}.get(platform.split(",")[0].lower())
  return f"pip install 'sam3-jax[{extra}]'" if extra else "install JAX's plug-in for it"
