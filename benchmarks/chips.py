"""TPUs that are not here: what is published of them, and their compiler, which needs none.

libtpu compiles for a described chip on any Linux machine (`pip install "jax[tpu]"`). `describe`, or
`emit`, comes before the first use of JAX in the process: it sets what libtpu reads when loaded.

Nothing here was ever confirmed by a TPU. Memory, collectives and whether a program compiles are
exact, if the compiler is of the version that the TPU has. Times are the compiler's estimates, of
two grades: emitted counts the cycles of the machine code, and takes minutes for each program;
planned are those of the cost model that chose the tiling. Compare within one grade only.
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
    flops: operations a second in bfloat16.
    bandwidth: bytes a second of its memory.
    clock: cycles a second: `flops` over those of all its matrix units in a cycle, which is
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
  """What is known of a compiled program, for each chip.

  Attributes:
    target: a key of `CHIPS`.
    compile_seconds: on this machine.
    peak, arguments, temporaries: bytes of the chip's memory, tiles' padding included.
    text: the program (HLO).
    listing: what it runs.
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
    """Instructions one after another, but no less than the time of all memory traffic; collectives
    are not in it."""
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
  """Lets chips be described where there are none."""
  os.environ.update({"JAX_PLATFORMS": "cpu"} | LIBTPU_ENVIRONMENT)


def emit() -> tempfile.TemporaryDirectory:
  """As `describe`; and has the compiler count cycles in the machine code.

  Returns:
    The folder that it writes to, which nobody reads: the flag puts the cycles into the text too.
  """
  describe()
  folder = tempfile.TemporaryDirectory(prefix="tpu-")
  flags = os.environ.get("LIBTPU_INIT_ARGS", "")
  os.environ["LIBTPU_INIT_ARGS"] = f"{flags} --xla_jf_dump_static_llo_profile_to={folder.name}"
  return folder


def devices(target: str, count: int = 1) -> list[Any]:
  """So many described chips, a key of `TOPOLOGIES`."""
  from jax.experimental import topologies

  alone = {"chips_per_host_bounds": (1, 1, 1)} if count == 1 else {}
  name = f"{target}:{TOPOLOGIES[count]}"
  return topologies.get_topology_desc(platform="tpu", topology_name=name, **alone).devices


def compile_for(target: str, function: Any, *args: Any) -> Report:
  """Compiles for one chip.

  Args:
    target: a key of `CHIPS`.
    function: to be jitted.
    args: pytrees of arrays or `jax.ShapeDtypeStruct`s.
  """
  import jax
  from jax.experimental.layout import Format, Layout

  place = jax.sharding.SingleDeviceSharding(devices(target)[0])
  given = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
  layout = Format(Layout.AUTO, place)
  return report(target, jax.jit(function, in_shardings=layout, out_shardings=layout).lower(*given))


def report(target: str, lowered: Any) -> Report:
  """Compiles what was lowered for chips of `target`."""
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
