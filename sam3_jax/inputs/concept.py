"""Concepts: exemplars that were encoded in some images, to find the same in others."""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from sam3_jax.storage.objects import read_file
from sam3_jax.storage.urls import is_url, parse, redact
from sam3_jax.utils.atomic_files import write_bytes
from sam3_jax.utils.identity import Origin, file_sha256
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.pytrees import Saveable

BOXES_ALONE = "visual"  # the phrase that Meta's code encodes for a prompt without text
BOX_SIZES = (8, 128)  # the exemplars of a prompt are padded to one of these: programs are few


@struct.dataclass
class Concept(Saveable):
  """Exemplars of one or several images, encoded by `Sam3.concept` for use with other images.

  Its first axis is the exemplars: `concept[:2]` has the first two. `save` and `load` keep it in a
  file of a kilobyte per exemplar for the released model in float32.

  Attributes:
    tokens: one for each exemplar box, before it attends to an image.
    positive: False for a negative exemplar.
    text: the noun phrase, as in `Prompt`; None for exemplars only.
    origin: the checkpoint that made it; no other checkpoint may decode it.
  """

  tokens: Float[Array, "U D"]
  positive: Bool[Array, " U"]
  text: str | None = struct.field(pytree_node=False, default=None)
  origin: Origin = struct.field(pytree_node=False, default=Origin())

  @property
  def phrase(self) -> str:
    """The phrase to encode."""
    return BOXES_ALONE if self.text is None else self.text

  @staticmethod
  def join(concepts: "Sequence[Concept]") -> "Concept":
    """One concept with the exemplars of all.

    Args:
      concepts: of the same checkpoint. Those that have a phrase must have the same.

    Raises:
      ValueError: no concept, different checkpoints or phrases, or too many exemplars.
    """
    if not concepts:
      raise ValueError("no concept given; pass a list with at least one.")
    first = concepts[0]
    for other in concepts:
      if other.origin != first.origin:
        raise ValueError(
          f"the concepts were made by two checkpoints, {first.origin} and {other.origin}; make "
          "them again with one of them."
        )
    text = single_phrase(concepts)
    check_exemplars(sum(map(len, concepts)))
    return dataclasses.replace(
      first,
      tokens=jnp.concatenate([one.tokens for one in concepts]),
      positive=jnp.concatenate([one.positive for one in concepts]),
      text=text,
    )

  def save(self, path: str | Path) -> None:
    """Writes a safetensors file, bit for bit: the whole file, or none."""
    from safetensors.flax import save

    write_bytes(path, save(*self._content()))

  def _header(self) -> dict[str, str]:
    return super()._header() | ({} if self.text is None else {"text": self.text})

  @classmethod
  def _from_header(cls, header: Mapping[str, str]) -> dict[str, Any]:
    return super()._from_header(header) | {"text": header.get("text")}


@dataclasses.dataclass(frozen=True)
class ConceptFile:
  """A concept that was read from a file.

  Attributes:
    name: of the file, without its directory.
    sha256: hexadecimal digest of its content.
    concept: the concept.
  """

  name: str
  sha256: str
  concept: Concept = dataclasses.field(compare=False, repr=False)

  @classmethod
  def read(cls, path: str | Path) -> Self:
    """Reads a local file, or an object in a bucket.

    Raises:
      FileNotFoundError: there is no such file.
      OSError: the object cannot be read.
      ValueError: it does not hold a concept, or is on a web server.
    """
    if is_url(path):
      return cls._download(str(path))
    if not os.path.isfile(path):
      raise _missing(path)
    return cls(Path(path).name, file_sha256(path), Concept.load(path))

  @classmethod
  def _download(cls, url: str) -> Self:
    if parse(url).scheme in ("http", "https"):
      raise ValueError(f"{redact(url)} is on a web server; download it, and give the local file.")
    try:
      data = read_file(url)
    except FileNotFoundError:
      raise _missing(url) from None
    with tempfile.TemporaryDirectory() as folder:
      local = Path(folder) / "concept"
      local.write_bytes(data)
      try:
        concept = Concept.load(local)
      except ValueError as error:
        raise ValueError(str(error).replace(str(local), url)) from error
    return cls(url.rpartition("/")[2], hashlib.sha256(data).hexdigest(), concept)

  @property
  def text(self) -> str | None:
    """The noun phrase, if the concept has one."""
    return self.concept.text

  @property
  def phrase(self) -> str:
    """The phrase to encode."""
    return self.concept.phrase

  @property
  def category(self) -> str:
    """The category of its instances: the noun phrase, or else the name without the suffix."""
    return Path(self.name).stem if self.text is None else self.text

  def to_json(self) -> dict[str, Any]:
    """JSON values that identify the concept."""
    return {"text": self.text, "concept": self.name, "sha256": self.sha256}


def _missing(path: str | Path) -> FileNotFoundError:
  return FileNotFoundError(
    f"there is no file of a concept {path}; check the path, or make it with `sam3-jax concept`."
  )


def single_phrase(prompts: Sequence[Any]) -> str | None:
  """The phrase of the exemplars of a concept; None if none has one.

  Args:
    prompts: prompts or concepts.

  Raises:
    ValueError: there are several phrases.
  """
  phrases = list(dict.fromkeys(one.text for one in prompts if one.text is not None))
  if len(phrases) > 1:
    raise ValueError(
      f"a concept has a single phrase; got {shown(phrases[0])} and {shown(phrases[1])}. Make a "
      "concept for each phrase."
    )
  return phrases[0] if phrases else None


def check_exemplars(count: int) -> None:
  """Raises ValueError if there are more exemplars than a prompt takes."""
  if count > BOX_SIZES[-1]:
    raise ValueError(f"a concept has at most {BOX_SIZES[-1]} exemplars; got {count}.")


def padded_slots(count: int) -> int:
  """The padded number of boxes or exemplars of a prompt."""
  return next(size for size in BOX_SIZES if size >= count)
