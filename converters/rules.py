"""Conversion rules: which tensor of a source goes where, and how its layout changes.

Every rule can be inverted, for export. `table.py` collects the rules of a layout.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from sam3_jax.config import Config

from .transforms import DENSE, Transform


@dataclasses.dataclass(frozen=True)
class Rule:
  """One tensor of a source, or one per layer.

  Attributes:
    source: its name, with `*` for the layer number.
    targets: its path in our parameter tree, also with `*`; three paths for fused q, k, v rows.
    transforms: for each target, the transforms of its rows, in this order.
    skip: number of leading entries of axis 1 that the model does not read; see `skipped_name`.
  """

  source: str
  targets: tuple[str, ...]
  transforms: tuple[tuple[Transform, ...], ...]
  skip: int = 0

  def split(self, array: np.ndarray, config: Config) -> list[np.ndarray]:
    """Returns our arrays of the source's tensor, one per target."""
    pieces = np.split(array[:, self.skip :] if self.skip else array, len(self.targets))
    for number, chain in enumerate(self.transforms):
      for transform in chain:
        pieces[number] = transform.apply(pieces[number], config)
    return pieces

  def join(self, arrays: Iterable[np.ndarray], config: Config) -> np.ndarray:
    """Inverts `split`, without the skipped entries."""
    pieces = list(arrays)
    for number, chain in enumerate(self.transforms):
      for transform in reversed(chain):
        pieces[number] = transform.undo(pieces[number], config)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

  def skipped_name(self, name: str) -> str:
    """The name under which `unread` holds the skipped entries of the tensor `name`."""
    return f"{name}[:, :{self.skip}]"


def rule(source: str, target: str, *transforms: Transform, skip: int = 0) -> tuple[Rule]:
  return (Rule(source, (target,), (transforms,), skip),)


def dense(
  source: str, target: str, *before: Transform, kernel: Transform = DENSE
) -> tuple[Rule, ...]:
  """Weight and bias of a dense layer or a convolution; `before` transforms the output rows."""
  return (
    *rule(f"{source}.weight", f"{target}/kernel", *before, kernel),
    *rule(f"{source}.bias", f"{target}/bias", *before),
  )


def norm(source: str, target: str) -> tuple[Rule, ...]:
  return (
    *rule(f"{source}.weight", f"{target}/scale"),
    *rule(f"{source}.bias", f"{target}/bias"),
  )
