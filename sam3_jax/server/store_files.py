"""Images of the store, their notes beside the embeddings on disk, and directories left behind."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Any

from sam3_jax.types import ImageEmbedding
from sam3_jax.utils.identity import Origin

ID_BYTES = 32  # 256 random bits
PREFIX = "sam3-jax-serve-"  # of temporary directories
KEPT = "sam3-jax-serve"  # directory that is kept, in the one that --store names
LOCK = "in-use"  # file that a running server locks


def new_id() -> str:
  """A random id or session, of 43 characters."""
  return secrets.token_urlsafe(ID_BYTES)


def hashed(secret: str) -> str:
  return hashlib.sha256(secret.encode()).hexdigest()


@dataclasses.dataclass(eq=False)
class StoredImage:
  """An encoded image.

  Attributes:
    key: hash of its id.
    owner: hash of its session; "" if it was uploaded without one.
    size: height and width of the image.
    bytes: of its embedding.
    used: when it was used last, in seconds since the epoch.
    embedding: None if it is only on disk.
    saved: whether it is on disk.
  """

  key: str
  owner: str
  size: tuple[int, int]
  bytes: int
  used: float
  embedding: ImageEmbedding | None = None
  saved: bool = False


def remove_abandoned() -> None:
  """Deletes the temporary directories of servers that were killed."""
  for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
    with contextlib.suppress(OSError):
      status = path.lstat()
      if status.st_uid != os.getuid() or path.is_symlink():
        continue
      with open(path / LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path, ignore_errors=True)


def write_note(path: Path, stored: StoredImage, origin: Origin) -> None:
  """Writes what `from_note` reads; without space on the disk, nothing."""
  fields = {"owner": stored.owner, "size": stored.size, "used": stored.used}
  fields |= {"bytes": stored.bytes, "checkpoint": origin.identity}
  part = path.with_suffix(".note")
  with contextlib.suppress(OSError):
    part.write_text(json.dumps(fields))
    os.chmod(part, 0o600)
    os.replace(part, path)


def from_note(path: Path, origin: Origin) -> StoredImage:
  """An image on disk.

  Raises:
    OSError, ValueError, KeyError, TypeError: the note is damaged, or of another checkpoint.
  """
  fields: dict[str, Any] = json.loads(path.read_text())
  if fields["checkpoint"] != origin.identity:
    raise ValueError("an embedding of another checkpoint")
  height, width = fields["size"]
  return StoredImage(
    key=path.stem,
    owner=str(fields["owner"]),
    size=(int(height), int(width)),
    bytes=int(fields["bytes"]),
    used=float(fields["used"]),
    saved=True,
  )
