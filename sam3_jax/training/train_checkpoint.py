"""Checkpoints to resume from: training state and position in the data, written asynchronously by
Orbax.

A checkpoint appears under its step number only when it is complete, so a process may be killed at
any time. The next process removes incomplete checkpoints.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from sam3_jax.training.state import TrainState

STATE, PROGRESS = "state", "progress"


class TrainCheckpoints:
  """The latest checkpoints of a run, in a directory of their own."""

  def __init__(self, directory: str | Path, max_to_keep: int):
    self.directory = Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self.directory,
      item_names=(STATE, PROGRESS),
      options=ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True),
    )

  @property
  def latest(self) -> int | None:
    """The step of the latest complete checkpoint; None if there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: TrainState, progress: dict[str, Any]) -> None:
    """Copies the state, and writes it in the background.

    Args:
      step: number of completed steps.
      state: may be donated when this returns.
      progress: other values that resuming needs, plain ones for JSON.
    """
    self._manager.save(
      step,
      args=ocp.args.Composite(
        **{STATE: ocp.args.StandardSave(_plain(state)), PROGRESS: ocp.args.JsonSave(progress)}
      ),
    )

  def restore(self, state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Reads the latest checkpoint, bit for bit, in the shapes, dtypes and shardings of `state`.

    Raises:
      ValueError: it does not fit, or cannot be read.
    """
    shapes = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state)
    )
    arguments = {STATE: ocp.args.StandardRestore(shapes), PROGRESS: ocp.args.JsonRestore()}
    try:
      restored = self._manager.restore(self.latest, args=ocp.args.Composite(**arguments))
    except Exception as error:  # Orbax and TensorStore raise many types, over many lines
      raise ValueError(
        f"cannot resume from {self.directory / str(self.latest)} "
        f"({type(error).__name__}: {str(error).strip().splitlines()[0]:.200}); remove this "
        "directory to resume from the checkpoint before it."
      ) from error
    return _filled(state, restored[STATE]), restored[PROGRESS]

  def wait(self) -> None:
    """Waits until everything is on disk, in all processes; raises errors of the background."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _plain(state: TrainState) -> dict[str, jax.Array]:
  """All leaves by name; the random key as an array."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(state)
  return {_name(path): _key_data(leaf) for path, leaf in leaves}


def _filled(like: TrainState, values: dict[str, jax.Array]) -> TrainState:
  def fill(path: Any, leaf: jax.Array) -> jax.Array:
    value = values[_name(path)]
    return jax.random.wrap_key_data(value) if _is_key(leaf) else value

  return jax.tree_util.tree_map_with_path(fill, like)


def _name(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator=".").replace("/", ".")


def _key_data(leaf: jax.Array) -> jax.Array:
  return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: jax.Array) -> bool:
  return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
