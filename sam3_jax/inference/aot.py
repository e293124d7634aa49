"""Compiles the programs of a model ahead of time (AOT): for this machine, so that the first calls
do not wait, or for a TPU that is not attached, to read what its compiler reports."""

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sam3_jax.inference.batch_sharding import BatchSharding
from sam3_jax.inference.programs import Programs
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.prompts import ConceptPrompt, Prompt, pack

# Stops libtpu, which reads them when it is loaded, from looking for a TPU or a metadata server.
LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled program, as its compiler reports it.

  Attributes:
    name: such as "decode 4 prompts".
    seconds: of compilation, while other programs were compiled in parallel.
    peak_bytes: of device memory, arguments included.
    argument_bytes: of parameters and inputs.
    flops: counts the body of a loop once.
  """

  name: str
  seconds: float
  peak_bytes: int
  argument_bytes: int
  flops: float


def compile_programs(programs: Programs, params: Any, **sizes: Any) -> list[Program]:
  """Compiles the programs of `lowered`, in parallel. Calls with the same shapes reuse them."""
  with ThreadPoolExecutor() as pool:
    items = lowered(programs, params, **sizes).items()
    return list(pool.map(lambda item: _compile(*item), items))


def lowered(
  programs: Programs,
  params: Any,
  *,
  images: Sequence[int] = (),
  phrases: Sequence[int] = (),
  prompts: Sequence[int] = (),
  boxes: int = 0,
  concepts: Sequence[tuple[int, int]] = (),
  max_detections: int | None = None,
) -> dict[str, Any]:
  """Lowers the programs for batches of these sizes; returns `jax.stages.Lowered` by name.

  Args:
    programs: of a model.
    params: its parameters; may be `jax.ShapeDtypeStruct`s.
    images: sizes of the batches of `encode`.
    phrases: sizes of the batches of `encode_text`.
    prompts: sizes of the batches of `decode`, of one image; on a mesh, of one image each.
    boxes: the largest number of boxes of a prompt.
    concepts: sizes of the batches of concepts of `decode`, of one image, and their exemplars.
    max_detections: as in `Sam3.decode`.
  """
  inputs = _Inputs(programs, jax.tree.map(_shape, params))
  arguments = {_name("encode", n, "image"): (programs.encode, inputs.images(n)) for n in images}
  arguments |= {
    _name("encode", n, "phrase"): (programs.encode_text, (inputs.tokens(n),)) for n in phrases
  }
  box: Any = [[0, 0, 1, 1]]
  kinds: list[tuple[str, int, ConceptPrompt]] = [
    (_name("decode", n, "prompt"), n, Prompt("any", box * boxes)) for n in prompts
  ]
  for n, exemplars in concepts:
    name = f"{_name('decode', n, 'concept')} of {exemplars} exemplars"
    kinds.append((name, n, inputs.concept(exemplars)))
  for name, n, prompt in kinds:
    split = inputs.sharding.is_split(n)
    detect = (programs.split_prompts if split else programs.prompts).detect
    arguments[name] = detect, (*inputs.prompts(n, prompt), max_detections)
  return {name: jitted.lower(inputs.params, *rest) for name, (jitted, rest) in arguments.items()}


def described_tpu(topology: str) -> Any:
  """The device of a chip that is not attached, such as of "v5e:1x1", as libtpu's compiler has it.

  Raises:
    ValueError: libtpu is missing, or has no such topology.
  """
  from jax.experimental import topologies

  os.environ |= LIBTPU_ENVIRONMENT | os.environ
  single = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  try:
    description = topologies.get_topology_desc(platform="tpu", topology_name=topology, **single)
  except Exception as error:
    [first, *_] = str(error).splitlines() or [""]
    raise ValueError(
      f"no compiler for the TPU {topology!r} ({first[:120]}); pip install 'sam3-jax[tpu]' on "
      "Linux, and name a topology such as v5e:1x1 or v6e:2x2."
    ) from error
  return description.devices[0]


class _Inputs:
  """Shapes of the inputs of programs, with their shardings."""

  def __init__(self, programs: Programs, params: Any):
    self.programs, self.params = programs, params
    self.sharding = BatchSharding(programs.mesh)

  def images(self, count: int) -> Any:
    side = self.programs.config.image_size
    pixels = jax.ShapeDtypeStruct((count, side, side, 3), np.uint8)
    return self._put(count, (pixels, jax.ShapeDtypeStruct((count, 2), np.int32)))

  def tokens(self, count: int) -> Any:
    return jax.ShapeDtypeStruct((count, self.programs.config.text.context), np.int32)

  def concept(self, exemplars: int) -> Concept:
    """A concept with a number of exemplars."""
    width, dtype = self.programs.config.width, jnp.dtype(self.programs.dtype)
    tokens: Any = np.zeros((exemplars, width), dtype)
    labels: Any = np.ones(exemplars, bool)
    return Concept(tokens, labels)

  def prompts(self, count: int, prompt: ConceptPrompt) -> tuple[Any, Any]:
    """The embedding and the prompts of `detect`, all like the given one."""
    mesh = self.programs.mesh
    embedding, _ = self._result(self.programs.encode, *self.images(mesh.size if mesh else 1))
    text = self._result(self.programs.encode_text, self.tokens(count))
    prompts = [prompt] * count
    rows, sizes = np.arange(count, dtype=np.int32), np.ones((count, 2), np.int32)
    packed = pack(prompts, sizes, image=0 * rows, first_id=rows, text=text)
    return self._put(count, (embedding, packed))

  def _result(self, jitted: Any, *args: Any) -> Any:
    """The shapes of a result, on the device of the parameters."""
    sharding = _shape(jax.tree.leaves(self.params)[0]).sharding
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      jax.eval_shape(jitted, self.params, *args),
    )

  def _put(self, count: int, batch: Any) -> Any:
    """The shapes of a batch; on a mesh, sharded, with `count` rows each."""
    sharding = self.sharding.sharding(count)
    if sharding is None:
      return jax.tree.map(_shape, batch)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=sharding), batch
    )


def _compile(name: str, lowered: Any) -> Program:
  start = time.perf_counter()
  compiled = lowered.compile()
  seconds, memory = time.perf_counter() - start, compiled.memory_analysis()
  return Program(
    name=name,
    seconds=seconds,
    peak_bytes=memory.peak_memory_in_bytes,
    argument_bytes=memory.argument_size_in_bytes,
    flops=(compiled.cost_analysis() or {}).get("flops", 0.0),
  )


def _shape(x: Any) -> jax.ShapeDtypeStruct:
  """With the sharding only of committed arrays: JAX finds compiled programs by that, too."""
  committed = isinstance(x, jax.ShapeDtypeStruct) or getattr(x, "committed", False)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if committed else None)


def _name(what: str, count: int, of: str) -> str:
  return f"{what} {count} {of}{'s' if count > 1 else ''}"
