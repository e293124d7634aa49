"""Compiles ahead of time (AOT) for TPUs, without a TPU, and reports the compiler's estimates.

libtpu compiles for a TPU topology on any Linux machine (`pip install "jax[tpu]"`). Call `describe`
or `emit` before the first use of JAX in the process, as they set variables that libtpu reads when
it is loaded.

No result has been confirmed on a TPU. Memory, collectives and whether a program compiles are exact
if the TPU has the same compiler version. Times are the compiler's estimates, of two grades: emitted
counts the cycles of the machine code, and takes minutes for each program; planned comes from the
cost model that chooses the tiling. Compare results of the same grade only.
"""

import dataclasses
import os
import tempfile
import time
from typing import Any

import hlo

from sam3_jax.inference.aot import LIBTPU_ENVIRONMENT


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of a chip.

  Attributes:
    flops: bfloat16 operations per second.
    bandwidth: bytes per second of its memory.
    clock: cycles per second: `flops` divided by the operations of all matrix units per cycle,
      2 x 4 x 128^2 on v5e, 2 x 4 x 256^2 on v6e.
    memory: bytes.
  """

  flops: float
  bandwidth: float
  clock: float
  memory: float


CHIPS = {
  "v5e": Chip(197e12, 819e9, 1.50e9, 16e9),
  "v6e": Chip(918e12, 1640e9, 1.75e9, 32e9),
}
TOPOLOGIES = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 64: "8x8", 256: "16x16"}


@dataclasses.dataclass(frozen=True)
class Report:
  """Properties of a compiled program, per chip.

  Attributes:
    target: a key of `CHIPS`.
    compile_seconds: on this machine.
    peak, arguments, temporaries: bytes of the chip's memory, including the padding of tiles.
    text: the program (HLO).
    listing: its instructions.
  """

  target: str
  compile_seconds: float
  peak: int
  arguments: int
  temporaries: int
  text: str
  listing: hlo.Listing

  @property
  def seconds(self) -> float:
    """The time of all instructions in sequence, at least the time of all memory traffic; without
    collectives."""
    chip = CHIPS[self.target]
    work = sum(op.seconds(chip.clock, chip.bandwidth) for op in self.listing.ops)
    return max(work, self.traffic / chip.bandwidth)

  @property
  def traffic(self) -> int:
    """Bytes to and from the chip's memory."""
    return sum(
      op.traffic * op.times
      for op in self.listing.ops
      if op.opcode not in hlo.FREE and not op.opcode.endswith("-done")
    )


def describe() -> None:
  """Sets the variables to compile without a TPU."""
  os.environ.update({"JAX_PLATFORMS": "cpu"} | LIBTPU_ENVIRONMENT)


def emit() -> tempfile.TemporaryDirectory:
  """As `describe`, and makes the compiler count cycles in the machine code.

  Returns:
    The directory that the compiler writes to. It is not read, as the program's text also has the
    cycles.
  """
  describe()
  directory = tempfile.TemporaryDirectory(prefix="tpu-")
  flags = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_static_llo_profile_to={directory.name}"
  return directory


def devices(target: str, count: int = 1) -> list[Any]:
  """The devices of a topology; `count` is a key of `TOPOLOGIES`."""
  from jax.experimental import topologies

  alone = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
  name = f"{target}:{TOPOLOGIES[count]}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices


def compile_for(target: str, function: Any, *args: Any, donated: tuple[int, ...] = ()) -> Report:
  """Compiles for one chip.

  Args:
    target: a key of `CHIPS`.
    function: to be jitted.
    args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
    donated: positions of the arguments that the program may overwrite.
  """
  import jax
  from jax.experimental.layout import Format, Layout

  sharding = jax.sharding.SingleDeviceSharding(devices(target)[0])
  given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  layout = Format(Layout.AUTO, sharding)
  jitted = jax.jit(function, in_shardings=layout, out_shardings=layout, donate_argnums=donated)
  return report(target, jitted.lower(*given))


def report(target: str, lowered: Any) -> Report:
  """Compiles a lowered program for chips of `target`."""
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
  text = compiled.as_text()
  return Report(
    target=target,
    compile_seconds=seconds,
    peak=memory.peak_memory_in_bytes,
    arguments=memory.argument_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    text=text,
    listing=hlo.read(text),
  )
