"""An oracle for the tokenizer tests: CLIP's algorithm, merge by merge, said plainly.

Its vocabulary is taken out of the committed tokenizer.model (no other copy is kept), and the
SHA-256 below ties it to OpenAI's file.
"""

import html
import unicodedata
from functools import cache
from itertools import pairwise
from pathlib import Path

import ftfy
import sentencepiece

MODEL = Path(__file__).parent / "goldens" / "tokenizer.model"  # of CLIP, 49,408 entries

# zcat bpe_simple_vocab_16e6.txt.gz | sed -n 2,48895p | sha256sum
PUBLISHED = "d308b7377a8ceaa9707a21614fe8c831b9196e197b7aeb69833359362907af02"

CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
SPECIAL = ("<start_of_text>", "<end_of_text>")


@cache
def byte_symbols() -> dict[int, str]:
  """GPT-2's printable character for each byte, in the order of CLIP's ids."""
  keep = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
  shifted = [b for b in range(256) if b not in keep]
  return {b: chr(b) for b in keep} | {b: chr(256 + n) for n, b in enumerate(shifted)}


@cache
def merges() -> list[tuple[str, str]]:
  """CLIP's merges by rank: a piece's parts are what all earlier merges leave of it."""
  processor = sentencepiece.SentencePieceProcessor(model_file=str(MODEL))
  symbols = byte_symbols()
  ranks: dict[tuple[str, str], int] = {}
  for index in range(512, 512 + 48894):
    points = [ord(character) - 0xE000 for character in processor.id_to_piece(index)]
    word = [symbols[point % 256] + ("</w>" if point >= 256 else "") for point in points]
    left, right = merge_all(word, ranks)
    ranks[left, right] = index - 512
  return list(ranks)


def merge_all(word: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
  """Joins the pair of the lowest rank, everywhere, from the left, until no pair has a rank."""
  while True:
    known = [pair for pair in pairwise(word) if pair in ranks]
    if not known:
      return word
    pair = min(known, key=ranks.__getitem__)
    joined, i = [], 0
    while i < len(word):
      step = 2 if tuple(word[i : i + 2]) == pair else 1
      joined.append("".join(word[i : i + step]))
      i += step
    word = joined


@cache
def vocabulary() -> dict[str, int]:
  symbols = list(byte_symbols().values())
  entries = symbols + [s + "</w>" for s in symbols] + [a + b for a, b in merges()] + list(SPECIAL)
  return {entry: index for index, entry in enumerate(entries)}


@cache
def ranks() -> dict[tuple[str, str], int]:
  return {pair: rank for rank, pair in enumerate(merges())}


def encode_word(word: str) -> list[int]:
  if word in SPECIAL:
    return [vocabulary()[word]]
  *inside, last = [byte_symbols()[byte] for byte in word.encode()]
  return [vocabulary()[part] for part in merge_all([*inside, last + "</w>"], ranks())]


def split(text: str) -> list[str]:
  """CLIP's words, by Unicode category rather than by a pattern."""
  words, i = [], 0
  folded = text.replace("ſ", "s")  # as a pattern that ignores case does
  while i < len(text):
    fixed = next((w for w in SPECIAL + CONTRACTIONS if folded.startswith(w, i)), None)
    end = i + (len(fixed) if fixed else 1)
    kind = _kind(text[i])
    if not fixed and kind in ("letter", "other"):
      while end < len(text) and _kind(text[end]) == kind:
        end += 1
    if kind != "space":
      words.append(text[i:end])
    i = end
  return words


def _kind(character: str) -> str:
  category = unicodedata.category(character)[0]
  if character.isspace():
    return "space"
  return {"L": "letter", "N": "number"}.get(category, "other")


def encode(text: str, context: int) -> list[int]:
  """A row: start, ids, end, zeros."""
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  ids = [49406]
  for word in split(" ".join(text.split()).lower()):
    ids += encode_word(word)
  ids = [*ids, 49407]
  if len(ids) > context:
    ids = [*ids[: context - 1], 49407]
  return ids + [0] * (context - len(ids))
