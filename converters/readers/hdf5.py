"""Reads KerasHub's files: `model.weights.h5`, or the shards that `model.weights.json` names.

Keras writes every variable as a contiguous dataset, without filters. So the HDF5 library only
locates the datasets, and their elements are read from a memory map. Other features of HDF5 (links
into other files, compressed chunks, elements that were never written) are refused. Source: the HDF5
format and `keras.src.saving.saving_lib`.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.utils.json_text import parse

from ..bounds import check_name, check_shape, read_text
from ..source import Source

INDEX = "model.weights.json"
MAX_DEPTH = 20  # of nested groups; Keras nests 9
AGAIN = "download it again."
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")

Extent = tuple[int, int, str, tuple[int, ...]]  # begin, end, dtype, shape


def open_hdf5(path: Path) -> dict[str, Source]:
  """Opens a file, or all shards that an index names; returns the datasets by path.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: a file is truncated, damaged, hostile or not as Keras writes it.
  """
  return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def _open_shards(index: Path) -> dict[str, Source]:
  try:
    values = parse(read_text(index), "it")["weight_map"].values()
    names = {name for value in values for name in ([value] if isinstance(value, str) else value)}
    for name in names:
      check_name(name)
    shards = sorted(names)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index} is not an index of shards ({error!r}); {AGAIN}") from error
  sources: dict[str, Source] = {}
  for shard in shards:
    path = index.parent / shard
    if Path(shard).name != shard:
      raise ValueError(
        f"{index} names the shard {shard!r:.100}; a shard must be in the directory of its index."
      )
    if not path.is_file():
      raise FileNotFoundError(f"{path}, one of {len(shards)} shards, is missing; download it.")
    found = _open_file(path)
    if twice := found.keys() & sources.keys():
      raise ValueError(f"{min(twice)} is in {path} and in another shard; download both again.")
    sources |= found
  return sources


def _open_file(path: Path) -> dict[str, Source]:
  import h5py

  extents: dict[str, Extent] = {}
  try:
    with h5py.File(path, "r") as file:
      _walk(file, "", extents, set(), h5py)
    _check_extents(extents, path.stat().st_size)
  except _Refusal as error:
    raise ValueError(f"{path} cannot be used: {error}.") from error
  except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{path} is truncated or damaged ({reason:.200}); {AGAIN}") from error
  data = np.memmap(path, np.uint8, "r")

  def source(begin: int, end: int, dtype: str, shape: tuple[int, ...]) -> Source:
    return Source(shape, dtype, lambda: data[begin:end].view(jnp.dtype(dtype)).reshape(shape))

  return {name: source(*extent) for name, extent in extents.items()}


class _Refusal(Exception):
  """A file uses a feature of HDF5 that Keras does not."""


def _walk(group: Any, prefix: str, extents: dict[str, Extent], seen: set[int], h5py: Any) -> None:
  """Adds the extent of every dataset in a group and its subgroups."""
  seen.add(h5py.h5o.get_info(group.id).addr)
  if prefix.count("/") > MAX_DEPTH:
    raise _Refusal(f"its groups are nested deeper than {MAX_DEPTH}")
  for key in group:
    name = f"{prefix}{key}"
    check_name(name)
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
      raise _Refusal(f"{name} is a link to another object ({type(link).__name__})")
    item = group[key]
    if isinstance(item, h5py.Group):
      if h5py.h5o.get_info(item.id).addr in seen:
        raise _Refusal(f"{name} is a group that occurs twice")
      _walk(item, f"{name}/", extents, seen, h5py)
    elif isinstance(item, h5py.Dataset):
      extents[name] = _extent(name, item, h5py)
    else:
      raise _Refusal(f"{name} is a {type(item).__name__}, not a dataset")


def _extent(name: str, dataset: Any, h5py: Any) -> Extent:
  settings = dataset.id.get_create_plist()
  if settings.get_external_count():
    raise _Refusal(f"the elements of {name} are in another file")
  if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_nfilters():
    raise _Refusal(f"{name} is stored in chunks, compressed or virtual, which Keras never does")
  shape, dtype = dataset.shape, str(dataset.dtype)
  if dataset.dtype.itemsize == 2 and _is_bfloat16(dataset):
    dtype = "bfloat16"
  if shape is None or dtype not in (*_DTYPES, "bfloat16"):
    raise _Refusal(f"{name} is of dtype {dtype:.40}, which is not numeric")
  check_shape(name, shape)
  needed = math.prod(shape) * jnp.dtype(dtype).itemsize
  begin = dataset.id.get_offset()
  if needed and (begin is None or dataset.id.get_storage_size() != needed):
    raise _Refusal(f"the elements of {name} {list(shape)} were never written")
  return begin or 0, (begin or 0) + needed, dtype, tuple(shape)


def _is_bfloat16(dataset: Any) -> bool:
  """Whether Keras marks a dataset as bfloat16, in an attribute; HDF5 has no such dtype."""
  if "dtype" not in dataset.attrs:
    return False
  if dataset.attrs.get_id("dtype").get_storage_size() > 100:
    return False
  return dataset.attrs["dtype"] == "bfloat16"


def _check_extents(extents: dict[str, Extent], size: int) -> None:
  """Refuses datasets that overlap, or end after the file of `size` bytes."""
  filled = sorted((extent[:2], name) for name, extent in extents.items() if extent[0] < extent[1])
  for ((_, end), name), ((begin, _), other) in itertools.pairwise(filled):
    if begin < end:
      raise _Refusal(f"{name} and {other} share their elements")
  if filled and filled[-1][0][1] > size:
    raise _Refusal(f"{filled[-1][1]} ends after the file of {size:,} bytes: it is truncated")
