"""Checkpoints to resume from: state and place in the data, written in the background by Orbax.

One appears under its step's number only when it is complete, so that a process may be killed at any
moment; what a killed one left half-written is removed by the next.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sam3_jax.training.state import TrainState

STATE, PROGRESS = "state", "progress"


class Storage:
  """The last checkpoints of a run, in a folder of its own."""

  def __init__(self, folder: str | Path, keep: int):
    self.folder = Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self.folder,
      item_names=(STATE, PROGRESS),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
    )

  @property
  def latest(self) -> int | None:
    """Steps done at the last complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
    """Takes a copy of the state, and writes it while training goes on.

    Args:
      step: how many are done.
      state: of that moment; may be donated when this returns.
      progress: what else resuming needs, plain values for JSON.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{STATE: ocp.args.StandardSave(_plain(state)), PROGRESS: ocp.args.JsonSave(progress)}
      ),
    )

  def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The last checkpoint, bit for bit, in the shapes, dtypes and shardings of `state`.

    Raises:
      ValueError: it does not fit, or cannot be read.
    """
    wanted = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state)
    )
    arguments = {STATE: ocp.args.StandardRestore(wanted), PROGRESS: ocp.args.JsonRestore()}
    try:
      found = self._manager.restore(self.latest, args=ocp.args.Composite(**arguments))
    except Exception as error:  # Orbax and TensorStore raise whatever they meet, over many lines
      raise ValueError(
        f"{self.folder / str(self.latest)} cannot be resumed from "
        f"({type(error).__name__}: {str(error).strip().splitlines()[0]:.200}); remove this folder "
        "to go on from the one before."
      ) from error
    return _filled(state, found[STATE]), found[PROGRESS]

  def wait(self) -> None:
    """Returns when all is on disk, in all processes; raises what went wrong in the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _plain(state: TrainState) -> dict[str, jax.Array]:
  """All leaves by name; the key as numbers."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {_name(path): _numbers(leaf) for path, leaf in leaves}


def _filled(like: TrainState, values: dict[str, jax.Array]) -> TrainState:
  def fill(path: Any, leaf: jax.Array) -> jax.Array:
    value = values[_name(path)]
    return jax.random.wrap_key_data(value) if _is_key(leaf) else value

  return jax.tree_util.tree_map_with_path(fill, like)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")


def _numbers(leaf: jax.Array) -> jax.Array:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: jax.Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
