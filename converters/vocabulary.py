"""Builds `tokenizer.model` from CLIP's vocabulary in any of its published forms.

  tokenizer.json                  Hugging Face, fast tokenizers
  vocabulary.json and merges.txt  KerasHub, in assets/tokenizer of a preset
  vocab.json and merges.txt       Hugging Face, slow tokenizers
  bpe_simple_vocab_16e6.txt.gz    OpenAI's CLIP, open_clip, Meta's SAM 3

All hold the same 48,894 merges; ids follow from them: 256 bytes inside a word, 256 bytes
that end a word (`</w>`), the merges' results, start and end. If a form lists ids, they must be
these. `sam3_jax.inputs.tokenizer` explains the pieces and why SentencePiece then merges as CLIP
does.
"""

import gzip
import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sam3_jax.inputs.sentencepiece_model import INSIDE, LAST, write_model
from sam3_jax.utils.json_text import parse, shown

from .bounds import MAX_TEXT, read_text

MERGES = 48_894  # 49,408 entries without 2 x 256 byte symbols, start and end
ENTRIES = MERGES + 514
_KERAS = "assets/tokenizer/vocabulary.json"
FORMS = (
  "tokenizer.json",
  "vocab.json",
  "bpe_simple_vocab_16e6.txt.gz",
  _KERAS,
)  # the order of search

_END_OF_WORD = "</w>"
_EXPECTED = f"CLIP's vocabulary of {ENTRIES:,} entries ({MERGES:,} merges) was expected"

Merge = tuple[str, str]


def find_vocabulary(directory: Path) -> Path:
  """Returns the first of `FORMS` in a directory, for `build_tokenizer`.

  Raises:
    FileNotFoundError: there is none, or only vocab.json without its merges.txt.
  """
  for name in FORMS:
    path = Path(directory) / name
    lone = path.suffix == ".json" and path.name != "tokenizer.json"
    if path.is_file() and (not lone or path.with_name("merges.txt").is_file()):
      return path
  raise FileNotFoundError(
    f"{directory} holds no vocabulary: looked for tokenizer.json, vocab.json with merges.txt, "
    f"bpe_simple_vocab_16e6.txt.gz and {_KERAS}; put one of them beside the weights."
  )


def build_tokenizer(source: Path) -> bytes:
  """Builds a SentencePiece model with exactly CLIP's ids.

  Args:
    source: one of `FORMS` (merges.txt is read beside vocab.json), or a directory with one.

  Returns:
    The bytes of `tokenizer.model`; every form gives the same bytes.

  Raises:
    FileNotFoundError: `source` or its merges.txt does not exist.
    ValueError: a file is damaged, or holds another vocabulary.
  """
  source = Path(source)
  if source.is_dir():
    source = find_vocabulary(source)
  if source.name.endswith(".gz"):
    merges, vocabulary = _parse_merges(_unzip(source), source, limit=MERGES), None
  elif source.name == "tokenizer.json":
    merges, vocabulary = _parse_fast(source)
  elif source.name in ("vocab.json", "vocabulary.json"):
    beside = source.with_name("merges.txt")
    text = _text(_bytes(beside), beside)
    if source.name == "vocabulary.json" and "#version" not in text.partition("\n")[0]:
      text = f"#version, which KerasHub leaves out\n{text}"
    merges, vocabulary = _parse_merges(text, beside), _json(source)
  else:
    raise ValueError(
      f"{source} is not a known vocabulary file; expected one of {', '.join(FORMS)}."
    )
  entries = _entries(merges, source)
  if vocabulary is not None:
    _compare(vocabulary, entries, source)
  return write_model([_spell(entry) for entry in entries])


def _parse_fast(source: Path) -> tuple[list[Merge], dict[str, Any]]:
  """Merges and ids in a tokenizer.json; a merge is "a b" or, since tokenizers 0.20, ["a", "b"]."""
  content = _json(source)
  try:
    vocabulary = dict(content["model"]["vocab"])
    vocabulary |= {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    merges = [m.split(" ") if isinstance(m, str) else m for m in content["model"]["merges"]]
  except (KeyError, TypeError, ValueError) as error:
    raise ValueError(f"{source} has no model.vocab and model.merges; {_EXPECTED}.") from error
  return _checked(merges, source), vocabulary


def _parse_merges(text: str, source: Path, limit: int | None = None) -> list[Merge]:
  """Reads one merge per line after a `#version` line; CLIP uses the first `limit` of OpenAI's."""
  head, *lines = text.rstrip("\n").split("\n")
  if "#version" not in head:
    raise ValueError(f"{source} does not begin with a #version line; {_EXPECTED}.")
  return _checked([line.split() for line in lines[:limit]], source)


def _checked(merges: Sequence[Any], source: Path) -> list[Merge]:
  if len(merges) != MERGES:
    raise ValueError(f"{source} holds {len(merges):,} merges; {_EXPECTED}.")
  for rank, merge in enumerate(merges):
    pair = isinstance(merge, list) and len(merge) == 2
    if not pair or not all(isinstance(part, str) for part in merge):
      raise ValueError(f"{source}: merge {rank} is {shown(merge)}, not two symbols; {_EXPECTED}.")
  return [(left, right) for left, right in merges]


def _entries(merges: Iterable[Merge], source: Path) -> list[str]:
  """CLIP's entries by id, without start and end, which every form must list."""
  symbols = list(alphabet())
  entries = dict.fromkeys([*symbols, *(symbol + _END_OF_WORD for symbol in symbols)])
  for rank, (left, right) in enumerate(merges):
    known = left in entries and right in entries and not left.endswith(_END_OF_WORD)
    if not known or left + right in entries:
      raise ValueError(
        f"{source}: merge {rank} ({left!r:.40}, {right!r:.40}) does not follow from those before "
        f"it; {_EXPECTED}."
      )
    entries[left + right] = None
  if not any(entry.endswith(_END_OF_WORD) for entry in list(entries)[512:]):
    raise ValueError(f"{source} has no merge that ends a word with {_END_OF_WORD}; {_EXPECTED}.")
  return list(entries)


def _compare(vocabulary: Mapping[str, Any], entries: Sequence[str], source: Path) -> None:
  """Refuses ids that differ from those of the merges; start and end may have any name."""
  if len(vocabulary) != ENTRIES:
    raise ValueError(f"{source} holds {len(vocabulary):,} entries; {_EXPECTED}.")
  for index, entry in enumerate(entries):
    if vocabulary.get(entry) != index:
      raise ValueError(
        f"{source} gives {entry!r} the id {shown(vocabulary.get(entry))} where its merges give "
        f"{index}; {_EXPECTED}."
      )
  special = [vocabulary[name] for name in vocabulary.keys() - set(entries)]
  if sorted(special, key=shown) != [ENTRIES - 2, ENTRIES - 1]:
    raise ValueError(
      f"{source} has start and end at {shown(special)}, not the last two ids; {_EXPECTED}."
    )


def alphabet() -> dict[str, int]:
  """GPT-2's printable characters for the 256 bytes, in the order of their ids, with their bytes.

  Printable Latin-1 characters stand for themselves; the other bytes map to U+0100 and up, in order.
  """
  printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
  others = [byte for byte in range(256) if byte not in printable]
  alphabet = {chr(byte): byte for byte in printable}
  return alphabet | {chr(0x100 + index): byte for index, byte in enumerate(others)}


_INSIDE = {ord(symbol): chr(INSIDE + byte) for symbol, byte in alphabet().items()}
_LAST = {ord(symbol): chr(LAST + byte) for symbol, byte in alphabet().items()}


def _spell(entry: str) -> str:
  """A CLIP entry in the private-use characters of `sam3_jax.inputs.tokenizer`."""
  if not entry.endswith(_END_OF_WORD):
    return entry.translate(_INSIDE)
  body = entry.removesuffix(_END_OF_WORD)
  return body[:-1].translate(_INSIDE) + body[-1].translate(_LAST)


def _bytes(path: Path) -> bytes:
  if not path.is_file():
    raise FileNotFoundError(f"{path} does not exist; {_EXPECTED} there.")
  try:
    return read_text(path)
  except ValueError as error:
    raise ValueError(f"{path} cannot be used: {error}; {_EXPECTED}.") from error


def _text(data: bytes, path: Path) -> str:
  try:
    return data.decode("utf-8")
  except UnicodeDecodeError as error:
    raise ValueError(f"{path} is not UTF-8 text; {_EXPECTED}.") from error


def _unzip(path: Path) -> str:
  try:
    with gzip.open(io.BytesIO(_bytes(path))) as file:
      data = file.read(MAX_TEXT + 1)
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise ValueError(f"{path} is not a complete gzip file ({error}); {_EXPECTED}.") from error
  if len(data) > MAX_TEXT:
    raise ValueError(f"{path} holds more than {MAX_TEXT // 1_000_000} MB; {_EXPECTED}.")
  return _text(data, path)


def _json(path: Path) -> dict[str, Any]:
  text = _text(_bytes(path), path)
  try:
    content = parse(text, "it")
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error}); {_EXPECTED}.") from error
  if not isinstance(content, dict):
    raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; {_EXPECTED}.")
  return content
