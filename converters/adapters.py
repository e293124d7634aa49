"""LoRA adapters of PEFT, and checkpoints with LoRA layers that were not merged.

A module with a weight W [out, in] has two factors beside it, A [r, in] and B [out, r]; merged, its
weight is W + scale * B @ A (Hu et al. 2021, arXiv:2106.09685). The scale is lora_alpha / r, or
lora_alpha / sqrt(r) with `use_rslora`, and stands in adapter_config.json. An adapter may hold whole
tensors too, which take the place of the model's: biases, and modules_to_save. Source: huggingface/
peft 0.18, `tuners/lora/layer.py` and `utils/save_and_load.py`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.param_tree import raise_faults

from .checks import read_text
from .rules import Source

CONFIG = "adapter_config.json"
KINDS = ("A", "B", "embedding_A", "embedding_B")
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<kind>\w+?)(?P<rest>(\..+)?)")
# Options of adapter_config.json that change what is computed in a way that is not merged here.
_OTHER = (
  "use_dora",
  "use_qalora",
  "use_bdlora",
  "layer_replication",
  "target_parameters",
  "trainable_token_indices",
  "alora_invocation_tokens",
  "arrow_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # of init_lora_weights
_MAX_PATTERN = 200  # characters of a pattern in adapter_config.json
_REMEDY = "Merge it with PEFT (merge_and_unload), save that model, and convert it."


@dataclasses.dataclass(frozen=True)
class Factor:
  """A tensor of LoRA in a file.

  Attributes:
    module: the module's name, as in the file.
    kind: one of `KINDS`, or another, which is refused.
    leaf: weight or bias; empty for the factors of an embedding.
    adapter: the name of the adapter, empty in a file of `save_pretrained`.
  """

  module: str
  kind: str
  leaf: str
  adapter: str


@dataclasses.dataclass(frozen=True)
class Settings:
  """What adapter_config.json says of scales; see PEFT's LoraConfig for the names.

  Attributes:
    r, alpha: of the modules that no pattern names; None where it is not said.
    rslora: whether the scale is alpha / sqrt(r).
    fan_in_fan_out: whether the model's weights are stored [in, out].
    ranks, alphas: by patterns of the end of a module's name.
    base: what the adapter was trained on.
  """

  r: int | None = None
  alpha: float | None = None
  rslora: bool = False
  fan_in_fan_out: bool = False
  ranks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  alphas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = ""

  def scale(self, module: str, rank: int) -> float | None:
    """Of a module's product; None if it is not known. Raises ValueError if the rank is another."""
    wanted = _matching(self.ranks, module, self.r)
    alpha = _matching(self.alphas, module, self.alpha)
    if wanted is not None and wanted != rank:
      raise ValueError(f"its rank is {rank} where {CONFIG} says {shown(wanted)}")
    if alpha is None:
      return None
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def split(names: Iterable[str]) -> tuple[dict[str, Factor], dict[str, str]]:
  """The tensors of LoRA among these, and the names that all others have in the model itself.

  Others are whole tensors: of PEFT's copies of a module, `original_module` is left out where
  `modules_to_save` has the trained one.
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


def read_settings(folder: Path, alpha: float | None) -> Settings | None:
  """What adapter_config.json in a folder says; `alpha` takes the place of its lora_alpha. None if
  there is neither.

  Raises:
    ValueError: it is of another kind of adapter, or asks for what is not merged here.
  """
  path = folder / CONFIG
  if not path.is_file():
    return None if alpha is None else Settings(alpha=alpha)
  try:
    values = parse(read_text(path), "it")
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); copy the adapter again.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold an object; copy the adapter again.")
  kind = values.get("peft_type")
  if kind not in ("LORA", None):
    raise ValueError(
      f"{path} is of an adapter of type {shown(kind)}; only LORA can be merged here. {_REMEDY}"
    )
  for option in _OTHER:
    if values.get(option):
      name = "DoRA (use_dora)" if option == "use_dora" else option
      raise ValueError(f"{path} asks for {name}, which is not merged here. {_REMEDY}")
  start = values.get("init_lora_weights")
  if isinstance(start, str) and start.startswith(_CHANGES_BASE):
    raise ValueError(
      f"{path} has init_lora_weights = {shown(start)}, with which the adapter's base is not the "
      f"released model. {_REMEDY}"
    )
  return Settings(
    r=_number(values, "r", int, path),
    alpha=alpha if alpha is not None else _number(values, "lora_alpha", (int, float), path),
    rslora=bool(values.get("use_rslora")),
    fan_in_fan_out=bool(values.get("fan_in_fan_out")),
    ranks=_patterns(values, "rank_pattern", path),
    alphas=_patterns(values, "alpha_pattern", path) if alpha is None else {},
    base=str(values.get("base_model_name_or_path") or ""),
  )


def merge(
  factors: Mapping[str, Factor],
  sources: Mapping[str, Source],
  names: Mapping[str, str],
  weights: Mapping[str, Source],
  settings: Settings | None,
  where: str,
) -> dict[str, Source]:
  """The weights that LoRA changes, each with its product added when it is read.

  Args:
    factors: of `split`.
    sources: the file's tensors.
    names: the name in the layout of each module's weight, by the module's name in the file.
    weights: the model's tensors by their names in the layout.
    settings: of the adapter.
    where: what messages call it.

  Raises:
    ValueError: with all faults in one line.
  """
  faults, modules = [], {}
  adapters = sorted({factor.adapter for factor in factors.values()} - {""})
  if len(adapters) > 1:
    faults.append(f"it holds {len(adapters)} adapters ({', '.join(adapters[:5])}), not one")
  for name, factor in factors.items():
    if factor.kind == "magnitude_vector":
      faults.append(f"{name} is of DoRA, which is not merged here")
    elif factor.kind not in KINDS:
      faults.append(f"{name} is of no known kind of LoRA")
    else:
      modules.setdefault(factor.module, {})[factor.kind, factor.leaf] = sources[name]
  raise_faults(faults, f"{where} cannot be merged", _REMEDY)
  merged, unknown = {}, []
  for module, parts in modules.items():
    name = names.get(module, "")
    if name not in weights:  # the projections of an nn.MultiheadAttention are in one matrix
      name = f"{name.removesuffix('weight')}in_proj_weight"
    if name not in weights:
      unknown.append(module)
      continue
    try:
      merged |= _merged(module, parts, name, weights, settings)
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


def _merged(
  module: str,
  parts: Mapping[tuple[str, str], Source],
  name: str,
  weights: Mapping[str, Source],
  settings: Settings | None,
) -> dict[str, Source]:
  """A module's weight, and its bias if LoRA has one of its own; ValueError if they do not fit."""
  embedding = any(kind.startswith("embedding") for kind, _ in parts)
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
  scale = settings.scale(_of_model(module), a.shape[0]) if settings else None
  if scale is None:
    raise ValueError(
      f"its scale is not known; put {CONFIG} with lora_alpha beside the file, or say --lora-alpha"
    )
  weight = weights[name]
  turned = embedding or (settings is not None and settings.fan_in_fan_out)
  shape = _product_shape(a.shape, b.shape, turned)
  if shape != weight.shape:
    raise ValueError(
      f"its factors {list(b.shape)} and {list(a.shape)} do not give the model's weight "
      f"{list(weight.shape)}: the adapter is of a model of another size"
    )

  def read() -> np.ndarray:
    first, second = (np.asarray(source.read(), np.float64) for source in (a, b))
    product = np.tensordot(second.reshape(len(second), -1), first, 1)
    product = product.T if turned else product
    return (np.asarray(weight.read(), np.float64) + scale * product).astype(np.float32)

  found = {name: _made(weight, read)}
  if shift := parts.get(("B", "bias")):
    bias_name = f"{name.removesuffix('weight')}bias"
    bias = weights.get(bias_name)
    if bias is None or bias.shape != shift.shape:
      raise ValueError("its lora_B has a bias that does not fit the module's")

    def read_bias(bias: Source = bias) -> np.ndarray:
      values = (np.asarray(source.read(), np.float64) for source in (bias, shift))
      return (next(values) + scale * next(values)).astype(np.float32)

    found[bias_name] = _made(bias, read_bias)
  return found


def _made(source: Source, read: Callable[[], np.ndarray]) -> Source:
  return Source(source.shape, "float32", read, made=True)


def _product_shape(a: tuple[int, ...], b: tuple[int, ...], turned: bool) -> tuple[int, ...]:
  """Of B @ A; of a convolution A is [r, in, rows, columns] and B [out, r, 1, 1]."""
  if len(b) < 2 or len(a) < 2 or b[1] != a[0] or math.prod(b[2:]) != 1 or (turned and len(a) > 2):
    raise ValueError(f"its factors {list(b)} and {list(a)} cannot be multiplied")
  shape = (b[0], *a[1:])
  return shape[::-1] if turned else shape


def _of_model(module: str) -> str:
  """The module's name in the model that PEFT wrapped, which patterns are compared with."""
  return module.partition("base_model.model.")[2] or module


def _matching(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
  for pattern, value in patterns.items():
    if re.match(rf"(.*\.)?({pattern})$", module):
      return value
  return default


def _number(values: Mapping[str, Any], key: str, kind: Any, path: Path) -> Any:
  value = values.get(key)
  if value is None:
    return None
  if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < 1e6:
    raise ValueError(f"{path} has {key} = {shown(value)}; expected a number greater than 0.")
  return value


def _patterns(values: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
  """Of names of modules; refuses those that would take Python's matcher without end."""
  patterns = values.get(key) or {}
  if not isinstance(patterns, dict):
    raise ValueError(f"{path} has {key} = {shown(patterns)}; expected an object.")
  for pattern in patterns:
    _number(patterns, pattern, (int, float), path)
    repeated = re.findall(r"[*+{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(repeated) > 4 or re.search(r"\)[*+{]", pattern):
      raise ValueError(f"{path} has a pattern {pattern!r:.100} in {key}, too complex to be one.")
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"{path} has a pattern {pattern!r:.100} in {key}: {error}.") from error
  return patterns
