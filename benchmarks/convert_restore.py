"""The restoring step of `convert.py`: loads a bundle onto devices of this host; prints JSON."""

import json
import sys
import time

# The number of devices for each kind of restore. Replicas of a full-size model on eight devices
# would take eight times its memory.
COPIES = {"one device": 1, "replicated on two": 2, "sharded over eight (FSDP)": 8}


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
  sharded = [array for array in arrays if not array.sharding.is_fully_replicated]
  once = all(sum(s.data.size for s in array.addressable_shards) == array.size for array in sharded)
  values = {
    "reading": time.perf_counter() - start,
    "devices": len(devices),
    "held": held,
    "copies": held / sum(array.nbytes for array in arrays),
    "sharded": sum(array.nbytes for array in sharded),
    "sharded_held_once": once,
  }
  print(json.dumps(values))


if __name__ == "__main__":
  main()
