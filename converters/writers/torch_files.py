"""Writes files that torch.load reads, without PyTorch; see `readers/torch_files.py` for the format.

The opcodes are those of torch.save without its memo; torch.load(weights_only=True) accepts them.
"""

import struct
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..readers.pickles import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_ALIGNMENT = 64  # bytes, as in torch.save, so that torch.load(mmap=True) gets aligned tensors
_DATE = (1980, 1, 1, 0, 0, 0)  # fixed, so that equal checkpoints give equal bytes

Entry = tuple[str, tuple[int, ...], str]


def write_torch(path: Path, entries: Sequence[Entry], arrays: Iterable[np.ndarray]) -> None:
  """Writes `{"model": {name: tensor}}`.

  Args:
    path: the file to write.
    entries: name, shape and dtype of each tensor.
    arrays: the tensors in the same order; one at a time is in memory.
  """
  with zipfile.ZipFile(path, "w") as archive:
    _add(archive, "data.pkl", _pickle(entries))
    _add(archive, "byteorder", b"little")
    for key, ((name, shape, dtype), array) in enumerate(zip(entries, arrays, strict=True)):
      if array.shape != shape or str(array.dtype) != dtype:
        raise ValueError(f"{name} became {array.dtype} {list(array.shape)} while it was written.")
      _add(archive, f"data/{key}", np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    _add(archive, "version", b"3\n")


def _add(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
  info = zipfile.ZipInfo(f"archive/{name}", _DATE)
  info.file_size = len(data)
  begin = (
    archive.start_dir + 30 + len(info.filename) + 4
  )  # local header, and the header of the padding
  padding = -begin % _ALIGNMENT
  info.extra = b"FB" + struct.pack("<H", padding) + bytes(padding)
  with archive.open(info, "w") as file:
    file.write(data)


def _pickle(entries: Sequence[Entry]) -> bytes:
  tensors = b"".join(
    _text(name) + _tensor(str(key), shape, dtype)
    for key, (name, shape, dtype) in enumerate(entries)
  )
  return b"\x80\x02}" + _text("model") + _ORDERED_DICT + b"(" + tensors + b"us."


def _tensor(key: str, shape: tuple[int, ...], dtype: str) -> bytes:
  strides = [int(np.prod(shape[i + 1 :], dtype=np.int64)) for i in range(len(shape))]
  kind = f"ctorch\n{_STORAGE_OF[dtype]}\n".encode()
  elements = int(np.prod(shape, dtype=np.int64))
  storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _number(elements) + b"tQ"
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + storage
    + _number(0)
    + _numbers(shape)
    + _numbers(strides)
    + b"\x89"  # requires no gradient
    + _ORDERED_DICT
    + b"tR"
  )


def _text(value: str) -> bytes:
  data = value.encode()
  return b"X" + struct.pack("<I", len(data)) + data


def _numbers(values: Iterable[int]) -> bytes:
  return b"(" + b"".join(map(_number, values)) + b"t"


def _number(value: int) -> bytes:
  return b"J" + struct.pack("<i", value)  # all sizes of SAM 3 are below 2**31
