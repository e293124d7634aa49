"""Paths of local directories and of buckets, `gs://bucket/path`.

Local paths are `pathlib` paths. Paths in buckets are `etils.epath` paths, as in Orbax; they
have the methods of `pathlib` that bundles need, so they are typed as `Path`. `epath.Path` is not
used for local paths: it would import etils for each of them and accept any scheme.
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
  """This package's directory in the user's cache.

  Raises:
    RuntimeError: there is neither a home directory, as in some containers, nor XDG_CACHE_HOME.
  """
  return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sam3-jax"


def resolve_path(path: str | Path) -> Path:
  """An absolute local path, or a path in a bucket.

  Raises:
    ImportError: the package gcsfs is missing.
    ValueError: the scheme is not `gs://`.
  """
  if not (scheme := scheme_of(path)):
    return Path(path).expanduser().absolute()
  if scheme != GS:
    raise ValueError(f"{_url(path)} has an unsupported scheme; give a local directory, or {GS}://.")
  if importlib.util.find_spec("gcsfs") is None:
    raise ImportError(f"{_url(path)} needs the package gcsfs: pip install 'sam3-jax[gcs]'.")
  from etils import epath

  remote: Any = epath.Path(_url(path))
  return remote


def scheme_of(path: str | Path) -> str | None:
  """`gs` of `gs://bucket/path`, or of `gs:/bucket/path` as `pathlib` writes it; None if local."""
  found = _SCHEME.fullmatch(str(path))
  return found[1].lower() if found else None


def is_remote(path: Any) -> bool:
  """Whether a path returned by `resolve_path` is in a bucket."""
  return not isinstance(path, str | Path)


def require_local(path: str | Path, what: str) -> None:
  """Raises ValueError if a path has a scheme; `what` names the path in the message."""
  if scheme_of(path):
    raise ValueError(f"{_url(path)}: {what} must be in a local directory.")


def exists(path: Path) -> bool:
  """Whether a path exists; raises a one-line ValueError if a bucket cannot be reached."""
  if not is_remote(path):
    return path.exists()
  try:
    return path.exists()
  except Exception as error:  # from gcsfs, aiohttp or google.auth
    reason = (str(error).strip() or "no reason given").partition("\n")[0]
    raise ValueError(
      f"{path} cannot be reached ({type(error).__name__}: {reason:.200}); check the name of the "
      "bucket, and log in with `gcloud auth application-default login`."
    ) from error


def file_sizes(folder: Path) -> dict[str, int]:
  """Sizes in bytes of all files in a directory tree, by their paths relative to it."""
  if not is_remote(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
  sizes: dict[str, int] = {}
  with contextlib.suppress(FileNotFoundError):
    for path in folder.iterdir():
      if path.is_dir():
        sizes |= {f"{path.name}/{name}": size for name, size in file_sizes(path).items()}
      else:
        status: Any = path.stat()
        sizes[path.name] = status.length
  return dict(sorted(sizes.items()))


def _url(path: str | Path) -> str:
  return _SCHEME.sub(r"\1://\2", str(path))
