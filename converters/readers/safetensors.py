"""Safetensors files, sharded or not, as tensors that are read from a memory map when asked for.

The format (huggingface/safetensors): 8 bytes of header length, a JSON header, then the tensors, one
after another. The package's NumPy reader does not know bfloat16, hence this one. It trusts nothing:
a file that contradicts itself is refused before any tensor is touched.
"""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.utils.json_text import parse, shown

from ..checks import MAX_TEXT, check_name, check_shape, read_text
from ..rules import Source

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


def open_safetensors(path: Path) -> dict[str, Source]:
  """The tensors of a file, or of all shards that an index file names.

  Raises:
    FileNotFoundError: a shard is not there.
    ValueError: a file is truncated, damaged or something else.
  """
  return open_shards(path, _open_file) if path.suffix == ".json" else _open_file(path)


def write_safetensors(
  path: Path, entries: Sequence[tuple[str, tuple[int, ...], str]], arrays: Iterable[np.ndarray]
) -> None:
  """Writes a file.

  Args:
    path: of the file.
    entries: name, shape and dtype of each tensor.
    arrays: the tensors in the same order, taken one at a time.
  """
  codes = {dtype: code for code, dtype in DTYPES.items()}
  header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
  end = 0
  for name, shape, dtype in entries:
    begin, end = end, end + math.prod(shape) * jnp.dtype(dtype).itemsize
    header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # aligns the tensors
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for (name, shape, dtype), array in zip(entries, arrays, strict=True):
      if array.shape != shape or str(array.dtype) != dtype:
        raise ValueError(f"{name} became {array.dtype} {list(array.shape)} while it was written.")
      file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def shards_in(index: Path) -> set[str]:
  """The names of the files that an index names, which has been read without a fault."""
  places = parse(index.read_bytes(), "it")["weight_map"].values()
  return {name for place in places for name in ([place] if isinstance(place, str) else place)}


def open_shards(index: Path, opener: Callable[[Path], dict[str, Source]]) -> dict[str, Source]:
  """The tensors of all shards that an index names; `opener` opens one. Raises as
  `open_safetensors` does."""
  try:
    places = parse(read_text(index), "it")["weight_map"]
    for name in (*places, *places.values()):
      check_name(name)
    shards = sorted({Path(place) for place in places.values()})
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{index} is no index of shards ({error!r}); give the file of the weights, or its folder."
    ) from error
  sources: dict[str, Source] = {}
  for shard in shards:
    path = index.parent / shard
    if shard.name != str(shard) or not shard.name:
      raise ValueError(f"{index} names the shard {shard}; a shard must lie beside its index.")
    if not path.is_file():
      raise FileNotFoundError(f"{path}, one of {len(shards)} shards, is missing; download it.")
    found = opener(path)
    wanted = {name for name, place in places.items() if place == shard.name}
    if found.keys() != wanted:
      name = min(found.keys() ^ wanted)
      raise ValueError(
        f"{path} and {index.name} disagree about {name} (and {len(found.keys() ^ wanted) - 1} more "
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
      raise ValueError(f"{path} is no safetensors file; give model.safetensors or its folder.")
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
  end = 0
  for name, _, _, begin, next_end in entries:
    if begin != end:
      raise ValueError(
        f"{name} in {path} does not begin where the tensor before it ends; "
        "the file is damaged: download it again."
      )
    end = next_end
  data_size = size - 8 - length
  if data_size < end:
    name = next(name for name, *_, last in entries if last > data_size)
    raise ValueError(f"{name} is not whole: {truncated}")
  if data_size > end:
    raise ValueError(
      f"{path} has {data_size - end:,} bytes that belong to no tensor; download it again."
    )
  if not entries:
    raise ValueError(f"{path} holds no tensors, only a header; give the file of the weights.")
  data = np.memmap(path, np.uint8, "r", offset=8 + length) if data_size else np.empty(0, np.uint8)

  def source(dtype: str, shape: tuple[int, ...], begin: int, end: int) -> Source:
    return Source(shape, dtype, lambda: data[begin:end].view(jnp.dtype(dtype)).reshape(shape))

  return {name: source(dtype, shape, begin, end) for name, dtype, shape, begin, end in entries}


def _entry(path: Path, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
  """Name, dtype, shape, begin and end of a tensor, after checking that they agree."""
  try:
    check_name(name)
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = DTYPES.get(entry["dtype"])
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
      raise ValueError("a size is not a whole number")
    check_shape(name, shape)
    if dtype is None:
      raise ValueError(f"dtype {shown(entry['dtype'])} is not known")
    if end - begin != math.prod(shape) * jnp.dtype(dtype).itemsize:
      raise ValueError(f"{dtype} {list(shape)} does not take {end - begin:,} bytes")
  except (KeyError, TypeError, ValueError) as error:
    printable = name if name.isprintable() else ascii(name)
    raise ValueError(f"{printable:.300} in the header of {path} is damaged: {error}.") from error
  return name, dtype, shape, begin, end


def _begin(entry: tuple[str, str, tuple[int, ...], int, int]) -> tuple[int, int]:
  return entry[3], entry[4]
