"""Encoded images: the least recently used leave the memory for the disk, and then the disk.

An image is known by the hash of its id, so neither files nor logs reveal an id. An image that was
uploaded in a session belongs to it: to all others its id is unknown.
"""

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from pathlib import Path

import jax

from sam3_jax.server.errors import ApiError
from sam3_jax.server.store_files import (
  KEPT,
  LOCK,
  PREFIX,
  StoredImage,
  from_note,
  hashed,
  new_id,
  remove_abandoned,
  write_note,
)
from sam3_jax.types import ImageEmbedding
from sam3_jax.utils.identity import Origin


class Store:
  """The encoded images of all sessions. Methods may take long (they read and write files), and may
  be called from any thread."""

  def __init__(
    self,
    *,
    memory: int,
    disk: int,
    origin: Origin,
    expire_seconds: float = float("inf"),
    directory: Path | None = None,
  ):
    """Opens a store.

    Args:
      memory, disk: bytes of embeddings in memory and on disk.
      origin: of the model; embeddings of other checkpoints in `directory` are deleted.
      expire_seconds: images that were not used for this time are forgotten.
      directory: where a new directory keeps the embeddings for the next server; None for a
        temporary directory.

    Raises:
      ValueError: another server uses the directory.
      OSError: it cannot be used.
    """
    self._memory, self._disk, self._expire = memory, disk, expire_seconds
    self._origin, self._keeps = origin, directory is not None
    self._lock = threading.RLock()
    self._images: OrderedDict[str, StoredImage] = OrderedDict()  # the least recently used first
    self._saving = threading.Lock()
    if directory is None:
      remove_abandoned()
      directory = Path(tempfile.mkdtemp(prefix=PREFIX))
    else:
      directory = directory / KEPT  # other files in the user's directory are left alone
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    self.directory = directory
    self._locked = open(directory / LOCK, "a")  # noqa: SIM115
    try:
      fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
      self._locked.close()
      raise ValueError(f"another server uses {directory}; give each its own --store.") from None
    self.uploads = directory / "uploads"
    shutil.rmtree(self.uploads, ignore_errors=True)
    self.uploads.mkdir(mode=0o700)
    if self._keeps:
      self._read()

  @property
  def memory_bytes(self) -> int:
    """Of the embeddings in memory."""
    with self._lock:
      return sum(one.bytes for one in self._images.values() if one.embedding is not None)

  @property
  def disk_bytes(self) -> int:
    """Of the embeddings on disk."""
    with self._lock:
      return sum(one.bytes for one in self._images.values() if one.saved)

  def __len__(self) -> int:
    return len(self._images)

  def add(self, embedding: ImageEmbedding, size: tuple[int, int], session: str | None) -> str:
    """Adds an image; returns its new id."""
    identity = new_id()
    stored = StoredImage(
      key=hashed(identity),
      owner=hashed(session) if session else "",
      size=size,
      bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(embedding)),
      used=time.time(),
      embedding=embedding,
    )
    with self._lock:
      self._images[stored.key] = stored
    if self._keeps:
      self._save(stored)
    self._shrink()
    return identity

  def find(self, identity: str, session: str | None) -> StoredImage:
    """An image of this session, or of none.

    Raises:
      ApiError: there is none, or it is another session's.
    """
    with self._lock:
      self._forget_expired()
      stored = self._images.get(hashed(identity))
      if stored is None or (stored.owner and stored.owner != (hashed(session) if session else "")):
        raise _unknown()
      stored.used = time.time()
      self._images.move_to_end(stored.key)
      return stored

  def load(self, stored: StoredImage) -> ImageEmbedding:
    """The embedding of an image, from memory or from disk.

    Raises:
      ApiError: it was deleted meanwhile.
    """
    with self._lock:
      if (embedding := stored.embedding) is not None:
        return embedding
      saved = stored.saved
    if not saved:
      raise _unknown()
    try:
      embedding = ImageEmbedding.load(self._path(stored.key))
    except (OSError, ValueError):  # deleted, or damaged by someone else
      self._forget(stored)
      raise _unknown() from None
    with self._lock:
      if stored.key in self._images:
        stored.embedding = embedding
    self._shrink()
    return embedding

  def remove(self, stored: StoredImage) -> None:
    self._forget(stored)

  def close(self) -> None:
    """Deletes everything, unless the store is kept."""
    with self._lock:
      images = list(self._images.values())
      self._images.clear()
    if self._keeps:
      for stored in images:
        self._note(stored)
      shutil.rmtree(self.uploads, ignore_errors=True)
    else:
      shutil.rmtree(self.directory, ignore_errors=True)
    self._locked.close()

  def _shrink(self) -> None:
    """Moves embeddings to disk until the memory suffices, and then deletes some from disk."""
    with self._saving:  # one thread writes at a time
      while (victim := self._victim()) is not None:
        if not victim.saved and victim.bytes <= self._disk:
          self._save(victim)
        with self._lock:
          victim.embedding = None
          if not victim.saved:
            self._forget(victim)
      with self._lock:
        self._forget_expired()
        excess = self.disk_bytes - self._disk
        saved = [one for one in self._images.values() if one.saved]
        if not self._keeps:  # first the files of embeddings that are in memory, too
          saved.sort(key=lambda one: one.embedding is None)
        for stored in saved:
          if excess <= 0:
            break
          excess -= stored.bytes
          if self._keeps or stored.embedding is None:
            self._forget(stored)
          else:
            stored.saved = False
            self._path(stored.key).unlink(missing_ok=True)

  def _victim(self) -> StoredImage | None:
    """The least recently used image in memory, if the memory does not suffice."""
    with self._lock:
      if self.memory_bytes <= self._memory:
        return None
      return next(one for one in self._images.values() if one.embedding is not None)

  def _save(self, stored: StoredImage) -> None:
    """Writes an embedding; without space on the disk, it stays unsaved."""
    path, embedding = self._path(stored.key), stored.embedding
    if embedding is None:  # deleted meanwhile
      return
    part = path.with_suffix(".part")
    try:
      embedding.save(part)
      os.chmod(part, 0o600)
      os.replace(part, path)
    except OSError:
      part.unlink(missing_ok=True)
      return
    with self._lock:
      stored.saved = True
      if stored.key not in self._images:  # deleted meanwhile
        path.unlink(missing_ok=True)
        return
    self._note(stored)

  def _note(self, stored: StoredImage) -> None:
    """Writes what `_read` needs beside an embedding, if the store is kept."""
    if self._keeps and stored.saved:
      write_note(self._path(stored.key).with_suffix(".json"), stored, self._origin)

  def _read(self) -> None:
    """Finds the embeddings of an earlier server; deletes those of other checkpoints."""
    found = []
    for path in self.directory.glob("*.json"):
      try:
        stored = from_note(path, self._origin)
      except (OSError, ValueError, KeyError, TypeError):
        path.unlink(missing_ok=True)
        continue
      if self._path(stored.key).exists():
        found.append(stored)
    self._images.update((one.key, one) for one in sorted(found, key=lambda one: one.used))
    for path in self.directory.iterdir():
      if path.suffix in (".safetensors", ".part", ".note") and path.stem not in self._images:
        path.unlink(missing_ok=True)
    self._shrink()

  def _forget_expired(self) -> None:
    oldest = time.time() - self._expire
    while self._images and (first := next(iter(self._images.values()))).used < oldest:
      self._forget(first)

  def _forget(self, stored: StoredImage) -> None:
    with self._lock:
      self._images.pop(stored.key, None)
      stored.embedding, saved, stored.saved = None, stored.saved, False
    if saved:
      path = self._path(stored.key)
      path.unlink(missing_ok=True)
      path.with_suffix(".json").unlink(missing_ok=True)

  def _path(self, key: str) -> Path:
    return self.directory / f"{key}.safetensors"


def _unknown() -> ApiError:
  return ApiError(
    "unknown_image", "there is no image with this id in this session; upload the image again."
  )
