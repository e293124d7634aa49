"""Writes SentencePiece models of byte-level vocabularies (source: sentencepiece_model.proto).

`sam3_jax.inputs.tokenizer` explains the pieces. Equal pieces give equal bytes. The protobuf module
that sentencepiece ships is not used: it only imports with the major version of protobuf that it was
generated with, and that of sentencepiece 0.2.1 crashes Python at exit.
"""

import struct
from collections.abc import Mapping, Sequence

INSIDE = 0xE000  # + byte: the character that represents a byte inside a word
LAST = 0xE100  # + byte: the character that represents the last byte of a word, CLIP's `</w>`
START = "<start_of_text>"
END = "<end_of_text>"

# Numbers of the required fields and enumerators in sentencepiece_model.proto.
_MODEL = {"pieces": 1, "trainer_spec": 2, "normalizer_spec": 3}
_PIECE = {"piece": 1, "score": 2, "type": 3}
_UNKNOWN, _CONTROL = 2, 3
_TRAINER = {
  "model_type": 3,
  "vocab_size": 4,
  "unk_id": 40,
  "bos_id": 41,
  "eos_id": 42,
  "pad_id": 43,
  "unk_piece": 45,
  "bos_piece": 46,
  "eos_piece": 47,
}
_BPE = 2
_NORMALIZER = {
  "name": 1,
  "add_dummy_prefix": 3,
  "remove_extra_whitespaces": 4,
  "escape_whitespaces": 5,
}


def write_model(pieces: Sequence[str]) -> bytes:
  """Serializes a ModelProto: BPE over `pieces`, then start, end and <unk>; no normalization.

  Args:
    pieces: by id: first the 512 byte symbols, then pieces that each join two earlier ones.
  """
  messages = [
    _message(_PIECE, piece=piece, score=float(min(512 - index, 0)))
    for index, piece in enumerate(pieces)
  ]
  messages += [_message(_PIECE, piece=piece, type=_CONTROL) for piece in (START, END)]
  messages += [_message(_PIECE, piece="<unk>", type=_UNKNOWN)]  # SentencePiece requires it
  unknown = len(messages) - 1
  trainer = _message(
    _TRAINER,
    model_type=_BPE,
    vocab_size=len(messages),
    unk_id=unknown,
    bos_id=unknown - 2,
    eos_id=unknown - 1,
    pad_id=-1,  # CLIP's padding id is also a piece
    unk_piece="<unk>",
    bos_piece=START,
    eos_piece=END,
  )
  normalizer = _message(
    _NORMALIZER,
    name="identity",
    add_dummy_prefix=0,
    remove_extra_whitespaces=0,
    escape_whitespaces=0,
  )
  return b"".join(
    [_field(_MODEL["pieces"], message) for message in messages]
    + [_field(_MODEL["trainer_spec"], trainer), _field(_MODEL["normalizer_spec"], normalizer)]
  )


def _message(numbers: Mapping[str, int], **fields: str | int | float) -> bytes:
  return b"".join(_field(numbers[name], value) for name, value in fields.items())


def _field(number: int, value: bytes | str | int | float) -> bytes:
  """Encodes a protobuf field: varint (0), length-delimited (2) or float (5)."""
  if isinstance(value, int):
    return _varint(number << 3) + _varint(value)
  if isinstance(value, float):
    return _varint(number << 3 | 5) + struct.pack("<f", value)
  data = value.encode() if isinstance(value, str) else value
  return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
  value &= (1 << 64) - 1  # negative numbers are written as two's complement

  encoded = bytearray()
  while value > 0x7F:
    encoded.append(value & 0x7F | 0x80)
    value >>= 7
  return bytes([*encoded, value])
