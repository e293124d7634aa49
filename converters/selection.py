"""Finds the model among the tensors of a file, and its names in the layout.

A file may hold a model under the keys of a training program, a second one beside it (an average of
its weights), LoRA layers, and optimizer state. One of the models is chosen, wrappers are removed
from its names, and tensors that remain are noted or refused.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from . import adapters
from .adapters import Factor
from .identify import identify_model, identify_quantization, identify_variant
from .source import Source
from .wrappers import FORMATS, Candidate, find_candidates, separator_of

# Keys under which training programs keep the model itself, the most likely first.
DEFAULT_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
_AVERAGE = re.compile(r"(.*_)?(ema|swa|average|averaged|avg|teacher)(_.*)?|.*_ema|.*average.*")
_OPTIMIZER = re.compile(r"(optim(izers?)?(_states?(_dict)?)?|(lr_)?schedulers?|(grad_)?scaler)")
_FEW = 0.1  # a model has at least this fraction of the matching names of the largest model
# Names that only SAM 3 has.
_SIGNS = {
  "huggingface": r"(detr_(de|en)coder|dot_product_scoring|geometry_encoder|tracker_neck)\.",
  "meta": r"(vision|language)_backbone\.|dot_prod_scoring\.|geometry_encoder\.|segmentation_head\.",
  "keras": r"sam3_",
}


@dataclasses.dataclass(frozen=True)
class Selection:
  """A model in a file.

  Attributes:
    layout: a key of `FORMATS`.
    prefix: the prefix of all its names, as segments; empty for none.
    tensors: its tensors by their names in the layout, without those of LoRA.
    factors: the tensors of LoRA, by their names in the file.
    modules: for each module that LoRA changes, by its name in the file, the name of its weight in
      the layout.
    adapter: whether the file lacks the weights that LoRA changes.
    notes: what was chosen, one sentence each.
  """

  layout: str
  prefix: tuple[str, ...]
  tensors: dict[str, Source]
  factors: dict[str, Factor]
  modules: dict[str, str]
  adapter: bool
  notes: list[str]


def select(
  sources: Mapping[str, Source], format: str, key: str | None, where: str, adapter: bool = False
) -> Selection:
  """Finds the model among the tensors of a file.

  Args:
    sources: all tensors of the file.
    format: "auto" or a key of `FORMATS`.
    key: the key or prefix of the model's tensors; None chooses.
    where: the file's name in messages.
    adapter: whether the file is named like an adapter of PEFT.

  Raises:
    ValueError: the file holds no SAM 3 model, several, or one that cannot be converted.
  """
  if format != "auto" and format not in FORMATS:
    raise ValueError(f"format {format!r} must be auto or one of {', '.join(FORMATS)}.")
  names = _names_under(key, sources, where)
  _refuse_unsupported({n: sources[name] for n, name in names.items()}, where)
  factors, plain = adapters.split(names)
  weight_of = {factor.module: f"{factor.module}.weight" for factor in factors.values()}
  adapter = adapter or (bool(factors) and not set(weight_of.values()) & set(plain.values()))
  candidates = _candidates(dict.fromkeys([*plain.values(), *weight_of.values()]), format, adapter)
  if not candidates:
    _refuse_unknown(names, format, where)
  most = max(candidate.matching for candidate in candidates)
  models = [candidate for candidate in candidates if candidate.matching >= _FEW * most]
  notes: list[str] = []
  chosen = _choose(models, where, notes) if len(models) > 1 else models[0]
  ours = dict(chosen.names)
  containers = {sources[names[n]].container for n, name in plain.items() if name in ours}
  others = {name for other in models for name in other.names if other is not chosen}
  left = {n: name for n, name in plain.items() if name not in ours and name not in others}
  ours |= _left_over(left, names, sources, chosen, containers, where, strict=key is None)
  renamed = {n: ours[name] for n, name in plain.items() if name in ours}
  return Selection(
    layout=chosen.layout,
    prefix=chosen.prefix,
    tensors=_by_layout(renamed, names, sources),
    factors={names[name]: factor for name, factor in factors.items()},
    modules={module: ours[name] for module, name in weight_of.items() if name in ours},
    adapter=adapter,
    notes=notes,
  )


def name_in_file(name: str, source: Source) -> str:
  """A tensor's name in its own dictionary."""
  return name.removeprefix(f"{source.container}.") if source.container else name


def _names_under(key: str | None, sources: Mapping[str, Source], where: str) -> dict[str, str]:
  """The names in the file by the names without `key`; names outside `key` and names of optimizer
  state are omitted."""
  names = {
    name: name
    for name in sources
    if not _OPTIMIZER.fullmatch(re.split(r"[./]", name, maxsplit=1)[0])
  }
  if sources and not names:
    raise ValueError(
      f"{where} holds the state of an optimizer and no model; give the file of the weights, which "
      "is saved beside it."
    )
  if key is None:
    return names
  start = key.rstrip("./")
  found = {
    name[len(start) + 1 :]: name for name in names if re.match(rf"{re.escape(start)}[./]", name)
  }
  if not found:
    keys = list(dict.fromkeys(name.split(".")[0] for name in names))
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    raise ValueError(
      f"{where} has nothing under the key {key!r:.100}; it has {', '.join(keys[:5])}{more}."
    )
  return found


def _refuse_unsupported(names: Mapping[str, Source], where: str) -> None:
  """Refuses models that are recognized but cannot be converted."""
  dtypes = [source.dtype for source in names.values() if len(source.shape) > 1]
  integers = [dtype for dtype in dtypes if "int" in dtype]
  if len(integers) > len(dtypes) / 2:
    raise ValueError(
      f"{where} has {integers[0]} weights, which are quantized and cannot be converted; give "
      "the weights in float32, bfloat16 or float16."
    )
  if quantized := identify_quantization(names):
    kind, name = quantized
    raise ValueError(
      f"{where} is quantized by {kind} ({name}), which cannot be converted; give the weights in "
      "float32, bfloat16 or float16."
    )
  if variant := identify_variant(names):
    lite = "LiteText" in variant
    raise ValueError(
      f"{where} is {variant}; "
      + (
        "give the weights of transformers' Sam3LiteTextModel instead."
        if lite
        else "only SAM 3's own image encoder (a ViT) is supported, so it cannot be converted."
      )
    )


def _candidates(names: Mapping[str, None], format: str, adapter: bool) -> list[Candidate]:
  """The models of the layout that matches best; none if `format` is another layout."""
  found: list[Candidate] = []
  for layout in FORMATS:
    models = [c for c in find_candidates(layout, names) if adapter or _is_sam3(c)]
    if not models and FORMATS[layout].matches(names):
      models = [Candidate(layout, (), {name: name for name in names}, 0)]
    if sum(c.matching for c in models) > sum(c.matching for c in found) or not found:
      found = models or found
  return found if found and format in ("auto", found[0].layout) else []


def _is_sam3(candidate: Candidate) -> bool:
  names = candidate.names.values()
  if FORMATS[candidate.layout].matches(names):
    return True
  return any(re.search(_SIGNS[candidate.layout], name) for name in names)


def _refuse_unknown(names: Mapping[str, str], format: str, where: str) -> None:
  others = _candidates(dict.fromkeys(names), "auto", False) if format != "auto" else []
  kind = f"SAM 3 in the layout {others[0].layout}" if others else identify_model(names)
  raise ValueError(
    f"{where} does not hold SAM 3 in {'any known' if format == 'auto' else f'the {format}'} "
    f"layout; it looks like {kind or 'an unknown model'}, and its first tensor is "
    f"{next(iter(names), 'missing')}. Give the weights of facebook/sam3."
  )


def _choose(models: Sequence[Candidate], where: str, notes: list[str]) -> Candidate:
  """Chooses one of several models in a file; see `DEFAULT_KEYS`.

  Raises:
    ValueError: two are equally likely, or each is only a part of a model.
  """
  names = [set(model.names.values()) for model in models]
  described = [_describe(model) for model in models]
  if not set.intersection(*names) and not any(
    a & b for i, a in enumerate(names) for b in names[i + 1 :]
  ):
    raise ValueError(
      f"{where} has one model under several prefixes: {', '.join(_counted(models))}. Save it with "
      "one prefix for all tensors, or with none."
    )
  common = 0
  while len({model.prefix[: common + 1] for model in models}) == 1 and all(
    len(model.prefix) > common for model in models
  ):
    common += 1
  ranks = [_rank(model.prefix[common:]) for model in models]
  best = min(ranks)
  if ranks.count(best) > 1:
    raise ValueError(
      f"{where} holds {len(models)} models: {', '.join(_counted(models))}. Choose one: "
      f"--key {'.'.join(models[ranks.index(best)].prefix) or 'KEY'}."
    )
  chosen = ranks.index(best)
  others = ", ".join(text for i, text in enumerate(described) if i != chosen)
  notes.append(f"took the model {described[chosen]}; another is {others} (--key)")
  return models[chosen]


def _rank(prefix: tuple[str, ...]) -> int:
  """Ranks prefixes: the lower, the more likely the user means the model with this prefix."""
  if not prefix:
    return 0
  if prefix[0] in DEFAULT_KEYS:
    return 1 + DEFAULT_KEYS.index(prefix[0])
  return 100 if any(_AVERAGE.fullmatch(part) for part in prefix) else 50


def _counted(models: Sequence[Candidate]) -> list[str]:
  return [f"{len(model.names):,} tensors {_describe(model)}" for model in models]


def _describe(model: Candidate) -> str:
  prefix = separator_of(model.layout).join(model.prefix)
  return f"under {prefix!r}" if prefix else "under no prefix"


def _left_over(
  left: Mapping[str, str],
  names: Mapping[str, str],
  sources: Mapping[str, Source],
  chosen: Candidate,
  containers: set[str],
  where: str,
  *,
  strict: bool,
) -> dict[str, str]:
  """Names of tensors that belong to no model but have the chosen one's prefix and dictionary.

  The layout does not know them, so that they are reported later. Other tensors in the dictionary
  are refused if `strict`; scalars, such as the number of an epoch, are ignored.
  """
  separator = separator_of(chosen.layout)
  start = "".join(f"{part}{separator}" for part in chosen.prefix)
  inside, outside = {}, []
  for name, plain in left.items():
    source = sources[names[name]]
    if source.container not in containers or (source.shape == () and separator not in plain):
      continue
    if plain.startswith(start):
      inside[plain] = plain.removeprefix(start)
    elif source.shape != ():
      outside.append(names[name])
  if outside and strict:
    raise ValueError(
      f"{where} has {len(outside):,} tensors outside the model's prefix {start!r}, "
      f"{outside[0]} first; use --key {start.rstrip('./')} to convert the model without them."
    )
  return inside


def _by_layout(
  renamed: Mapping[str, str], names: Mapping[str, str], sources: Mapping[str, Source]
) -> dict[str, Source]:
  """The tensors by their names in the layout; refuses two of the same name."""
  found: dict[str, str] = {}
  for name, target in renamed.items():
    if target in found:
      raise ValueError(
        f"{names[found[target]]} and {names[name]} are one tensor of the model, {target}."
      )
    found[target] = name
  return {
    target: dataclasses.replace(
      source := sources[names[name]], name=name_in_file(names[name], source)
    )
    for target, name in found.items()
  }
