"""KerasHub's files: `model.weights.h5`, or the shards that `model.weights.json` names.

Keras writes every variable as a contiguous dataset, without filters. So the HDF5 library is asked
only where each one lies, and the elements are read from a memory map; all that HDF5 could do
besides (links into other files, chunks that a filter inflates, elements that were never written) is
refused. Source: the HDF5 format and `keras.src.saving.saving_lib`.
"""

import itertools
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from sam3_jax.utils.json_text import parse

from ..checks import check_name, check_shape, read_text
from ..rules import Source

INDEX = "model.weights.json"
MAX_DEPTH = 20  # groups in groups; Keras nests 9 of them
AGAIN = "download it again."
_DTYPES = ("float64", "float32", "float16", "int64", "int32", "int8", "uint8", "bool")

Place = tuple[int, int, str, tuple[int, ...]]  # begin, end, dtype, shape


def open_hdf5(path: Path) -> dict[str, Source]:
  """The datasets of a file by path, or of all shards that an index names.

  Raises:
    FileNotFoundError: a shard is not there.
    ValueError: a file is truncated, damaged, hostile or not as Keras writes it.
  """
  return _open_shards(path) if path.suffix == ".json" else _open_file(path)


def _open_shards(index: Path) -> dict[str, Source]:
  try:
    places = parse(read_text(index), "it")["weight_map"].values()
    named = {name for place in places for name in ([place] if isinstance(place, str) else place)}
    for name in named:
      check_name(name)
    shards = sorted(named)
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"{index} is no index of shards ({error!r}); {AGAIN}") from error
  sources: dict[str, Source] = {}
  for shard in shards:
    path = index.parent / shard
    if Path(shard).name != shard:
      raise ValueError(f"{index} names the shard {shard!r:.100}; it must lie beside its index.")
    if not path.is_file():
      raise FileNotFoundError(f"{path}, one of {len(shards)} shards, is missing; download it.")
    found = _open_file(path)
    if twice := found.keys() & sources.keys():
      raise ValueError(f"{min(twice)} is in {path} and in another shard; download both again.")
    sources |= found
  return sources


def _open_file(path: Path) -> dict[str, Source]:
  import h5py

  places: dict[str, Place] = {}
  try:
    with h5py.File(path, "r") as file:
      _walk(file, "", places, set(), h5py)
    _check_extents(places, path.stat().st_size)
  except _Refusal as error:
    raise ValueError(f"{path} cannot be used: {error}.") from error
  except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
    reason = str(error).partition("\n")[0]
    raise ValueError(f"{path} is truncated or damaged ({reason:.200}); {AGAIN}") from error
  data = np.memmap(path, np.uint8, "r")

  def source(begin: int, end: int, dtype: str, shape: tuple[int, ...]) -> Source:
    return Source(shape, dtype, lambda: data[begin:end].view(jnp.dtype(dtype)).reshape(shape))

  return {name: source(*place) for name, place in places.items()}


class _Refusal(Exception):
  """What a file does that Keras does not, in words."""


def _walk(group: Any, prefix: str, places: dict[str, Place], seen: set[int], h5py: Any) -> None:
  """Adds the place of every dataset in a group and in the groups in it."""
  seen.add(h5py.h5o.get_info(group.id).addr)
  if prefix.count("/") > MAX_DEPTH:
    raise _Refusal(f"its groups are nested deeper than {MAX_DEPTH}")
  for key in group:
    name = f"{prefix}{key}"
    check_name(name)
    link = group.get(key, getlink=True)
    if not isinstance(link, h5py.HardLink):
      raise _Refusal(f"{name} is a link elsewhere ({type(link).__name__})")
    item = group[key]
    if isinstance(item, h5py.Group):
      if h5py.h5o.get_info(item.id).addr in seen:
        raise _Refusal(f"{name} is a group that is there twice")
      _walk(item, f"{name}/", places, seen, h5py)
    elif isinstance(item, h5py.Dataset):
      places[name] = _place(name, item, h5py)
    else:
      raise _Refusal(f"{name} is a {type(item).__name__}, not a dataset")


def _place(name: str, dataset: Any, h5py: Any) -> Place:
  settings = dataset.id.get_create_plist()
  if settings.get_external_count():
    raise _Refusal(f"the elements of {name} lie in another file")
  if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_nfilters():
    raise _Refusal(f"{name} is stored in chunks, compressed or virtual, as Keras stores nothing")
  shape, dtype = dataset.shape, str(dataset.dtype)
  if dataset.dtype.itemsize == 2 and _is_bfloat16(dataset):
    dtype = "bfloat16"
  if shape is None or dtype not in (*_DTYPES, "bfloat16"):
    raise _Refusal(f"{name} is of dtype {dtype:.40}, not of numbers")
  check_shape(name, shape)
  needed = math.prod(shape) * jnp.dtype(dtype).itemsize
  begin = dataset.id.get_offset()
  if needed and (begin is None or dataset.id.get_storage_size() != needed):
    raise _Refusal(f"the elements of {name} {list(shape)} were never written")
  return begin or 0, (begin or 0) + needed, dtype, tuple(shape)


def _is_bfloat16(dataset: Any) -> bool:
  """Keras says so in an attribute: HDF5 has no such dtype."""
  if "dtype" not in dataset.attrs:
    return False
  if dataset.attrs.get_id("dtype").get_storage_size() > 100:
    return False
  return dataset.attrs["dtype"] == "bfloat16"


def _check_extents(places: dict[str, Place], size: int) -> None:
  filled = sorted((place[:2], name) for name, place in places.items() if place[0] < place[1])
  for ((_, end), name), ((begin, _), other) in itertools.pairwise(filled):
    if begin < end:
      raise _Refusal(f"{name} and {other} share their elements")
  if filled and filled[-1][0][1] > size:
    raise _Refusal(f"{filled[-1][1]} ends after the file of {size:,} bytes: it is truncated")
