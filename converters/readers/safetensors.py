"""Reads safetensors files, sharded or not, from a memory map, on demand.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header, then the tensors, one
after another. A file that contradicts itself is refused before any tensor is read. The package's
own reader (0.8) is not used: it copies each tensor (48 MB above the map for 50 MB tensors, against
0 MB here), accepts names with line breaks, and its errors name neither the file nor, for a wrong
dtype or shape, the tensor.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.utils.json_text import parse, shown

from ..bounds import MAX_TEXT, check_name, check_shape, read_text
from ..source import Source

INDEX, TORCH_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
QUANTIZED = ("F8_", "F6_")  # float8 and float6
DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U8": "uint8",
  "BOOL": "bool",
  "C64": "complex64",
}
_EMPTY = np.empty(0, np.uint8)

Entry = tuple[str, str, tuple[int, ...], int, int]  # name, dtype, shape, begin, end


def open_safetensors(path: Path) -> dict[str, Source]:
  """Opens a file, or all shards that an index file names; returns the tensors by name.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: a file is truncated, damaged or something else.
  """
  return open_shards(path, _open_file) if path.suffix == ".json" else _open_file(path)


def shards_in(index: Path) -> set[str]:
  """The names of the shards in an index that has been read without a fault."""
  shards = parse(index.read_bytes(), "it")["weight_map"].values()
  return {name for shard in shards for name in ([shard] if isinstance(shard, str) else shard)}


def open_shards(index: Path, opener: Callable[[Path], dict[str, Source]]) -> dict[str, Source]:
  """Opens all shards that an index names, each with `opener`; raises as `open_safetensors` does."""
  try:
    shard_of = parse(read_text(index), "it")["weight_map"]
    for name in (*shard_of, *shard_of.values()):
      check_name(name)
    shards = sorted({Path(shard) for shard in shard_of.values()})
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index} is not an index of shards ({error!r}); give the file of the weights, or its "
      "directory."
    ) from error
  sources: dict[str, Source] = {}
  for shard in shards:
    path = index.parent / shard
    if shard.name != str(shard) or not shard.name:
      raise ValueError(
        f"{index} names the shard {shard}; a shard must be in the directory of its index."
      )
    if not path.is_file():
      raise FileNotFoundError(f"{path}, one of {len(shards)} shards, is missing; download it.")
    found = opener(path)
    listed = {name for name, other in shard_of.items() if other == shard.name}
    if found.keys() != listed:
      name = min(found.keys() ^ listed)
      raise ValueError(
        f"{path} and {index.name} disagree about {name} (and {len(found.keys() ^ listed) - 1} more "
        "tensors): they are of different checkpoints; download both again."
      )
    sources |= found
  return sources


def _open_file(path: Path) -> dict[str, Source]:
  size = path.stat().st_size
  with path.open("rb") as file:
    start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    if len(start) < 9 or start[8:] != b"{" or length > MAX_TEXT:
      raise ValueError(
        f"{path} is not a safetensors file; give model.safetensors or its directory."
      )
    file.seek(8)
    text = file.read(length)
  truncated = f"{path} is truncated at {size:,} bytes; download it again."
  if len(text) < length:
    raise ValueError(truncated)
  try:
    header = parse(text, "it")
  except ValueError as error:
    raise ValueError(f"the header of {path} is damaged ({error}); download it again.") from error
  header.pop("__metadata__", None)
  for name, entry in header.items():
    if isinstance(entry, dict) and str(entry.get("dtype")).startswith(QUANTIZED):
      raise ValueError(
        f"{path} is quantized: {name!r:.200} is {shown(entry['dtype'])}, which cannot be "
        "converted; give the weights in float32, bfloat16 or float16."
      )
  entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=_begin)
  _check_extents(path, entries, size - 8 - length, truncated)
  if not entries:
    raise ValueError(f"{path} holds no tensors, only a header; give the file of the weights.")
  data = np.memmap(path, np.uint8, "r", offset=8 + length) if size > 8 + length else _EMPTY

  def source(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Source:
    return Source(shape, dtype, lambda: data[begin:end].view(jnp.dtype(dtype)).reshape(shape))

  return {name: source(dtype, shape, begin, end) for name, dtype, shape, begin, end in entries}


def _check_extents(path: Path, entries: list[Entry], data_size: int, truncated: str) -> None:
  """Refuses tensors with gaps, overlaps, or bytes beyond the end of the file or left over."""
  end = 0
  for name, _, _, begin, next_end in entries:
    if begin != end:
      raise ValueError(
        f"{name} in {path} does not begin where the tensor before it ends; "
        "the file is damaged: download it again."
      )
    end = next_end
  if data_size < end:
    name = next(name for name, *_, last in entries if last > data_size)
    raise ValueError(f"{name} is incomplete: {truncated}")
  if data_size > end:
    raise ValueError(
      f"{path} has {data_size - end:,} bytes that belong to no tensor; download it again."
    )


def _entry(path: Path, name: str, entry: Any) -> Entry:
  """A tensor of the header, after checking that dtype, shape and extent agree."""
  try:
    check_name(name)
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
      raise ValueError("a size is not an integer of 0 or more")
    check_shape(name, shape)
    if dtype is None:
      raise ValueError(f"dtype {shown(entry['dtype'])} is unknown")
    if end - begin != math.prod(shape) * jnp.dtype(dtype).itemsize:
      raise ValueError(f"{dtype} {list(shape)} does not take {end - begin:,} bytes")
  except (KeyError, TypeError, ValueError) as error:
    printable = name if name.isprintable() else ascii(name)
    raise ValueError(f"{printable:.300} in the header of {path} is damaged: {error}.") from error
  return name, dtype, shape, begin, end


def _begin(entry: Entry) -> tuple[int, int]:
  return entry[3], entry[4]
