"""Rows of results: cut into batches of few sizes, put together, taken out.

A program is compiled for each shape of its inputs, so there are few sizes of batches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


def batches(rows: np.ndarray, sizes: Sequence[int], places: int = 1) -> Iterator[np.ndarray]:
  """Cuts rows into batches, the largest that fits first.

  Args:
    rows: their numbers.
    sizes: of batches for each place, in descending order; the last one is 1.
    places: among which each batch is shared out equally; the last row again and again fills the
      rows up until they divide them.
  """
  rows = np.pad(rows, (0, -len(rows) % places), mode="edge")
  while len(rows):
    size = next(places * size for size in sizes if places * size <= len(rows))
    yield rows[:size]
    rows = rows[size:]


def batches_by_image(
  images: np.ndarray, sizes: Sequence[int], places: int = 1
) -> Iterator[np.ndarray]:
  """Batches of prompts about one image, whose numbers are given; what is left over, in batches
  about several. `sizes` and `places` are those of `batches`."""
  rest, largest = [], places * sizes[0]
  for image in np.unique(images):
    rows = np.flatnonzero(images == image)
    left = len(rows) % largest
    yield from rows[: len(rows) - left].reshape(-1, largest)
    rest.append(rows[len(rows) - left :])
  if rest:
    yield from batches(np.concatenate(rest), sizes, places)


def lengths(cut: Iterator[np.ndarray]) -> list[int]:
  """The different sizes of batches."""
  return sorted({len(batch) for batch in cut})


def ordinals(images: np.ndarray) -> np.ndarray:
  """For each prompt, how many prompts before it are about the same image."""
  seen: dict[int, int] = {}
  places = []
  for image in images.tolist():
    places.append(seen.get(image, 0))
    seen[image] = places[-1] + 1
  return np.array(places, np.int32)


def join(parts: list) -> Any:
  """One pytree of the rows of several."""
  if len(parts) == 1:
    return parts[0]
  return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def take(pytree: Any, rows: np.ndarray) -> Any:
  """Rows of each array; without a copy if these are all of them in order."""
  if np.array_equal(rows, np.arange(len(pytree))):
    return pytree
  return _gather(pytree, rows)


def distinct(pytree: Any, rows: np.ndarray) -> tuple[Any, np.ndarray]:
  """A pytree and the numbers of its rows, without those that are there again."""
  first = np.sort(np.unique(rows, return_index=True)[1])
  return take(pytree, first), rows[first]


@jax.jit
def _gather(pytree: Any, rows: Array) -> Any:
  return jax.tree.map(lambda array: array[rows], pytree)
