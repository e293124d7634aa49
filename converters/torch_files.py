"""PyTorch's files without PyTorch: `sam3.pt`, checkpoints of its training, `pytorch_model.bin`.

torch.save (since 1.6) writes a zip archive of uncompressed files in one folder: `data.pkl`, a
pickle that puts names to tensors, and `data/KEY`, the raw elements of a storage. The file is mapped
into memory, and a tensor is a view of it. Nothing in the archive is believed before it is checked,
and nothing is extracted.
"""

import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .checks import check_name, check_shape
from .pickles import MAX_BYTES, Tensor, read_pickle
from .rules import Source

AGAIN = "download it again"
NESTED = ("model", "state_dict", "model_state_dict")  # where checkpoints of training keep the model
_LOCAL = struct.Struct("<4s22xHH")  # signature, then the lengths of name and extra field


def open_torch(path: Path) -> dict[str, Source]:
  """The model's tensors in a file of torch.save, by name; other contents are left alone.

  Raises:
    ValueError: the file is truncated, damaged, hostile, of another kind, or holds no tensors.
  """
  with path.open("rb") as file:
    if file.read(4) != b"PK\x03\x04":
      raise ValueError(_old(path))
  try:
    places, pickle = _read_archive(path)
    tensors = _model(read_pickle(pickle))
    _check_views(tensors)
    return _sources(path, tensors, places)
  except ValueError as error:
    raise ValueError(f"{path} cannot be used: {error}; {_remedy(error)}.") from error


def _read_archive(path: Path) -> tuple[dict[str, tuple[int, int, int]], bytes]:
  """Begin, end and CRC-32 of each storage by its key, and the bytes of the pickle."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename: info for info in archive.infolist()}
      if len(members) != len(archive.infolist()):
        raise ValueError("it holds two files of one name")
      folder = _check_members(members)
      extents = _check_extents(path, members.values(), archive.start_dir)
      order = members.get(f"{folder}/byteorder")
      if order and _bytes(path, order, extents) != b"little":
        raise ValueError("its numbers are not little-endian")
      data = _bytes(path, members[f"{folder}/data.pkl"], extents)
  except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, struct.error) as error:
    raise ValueError(f"it is truncated or damaged ({error})") from error
  start = f"{folder}/data/"
  return {
    name.removeprefix(start): (*extents[name], info.CRC)
    for name, info in members.items()
    if name.startswith(start)
  }, data


def _check_members(members: Mapping[str, zipfile.ZipInfo]) -> str:
  """The folder that all is in, after looking at what the archive says of its files."""
  for name, info in members.items():
    check_name(name)
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
      raise ValueError(f"it holds a file {name!r:.120} that would lie outside of its folder")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
      raise ValueError(
        f"its file {name} is compressed ({info.compress_size:,} bytes to {info.file_size:,}), "
        "which torch.save never does"
      )
    if info.flag_bits & 1:
      raise ValueError(f"its file {name} is encrypted")
  pickles = [name for name in members if name.endswith("/data.pkl")]
  if len(pickles) != 1 or pickles[0].count("/") != 1:
    raise ValueError(f"it is {_other_archive(members)}")
  folder = pickles[0].partition("/")[0]
  if f"{folder}/constants.pkl" in members:
    raise ValueError("it is a TorchScript program, not a checkpoint")
  return folder


def _check_extents(
  path: Path, infos: Iterable[zipfile.ZipInfo], directory: int
) -> dict[str, tuple[int, int]]:
  """Where each file's bytes begin and end; refuses files that share some, or the directory's.

  A file's own header is read too: it may be longer than the directory says.
  """
  extents = {}
  infos = sorted(infos, key=lambda info: info.header_offset)
  limits = [*(info.header_offset for info in infos[1:]), directory]
  with path.open("rb") as file:
    for info, limit in zip(infos, limits, strict=True):
      file.seek(info.header_offset)
      signature, name, extra = _LOCAL.unpack(file.read(_LOCAL.size))
      begin = info.header_offset + _LOCAL.size + name + extra
      if signature != b"PK\x03\x04" or begin + info.file_size > limit:
        raise ValueError(f"its file {info.filename} overlaps what follows it")
      extents[info.filename] = begin, begin + info.file_size
  return extents


def _bytes(path: Path, info: zipfile.ZipInfo, extents: Mapping[str, tuple[int, int]]) -> bytes:
  begin, end = extents[info.filename]
  if end - begin > MAX_BYTES:
    raise ValueError(f"its file {info.filename} of {end - begin:,} bytes is too large")
  with path.open("rb") as file:
    file.seek(begin)
    data = file.read(end - begin)
  if info.CRC and zlib.crc32(data) != info.CRC:  # 0: written without checksums
    raise ValueError(f"its file {info.filename} differs from its checksum")
  return data


def _model(content: Any) -> dict[str, Tensor]:
  """The dictionary of the model's tensors, which training keeps beside other things."""
  if not isinstance(content, dict):
    raise ValueError(f"it holds a {type(content).__name__}, not a dictionary of tensors")
  nested = [key for key in NESTED if isinstance(content.get(key), dict)]
  if nested:
    content = content[nested[0]]
  elif not any(isinstance(value, Tensor) for value in content.values()):
    keys = ", ".join(repr(key)[:30] for key in list(content)[:5])
    raise ValueError(f"it holds no model: of {', '.join(NESTED)} it has none, but {keys}")
  for name, value in content.items():
    if not isinstance(name, str) or not isinstance(value, Tensor):
      raise ValueError(f"{name!r:.120} is a {type(value).__name__}; expected a tensor")
    check_name(name)
  return content


def _check_views(tensors: Mapping[str, Tensor]) -> None:
  """Refuses tensors that leave their storage, or share elements without being the same view."""
  spans: dict[str, list[tuple[int, int, tuple[int, ...], tuple[int, ...], str]]] = {}
  for name, tensor in tensors.items():
    check_shape(name, tensor.shape)
    if not math.prod(tensor.shape):
      continue
    last = 0
    for stride, size in sorted(zip(tensor.strides, tensor.shape, strict=True)):
      if size > 1 and stride <= last:
        raise ValueError(f"{name} has strides {list(tensor.strides)}: its elements overlap")
      last += stride * (size - 1)
    if tensor.offset + last >= tensor.storage.elements:
      raise ValueError(
        f"{name} {list(tensor.shape)} ends at element {tensor.offset + last:,} of a storage of "
        f"{tensor.storage.elements:,}"
      )
    span = tensor.offset, tensor.offset + last + 1, tensor.shape, tensor.strides, name
    spans.setdefault(tensor.storage.key, []).append(span)
  for key, views in spans.items():
    views.sort()
    for view, following in itertools.pairwise(views):
      if following[0] < view[1] and view[:4] != following[:4]:
        raise ValueError(f"{view[4]} and {following[4]} overlap in storage {key}")


def _sources(
  path: Path, tensors: Mapping[str, Tensor], places: Mapping[str, tuple[int, int, int]]
) -> dict[str, Source]:
  data = np.memmap(path, np.uint8, "r")
  checked: set[str] = set()

  def storage(tensor: Tensor, name: str) -> np.ndarray:
    begin, end, crc = places[tensor.storage.key]
    if tensor.storage.key not in checked:
      if crc and zlib.crc32(data[begin:end].data) != crc:
        raise ValueError(f"{name} in {path} differs from its checksum; {AGAIN}.")
      checked.add(tensor.storage.key)
    return data[begin:end].view(jnp.dtype(tensor.storage.dtype))

  def source(name: str, tensor: Tensor) -> Source:
    def read() -> np.ndarray:
      elements = storage(tensor, name)
      return np.lib.stride_tricks.as_strided(
        elements[tensor.offset :],
        tensor.shape,
        [stride * elements.itemsize for stride in tensor.strides],
        writeable=False,
      )

    return Source(tensor.shape, tensor.storage.dtype, read)

  for name, tensor in tensors.items():
    if tensor.storage.key not in places:
      raise ValueError(f"the storage {tensor.storage.key!r:.60} of {name} is missing")
    begin, end, _ = places[tensor.storage.key]
    needed = tensor.storage.elements * jnp.dtype(tensor.storage.dtype).itemsize
    if needed != end - begin:
      raise ValueError(
        f"the storage of {name} takes {end - begin:,} bytes; expected {needed:,} for "
        f"{tensor.storage.elements:,} of {tensor.storage.dtype}"
      )
  return {name: source(name, tensor) for name, tensor in tensors.items()}


def _old(path: Path) -> str:
  """What to say of a pickle that is no archive; one that asks for a global gets that said."""
  with path.open("rb") as file:
    start = file.read(1_000_000)
  why = "it is in PyTorch's format of before 1.6"
  try:
    read_pickle(start)
  except ValueError as error:
    why = str(error) if "asks for" in str(error) else why
  return f"{path} cannot be used: {why}; load it with PyTorch and save it again with torch.save."


def _other_archive(members: Mapping[str, Any]) -> str:
  names = set(members)
  if {"config.json", "model.weights.h5"} <= names:
    return "a .keras archive; give the folder of the KerasHub preset instead"
  if names and all(name.endswith(".npy") for name in names):
    return "an archive of NumPy arrays (.npz)"
  return "a zip archive without PyTorch's data.pkl"


def _remedy(error: ValueError) -> str:
  if "asks for" in str(error):
    return "if you trust it, load it with PyTorch and save its model alone with torch.save"
  return "give another file" if "it is a" in str(error) else AGAIN
