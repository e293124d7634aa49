"""PEFT's adapter_config.json: the scales of LoRA's products."""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_jax.utils.json_text import parse, shown

from .bounds import read_text

CONFIG = "adapter_config.json"
REMEDY = "Merge it with PEFT (merge_and_unload), save that model, and convert it."
# Options that change the computation in ways that `adapters.merge` does not support.
_UNSUPPORTED = (
  "use_dora",
  "use_qalora",
  "use_bdlora",
  "layer_replication",
  "target_parameters",
  "trainable_token_indices",
  "alora_invocation_tokens",
  "arrow_config",
)
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # values of init_lora_weights
_MAX_PATTERN = 200  # characters


@dataclasses.dataclass(frozen=True)
class LoraSettings:
  """Settings of LoRA; see PEFT's LoraConfig.

  Attributes:
    r, alpha: rank and alpha of modules that match no pattern; None if unknown.
    rslora: whether the scale is alpha / sqrt(r).
    fan_in_fan_out: whether the model's weights are stored [in, out].
    ranks, alphas: ranks and alphas by regular expressions for the end of a module's name.
    base: the model that the adapter was trained on.
  """

  r: int | None = None
  alpha: float | None = None
  rslora: bool = False
  fan_in_fan_out: bool = False
  ranks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  alphas: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  base: str = ""

  def scale(self, module: str, rank: int) -> float | None:
    """The scale of a module's product; None if it is unknown.

    Raises:
      ValueError: the settings have another rank.
    """
    expected = _matching(self.ranks, module, self.r)
    alpha = _matching(self.alphas, module, self.alpha)
    if expected is not None and expected != rank:
      raise ValueError(f"its rank is {rank}, but {CONFIG} says {shown(expected)}")
    if alpha is None:
      return None
    return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_settings(directory: Path, alpha: float | None) -> LoraSettings | None:
  """Reads adapter_config.json in a directory; None if there is none and `alpha` is None.

  Args:
    directory: the adapter's.
    alpha: overrides the file's lora_alpha.

  Raises:
    ValueError: the file is of another kind of adapter, or asks for what cannot be merged.
  """
  path = directory / CONFIG
  if not path.is_file():
    return None if alpha is None else LoraSettings(alpha=alpha)
  try:
    values = parse(read_text(path), "it")
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); copy the adapter again.") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold an object; copy the adapter again.")
  _check_supported(values, path)
  return LoraSettings(
    r=_number(values, "r", int, path),
    alpha=alpha if alpha is not None else _number(values, "lora_alpha", (int, float), path),
    rslora=bool(values.get("use_rslora")),
    fan_in_fan_out=bool(values.get("fan_in_fan_out")),
    ranks=_patterns(values, "rank_pattern", path),
    alphas=_patterns(values, "alpha_pattern", path) if alpha is None else {},
    base=str(values.get("base_model_name_or_path") or ""),
  )


def _check_supported(values: Mapping[str, Any], path: Path) -> None:
  kind = values.get("peft_type")
  if kind not in ("LORA", None):
    raise ValueError(
      f"{path} is of an adapter of type {shown(kind)}; only LORA can be merged. {REMEDY}"
    )
  for option in _UNSUPPORTED:
    if values.get(option):
      name = "DoRA (use_dora)" if option == "use_dora" else option
      raise ValueError(f"{path} asks for {name}, which cannot be merged. {REMEDY}")
  start = values.get("init_lora_weights")
  if isinstance(start, str) and start.startswith(_CHANGES_BASE):
    raise ValueError(
      f"{path} has init_lora_weights = {shown(start)}, which changes the base, so that it is not "
      f"the released model. {REMEDY}"
    )


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
  """Numbers by patterns of module names; refuses patterns on which `re` could run forever."""
  patterns = values.get(key) or {}
  if not isinstance(patterns, dict):
    raise ValueError(f"{path} has {key} = {shown(patterns)}; expected an object.")
  for pattern in patterns:
    _number(patterns, pattern, (int, float), path)
    repeated = re.findall(r"[*+{]", pattern)
    if len(pattern) > _MAX_PATTERN or len(repeated) > 4 or re.search(r"\)[*+{]", pattern):
      raise ValueError(f"{path} has a pattern {pattern!r:.100} in {key}, which is too complex.")
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(f"{path} has a pattern {pattern!r:.100} in {key}: {error}.") from error
  return patterns
