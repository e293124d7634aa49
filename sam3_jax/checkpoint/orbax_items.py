"""One Orbax item: a tree of arrays in a folder. Reading raises ValueError in one line."""

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

REST = "rest"  # a bundle's item of all parts that are no items of their own
AGAIN = "convert or copy the checkpoint again."
CHUNK = 4 * 2**20  # bytes from which on an array is stored in pieces, which are read by themselves

# One sharding for all parameters, or a function of path and shape.
Shardings = jax.sharding.Sharding | Callable[[str, tuple[int, ...]], jax.sharding.Sharding]


def save_item(folder: Path, tree: dict[str, Any]) -> None:
  """Writes NumPy arrays, none of them empty; large ones in chunks, of which a process that wants a
  shard reads those with a part of it."""
  import orbax.checkpoint as ocp

  chunks = jax.tree.map(lambda array: ocp.SaveArgs(chunk_byte_size=_chunk_bytes(array)), tree)
  remedy = "may you write there?" if is_remote(folder) else "is the disk full?"
  with _one_line(folder, "written", remedy), _checkpointer() as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args=chunks))
  (folder / "commit_success.txt").unlink(missing_ok=True)  # it only says on which path it was


def restore_item(folder: Path, wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Any]:
  """An item as JAX arrays, straight to the dtype and sharding that are wanted of them, by path."""
  import orbax.checkpoint as ocp

  arguments = {
    name: ocp.ArrayRestoreArgs(dtype=wanted[name].dtype, sharding=wanted[name].sharding)
    for name in stored_arrays(folder)
  }
  with _one_line(folder, "read", AGAIN), _checkpointer() as checkpointer:
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=nest(arguments)))


def read_item(folder: Path) -> dict[str, Any]:
  """An item as NumPy arrays, as stored."""
  import orbax.checkpoint as ocp

  with _one_line(folder, "read", AGAIN), _checkpointer() as checkpointer:
    arguments = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
      checkpointer.metadata(folder).item_metadata.tree,
    )
    return checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=arguments))


def read_array(folder: Path, name: str) -> np.ndarray | None:
  """One array of a damaged item as stored, by its path; None if it cannot be read.

  Without Orbax, which reads all at once and leaves threads at work when one of them fails.
  """
  import tensorstore

  store = {"driver": "ocdbt", "base": f"{folder if is_remote(folder) else f'file://{folder}'}/"}
  spec = {"driver": "zarr", "kvstore": store, "path": name.replace("/", ".")}
  try:
    return tensorstore.open(spec, open=True, read=True).result().read().result()
  except (ValueError, RuntimeError, OSError):
    return None


def stored_arrays(folder: Path) -> dict[str, Any]:
  """Shape and dtype of an item's arrays, by path."""
  with _one_line(folder, "read", AGAIN), _checkpointer() as checkpointer:
    return flatten(checkpointer.metadata(folder).item_metadata.tree)


def _chunk_bytes(array: np.ndarray) -> int | None:
  """The largest axis halved until a chunk is small enough, which is Orbax's way; but never an odd
  one, of which Orbax would make as many chunks as it is long if that is a prime. None for one."""
  shape = list(array.shape)
  while (size := math.prod(shape) * array.dtype.itemsize) > CHUNK and max(shape) % 2 == 0:
    shape[shape.index(max(shape))] //= 2
  return size if size < array.nbytes else None


def _checkpointer():
  """Orbax, without its copy of the arrays and without compression, which weights do not bear; of
  several processes each works by itself."""
  import orbax.checkpoint as ocp
  from etils import epath

  class Alone(ocp.Checkpointer):
    def restore(self, directory, args):
      """Without asking for the file by which Orbax knows a whole item in a bucket: the manifest
      says what belongs to one."""
      return handler.restore(epath.Path(directory), args=args)

    def synchronize_next_awaitable_signal_operation_id(self):
      """Counts nothing: processes find each other's signals by the number of their saves, in which
      a save of one process alone has no part."""

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
