"""Reads the features of a serialized `tf.train.Example`, the record of most TFRecord files.

The messages are Example, Features, Feature and BytesList of tensorflow/core/example; the wire
format is that of https://protobuf.dev/programming-guides/encoding. Values are not copied.
"""

from collections.abc import Iterator
from typing import NamedTuple

_KINDS = {1: "bytes", 2: "float", 3: "int64"}  # numbers of the fields of Feature
_LENGTH_DELIMITED = 2


class Feature(NamedTuple):
  """A feature.

  Attributes:
    kind: "bytes", "float" or "int64"; empty for a feature without values.
    values: of kind "bytes"; other values are not read.
  """

  kind: str
  values: list[memoryview]


def read_example(data: bytes | memoryview) -> dict[str, Feature]:
  """The features by name, sorted.

  Raises:
    ValueError: the bytes are not an Example.
  """
  features: dict[str, Feature] = {}
  for number, value in _messages(memoryview(data)):
    if number != 1:
      raise ValueError("not a tf.train.Example")
    for _, entry in _messages(value):
      fields = dict(_messages(entry))
      try:
        name = bytes(fields.get(1, b"")).decode()
      except UnicodeDecodeError:
        raise ValueError("not a tf.train.Example") from None
      features[name] = _feature(fields.get(2, memoryview(b"")))
  return dict(sorted(features.items()))


def _feature(data: memoryview) -> Feature:
  kind, values = "", list[memoryview]()
  for number, value in _messages(data):
    kind = _KINDS.get(number, "")
    if kind == "bytes":
      values += [one for _, one in _messages(value)]
  return Feature(kind, values)


def _messages(data: memoryview) -> Iterator[tuple[int, memoryview]]:
  """The fields of a message, all of which must be messages, strings or bytes."""
  at = 0
  while at < len(data):
    tag, at = _varint(data, at)
    if tag & 7 != _LENGTH_DELIMITED:
      raise ValueError("not a tf.train.Example")
    size, at = _varint(data, at)
    if at + size > len(data):
      raise ValueError("a truncated tf.train.Example")
    yield tag >> 3, data[at : at + size]
    at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
  """An integer, and the position after it."""
  value = shift = 0
  while at < len(data) and shift < 64:
    value |= (data[at] & 0x7F) << shift
    if not data[at] & 0x80:
      return value, at + 1
    at, shift = at + 1, shift + 7
  raise ValueError("a truncated tf.train.Example")
