"""Which tensors of a file are the model, and what they are called in its layout.

A file may have a model under the keys of a training program, a second one beside it (an average of
its weights), layers of LoRA, and the state of an optimizer. One of the models is chosen, wrappers
are taken off its names, and whatever is left over is said or refused.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence

from . import adapters
from .adapters import Factor
from .identify import recognise, recognise_quantized, recognise_variant
from .rules import Source
from .wrappers import FORMATS, Candidate, find_candidates, separator_of

# Keys under which training programs keep the model itself, the first first.
DEFAULT_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "network", "student")
_AVERAGE = re.compile(r"(.*_)?(ema|swa|average|averaged|avg|teacher)(_.*)?|.*_ema|.*average.*")
_OPTIMIZER = re.compile(r"(optim(izers?)?(_states?(_dict)?)?|(lr_)?schedulers?|(grad_)?scaler)")
_FEW = 0.1  # of the largest model's names that fit: fewer are no model
# Names that only SAM 3 has.
_SIGNS = {
  "huggingface": r"(detr_(de|en)coder|dot_product_scoring|geometry_encoder|tracker_neck)\.",
  "meta": r"(vision|language)_backbone\.|dot_prod_scoring\.|geometry_encoder\.|segmentation_head\.",
  "keras": r"sam3_",
}


@dataclasses.dataclass(frozen=True)
class Selection:
  """A model of a file.

  Attributes:
    layout: a key of `FORMATS`.
    prefix: what stood before all names, as segments; empty for none.
    tensors: by their names in the layout, LoRA's apart.
    factors: the tensors of LoRA, by their names in the file.
    modules: name in the layout of the weight of each module that LoRA changes, by the module's name
      in the file.
    adapter: whether the weights that LoRA changes are not in the file.
    notes: what was chosen, a sentence each.
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
  """The model among the tensors of a file.

  Args:
    sources: all of the file's tensors.
    format: "auto" or a key of `FORMATS`.
    key: of the dictionary, or what stands before the names; None chooses.
    where: what messages call the file.
    adapter: whether it is one of PEFT by its name.

  Raises:
    ValueError: it holds no SAM 3, one that cannot be converted, or several.
  """
  if format != "auto" and format not in FORMATS:
    raise ValueError(f"format {format!r} must be auto or one of {', '.join(FORMATS)}.")
  names = _under(key, sources, where)
  _refuse_others({n: sources[name] for n, name in names.items()}, where)
  factors, plain = adapters.split(names)
  pseudo = {factor.module: f"{factor.module}.weight" for factor in factors.values()}
  adapter = adapter or (bool(factors) and not set(pseudo.values()) & set(plain.values()))
  wanted = dict.fromkeys([*plain.values(), *pseudo.values()])
  found = _candidates(wanted, format, adapter)
  if not found:
    _refuse_unknown(names, format, where)
  notes: list[str] = []
  models = [each for each in found if each.fitting >= _FEW * max(c.fitting for c in found)]
  chosen = _choose(models, where, notes) if len(models) > 1 else models[0]
  ours = dict(chosen.names)
  containers = {sources[names[n]].container for n, name in plain.items() if name in ours}
  theirs = {name for other in models for name in other.names if other is not chosen}
  left = {n: name for n, name in plain.items() if name not in ours and name not in theirs}
  ours |= _left_over(left, names, sources, chosen, containers, where, strict=key is None)
  return Selection(
    layout=chosen.layout,
    prefix=chosen.prefix,
    tensors=_by_layout(
      {n: ours[name] for n, name in plain.items() if name in ours}, names, sources
    ),
    factors={names[name]: factor for name, factor in factors.items()},
    modules={module: ours[name] for module, name in pseudo.items() if name in ours},
    adapter=adapter,
    notes=notes,
  )


def _under(key: str | None, sources: Mapping[str, Source], where: str) -> dict[str, str]:
  """The names in a file of what is under a key, by what is left of them without it; the state of an
  optimizer is left out."""
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


def _refuse_others(names: Mapping[str, Source], where: str) -> None:
  """Refuses what is recognized and cannot be converted."""
  matrices = [source.dtype for source in names.values() if len(source.shape) > 1]
  whole = [dtype for dtype in matrices if "int" in dtype]
  if len(whole) > len(matrices) / 2:
    raise ValueError(
      f"{where} has weights of {whole[0]}, as quantized ones are, which cannot be converted; give "
      "the weights in float32, bfloat16 or float16."
    )
  if quantized := recognise_quantized(names):
    kind, name = quantized
    raise ValueError(
      f"{where} is quantized by {kind} ({name}), which cannot be converted; give the weights in "
      "float32, bfloat16 or float16."
    )
  if variant := recognise_variant(names):
    lite = "LiteText" in variant
    raise ValueError(
      f"{where} is of {variant}; "
      + (
        "give the weights of transformers' Sam3LiteTextModel instead."
        if lite
        else "this package has SAM 3's own image encoder (a ViT) alone, so it cannot be converted."
      )
    )


def _candidates(names: Mapping[str, None], format: str, adapter: bool) -> list[Candidate]:
  """The models of the layout that fits best; none if another layout was asked for."""
  found: list[Candidate] = []
  for layout in FORMATS:
    models = [c for c in find_candidates(layout, names) if adapter or _is_sam3(c)]
    if not models and FORMATS[layout].matches(names):
      models = [Candidate(layout, (), {name: name for name in names}, 0)]
    if sum(c.fitting for c in models) > sum(c.fitting for c in found) or not found:
      found = models or found
  return found if found and format in ("auto", found[0].layout) else []


def _is_sam3(candidate: Candidate) -> bool:
  names = candidate.names.values()
  if FORMATS[candidate.layout].matches(names):
    return True
  return any(re.search(_SIGNS[candidate.layout], name) for name in names)


def _refuse_unknown(names: Mapping[str, str], format: str, where: str) -> None:
  others = _candidates(dict.fromkeys(names), "auto", False) if format != "auto" else []
  kind = f"SAM 3 in the layout {others[0].layout}" if others else recognise(names)
  raise ValueError(
    f"{where} does not hold SAM 3 in {'any known' if format == 'auto' else f'the {format}'} "
    f"layout; it looks like {kind or 'nothing known'}, and its first tensor is "
    f"{next(iter(names), 'missing')}. Give the weights of facebook/sam3."
  )


def _choose(models: Sequence[Candidate], where: str, notes: list[str]) -> Candidate:
  """One of several models in a file; see `DEFAULT_KEYS`.

  Raises:
    ValueError: none is more likely than the others, or each is only a part.
  """
  names = [set(model.names.values()) for model in models]
  said = [_said(model) for model in models]
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
      f"{where} holds {len(models)} models: {', '.join(_counted(models))}. Say which one is meant: "
      f"--key {'.'.join(models[ranks.index(best)].prefix) or 'KEY'}."
    )
  chosen = ranks.index(best)
  others = ", ".join(text for i, text in enumerate(said) if i != chosen)
  notes.append(f"took the model {said[chosen]}; another is {others} (--key)")
  return models[chosen]


def _rank(prefix: tuple[str, ...]) -> int:
  """The lower, the more likely a model under this prefix is meant."""
  if not prefix:
    return 0
  if prefix[0] in DEFAULT_KEYS:
    return 1 + DEFAULT_KEYS.index(prefix[0])
  return 100 if any(_AVERAGE.fullmatch(part) for part in prefix) else 50


def _counted(models: Sequence[Candidate]) -> list[str]:
  return [f"{len(model.names):,} tensors {_said(model)}" for model in models]


def _said(model: Candidate) -> str:
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
  """Names in the layout of tensors that no model has, but that are in the chosen one's dictionary:
  those with its prefix, which the layout will not know. Refuses others unless a key was given.

  Numbers, such as that of an epoch, are left out.
  """
  separator = separator_of(chosen.layout)
  start = "".join(f"{part}{separator}" for part in chosen.prefix)
  here, outside = {}, []
  for name, plain in left.items():
    source = sources[names[name]]
    if source.container not in containers or (source.shape == () and separator not in plain):
      continue
    if plain.startswith(start):
      here[plain] = plain.removeprefix(start)
    elif source.shape != ():
      outside.append(names[name])
  if outside and strict:
    raise ValueError(
      f"{where} has {len(outside):,} tensors that are not under {start!r} as the model's are, "
      f"{outside[0]} first; say --key {start.rstrip('./')} to convert the model without them."
    )
  return here


def _by_layout(
  renamed: Mapping[str, str], names: Mapping[str, str], sources: Mapping[str, Source]
) -> dict[str, Source]:
  """The tensors by their names in the layout; refuses two of one name."""
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


def name_in_file(name: str, source: Source) -> str:
  """A tensor's name in its own dictionary."""
  return name.removeprefix(f"{source.container}.") if source.container else name
