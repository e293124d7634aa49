"""Splits results and prompts into batches of few sizes, and joins and selects rows.

JAX compiles a program for each shape of its inputs, so there are few sizes of batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def batches(rows: np.ndarray, sizes: Sequence[int], n_devices: int = 1) -> Iterator[np.ndarray]:
  """Splits rows into batches, the largest that fits first.

  Args:
    rows: their indices.
    sizes: of the batches on each device, in descending order; the last one is 1.
    n_devices: devices that share a batch equally. Repeats the last row to pad the rows to a
      multiple of `n_devices`.
  """
  rows = np.pad(rows, (0, -len(rows) % n_devices), mode="edge")
  while len(rows):
    size = next(n_devices * size for size in sizes if n_devices * size <= len(rows))
    yield rows[:size]
    rows = rows[size:]


def batches_by_image(
  images: np.ndarray, sizes: Sequence[int], n_devices: int = 1
) -> Iterator[np.ndarray]:
  """Splits prompts into batches of the same image, and the rest into batches of several images.

  Args:
    images: the image of each prompt.
    sizes, n_devices: as in `batches`.
  """
  rest, largest = [], n_devices * sizes[0]
  for image in np.unique(images):
    rows = np.flatnonzero(images == image)
    left = len(rows) % largest
    yield from rows[: len(rows) - left].reshape(-1, largest)
    rest.append(rows[len(rows) - left :])
  if rest:
    yield from batches(np.concatenate(rest), sizes, n_devices)


def batch_sizes(split: Iterator[np.ndarray]) -> list[int]:
  """The distinct sizes of batches, in ascending order."""
  return sorted({len(batch) for batch in split})


def ordinals(images: np.ndarray) -> np.ndarray:
  """For each prompt, the number of earlier prompts of the same image."""
  counts: dict[int, int] = {}
  numbers = []
  for image in images.tolist():
    numbers.append(counts.get(image, 0))
    counts[image] = numbers[-1] + 1
  return np.array(numbers, np.int32)


def join(parts: list) -> Any:
  """Concatenates pytrees along the first axis."""
  if len(parts) == 1:
    return parts[0]
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def take(pytree: Any, rows: np.ndarray) -> Any:
  """Selects rows of each array; no copy if `rows` are all of them in order."""
  if np.array_equal(rows, np.arange(len(pytree))):
    return pytree
  return _gather(pytree, rows)


def drop_repeats(pytree: Any, rows: np.ndarray) -> tuple[Any, np.ndarray]:
  """Removes the repeated rows that pad a batch.

  Args:
    pytree: the results of a batch.
    rows: their indices.

  Returns:
    The first result of each index, and the indices.
  """
  first = np.sort(np.unique(rows, return_index=True)[1])
  return take(pytree, first), rows[first]


@jax.jit
def _gather(pytree: Any, rows: Array) -> Any:
  return jax.tree.map(lambda array: array[rows], pytree)
