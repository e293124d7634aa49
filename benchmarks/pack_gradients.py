"""Packs the gradients of Meta's training step for tests/goldens: `pack_gradients.py IN OUT`.

Each tensor becomes 16-bit integers times (its largest magnitude / 32767), so that no value moves by
more than 1.6e-5 of that; of the token embedding only the rows that are not zero are in the input.
"""

import sys

import numpy as np


def main(source: str, target: str) -> None:
  arrays = {}
  for name, x in np.load(source).items():
    if name.endswith(".rows"):
      arrays[name] = x.astype(np.int32)
      continue
    scale = np.abs(x).max() / 32767
    arrays[name] = np.round(x / (scale or 1)).astype(np.int16)
    arrays[f"{name}:scale"] = np.float32(scale)
  np.savez_compressed(target, **arrays)


if __name__ == "__main__":
  main(*sys.argv[1:])
