"""Reads PyTorch's files without PyTorch: `sam3.pt`, training checkpoints, `pytorch_model.bin`.

torch.save (since 1.6) writes a zip archive of uncompressed files in one directory: `data.pkl`, a
pickle that names the tensors, and `data/KEY`, the raw elements of a storage. The file is mapped
into memory, and a tensor is a view of it. Everything in the archive is checked before it is used,
and nothing is extracted.
"""

import itertools
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..bounds import check_name, check_shape
from ..source import Source
from .pickles import MAX_BYTES, Inert, Tensor, read_pickle

AGAIN = "download it again"
MAX_DEPTH = 16  # of nested dictionaries
# Keys beside the model in checkpoints of Meta's trainer, Lightning, DeepSpeed and accelerate.
_OF_TRAINING = (
  r"(optim(izers?)?(_states?(_dict)?)?|(lr_)?sched(uler)?s?(_states?(_dict)?)?|(grad_)?scaler|loops"
  r"|callbacks|rng_states?|(native_)?amp(_scaling)?(_state)?|hyper_parameters|param_groups"
  r"|(lr_schedulers|optimizer_states|ds_config|steps|loss|best_meter_values))"
)
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".h5")
_LOCAL = struct.Struct("<4s22xHH")  # signature, lengths of name and extra field


def open_torch(path: Path) -> dict[str, Source]:
  """Opens a file of torch.save; returns the tensors by their dotted keys (see `_tensors`).

  Raises:
    ValueError: the file is truncated, damaged, hostile, of another kind, or holds no tensors.
  """
  with path.open("rb") as file:
    if file.read(4) != b"PK\x03\x04":
      raise ValueError(_describe_pickle(path))
  try:
    extents, pickle = _read_archive(path)
    tensors = _tensors(read_pickle(pickle))
    for container in {container for _, container in tensors.values()}:
      _check_views({n: tensor for n, (tensor, c) in tensors.items() if c == container})
    return _sources(path, tensors, extents)
  except ValueError as error:
    raise ValueError(f"{path} cannot be used: {error}; {_remedy(error)}.") from error


def _read_archive(path: Path) -> tuple[dict[str, tuple[int, int, int]], bytes]:
  """Begin, end and CRC-32 of each storage by its key, and the bytes of the pickle."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = {info.filename: info for info in archive.infolist()}
      if len(members) != len(archive.infolist()):
        raise ValueError("it holds two files of the same name")
      folder = _check_members(members)
      extents = _check_extents(path, members.values(), archive.start_dir)
      order = members.get(f"{folder}/byteorder")
      if order and _bytes(path, order, extents) != b"little":
        raise ValueError("its numbers are not little-endian")
      data = _bytes(path, members[f"{folder}/data.pkl"], extents)
  # zipfile raises NotImplementedError for versions and compressions that PyTorch never writes.
  except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, struct.error) as error:
    raise ValueError(f"it is truncated or damaged ({error})") from error
  start = f"{folder}/data/"
  return {
    name.removeprefix(start): (*extents[name], info.CRC)
    for name, info in members.items()
    if name.startswith(start)
  }, data


def _check_members(members: Mapping[str, zipfile.ZipInfo]) -> str:
  """Checks the archive's file list; returns the name of the directory that holds all files."""
  for name, info in members.items():
    check_name(name)
    if name.startswith("/") or "\\" in name or ".." in name.split("/"):
      raise ValueError(f"it holds a file {name!r:.120} that would be outside of its directory")
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
  """Returns where each file's bytes begin and end; refuses overlaps.

  Each file's own header is read too, as it may be longer than the directory says.
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
  if info.CRC and zlib.crc32(data) != info.CRC:  # 0 means written without checksums
    raise ValueError(f"its file {info.filename} differs from its checksum")
  return data


def _tensors(content: Any) -> dict[str, tuple[Tensor, str]]:
  """All tensors by their dotted keys, each with the dotted keys of its dictionary.

  Other contents of training checkpoints are left out: numbers, strings, and the states of optimizer
  and scheduler.
  """
  if not isinstance(content, dict):
    kind = "object" if isinstance(content, Inert) else type(content).__name__
    raise ValueError(f"it holds {_article(kind)}, not a dictionary of tensors")
  found: dict[str, tuple[Tensor, str]] = {}
  others: list[str] = []

  def visit(values: dict[Any, Any], keys: tuple[str, ...]) -> None:
    for key, value in values.items():
      name = ".".join((*keys, str(key)))
      if isinstance(value, Tensor):
        check_name(name)
        if name in found:
          raise ValueError(f"{name!r:.120} is there twice")
        found[name] = value, ".".join(keys)
      elif isinstance(value, dict) and not keys and is_of_training(str(key)):
        others.append(str(key))
      elif isinstance(value, dict) and len(keys) < MAX_DEPTH:
        visit(value, (*keys, str(key)))

  visit(content, ())
  if {"state", "param_groups"} <= content.keys() or (others and not found):
    raise ValueError(
      "it holds the state of an optimizer and no model: the model is in another file, saved "
      "beside it"
    )
  if not found:
    keys = ", ".join(repr(key)[:30] for key in list(content)[:5])
    raise ValueError(f"it holds no model: it has no tensors{f', but {keys}' if keys else ''}")
  return found


def is_of_training(key: str) -> bool:
  """Whether a checkpoint's key holds training state rather than the model."""
  return bool(re.fullmatch(_OF_TRAINING, key))


def _check_views(tensors: Mapping[str, Tensor]) -> None:
  """Refuses views that exceed their storage, or overlap without being equal."""
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
  path: Path,
  tensors: Mapping[str, tuple[Tensor, str]],
  extents: Mapping[str, tuple[int, int, int]],
) -> dict[str, Source]:
  data = np.memmap(path, np.uint8, "r")
  checked: set[str] = set()

  def storage(tensor: Tensor, name: str) -> np.ndarray:
    begin, end, crc = extents[tensor.storage.key]
    if tensor.storage.key not in checked:
      if crc and zlib.crc32(data[begin:end].data) != crc:
        raise ValueError(f"{name} in {path} differs from its checksum; {AGAIN}.")
      checked.add(tensor.storage.key)
    return data[begin:end].view(jnp.dtype(tensor.storage.dtype))

  def source(name: str, tensor: Tensor, container: str) -> Source:
    def read() -> np.ndarray:
      elements = storage(tensor, name)
      return np.lib.stride_tricks.as_strided(
        elements[tensor.offset :],
        tensor.shape,
        [stride * elements.itemsize for stride in tensor.strides],
        writeable=False,
      )

    return Source(tensor.shape, tensor.storage.dtype, read, container)

  for name, (tensor, _) in tensors.items():
    if tensor.storage.key not in extents:
      raise ValueError(f"the storage {tensor.storage.key!r:.60} of {name} is missing")
    begin, end, _ = extents[tensor.storage.key]
    needed = tensor.storage.elements * jnp.dtype(tensor.storage.dtype).itemsize
    if needed != end - begin:
      raise ValueError(
        f"the storage of {name} takes {end - begin:,} bytes; expected {needed:,} for "
        f"{tensor.storage.elements:,} of {tensor.storage.dtype}"
      )
  return {name: source(name, *tensor) for name, tensor in tensors.items()}


def _describe_pickle(path: Path) -> str:
  """The message for a bare pickle; it names a refused global, if there is one."""
  with path.open("rb") as file:
    start = file.read(1_000_000)
  why = "it is in the format of PyTorch before 1.6"
  try:
    read_pickle(start)
  except ValueError as error:
    why = str(error) if "asks for" in str(error) else why
  return f"{path} cannot be used: {why}; load it with PyTorch and save it with torch.save."


def _other_archive(members: Mapping[str, Any]) -> str:
  names = set(members)
  if {"config.json", "model.weights.h5"} <= names:
    return "a .keras archive; give the directory of the KerasHub preset instead"
  if names and all(name.endswith(".npy") for name in names):
    return "an archive of NumPy arrays (.npz)"
  if weights := [name for name in members if name.endswith(_WEIGHTS)]:
    return f"a zip archive that contains {weights[0]:.100}; unpack it first"
  return "a zip archive without PyTorch's data.pkl"


def _article(noun: str) -> str:
  return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def _remedy(error: ValueError) -> str:
  """The remedy, if the message has none."""
  text = str(error)
  if "ultralytics" in text or "a YOLO" in text:
    return "give the weights of facebook/sam3"
  if "asks for" in text:
    return "if you trust the file, load it with PyTorch and save its state_dict() alone"
  if "float8" in text:
    return "give the weights in float32, bfloat16 or float16"
  if any(words in text for words in ("it is a", "it holds", "saved beside")):
    return "give the file of the weights"
  return AGAIN
