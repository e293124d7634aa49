"""The tokenizer against Meta's ids and a merge-by-merge oracle; truncation, padding, errors."""

import hashlib
import io
import json
import pickle
import random
import unicodedata
from functools import partial
from itertools import islice
from pathlib import Path

import clip_bpe
import numpy as np
import pytest
import sentencepiece

from sam3_jax.inputs import tokenizer
from sam3_jax.inputs.tokenizer import Tokenizer, clean, phrase_fault

GOLDEN = json.loads((Path(__file__).parent / "goldens" / "tokenizer.json").read_text())
START, END = 49406, 49407


@pytest.fixture(scope="module")
def tokenize() -> Tokenizer:
  return Tokenizer(clip_bpe.MODEL)


def test_meta_ids(tokenize):
  rows = tokenize([text for text, _ in GOLDEN], truncate=True)
  assert len(GOLDEN) == 362
  assert rows.dtype == np.int32
  np.testing.assert_array_equal(rows, [ids for _, ids in GOLDEN])


def test_oracle_equals_meta_ids():
  for text, ids in GOLDEN:
    assert clip_bpe.encode(text, 32) == ids


def test_merges_equal_the_published_merges():
  lines = "".join(f"{left} {right}\n" for left, right in clip_bpe.merges())
  assert hashlib.sha256(lines.encode()).hexdigest() == clip_bpe.PUBLISHED


def test_attributes_come_from_the_model(tokenize):
  assert (tokenize.start, tokenize.end, tokenize.vocabulary) == (START, END, 49408)
  assert tokenize.context == 32
  assert tokenize.model == clip_bpe.MODEL.read_bytes()


def test_every_entry_is_encoded_as_by_the_oracle(tokenize):
  """Each entry that ends a word is encoded as by the oracle, nearly always to its own id."""
  own = 0
  to_byte = {symbol: byte for byte, symbol in clip_bpe.byte_symbols().items()}
  for entry, index in clip_bpe.vocabulary().items():
    if not entry.endswith("</w>"):
      continue
    word = bytes(to_byte[symbol] for symbol in entry.removesuffix("</w>"))
    ids = tokenize._pieces.encode(tokenizer.symbols(word))
    parts = [clip_bpe.byte_symbols()[byte] for byte in word]
    merged = clip_bpe.merge_all([*parts[:-1], parts[-1] + "</w>"], clip_bpe.ranks())
    assert ids == [clip_bpe.vocabulary()[part] for part in merged]
    own += ids == [index]
  assert own == 256 + sum(right.endswith("</w>") for _, right in clip_bpe.merges())


def _known(text: str) -> bool:
  """Whether the oracle's Unicode tables (Python's) know all characters; `regex` has newer ones."""
  return all(unicodedata.category(character) != "Cn" for character in clean(text))


def _ascii(rng):
  return "".join(chr(rng.randrange(32, 127)) for _ in range(rng.randint(1, 40)))


def _unicode(rng):
  top = rng.choice((0x250, 0x3000, 0x10000, 0x20000, 0x110000))
  characters = [chr(rng.randrange(top)) for _ in range(rng.randint(1, 20))]
  return "".join(filter(_known, characters))


def _merges(rng):
  """Entries split at other positions than their merge, beside parts that merge with neighbors."""
  texts = []
  for _ in range(rng.randint(1, 4)):
    left, right = rng.choice(clip_bpe.merges())
    body = (left + right).removesuffix("</w>")
    cut = rng.randint(0, len(body))
    texts.append(body[:cut] + body[max(cut - 1, 0) :] * rng.randint(1, 3) + rng.choice(body))
  return "".join(texts)


def _repeats(rng):
  return "".join(rng.choice("aelotsn-.!") * rng.randint(1, 9) for _ in range(rng.randint(1, 6)))


def _digits(rng):
  return "".join(rng.choice("0123456789½²٣Ⅷ,. a") for _ in range(rng.randint(1, 30)))


def _apostrophes(rng):
  return "".join(
    rng.choice(("'", "'s", "'S", "'ſ", "'ll", "'LL", "'re", "'v", "\u2019", "!", "don", " ", "3"))
    for _ in range(rng.randint(1, 14))
  )


def _emoji(rng):
  parts = ("😀", "👩\u200d👩\u200d👧", "🇫🇷", "❤️", "☎", "👍🏽", "cat", " ", "é", "中")
  return "".join(rng.choice(parts) for _ in range(rng.randint(1, 8)))


def _invisible(rng):
  parts = "\u200b\u200c\u200d\u2060\ufeff\u00ad\u00a0\u2028\u3000\t\r\n\x1c\x85\x00ab e\u0301"
  return "".join(rng.choice(parts) for _ in range(rng.randint(1, 20)))


def _markup(rng):
  parts = ("&amp;", "&amp;lt;", "&#x1c;", "&#233;", "&nbsp;", "&", ";", "<start_of_text>", "x", " ")
  parts += (
    "<end_of_text>",
    "<END_OF_TEXT>",
    "<ſtart_of_text>",
    "<|startoftext|>",
    "</w>",
    "_",
    "<",
  )
  return "".join(rng.choice(parts) for _ in range(rng.randint(1, 8)))


def _long_words(rng):
  return "".join(rng.choice("abcdefghijklmnopqrstuvwxyzé") for _ in range(rng.randint(100, 400)))


def _bytes(rng):
  return rng.randbytes(rng.randint(1, 40)).decode(rng.choice(("utf-8", "latin-1")), "replace")


@pytest.mark.slow
@pytest.mark.parametrize(
  ("make", "count"),
  [
    (_ascii, 1000),
    (_unicode, 1000),
    (_merges, 2000),
    (_repeats, 1000),
    (_digits, 500),
    (_apostrophes, 500),
    (_emoji, 500),
    (_invisible, 500),
    (_markup, 500),
    (_long_words, 100),
    (_bytes, 1000),
  ],
)
def test_random_strings(make, count):
  tokenize = Tokenizer(clip_bpe.MODEL, context=77)
  rng = random.Random(f"{make.__name__} 3")
  texts = list(islice((text for text in iter(partial(make, rng), None) if _known(text)), count))
  rows = tokenize(texts, truncate=True)
  for text, row in zip(texts, rows, strict=True):
    assert row.tolist() == clip_bpe.encode(text, 77), repr(text)


def test_no_phrases_and_empty_phrase(tokenize):
  assert tokenize([]).shape == (0, 32)
  assert tokenize([]).dtype == np.int32
  for blank in ("", " ", "\t\n\u3000", "&nbsp;"):
    assert tokenize([blank])[0].tolist() == [START, END] + [0] * 30
  assert tokenize.encode("") == []


@pytest.mark.parametrize("words", [29, 30, 31, 200])
def test_truncation(tokenize, words):
  """30 words fill a context of 32; of longer phrases, 30 tokens and the end id remain."""
  row = tokenize(["cat " * words], truncate=True)[0]
  kept = min(words, 30)
  assert row.tolist() == [START] + [2368] * kept + [END] + [0] * (30 - kept)


@pytest.mark.parametrize("context", [2, 3, 16, 33])
def test_other_contexts(context):
  phrases = [text for text, _ in GOLDEN]
  rows = Tokenizer(clip_bpe.MODEL.read_bytes(), context=context)(phrases, truncate=True)
  assert rows.shape == (len(phrases), context)
  for phrase, row in zip(phrases, rows, strict=True):
    assert row.tolist() == clip_bpe.encode(phrase, context)


def test_truncation_inside_a_word(tokenize):
  ids = tokenize.encode("x" * 2000)
  row = tokenize(["x" * 2000], truncate=True)[0]
  assert row[1:31].tolist() == ids[:30]
  assert row[31] == END
  assert tokenize.encode("x" * 2000, limit=0) == []


def test_truncation_of_long_text_is_fast(tokenize, monkeypatch):
  encoded = []
  plain = Tokenizer._encode_word
  monkeypatch.setattr(
    Tokenizer, "_encode_word", lambda self, word: encoded.append(word) or plain(self, word)
  )
  tokenize(["cat " * 10_000], truncate=True)
  assert len(encoded) == 30


def test_exclamation_mark_inside_a_word_is_the_padding_id(tokenize):
  """Id 0 has two meanings, as in Meta's tokenizer."""
  row = tokenize(["?!?!~#"])[0].tolist()
  assert row == clip_bpe.encode("?!?!~#", 32)
  assert tokenize(["!\u0301"])[0, 1] == 0


def test_special_tokens_in_a_text(tokenize):
  assert tokenize.encode("<start_of_text>cat<END_OF_TEXT>") == [START, 2368, END]


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("  Yellow\t School \n BUS ", "yellow school bus"),
    ("schÃ¶n", "schön"),
    ("caf&eacute; &amp;amp; bar", "café & bar"),
    ("&lt;b&gt;", "<b>"),
    ("“quoted”", '"quoted"'),
    ("\ud800", "\ufffd"),
    ("\u3000", ""),
  ],
)
def test_clean(text, expected):
  assert clean(text) == expected


def test_pickles(tokenize):
  """Data loader workers get a copy."""
  copy = pickle.loads(pickle.dumps(tokenize))
  np.testing.assert_array_equal(copy(["yellow school bus"]), tokenize(["yellow school bus"]))


@pytest.mark.parametrize("phrases", ["cat", b"cat"])
def test_single_string_is_rejected(tokenize, phrases):
  with pytest.raises(TypeError, match=r"sequence of strings; write \[.*cat"):
    tokenize(phrases)


@pytest.mark.parametrize("phrase", [None, 3, b"cat", ["cat"]])
def test_phrase_of_wrong_type(tokenize, phrase):
  with pytest.raises(TypeError, match="a phrase must be a str, got"):
    tokenize(["dog", phrase])


@pytest.mark.parametrize("context", [-1, 0, 1])
def test_context_too_small(context):
  with pytest.raises(ValueError, match="context must be at least 2"):
    Tokenizer(clip_bpe.MODEL, context=context)


def test_missing_model(tmp_path):
  for path in (tmp_path / "tokenizer.model", tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not a file; give the tokenizer.model"):
      Tokenizer(path)


@pytest.mark.parametrize("data", [b"", b"some text, no model", clip_bpe.MODEL.read_bytes()[:-7]])
def test_damaged_model(tmp_path, data, capfd):
  path = tmp_path / "tokenizer.model"
  path.write_bytes(data)
  for source, name in ((path, str(path)), (data, "the given bytes")):
    with pytest.raises(ValueError, match="is not a SentencePiece model, or is damaged") as error:
      Tokenizer(source)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
  assert capfd.readouterr().err == ""


def _other_vocabulary() -> bytes:
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["a cat and a dog", "a bus and a car"]),
    model_writer=model,
    vocab_size=20,
    model_type="bpe",
    minloglevel=2,
  )
  return model.getvalue()


def test_model_of_another_vocabulary():
  model = clip_bpe.MODEL.read_bytes()
  others = (_other_vocabulary(), model[: 20 * 1000], model.replace("\ue041".encode(), b"abc"))
  for other in others:
    with pytest.raises(ValueError, match=r"not of CLIP's vocabulary|damaged"):
      Tokenizer(other)


def test_trimmed_vocabulary_keeps_the_first_merges(tokenize):
  small = Tokenizer(tokenizer.trim(clip_bpe.MODEL.read_bytes(), 4098))
  assert (small.vocabulary, small.start, small.end) == (4098, 4096, 4097)
  assert len(small.model) < 100_000
  for text, _ in GOLDEN:
    ids, wanted = small.encode(text), tokenize.encode(text)
    assert [i for i in ids if i < 4096] == ids or "<" in text
    spelled = [small._pieces.id_to_piece(ids), tokenize._pieces.id_to_piece(wanted)]
    assert "".join(spelled[0]) == "".join(spelled[1])
    if all(i < 4096 for i in wanted):
      assert ids == wanted
  assert tokenizer.trim(clip_bpe.MODEL.read_bytes(), 49408) == clip_bpe.MODEL.read_bytes()


@pytest.mark.parametrize("entries", [0, 513, 49409])
def test_trimmed_vocabulary_size_has_bounds(entries):
  with pytest.raises(ValueError, match=f"514 to 49,408; got {entries:,}"):
    tokenizer.trim(clip_bpe.MODEL.read_bytes(), entries)


LONG = "cat " * 31
EMPTY = ("", " ", "\t\n\u3000", "&nbsp;", "\0\x1b\x07", "\u200b\u202e", "\ufeff")


def test_long_phrases_are_rejected_unless_truncated(tokenize):
  for phrase in (LONG, "cat " * 10_000, "x" * 2000):
    with pytest.raises(ValueError, match=r"phrase '.* has .*, and at most 30 .*Use a short noun"):
      tokenize(["dog", phrase])
    with pytest.raises(ValueError, match="at most 30"):
      tokenize.check(["dog", phrase])
    assert len(tokenize.fault(phrase)) < 200
    assert tokenize([phrase], truncate=True)[0, -1] == END
  for phrase in ("cat " * 30, "a" * 30, "\N{CAT FACE}" * 7, " " * 9000 + "cat"):
    assert tokenize.fault(phrase) == ""
    tokenize.check([phrase])
    assert tokenize([phrase]).shape == (1, 32)


@pytest.mark.parametrize("phrase", EMPTY)
def test_empty_phrases(tokenize, phrase):
  assert "is empty" in tokenize.fault(phrase)
  assert "is empty" in phrase_fault(phrase)
  with pytest.raises(ValueError, match=r"is empty. Name what to find."):
    tokenize.check([phrase])


def test_phrases_with_undecodable_bytes(tokenize):
  assert "not valid UTF-8" in tokenize.fault("caf\udce9")
  assert phrase_fault("caf\u00e9 \N{CAT FACE} !") == ""


def test_equal_phrases():
  assert tokenizer.distinct(["Dog", "cat", " dog", "dogs"]) == ["Dog", "cat", "dogs"]
  tokenizer.check_distinct(["dog", None, "cat", None])
  with pytest.raises(
    ValueError, match=r"^phrase 'A  DOG' is given twice: give each phrase once\.$"
  ):
    tokenizer.check_distinct(["a dog", "A  DOG"])
