"""Where files lie: in a folder of this machine, or in a bucket, `gs://bucket/path`.

Folders of this machine are `pathlib` paths. Those of buckets are of `etils.epath`, which Orbax uses
too; they have the methods of `pathlib` that a bundle is read and written with, and so count as such
here.
"""

import contextlib
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
GS = "gs"


def user_cache() -> Path:
  """This package's part of the user's cache folder.

  Raises:
    RuntimeError: a user who has no home, as in some containers, and no XDG_CACHE_HOME.
  """
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam3-jax"


def place(path: str | Path) -> Path:
  """An absolute path, or one in a bucket.

  Raises:
    ImportError: the package gcsfs is missing.
    ValueError: of another scheme than `gs://`.
  """
  if not (scheme := scheme_of(path)):
    return Path(path).expanduser().absolute()
  if scheme != GS:
    raise ValueError(f"{_url(path)} is of a kind that is not known; give a folder, or {GS}://.")
  if importlib.util.find_spec("gcsfs") is None:
    raise ImportError(f"{_url(path)} needs the package gcsfs: pip install 'sam3-jax[gcs]'.")
  from etils import epath

  remote: Any = epath.Path(_url(path))
  return remote


def scheme_of(path: str | Path) -> str | None:
  """`gs` of `gs://bucket/path`, also where `pathlib` has made one stroke of the two; None of a
  folder of this machine."""
  found = _SCHEME.fullmatch(str(path))
  return found[1].lower() if found else None


def is_remote(path: Any) -> bool:
  """Whether a path that `place` returned is in a bucket."""
  return not isinstance(path, str | Path)


def require_local(path: str | Path, what: str) -> None:
  """Raises ValueError if a path has a scheme."""
  if scheme_of(path):
    raise ValueError(f"{_url(path)}: {what} must be in a folder of this machine.")


def exists(path: Path) -> bool:
  """Whether something is there; ValueError in one line if a bucket cannot be reached."""
  if not is_remote(path):
    return path.exists()
  try:
    return path.exists()
  except Exception as error:  # of gcsfs, aiohttp, or google.auth
    reason = (str(error).strip() or "no reason given").partition("\n")[0]
    raise ValueError(
      f"{path} cannot be reached ({type(error).__name__}: {reason:.200}); look at the bucket's "
      "name, and say who you are with `gcloud auth application-default login`."
    ) from error


def file_sizes(folder: Path) -> dict[str, int]:
  """Bytes of each file in a folder and the folders in it, by their names from there."""
  if not is_remote(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
  sizes: dict[str, int] = {}
  with contextlib.suppress(FileNotFoundError):
    for path in folder.iterdir():
      if path.is_dir():
        sizes |= {f"{path.name}/{name}": size for name, size in file_sizes(path).items()}
      else:
        about: Any = path.stat()
        sizes[path.name] = about.length
  return dict(sorted(sizes.items()))


def _url(path: str | Path) -> str:
  return _SCHEME.sub(r"\1://\2", str(path))
