"""The model's programs compiled before they are called: for this machine, so that no call has to
wait, or for a TPU that is not here, to see what its compiler says of them."""

import dataclasses
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from sam3_jax.inputs.prompts import Prompt, pack

if TYPE_CHECKING:
  from sam3_jax.inference.predictor import Sam3

# Has libtpu look for no TPU and for no metadata server; it reads them when it is loaded.
DESCRIBED = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compiler says of a program.

  Attributes:
    name: such as "decode 4 prompts".
    seconds: of compilation; programs are compiled side by side and disturb each other.
    peak_bytes: of device memory, arguments included.
    argument_bytes: parameters and inputs.
    flops: a count that takes the body of a loop once.
  """

  name: str
  seconds: float
  peak_bytes: int
  argument_bytes: int
  flops: float


def programs(model: "Sam3", **sizes: Any) -> list[Program]:
  """Compiles what `lowered` gives. Calls of the same shapes find it."""
  with ThreadPoolExecutor() as pool:
    return list(pool.map(lambda pair: _compile(*pair), lowered(model, **sizes).items()))


def lowered(
  model: "Sam3",
  *,
  images: Sequence[int] = (),
  phrases: Sequence[int] = (),
  prompts: Sequence[int] = (),
  boxes: int = 0,
  max_detections: int | None = None,
) -> dict[str, Any]:
  """What `model` runs for batches of these sizes, for the compiler; by a name each.

  Args:
    model: its parameters may be `jax.ShapeDtypeStruct`s.
    images: sizes of the batches of `encode`.
    phrases: of `encode_text`.
    prompts: of `decode`, about one image; on a mesh, about an image each.
    boxes: the most of a prompt.
    max_detections: as in `decode`.
  """
  config = model.config
  params, given = jax.tree.map(_shape, model.params), _sharding(model.params)

  def array(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

  def result(jitted: Any, *args: Any) -> Any:
    """Lies where the parameters lie."""
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=given),
      jax.eval_shape(jitted, params, *args),
    )

  def put(count: int, batch: Any) -> Any:
    """As it is, or, if `model` has a mesh, so many rows as they lie there."""
    sharding = model._placement.sharding(count)
    if sharding is None:
      return jax.tree.map(_shape, batch)
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype, sharding=sharding), batch
    )

  def image_shapes(count: int) -> tuple[Any, Any]:
    side = config.image_size
    return array((count, side, side, 3), np.uint8), array((count, 2), np.int32)

  def tokens(count: int) -> Any:
    return array((count, config.text.context), np.int32)

  def question(count: int) -> tuple[Any, Any, int | None]:
    seen, _ = result(model._encode_image, *image_shapes(model.mesh.size if model.mesh else 1))
    rows, sizes = np.arange(count, dtype=np.int32), np.ones((count, 2), np.int32)
    asked = [Prompt("any", [[0, 0, 1, 1]] * boxes)] * count
    text = result(model._encode_text, tokens(count))
    packed = pack(asked, sizes, image=0 * rows, first_id=rows, text=text)
    return *put(count, (seen, packed)), max_detections

  wanted = {
    _named("encode", n, "image"): (model._encode_image, put(n, image_shapes(n))) for n in images
  }
  wanted |= {_named("encode", n, "phrase"): (model._encode_text, (tokens(n),)) for n in phrases}
  wanted |= {_named("decode", n, "prompt"): (model._programs(n)[0], question(n)) for n in prompts}
  return {name: jitted.lower(params, *args) for name, (jitted, args) in wanted.items()}


def described_tpu(topology: str) -> Any:
  """The device of a chip that is not here, such as of "v5e:1x1"; the compiler in libtpu knows it.

  Raises:
    ValueError: libtpu is missing, or knows no such topology.
  """
  from jax.experimental import topologies

  os.environ |= DESCRIBED | os.environ
  alone = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
  try:
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **alone)
  except Exception as error:
    [first, *_] = str(error).splitlines() or [""]
    raise ValueError(
      f"no compiler for the TPU {topology!r} ({first[:120]}); pip install 'sam3-jax[tpu]' on "
      "Linux, and name a topology such as v5e:1x1 or v6e:2x2."
    ) from error
  return described.devices[0]


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
  """Committed to a device or not, which is part of what a program is found by."""
  placed = isinstance(x, jax.ShapeDtypeStruct) or getattr(x, "committed", False)
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding if placed else None)


def _sharding(params: Any) -> Any:
  """Where what is computed of the parameters lies; None if nothing decides it."""
  return _shape(jax.tree.leaves(params)[0]).sharding


def _named(what: str, count: int, of: str) -> str:
  return f"{what} {count} {of}{'s' if count > 1 else ''}"
