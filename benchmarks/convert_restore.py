"""The restoring side of `convert.py`: a bundle onto devices of this host; prints JSON."""

import json
import sys
import time

# Ways to restore: how many of the devices take part. A full-size model whole on eight devices of a
# host would take eight times its memory.
COPIES = {"one device": 1, "whole on two": 2, "cut over eight (FSDP)": 8}


def main() -> None:
  import jax

  from sam3_jax.checkpoint import bundle
  from sam3_jax.training import sharding

  path, kind = sys.argv[1:]
  devices = jax.devices()[: COPIES[kind]]
  mesh = sharding.make_mesh(devices, fsdp=len(devices) if "FSDP" in kind else 1)
  start = time.perf_counter()
  params = bundle.load(
    path, sharding=lambda name, shape: sharding.parameter_sharding(mesh, name, shape)
  ).params
  jax.block_until_ready(params)
  arrays = jax.tree.leaves(params)
  held = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
  cut = [array for array in arrays if not array.sharding.is_fully_replicated]
  once = all(sum(s.data.size for s in array.addressable_shards) == array.size for array in cut)
  values = {
    "reading": time.perf_counter() - start,
    "devices": len(devices),
    "held": held,
    "copies": held / sum(array.nbytes for array in arrays),
    "cut": sum(array.nbytes for array in cut),
    "cut_held_once": once,
  }
  print(json.dumps(values))


if __name__ == "__main__":
  main()
