"""Copies checkpoints from buckets of S3 into the cache on this machine, and to such buckets.

Orbax reads Cloud Storage itself, and each process only its shards. It does not read S3 with every
configuration of credentials and endpoints, so those checkpoints are copied first, by the same code
as all other objects. The versions of the objects name a copy, so a changed checkpoint is another
copy. Only complete copies have that name.
"""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sam3_jax.storage.find import FoundObject, find_objects
from sam3_jax.storage.objects import ObjectPath
from sam3_jax.utils.identity import digest
from sam3_jax.utils.lease import Lease, draft_path
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.paths import user_cache

MANIFEST = "manifest.json"
_READERS = 8  # files copied at the same time
_POLL_SECONDS = 0.5
_PIECE = 2**24  # bytes read at a time


def mirror(url: str) -> Path:
  """Copies a checkpoint unless this version of it has been copied before.

  Other processes of this machine wait for the copy.

  Args:
    url: of the checkpoint, such as `s3://bucket/checkpoints/sam3`.

  Returns:
    The directory of the copy.

  Raises:
    FileNotFoundError: there is no checkpoint.
    ValueError: the bucket cannot be read, or there is no home directory for the copy.
    OSError: the copy cannot be written.
  """
  try:
    found = list(find_objects(url).objects)
  except FileNotFoundError:
    raise FileNotFoundError(f"there is no checkpoint at {url}; check the address.") from None
  except OSError as error:
    raise ValueError(f"{error}; check the address of the checkpoint.") from error
  if not any(one.name == MANIFEST for one in found):
    raise FileNotFoundError(f"there is no checkpoint at {url}: {MANIFEST} is missing.")
  if strange := [one.name for one in found if ".." in one.name.split("/") or one.name[0] == "/"]:
    raise ValueError(f"{url} has a file {strange[0]!r:.80}; remove it from the checkpoint.")
  versions = [[one.where, one.entry.size, one.entry.version] for one in found]
  try:
    folder = user_cache() / "buckets"
  except RuntimeError as error:
    raise ValueError(f"no home directory to cache {url} in; set XDG_CACHE_HOME.") from error
  target = folder / f"{found[0].where.bucket}-{digest(versions)[:16]}"
  lease = Lease(folder / f"{target.name}.lease")
  while not target.is_dir():
    if lease.acquire():
      try:
        if not target.is_dir():
          _copy(found, target)
      finally:
        lease.release()
    else:
      time.sleep(_POLL_SECONDS)
  return target


def check_absent(url: str) -> None:
  """Raises ValueError if there are objects below a URL, or the bucket cannot be listed."""
  try:
    next(find_objects(url).objects)
  except FileNotFoundError:
    return
  except OSError as error:
    raise ValueError(f"{error}; check the address.") from error
  raise ValueError(f"{url} exists already; give another address, or remove it first.")


def upload(folder: Path, url: str) -> None:
  """Uploads a checkpoint. The manifest comes last, so a checkpoint without it is incomplete.

  Args:
    folder: directory of the checkpoint.
    url: where to; see `check_absent`.

  Raises:
    ValueError: the bucket cannot be written.
  """
  root = ObjectPath(url)
  files = [path for path in folder.rglob("*") if path.is_file()]
  last = folder / MANIFEST

  def send(path: Path) -> None:
    (root / path.relative_to(folder).as_posix()).upload(path)

  try:
    with ThreadPoolExecutor(_READERS) as pool:
      list(pool.map(send, (path for path in files if path != last)))
    send(last)
  except OSError as error:
    raise ValueError(f"{error}; remove what was uploaded, and convert again.") from error


def _copy(found: list[FoundObject], target: Path) -> None:
  """Copies objects into a directory that appears when it is complete."""
  temporary = draft_path(target)
  try:
    with ThreadPoolExecutor(_READERS) as pool:
      list(pool.map(lambda one: _copy_file(one, temporary / one.name), found))
    temporary.rename(target)
  except OSError as error:
    raise ValueError(
      f"{error.filename or target} cannot be copied to {target.parent} ({error_text(error)}); "
      "try again, or set XDG_CACHE_HOME to a larger disk."
    ) from error
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _copy_file(one: FoundObject, target: Path) -> None:
  target.parent.mkdir(parents=True, exist_ok=True)
  path = ObjectPath(one.where.url)
  with target.open("wb") as file:
    for start in range(0, one.entry.size, _PIECE):
      stop = min(start + _PIECE, one.entry.size)
      file.write(path.read_range(start, stop, one.entry.version))
