"""Conversion of small models in memory, from and to arrays by name."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from sam3_jax.checkpoint.bundle import expected_shapes
from sam3_jax.config import Config
from sam3_jax.utils.param_tree import flatten, raise_faults

from .infer import infer_config
from .layouts import meta
from .plan import REMEDY, has_visual, plan
from .source import Source
from .table import Table


def convert_meta(
  arrays: Mapping[str, np.ndarray], config: Config | None = None, dtype: str = "float32"
) -> tuple[Config, dict[str, Any]]:
  """Returns our configuration and parameters, from arrays by Meta's names.

  Raises:
    ValueError: tensors are missing, unknown, misshaped or not finite (all faults in one line), or
      the shapes do not determine the configuration.
  """
  table = meta.TABLE
  config = config or infer_config(table, {name: array.shape for name, array in arrays.items()})
  config = table.with_video(config, arrays)
  shapes = expected_shapes(config, visual=table.has_visual(arrays))
  return config, convert_arrays(table, arrays, shapes, config, dtype)


def convert_arrays(
  table: Table,
  arrays: Mapping[str, np.ndarray],
  shapes: Mapping[str, tuple[int, ...]],
  config: Config,
  dtype: str = "float32",
) -> dict[str, Any]:
  """Returns the whole parameter tree; raises as `plan` does."""
  sources = {name: Source.of(array) for name, array in arrays.items()}
  planned, faults = plan(table, sources, shapes, config), []
  params = {part: planned.read(part, dtype, faults) for part in planned.parts}
  raise_faults(faults, "these arrays cannot be used", REMEDY)
  return params


def export_arrays(
  table: Table, params: Mapping[str, Any], unread: Mapping[str, np.ndarray], config: Config
) -> Iterator[tuple[str, np.ndarray]]:
  """Inverts `convert_arrays`: yields every tensor of the layout, one at a time.

  Args:
    table: the layout to write.
    params: our parameter tree, of NumPy arrays.
    unread: what `Plan.read_unread` returned for a source in the same layout; skipped entries that
      it lacks are zero.
    config: the model's configuration.
  """
  flat = flatten(params)
  for name, entry in table.entries(config, visual=has_visual(flat)).items():
    yield name, entry.restore(name, flat, unread, config)
  yield from ((name, array) for name, array in unread.items() if "[" not in name)
