"""Orbax items: trees of arrays in a directory. Errors become ValueErrors of one line."""

import contextlib
import math
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3_jax.utils.param_tree import flatten, nest
from sam3_jax.utils.paths import is_remote

REST = "rest"  # the item of all small parts
REMEDY = "convert or copy the checkpoint again."
CHUNK = 4 * 2**20  # bytes: larger arrays are stored in chunks, which can be read separately

# One sharding for all parameters, or a function of path and shape.
Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def save_item(folder: Path, tree: dict[str, Any]) -> None:
  """Writes NumPy arrays, none of them empty.

  Large arrays are chunked, so that a process that restores a shard reads only its chunks.
  """
  import orbax.checkpoint as ocp

  chunks = jax.tree.map(lambda array: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(array)), tree)
  remedy = "may you write there?" if is_remote(folder) else "is the disk full?"
  with _one_line(folder, "written", remedy), _checkpointer() as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunks))
  (folder / "commit_success.txt").unlink(missing_ok=True)  # it holds only the temporary path


def restore_item(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
  """Reads an item as JAX arrays, directly in the wanted dtype and sharding of each path."""
  import orbax.checkpoint as ocp

  arguments = {
    name: ocp.ArrayRestoreArgs(dtype=wanted[name].dtype, sharding=wanted[name].sharding)
    for name in stored_arrays(folder)
  }
  with _one_line(folder, "read", REMEDY), _checkpointer() as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=nest(arguments)))


def read_item(folder: Path) -> dict[str, Any]:
  """Reads an item as NumPy arrays, as stored."""
  import orbax.checkpoint as ocp

  with _one_line(folder, "read", REMEDY), _checkpointer() as checkpointer:
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      checkpointer.metadata(folder).item_metadata.tree,
    )
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))


def read_array(folder: Path, name: str) -> np.ndarray | None:
  """Reads one array of a damaged item as stored; None if it cannot be read.

  Does not use Orbax, which reads all arrays at once and leaves threads running when one fails.
  """
  import tensorstore

  store = {"driver": "ocdbt", "base": f"{folder if is_remote(folder) else f'file://{folder}'}/"}
  spec = {"driver": "zarr", "kvstore": store, "path": name.replace("/", ".")}
  try:
    return tensorstore.open(spec, open=True, read=True).result().read().result()
  except (ValueError, RuntimeError, OSError):
    return None


def stored_arrays(folder: Path) -> dict[str, Any]:
  """Shapes and dtypes of an item's arrays, by path."""
  with _one_line(folder, "read", REMEDY), _checkpointer() as checkpointer:
    return flatten(checkpointer.metadata(folder).item_metadata.tree)


def _chunk_bytes(array: np.ndarray) -> int | None:
  """Bytes of a chunk, which Orbax gets by halving the largest axis; None for a single chunk.

  Never halves an odd axis: Orbax would split a prime one into as many chunks as it is long.
  """
  shape = list(array.shape)
  while (size := math.prod(shape) * array.dtype.itemsize) > CHUNK and max(shape) % 2 == 0:
    shape[shape.index(max(shape))] //= 2
  return size if size < array.nbytes else None


def _checkpointer():
  """An Orbax checkpointer that neither copies the arrays nor compresses them, as weights do not
  compress. Each process works on its own."""
  import orbax.checkpoint as ocp
  from etils import epath

  class Alone(ocp.Checkpointer):
    def restore(self, directory, args):
      """Does not require the file with which Orbax marks a complete item in a bucket, as the
      manifest lists its files."""
      return handler.restore(epath.Path(directory), args=args)

    def synchronize_next_awaitable_signal_operation_id(self):
      """Does nothing: Orbax counts saves to match the signals of processes, and a save of a single
      process must not count."""

  this = jax.process_index()
  alone = ocp.options.MultiprocessingOptions(
    primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process{this}"
  )

  handlers = ocp.type_handlers
  registry = handlers.create_type_handler_registry(
    (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
    (jax.Array, handlers.ArrayHandler()),
  )
  handler = ocp.PyTreeCheckpointHandler(
    use_compression=False, type_handler_registry=registry, multiprocessing_options=alone
  )
  return Alone(handler, multiprocessing_options=alone)


@contextlib.contextmanager
def _one_line(folder: Path, verb: str, remedy: str):
  try:
    yield
  except Exception as error:  # Orbax and TensorStore raise whatever they meet, over many lines
    reason = textwrap.shorten(str(error).strip().partition("\n")[0], 200, placeholder=" ...")
    raise ValueError(
      f"{folder} cannot be {verb} ({type(error).__name__}: {reason}); {remedy}"
    ) from error
