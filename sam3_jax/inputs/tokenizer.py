"""Phrases to token ids: CLIP's byte-level BPE (49,408 entries), run by SentencePiece.

Owns the cleaning and splitting of text and the meaning of `tokenizer.model`; the file itself is
built from CLIP's published vocabulary by `sam3_jax.converters.vocabulary`. Ids are exactly those of
SAM 3's released tokenizer (`SimpleTokenizer` in facebookresearch/sam3, sam3/model/tokenizer_ve.py,
after OpenAI's CLIP, Radford et al. 2021, arXiv:2103.00020).

How a byte-level BPE becomes a SentencePiece model: CLIP merges symbols inside one word at a time,
and a word's last byte is a symbol of its own (`</w>`). So each of the 256 byte values is written as
one of two private-use characters, `INSIDE + byte` or `LAST + byte`; the model's pieces are those
512 characters and then every merge's result, in CLIP's order, with the score -rank. SentencePiece's
BPE joins the best-scored neighbours first, the leftmost of equals, which is CLIP's rule. Piece ids
are CLIP's ids; the one piece more, `<unk>`, has the last id and never comes out, as all 512 symbols
are pieces.
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

PADDING = 0  # Meta pads with zeros; it is also the id of "!" inside a word, so the model masks both

LONGEST = 10_000  # characters of a phrase that are cleaned and split; the context holds far fewer
SHORTEN = "Use a short noun phrase."
NAME_IT = "Name what to find."
_SEEN = regex.compile(r"[^\p{C}\p{Z}]")  # neither a control nor a format character, nor a space

# Meta's pattern, letter for letter; `regex` rather than `re`, which does not know \p{L} and \p{N}.
_WORD = regex.compile(
  f"{START}|{END}" + r"|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
  regex.IGNORECASE,
)


class Tokenizer:
  """SAM 3's tokenizer: cleans and splits phrases as CLIP does, encodes word by word.

  Attributes:
    model: the bytes of `tokenizer.model`.
    context: ids in a row, T.
    vocabulary: number of ids the text encoder's table needs (49,408).
    start, end: ids that open and close every row (49406, 49407).
  """

  def __init__(self, source: str | Path | bytes, context: int = 32):
    """Reads a model.

    Args:
      source: path of a `tokenizer.model`, or its bytes.
      context: ids in a row, at least 2; 32 for the released model.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it is no SentencePiece model, or one of another vocabulary; or `context` < 2.
    """
    if context < 2:
      raise ValueError(f"context must be at least 2 (start and end), got {context}; SAM 3 has 32.")
    self.model = _read(source)
    self.context = context
    self._pieces = _load(self.model, "the given bytes" if isinstance(source, bytes) else source)
    self.start = self._pieces.bos_id()
    self.end = self._pieces.eos_id()
    self.vocabulary = len(self._pieces) - 1  # all but <unk>

  def __call__(self, phrases: Sequence[str], *, truncate: bool = False) -> Int[np.ndarray, " P T"]:
    """Encodes phrases to rows of ids.

    Args:
      phrases: P strings; an empty one gives start and end alone.
      truncate: cut a phrase that is too long, as Meta's tokenizer does; its row still closes with
        the end id. The model then reads another phrase, so nothing in this package asks for it.

    Returns:
      int32 [P, context]: start, the words' ids, end, then zeros.

    Raises:
      ValueError: a phrase has more tokens than `context` holds.
      TypeError: `phrases` is a single string, or holds something that is no string.
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
    """Why a phrase cannot be asked for, without a full stop; an empty string if it can.

    The one rule for all commands and for the API: see `phrase_fault`, and it must not have more
    tokens than the text encoder reads, as that would find what the beginning of the phrase names.
    """
    return phrase_fault(phrase) or self._length_fault(phrase)

  def check(self, phrases: Iterable[str]) -> None:
    """Raises ValueError of the first phrase that cannot be asked for."""
    for phrase in phrases:
      if fault := self.fault(phrase):
        raise ValueError(f"{fault}. {NAME_IT if phrase_fault(phrase) else SHORTEN}")

  def encode(self, text: str, limit: int | None = None) -> list[int]:
    """The ids of one text, cleaned and split, without start, end or padding; the first `limit`."""
    ids: list[int] = []
    for match in _WORD.finditer(clean(text)):
      if limit is not None and len(ids) >= limit:
        break  # a page of text costs no more than a row
      ids += self._encode_word(match.group())
    return ids[:limit]

  def _length_fault(self, phrase: str) -> str:
    most = self.context - 2  # start and end take one each
    if len(phrase) > LONGEST:
      return (
        f"phrase {phrase[:60]!r} has {len(phrase):,} characters, and at most {most} tokens are read"
      )
    # A token is a byte at least, so short phrases, which most are, need no counting.
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
  """The same tokenizer with the first merges only, for a small model: `entries` ids in all.

  Rarer words come out in more pieces; nothing is lost, as every byte is a piece.

  Raises:
    ValueError: fewer entries than the 512 bytes' symbols, start and end, or more than there are.
  """
  pieces = _load(model, "the given bytes")
  most = len(pieces) - 1  # all but <unk>
  if not 514 <= entries <= most:
    raise ValueError(
      f"a vocabulary cut from {most:,} entries has 514 to {most:,}; not {entries:,}."
    )
  return write_model([pieces.id_to_piece(index) for index in range(entries - 2)])


def phrase_fault(phrase: str) -> str:
  """Why a text is no phrase, whatever the tokenizer, without a full stop; "" if it is one."""
  if len(phrase) <= LONGEST and not _SEEN.search(clean(phrase)):
    return f"phrase {phrase[:60]!r} is empty"
  if any("\ud800" <= character <= "\udfff" for character in phrase):
    return f"phrase {phrase[:60]!r} holds bytes that are no text in UTF-8"
  return ""


def clean(text: str) -> str:
  """CLIP's cleaning: mojibake and HTML entities mended, white space collapsed, lower case."""
  text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
  return regex.sub(r"\s+", " ", text).strip().lower()


def symbols(word: bytes) -> str:
  """A word as the model's pieces spell it: one private-use character a byte (see above)."""
  return "".join([chr(INSIDE + byte) for byte in word[:-1]]) + chr(LAST + word[-1])


def _read(source: str | Path | bytes) -> bytes:
  if isinstance(source, bytes):
    return source
  path = Path(source) if isinstance(source, str) else source  # it may be in a bucket
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} is no file; a tokenizer.model was expected there, as `sam3-jax convert` writes it."
    )
  return path.read_bytes()


def _load(model: bytes, name: str | Path) -> sentencepiece.SentencePieceProcessor:
  """The processor, once it is certain that it holds a vocabulary in this module's form."""
  remedy = "give the tokenizer.model that `sam3-jax convert` writes."
  try:
    if not model:  # which SentencePiece accepts, and then logs to stderr at every use
      raise RuntimeError("it is empty")
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError as error:
    raise ValueError(f"{name} is no SentencePiece model, or a damaged one; {remedy}") from error
  alphabet = {chr(first + byte) for first in (INSIDE, LAST) for byte in range(256)}
  found = {pieces.id_to_piece(index) for index in range(min(512, len(pieces)))}
  last = len(pieces) - 1
  if found != alphabet or (pieces.bos_id(), pieces.eos_id()) != (last - 2, last - 1):
    raise ValueError(f"{name} is a SentencePiece model, but not of CLIP's vocabulary; {remedy}")
  return pieces
