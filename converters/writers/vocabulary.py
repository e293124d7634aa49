"""Writes CLIP's vocabulary in its published forms, from `tokenizer.model`.

A SentencePiece model holds the results of merges, but not the two parts that each joins. They
follow from the order: the earlier merges reduce a result to exactly the two parts of its own merge.
"""

import gzip
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from sam3_jax.inputs.sentencepiece_model import INSIDE, LAST

from ..vocabulary import ENTRIES, Merge, alphabet

HEADER = "#version: 0.2"
START, END = "<|startoftext|>", "<|endoftext|>"
OPENAI = "bpe_simple_vocab_16e6.txt.gz"


def write_openai(model: bytes, directory: Path) -> None:
  """Writes OpenAI's form, which open_clip and Meta's package read."""
  lines = [HEADER, *(" ".join(merge) for merge in merges(model))]
  text = "\n".join(lines) + "\n"
  (directory / OPENAI).write_bytes(gzip.compress(text.encode(), mtime=0))


def write_huggingface(model: bytes, directory: Path, context: int) -> None:
  """Writes vocab.json, merges.txt and the settings of transformers' CLIPTokenizer."""
  lines = [HEADER, *(" ".join(merge) for merge in merges(model))]
  (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
  ids = {entry: index for index, entry in enumerate([*entries(model), START, END])}
  (directory / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
  special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
  settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context, **special}
  (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
  (directory / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


def entries(model: bytes) -> list[str]:
  """CLIP's entries by id, without start and end.

  Raises:
    ValueError: the vocabulary was trimmed, so that its ids are not CLIP's.
  """
  processor = SentencePieceProcessor(model_proto=model)
  pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size() - 3)]
  if len(pieces) + 2 != ENTRIES:
    raise ValueError(
      f"its vocabulary has {len(pieces) + 2:,} entries; other programs have CLIP's {ENTRIES:,} "
      "and would give words other ids."
    )
  return [_clip(piece) for piece in pieces]


def merges(model: bytes) -> list[Merge]:
  """The merges of a model, in the order of their ranks."""
  processor = SentencePieceProcessor(model_proto=model)
  pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size() - 3)]
  ranks = {piece: rank for rank, piece in enumerate(pieces)}
  pairs = [_parts(piece, ranks) for piece in pieces[512:]]
  return [(_clip(left), _clip(right)) for left, right in pairs]


def _parts(piece: str, ranks: Mapping[str, int]) -> Sequence[str]:
  """The two symbols that the merges before a piece's own reduce it to."""
  parts, own = list(piece), ranks[piece]
  while len(parts) > 2:
    joined = [left + right for left, right in itertools.pairwise(parts)]
    best = min(joined, key=lambda pair: ranks.get(pair, own))
    if ranks.get(best, own) >= own:
      raise ValueError(f"piece {own} of the tokenizer does not follow from those before it.")
    merged, i = [], 0
    while i < len(parts):
      both = i + 1 < len(parts) and parts[i] + parts[i + 1] == best
      merged.append(best if both else parts[i])
      i += 2 if both else 1
    parts = merged
  return parts


_SYMBOLS = {byte: symbol for symbol, byte in alphabet().items()}
_CLIP = {INSIDE + byte: symbol for byte, symbol in _SYMBOLS.items()}
_CLIP |= {LAST + byte: f"{symbol}</w>" for byte, symbol in _SYMBOLS.items()}


def _clip(piece: str) -> str:
  return piece.translate(_CLIP)
