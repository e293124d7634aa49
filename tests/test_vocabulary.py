"""CLIP's vocabulary: each published form gives the same model; other files are refused."""

import gzip
import json
from pathlib import Path

import clip_bpe
import pytest
from sam3_jax.converters.vocabulary import build_tokenizer, find_vocabulary

from sam3_jax.inputs.tokenizer import Tokenizer

GZIP = "bpe_simple_vocab_16e6.txt.gz"
KINDS = ("NORMAL", "UNKNOWN", "CONTROL")
LINES = [f"{left} {right}" for left, right in clip_bpe.merges()]


def _entries() -> dict[str, int]:
  """The vocabulary with Hugging Face's names of start and end."""
  entries = dict(clip_bpe.vocabulary())
  return {name: i for name, i in entries.items() if i < 49406} | {
    "<|startoftext|>": 49406,
    "<|endoftext|>": 49407,
  }


def _write_gzip(folder: Path, lines=LINES, head='"bpe_simple_vocab_16e6.txt#version: 0.2') -> Path:
  path = folder / GZIP
  path.write_bytes(gzip.compress("\n".join([head, *lines, ""]).encode(), compresslevel=1))
  return path


def _write_slow(folder: Path, entries=None, lines=LINES) -> Path:
  (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
  path = folder / "vocab.json"
  path.write_text(json.dumps(_entries() if entries is None else entries))
  return path


def _write_fast(folder: Path, entries=None, merges=LINES) -> Path:
  """tokenizer.json as tokenizers writes it: start and end are in both tables."""
  entries = _entries() if entries is None else entries
  added = [{"id": 49406, "content": "<|startoftext|>"}, {"id": 49407, "content": "<|endoftext|>"}]
  model = {"type": "BPE", "end_of_word_suffix": "</w>", "vocab": entries, "merges": merges}
  path = folder / "tokenizer.json"
  path.write_text(json.dumps({"version": "1.0", "added_tokens": added, "model": model}))
  return path


def _published_tail(folder: Path) -> Path:
  """OpenAI's file has more merges than CLIP uses."""
  return _write_gzip(folder, [*LINES, "more merges", "than CLIP", "reads here"])


def _pairs(folder: Path) -> Path:
  return _write_fast(folder, merges=clip_bpe.merges())


def _only_added(folder: Path) -> Path:
  return _write_fast(folder, entries=dict(list(_entries().items())[:-2]))


def _windows(folder: Path) -> Path:
  return _write_slow(folder, lines=[line + "\r" for line in LINES])


FORMS = [_write_gzip, _published_tail, _write_slow, _windows, _write_fast, _pairs, _only_added]


@pytest.mark.slow
@pytest.mark.parametrize("write", FORMS)
def test_every_form_gives_the_committed_model(tmp_path, write):
  path = write(tmp_path)
  assert find_vocabulary(tmp_path) == path
  assert build_tokenizer(path) == clip_bpe.MODEL.read_bytes()


def test_folder_as_source(tmp_path):
  _write_slow(tmp_path)
  assert Tokenizer(build_tokenizer(tmp_path))(["visual"])[0, :4].tolist() == [49406, 7195, 49407, 0]


def test_model_as_protobuf_reads_it():
  """Read by protobuf with the schema that SentencePiece ships."""
  schema = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
  model = schema.ModelProto.FromString(clip_bpe.MODEL.read_bytes())
  assert len(model.pieces) == 49409
  assert [piece.score for piece in model.pieces[512:49406]] == [-float(r) for r in range(48894)]
  kinds = [piece.type for piece in model.pieces]
  normal, unknown, control = (schema.ModelProto.SentencePiece.Type.Value(name) for name in KINDS)
  assert kinds == [normal] * 49406 + [control] * 2 + [unknown]
  trainer, normalizer = model.trainer_spec, model.normalizer_spec
  assert trainer.model_type == schema.TrainerSpec.ModelType.Value("BPE")
  assert (trainer.vocab_size, trainer.bos_id, trainer.eos_id) == (49409, 49406, 49407)
  assert (trainer.unk_id, trainer.pad_id) == (49408, -1)
  assert (trainer.bos_piece, trainer.eos_piece) == ("<start_of_text>", "<end_of_text>")
  assert (normalizer.name, normalizer.precompiled_charsmap) == ("identity", b"")
  assert not normalizer.add_dummy_prefix
  assert not normalizer.remove_extra_whitespaces
  assert not normalizer.escape_whitespaces
  assert model.SerializeToString(deterministic=True) == clip_bpe.MODEL.read_bytes()


def test_search_order(tmp_path):
  for write in (_write_gzip, _write_slow, _write_fast):
    path = write(tmp_path)  # each precedes the earlier ones
    assert find_vocabulary(tmp_path) == path


def test_vocab_json_needs_its_merges(tmp_path):
  path = _write_slow(tmp_path)
  (tmp_path / "merges.txt").unlink()
  with pytest.raises(FileNotFoundError, match=r"vocab.json with merges.txt"):
    find_vocabulary(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"merges.txt does not exist"):
    build_tokenizer(path)


def test_nothing_found(tmp_path):
  for call in (find_vocabulary, build_tokenizer):
    with pytest.raises(FileNotFoundError) as error:
      call(tmp_path)
    for name in (str(tmp_path), "tokenizer.json", "vocab.json", "merges.txt", GZIP):
      assert name in str(error.value)
  with pytest.raises(FileNotFoundError, match=r"tokenizer.json does not exist"):
    build_tokenizer(tmp_path / "tokenizer.json")


def test_unknown_file_name(tmp_path):
  (tmp_path / "notes.txt").write_text("notes")
  with pytest.raises(ValueError, match=r"notes.txt is not a known vocabulary file"):
    build_tokenizer(tmp_path / "notes.txt")


def _refused(path: Path, match: str) -> None:
  with pytest.raises(ValueError, match=match) as error:
    build_tokenizer(path)
  assert str(path) in str(error.value)
  assert "49,408 entries" in str(error.value)
  assert "\n" not in str(error.value)


def test_damaged_gzip(tmp_path):
  path = _write_gzip(tmp_path)
  whole = path.read_bytes()
  flipped = bytearray(whole)
  flipped[len(whole) // 2] ^= 0xFF
  for data in (b"no gzip", whole[:-9], whole[: len(whole) // 2], bytes(flipped)):
    path.write_bytes(data)
    _refused(path, "is not a complete gzip file")
  path.write_bytes(b"")
  _refused(path, "does not begin with")
  path.write_bytes(gzip.compress(b"#version\n\xff\xfe"))
  _refused(path, "is not UTF-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json"])
@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"", "is not JSON"),
    (b'{"model": {"vo', "is not JSON"),
    (b"\xff\xfe{}", "is not UTF-8"),
    (b"[1, 2]", "holds a JSON list"),
  ],
)
def test_damaged_json(tmp_path, name, data, match):
  _write_slow(tmp_path)
  (tmp_path / name).write_bytes(data)
  _refused(tmp_path / name, match)


@pytest.mark.parametrize(
  "content",
  [
    {},
    {"model": None},
    {"model": {"vocab": {}}},
    {"model": {"vocab": [1], "merges": []}},
    {"model": {"vocab": {}, "merges": None}},
    {"model": {"vocab": {}, "merges": []}, "added_tokens": [{"id": 3}]},
  ],
)
def test_json_of_another_layout(tmp_path, content):
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(content))
  _refused(path, r"has no model.vocab and model.merges")


@pytest.mark.parametrize(
  ("lines", "match"),
  [
    ([], "holds 0 merges"),
    (LINES[:-1], "holds 48,893 merges"),
    (["in", *LINES[1:]], r"merge 0 is \['in'\], not two symbols"),
    (["i n g", *LINES[1:]], "merge 0 is .* not two symbols"),
    ([LINES[700], *LINES[1:700], LINES[0], *LINES[701:]], "merge 0 .* does not follow"),
    ([*LINES[:-1], LINES[0]], "merge 48893 .* does not follow"),
    (["i</w> n", *LINES[1:]], "merge 0 .* does not follow"),
  ],
)
def test_wrong_merges(tmp_path, lines, match):
  _refused(_write_gzip(tmp_path, lines), match)


@pytest.mark.parametrize("merge", [3, None, ["i", 3], {"i": "n"}, "i n g", "in"])
def test_merge_of_wrong_type(tmp_path, merge):
  path = _write_fast(tmp_path, {}, [merge, *LINES[1:]])
  _refused(path, "merge 0 is .* not two symbols")


def test_merges_without_ends_of_words(tmp_path):
  """GPT-2's merges have CLIP's shape, but no `</w>`."""
  alphabet = list(clip_bpe.byte_symbols().values())
  pairs = [f"{a} {b}" for a in alphabet for b in alphabet]
  _refused(_write_gzip(tmp_path, pairs[:48894]), "no merge that ends a word")


def test_merges_without_a_version_line(tmp_path):
  _refused(_write_gzip(tmp_path, head=LINES[0]), "does not begin with a #version line")


def test_too_many_merges(tmp_path):
  _write_slow(tmp_path, lines=[*LINES, "more merges"])
  with pytest.raises(ValueError, match=r"merges.txt holds 48,895 merges"):
    build_tokenizer(tmp_path / "vocab.json")


def _swapped() -> dict[str, int]:
  entries = _entries()
  return entries | {"in": entries["th"], "th": entries["in"]}


@pytest.mark.parametrize(
  ("entries", "match"),
  [
    (_entries() | {"<pad>": 49408}, "holds 49,409 entries"),
    (_swapped(), "gives 'in' the id 513 where its merges give 512"),
    (_entries() | {"in": "512"}, "gives 'in' the id '512' where"),
    (
      {name: i for name, i in _entries().items() if name != "in"} | {"☃": 512},
      "gives 'in' the id",
    ),
  ],
)
def test_wrong_entries(tmp_path, entries, match):
  _refused(_write_slow(tmp_path, entries=entries), match)


def test_start_and_end_with_wrong_ids(tmp_path):
  entries = _entries() | {"<|endoftext|>": 50000}
  _refused(_write_slow(tmp_path, entries=entries), "has start and end at")
  _refused(_write_fast(tmp_path, _entries() | {"<pad>": 49408}), "holds 49,409 entries")
