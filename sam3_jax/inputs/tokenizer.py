"""Tokenizer of phrases: CLIP's byte-level BPE (49,408 entries), run by SentencePiece.

Ids are exactly those of SAM 3's released tokenizer (`SimpleTokenizer` in facebookresearch/sam3,
sam3/model/tokenizer_ve.py, after OpenAI's CLIP, Radford et al. 2021, arXiv:2103.00020). This module
cleans and splits text; `sam3_jax.converters.vocabulary` builds `tokenizer.model` from CLIP's
published vocabulary.

CLIP's BPE as a SentencePiece model: CLIP merges symbols within a word, and the last byte of a word
has its own symbols (`</w>`). So each of the 256 byte values is represented by two private-use
characters, `INSIDE + byte` and `LAST + byte`. The pieces are these 512 characters, followed by the
results of all merges in CLIP's order, with the score -rank. Like CLIP, SentencePiece's BPE merges
the pair with the highest score first, and the leftmost of equal pairs. Piece ids are CLIP's ids.
The additional piece `<unk>` has the last id; it never occurs, since all 512 symbols are pieces.
"""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

import ftfy
import numpy as np
import regex
import sentencepiece
from jaxtyping import Int

from sam3_jax.inputs.sentencepiece_model import END, INSIDE, LAST, START, write_model

PADDING = 0  # as Meta pads; it is also the id of "!" inside a word, so the model masks both

MAX_CHARACTERS = 10_000  # of a phrase; the context holds far fewer
SHORTEN = "Use a short noun phrase."
NAME_IT = "Name what to find."
_VISIBLE = regex.compile(r"[^\p{C}\p{Z}]")  # not a control character, format character or space

# Meta's pattern, unchanged. It needs `regex`, as `re` does not support \p{L} and \p{N}.
_WORD = regex.compile(
  f"{START}|{END}" + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
  regex.IGNORECASE,
)


class Tokenizer:
  """SAM 3's tokenizer: cleans and splits phrases as CLIP does, and encodes word by word.

  Attributes:
    model: the bytes of `tokenizer.model`.
    context: context length T, in tokens.
    vocabulary: size of the text encoder's embedding table (49,408).
    start, end: ids of the start and end tokens (49406, 49407).
  """

  def __init__(self, source: str | Path | bytes, context: int = 32):
    """Reads a tokenizer model.

    Args:
      source: path of a `tokenizer.model`, or its bytes.
      context: context length in tokens, at least 2; 32 for the released model.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a SentencePiece model, or a model of another vocabulary; or `context` < 2.
    """
    if context < 2:
      raise ValueError(f"context must be at least 2 (start and end), got {context}; SAM 3 has 32.")
    self.model = _read(source)
    self.context = context
    self._pieces = _load(self.model, "the given bytes" if isinstance(source, bytes) else source)
    self.start = self._pieces.bos_id()
    self.end = self._pieces.eos_id()
    self.vocabulary = len(self._pieces) - 1  # without <unk>

  def __call__(self, phrases: Sequence[str], *, truncate: bool = False) -> Int[np.ndarray, " P T"]:
    """Encodes phrases.

    Args:
      phrases: P strings; an empty string gives only the start and end tokens.
      truncate: truncate phrases that are too long, as Meta's tokenizer does; the end token is kept.
        This package never does, since it changes the meaning of the phrase.

    Returns:
      int32 [P, context]: start, tokens of the phrase, end, then zeros.

    Raises:
      ValueError: a phrase has too many tokens for `context`.
      TypeError: `phrases` is a single string, or not all are strings.
    """
    if isinstance(phrases, str | bytes):
      raise TypeError(f"phrases must be a sequence of strings; write [{phrases!r:.60}] for one.")
    rows = np.full((len(phrases), self.context), PADDING, np.int32)
    for row, phrase in zip(rows, phrases, strict=True):
      if not isinstance(phrase, str):
        raise TypeError(f"a phrase must be a str, got {phrase!r:.60} ({type(phrase).__name__}).")
      if not truncate and (fault := self._length_fault(phrase)):
        raise ValueError(f"{fault}. {SHORTEN}")
      ids = [self.start, *self.encode(phrase, limit=self.context - 2), self.end]
      row[: len(ids)] = ids
    return rows

  def fault(self, phrase: str) -> str:
    """Says why a phrase is invalid, without a full stop; returns an empty string if it is valid.

    All commands and the API use this rule: a phrase must pass `phrase_fault` and must not have more
    tokens than the text encoder reads.
    """
    return phrase_fault(phrase) or self._length_fault(phrase)

  def check(self, phrases: Iterable[str]) -> None:
    """Raises ValueError for the first invalid phrase."""
    for phrase in phrases:
      if fault := self.fault(phrase):
        raise ValueError(f"{fault}. {NAME_IT if phrase_fault(phrase) else SHORTEN}")

  def encode(self, text: str, limit: int | None = None) -> list[int]:
    """Token ids of a text, cleaned and split, without start, end and padding; at most `limit`."""
    ids: list[int] = []
    for match in _WORD.finditer(clean(text)):
      if limit is not None and len(ids) >= limit:
        break  # long texts take no more time
      ids += self._encode_word(match.group())
    return ids[:limit]

  def _length_fault(self, phrase: str) -> str:
    most = self.context - 2  # without start and end
    if len(phrase) > MAX_CHARACTERS:
      return (
        f"phrase {phrase[:60]!r} has {len(phrase):,} characters, and at most {most} tokens are read"
      )
    # A token has at least one byte, so most phrases are short enough without counting tokens.
    if (
      len(clean(phrase).encode(errors="replace")) <= most
      or (count := len(self.encode(phrase))) <= most
    ):
      return ""
    return f"phrase {phrase[:60]!r} has {count} tokens, and at most {most} are read"

  def _encode_word(self, word: str) -> list[int]:
    if word in (START, END):
      return [self.start if word == START else self.end]
    return self._pieces.encode(symbols(word.encode()))


def trim(model: bytes, entries: int) -> bytes:
  """Reduces a tokenizer to its first merges, for a small model with `entries` ids in total.

  Rare words get more tokens, but every text can be encoded, since every byte is a piece.

  Raises:
    ValueError: `entries` is less than 514 (the byte symbols, start and end) or more than there are.
  """
  pieces = _load(model, "the given bytes")
  most = len(pieces) - 1  # without <unk>
  if not 514 <= entries <= most:
    raise ValueError(
      f"a vocabulary reduced from {most:,} entries must have 514 to {most:,}; got {entries:,}."
    )
  return write_model([pieces.id_to_piece(index) for index in range(entries - 2)])


def phrase_fault(phrase: str) -> str:
  """Says why a text is invalid for every tokenizer, without a full stop; "" if it is valid."""
  if len(phrase) <= MAX_CHARACTERS and not _VISIBLE.search(clean(phrase)):
    return f"phrase {phrase[:60]!r} is empty"
  if any("\ud800" <= character <= "\udfff" for character in phrase):
    return f"phrase {phrase[:60]!r} has bytes that are not valid UTF-8"
  return ""


def check_distinct(phrases: Iterable[str | None]) -> None:
  """Raises ValueError if two phrases are equal after `clean`; None is no phrase."""
  seen: set[str] = set()
  for phrase in phrases:
    if phrase is not None:
      if clean(phrase) in seen:
        raise ValueError(f"phrase {phrase!r:.60} is given twice: give each phrase once.")
      seen.add(clean(phrase))


def distinct(phrases: Iterable[str]) -> list[str]:
  """The phrases without those that equal an earlier one after `clean`."""
  found: dict[str, str] = {}
  for phrase in phrases:
    found.setdefault(clean(phrase), phrase)
  return list(found.values())


def clean(text: str) -> str:
  """Cleans text as CLIP does: fixes mojibake and HTML entities, collapses spaces, lowers case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return regex.sub(r"\s+", " ", text).strip().lower()


def symbols(word: bytes) -> str:
  """A word in the symbols of the model: one private-use character for each byte (see above)."""
  return "".join([chr(INSIDE + byte) for byte in word[:-1]]) + chr(LAST + word[-1])


def _read(source: str | Path | bytes) -> bytes:
  if isinstance(source, bytes):
    return source
  path = Path(source) if isinstance(source, str) else source  # may be in a bucket
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is not a file; give the tokenizer.model that `sam3-jax convert` writes."
    )
  return path.read_bytes()


def _load(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
  """Loads a model and checks that its vocabulary has the form described above."""
  remedy = "give the tokenizer.model that `sam3-jax convert` writes."
  try:
    if not model:  # SentencePiece would accept it, and log to stderr at every use
      raise RuntimeError("it is empty")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError as error:
    raise ValueError(f"{name} is not a SentencePiece model, or is damaged; {remedy}") from error

  alphabet = {chr(first + byte) for first in (INSIDE, LAST) for byte in range(256)}
  found = {pieces.id_to_piece(index) for index in range(min(512, len(pieces)))}
  last = len(pieces) - 1
  if found != alphabet or (pieces.bos_id(), pieces.eos_id()) != (last - 2, last - 1):
    raise ValueError(f"{name} is a SentencePiece model, but not of CLIP's vocabulary; {remedy}")
  return pieces
