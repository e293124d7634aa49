"""Merges LoRA: adapters of PEFT, and checkpoints with LoRA layers that were not merged.

A module with a weight W [out, in] has two factors, A [r, in] and B [out, r]; its merged weight is
W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685). The scale is lora_alpha / r, or lora_alpha /
sqrt(r) with `use_rslora`; see `adapter_config.py`. An adapter may also hold whole tensors that
replace the model's: biases, and modules_to_save. Source: huggingface/peft 0.18,
`tuners/lora/layer.py` and `utils/save_and_load.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from sam3_jax.utils.param_tree import raise_faults

from .adapter_config import CONFIG, REMEDY, LoraSettings
from .source import Source

KINDS = ("A", "B", "embedding_A", "embedding_B")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>\w+?)(?P<rest>(\..+)?)")


@dataclasses.dataclass(frozen=True)
class Factor:
  """The name of a LoRA tensor, parsed.

  Attributes:
    module: the module's name in the file.
    kind: one of `KINDS`; others are refused.
    leaf: weight or bias; empty for the factors of an embedding.
    adapter: the name of the adapter; empty in a file of `save_pretrained`.
  """

  module: str
  kind: str
  leaf: str
  adapter: str


def split(names: Iterable[str]) -> tuple[dict[str, Factor], dict[str, str]]:
  """Separates the tensors of LoRA from whole tensors.

  Of PEFT's two copies of a module, `original_module` is left out if `modules_to_save` has the
  trained one.

  Returns:
    the factors by name, and for each whole tensor its name in the model that PEFT wrapped.
  """
  factors, plain = {}, {}
  names = list(names)
  for name in names:
    if match := _LORA.fullmatch(name):
      rest = [part for part in match["rest"].split(".") if part]
      leaf = rest.pop() if rest and rest[-1] in ("weight", "bias") else ""
      factors[name] = Factor(match["module"], match["kind"], leaf, ".".join(rest))
  adapters = {factor.adapter for factor in factors.values()} | {"default"}
  saved = {name.partition(".modules_to_save.")[0] for name in names if ".modules_to_save." in name}
  for name in names:
    if name in factors:
      continue
    name, whole = name.replace(".base_layer.", "."), name
    head, found, rest = name.partition(".modules_to_save.")
    if found:
      first, _, last = rest.partition(".")
      plain[whole] = f"{head}.{last if first in adapters and last else rest}"
      continue
    head, found, rest = name.partition(".original_module.")
    if found and head in saved:
      continue
    plain[whole] = f"{head}.{rest}" if found else name
  return factors, plain


def merge(
  factors: Mapping[str, Factor],
  sources: Mapping[str, Source],
  names: Mapping[str, str],
  weights: Mapping[str, Source],
  settings: LoraSettings | None,
  where: str,
) -> dict[str, Source]:
  """Returns the weights that LoRA changes; each product is added when the weight is read.

  Args:
    factors: as `split` returns them.
    sources: the tensors of the file.
    names: for each module, by its name in the file, the name of its weight in the layout.
    weights: the model's tensors, by their names in the layout.
    settings: of the adapter; None if unknown.
    where: the file's name in messages.

  Raises:
    ValueError: with all faults in one line.
  """
  faults: list[str] = []
  modules = _by_module(factors, sources, faults)
  raise_faults(faults, f"{where} cannot be merged", REMEDY)
  merged, unknown = {}, []
  for module, parts in modules.items():
    name = names.get(module, "")
    if name not in weights:  # an nn.MultiheadAttention has its projections in one matrix
      name = f"{name.removesuffix('weight')}in_proj_weight"
    if name not in weights:
      unknown.append(module)
      continue
    try:
      merged |= _merge_module(module, parts, name, weights, settings)
    except ValueError as error:
      faults.append(f"{module}: {error}")
  if unknown:
    faults.insert(
      0,
      f"{len(unknown):,} of its {len(modules):,} modules are not in the model, {unknown[0]} first",
    )
  remedy = "Give the checkpoint that it was trained on, with its adapter_config.json beside it."
  raise_faults(faults, f"{where} does not fit its model", remedy)
  return merged


def _by_module(
  factors: Mapping[str, Factor], sources: Mapping[str, Source], faults: list[str]
) -> dict[str, dict[tuple[str, str], Source]]:
  """The factors of each module, by kind and leaf."""
  modules: dict[str, dict[tuple[str, str], Source]] = {}
  adapters = sorted({factor.adapter for factor in factors.values()} - {""})
  if len(adapters) > 1:
    faults.append(f"it holds {len(adapters)} adapters ({', '.join(adapters[:5])}), not one")
  for name, factor in factors.items():
    if factor.kind == "magnitude_vector":
      faults.append(f"{name} is of DoRA, which cannot be merged")
    elif factor.kind not in KINDS:
      faults.append(f"{name} is of an unknown kind of LoRA")
    else:
      modules.setdefault(factor.module, {})[factor.kind, factor.leaf] = sources[name]
  return modules


def _merge_module(
  module: str,
  parts: Mapping[tuple[str, str], Source],
  name: str,
  weights: Mapping[str, Source],
  settings: LoraSettings | None,
) -> dict[str, Source]:
  """A module's merged weight, and its bias if LoRA has one; ValueError if they do not fit."""
  embedding = any(kind.startswith("embedding") for kind, _ in parts)
  a, b = _factors(parts, embedding)
  scale = settings.scale(_name_in_model(module), a.shape[0]) if settings else None
  if scale is None:
    raise ValueError(
      f"its scale is unknown; put {CONFIG} with lora_alpha beside the file, or give --lora-alpha"
    )
  weight = weights[name]
  transposed = embedding or (settings is not None and settings.fan_in_fan_out)
  shape = _product_shape(a.shape, b.shape, transposed)
  if shape != weight.shape:
    raise ValueError(
      f"its factors {list(b.shape)} and {list(a.shape)} do not give the model's weight "
      f"{list(weight.shape)}: the adapter is of a model of another size"
    )

  def read() -> np.ndarray:
    first, second = (np.asarray(source.read(), np.float64) for source in (a, b))
    product = np.tensordot(second.reshape(len(second), -1), first, 1)
    product = product.T if transposed else product
    return (np.asarray(weight.read(), np.float64) + scale * product).astype(np.float32)

  found = {name: _merged(weight, read)}
  if shift := parts.get(("B", "bias")):
    bias_name = f"{name.removesuffix('weight')}bias"
    bias = weights.get(bias_name)
    if bias is None or bias.shape != shift.shape:
      raise ValueError("its lora_B has a bias that does not fit the module's")

    def read_bias(bias: Source = bias) -> np.ndarray:
      values = (np.asarray(source.read(), np.float64) for source in (bias, shift))
      return (next(values) + scale * next(values)).astype(np.float32)

    found[bias_name] = _merged(bias, read_bias)
  return found


def _factors(parts: Mapping[tuple[str, str], Source], embedding: bool) -> tuple[Source, Source]:
  """A and B of a module; ValueError if one is missing or no array of floats."""
  a, b = (
    parts.get((f"embedding_{kind}", "")) or parts.get((f"embedding_{kind}", "weight"))
    if embedding
    else parts.get((kind, "weight")) or parts.get((kind, ""))
    for kind in ("A", "B")
  )
  if a is None or b is None:
    raise ValueError(f"it has no lora_{'A' if a is None else 'B'}")
  for source in (a, b):
    if source.dtype not in ("float32", "bfloat16", "float16") or not source.shape:
      raise ValueError(f"a factor is {source.dtype} {list(source.shape)}")
  return a, b


def _merged(source: Source, read: Callable[[], np.ndarray]) -> Source:
  return Source(source.shape, "float32", read, in_file=False)


def _product_shape(a: tuple[int, ...], b: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
  """The shape of B @ A; a convolution has A [r, in, height, width] and B [out, r, 1, 1]."""
  unsupported = transposed and len(a) > 2
  if len(b) < 2 or len(a) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1 or unsupported:
    raise ValueError(f"its factors {list(b)} and {list(a)} cannot be multiplied")
  shape: tuple[int, ...] = (b[0], *a[1:])
  return shape[::-1] if transposed else shape


def _name_in_model(module: str) -> str:
  """The module's name in the model that PEFT wrapped, which the settings' patterns match."""
  return module.partition("base_model.model.")[2] or module
