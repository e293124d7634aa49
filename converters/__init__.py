"""Checkpoints of other programs into ours: `convert`.

`sources.py` finds and opens files, which `safetensors.py`, `torch_files.py` (by `pickles.py`) and
`hdf5.py` read; `meta.py`, `huggingface.py` and `keras_hub.py` hold the names and layouts of each
source, `shared.py` the rules that several have, `huggingface_config.py` the config.json of one, and
`unread.py` the names of what our model does not read. `rules.py` is the language they are written
in, and `engine.py` carries them out. Before that, `selection.py` finds the model in the file,
`wrappers.py` takes what training programs add off its names, `adapters.py` merges LoRA, and
`base.py` gives from a checkpoint of ours what a file lacks, by `parts.py`. `infer.py` reads a
configuration off shapes, `vocabulary.py` makes the tokenizer, `origin.py` says which files these
were, and `foreign.py` what a file is that cannot be converted. `settings.py` reads values of a
config.json, and `checks.py` bounds what is believed. `export.py` is the way back, with
`torch_writer.py` and `vocabulary_files.py` for its files; `live.py` compares with transformers,
which `peer.py` sets right.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sam3_jax.checkpoint import check_dtype, expected_shapes
from sam3_jax.config import RELEASED, Config
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import raise_faults
from sam3_jax.writer import Writer

from . import adapters, huggingface, keras_hub, meta
from .base import Base, check_same_size
from .checks import parse_json, read_text
from .engine import REMEDY, Plan, account, raise_incomplete
from .infer import infer_config
from .origin import describe_origin
from .parts import DETECTOR, WORDS, list_words, parts_of
from .rules import Source, Table
from .selection import Selection, select
from .sources import ADAPTERS, find_weights, open_weights
from .unread import lacking
from .vocabulary import build_tokenizer, find_vocabulary
from .wrappers import FORMATS as FORMATS

LICENCE = "that of the source; Meta's SAM 3 weights are under the SAM License"
_MORE = 4  # times as many tensors as a file has: not worth listing what is missing
_FEW = 20  # faults of a file that is the released one but for them


def convert(
  source: str | Path,
  out: str | Path,
  *,
  format: str = "auto",
  dtype: str = "float32",
  config: Config | None = None,
  tokenizer: str | Path | None = None,
  verify: bool = True,
  fingerprint: bool = False,
  progress: Callable[[str, float], None] | None = None,
  key: str | None = None,
  base: str | Path | None = None,
  lora_alpha: float | None = None,
  note: Callable[[str], None] | None = None,
) -> str | None:
  """Writes a checkpoint of ours from released or fine-tuned weights.

  Args:
    source: model.safetensors, its index of shards or one of them, sam3.pt or another file of
      torch.save, model.weights.h5 of a KerasHub preset, a LoRA adapter of PEFT, or the folder of
      any of these. What training programs put before the names of tensors is taken off.
    out: a folder that does not exist yet, or is empty; it appears when it is complete.
    format: whose names the tensors have, one of `FORMATS`; "auto" looks at them.
    dtype: of the parameters, "float32" or "bfloat16"; tensors that nothing reads keep theirs.
    config: the model's; None reads config.json beside the weights, or else the shapes.
    tokenizer: a vocabulary (see `vocabulary.FORMS`) or tokenizer.model; None looks beside the
      weights.
    verify: read everything back and compare the checksums.
    fingerprint: run the model too, keep a few numbers of what it gave (see fingerprint.py), and
      compare it with transformers, if that is installed (see live.py).
    progress: is told what is being done, and which fraction of the whole was done before that.
    key: which model of a file with several is meant, such as "ema": the key of its dictionary or
      the beginning of its names. None takes the only one, or the one under the first of
      `selection.DEFAULT_KEYS`.
    base: a checkpoint of ours, from which parts come that the source lacks as a whole, and to
      whose weights an adapter is added.
    lora_alpha: of LoRA, where no adapter_config.json beside the source says it.
    note: is told, in a sentence each, what was decided that the caller may not expect.

  Returns:
    With `fingerprint`, a line that says how far from transformers' the answers are, or why they
    were not compared.

  Raises:
    FileNotFoundError: the source, a shard or the vocabulary is not there.
    ValueError: the source is something else, is damaged, or does not fit its configuration, with
      all faults in one line; what the model computes is not finite, or not what transformers
      computes; or `out` is not empty or cannot be written. Nothing is left then.
  """
  check_dtype(dtype)
  tell = progress or (lambda what, fraction: None)
  tell("reading names and shapes", 0.0)
  weights = find_weights(Path(source).expanduser())
  sources = open_weights(weights)
  adapter = weights.name in ADAPTERS
  chosen = select(sources, format, key, str(weights), adapter)
  scales = adapters.read_settings(weights.parent, lora_alpha) if chosen.factors or adapter else None
  below = Base(Path(base).expanduser()) if base is not None else None
  if chosen.adapter and below is None:
    raise ValueError(_needs_base(weights, scales))
  planned = _plan_merged(chosen, sources, weights, config, below, scales)
  model = _tokenizer(tokenizer, weights.parent, below)
  notes = [*chosen.notes, *_notes(planned, chosen, below, dtype)]
  for line in notes:
    (note or (lambda line: None))(line)
  direct = chosen.layout == "huggingface" and not (below or chosen.factors or chosen.prefix)
  trial = _Trial(weights, direct, tell)
  with Writer(out) as writer:
    unread = _add_parts(writer, planned, dtype, tell, weights)
    unread |= below.rest(unread) if below else {}
    tell("checksums of the source", 1.0)
    info = _info(planned, weights, Path(out).name, below, notes, [*unread])
    tell("checking what was written" if verify else "finishing", 1.0)
    reasons = dict.fromkeys(unread, "kept from the base") | planned.reasons()
    writer.finish(
      planned.config,
      model,
      info=info,
      unread=unread,
      unread_reasons=reasons,
      dropped=_describe_dropped(planned),
      source_tensors=planned.counts(),
      verify=verify,
      run=trial if fingerprint else None,
    )
  return trial.line


def _add_parts(
  writer: Writer, planned: Plan, dtype: str, tell: Callable[[str, float], None], weights: Path
) -> dict[str, np.ndarray]:
  """Writes the parameters, part after part, and returns the tensors that nothing reads."""
  faults, done = [], 0
  for part in planned.parts:
    tell(part, done / planned.parameters())
    writer.add(part, planned.read(part, dtype, faults))
    done += planned.parameters(part)
  unread = planned.read_unread(faults)
  raise_faults(faults, f"{weights} cannot be converted", REMEDY)
  return unread


def _info(
  planned: Plan,
  weights: Path,
  name: str,
  base: Base | None,
  notes: list[str],
  unread: list[str],
) -> dict[str, Any]:
  """What the checkpoint says of itself."""
  own = sum(not source.made for source in planned.sources.values())
  info = {
    "name": name,
    "source": f"{weights.name}, {own} tensors in the layout {planned.table.name}",
    "origin": describe_origin(weights),
    "licence": LICENCE,
    "trained": True,
    "lacks": _lacks(planned, unread),
  }
  if base:
    info["base"] = {
      "name": base.name,
      "identity": base.identity,
      "parts": sorted(_made_parts(planned)),
      "parameters": sorted(planned.direct),
    }
  return info | ({"notes": notes} if notes else {})


def _made_parts(planned: Plan) -> set[str]:
  """The parts of the model that come from the base as a whole; see `parts.WORDS`."""
  parts = parts_of(planned.table.name)
  own, made = (
    {parts.of(name) for name in planned.entries if planned.sources[name].made is kind}
    for kind in (False, True)
  )
  return made - own


def _notes(planned: Plan, chosen: Selection, base: Base | None, dtype: str) -> list[str]:
  """What was decided that the caller may not expect, a sentence each."""
  notes = []
  if chosen.factors:
    notes.append(f"merged LoRA into {len(chosen.modules):,} weights")
  if base and not chosen.adapter and (made := _made_parts(planned)):
    words = list_words(part for part in WORDS if part in made)
    notes.append(f"took from the base {base.name}: {words}")
  own = [source.dtype for source in planned.sources.values() if not source.made]
  if halves := own.count("float16"):
    how = "rounded to bfloat16" if dtype == "bfloat16" else "kept exactly in float32"
    notes.append(f"{halves:,} tensors of the source are float16; their values are {how}")
  return notes


class _Trial:
  """Runs a checkpoint that is about to appear, keeps its fingerprint, and compares it live."""

  def __init__(self, weights: Path, direct: bool, tell: Callable[[str, float], None]):
    self.weights, self.direct, self.tell = weights, direct, tell
    self.line: str | None = None

  def __call__(self, folder: Path) -> None:
    from sam3_jax import fingerprint
    from sam3_jax.inference import Sam3

    from . import live

    self.tell("running the model", 1.0)
    answers = fingerprint.ask(Sam3.from_checkpoint(folder, dtype="float32"))
    fingerprint.write(fingerprint.summarise(answers, "float32"), folder)
    self.tell("comparing with transformers", 1.0)
    self.line = live.compare(folder, self.weights, answers, direct=self.direct)


def _needs_base(weights: Path, settings: adapters.Settings | None) -> str:
  on = f" of {settings.base}" if settings and settings.base else ""
  return (
    f"{weights} is a LoRA adapter{on}, which holds only changes to a model; convert that model "
    "first, then say --base CHECKPOINT to merge the adapter into it."
  )


def _plan_merged(
  chosen: Selection,
  sources: Mapping[str, Source],
  weights: Path,
  config: Config | None,
  base: Base | None,
  settings: adapters.Settings | None,
) -> Plan:
  """Accounts for every tensor of a selection, LoRA merged."""
  layout, tensors = FORMATS[chosen.layout], chosen.tensors
  names = [*tensors, *chosen.modules.values()]
  table = _table(layout, names, base if chosen.adapter else None)
  if chosen.factors or chosen.adapter:
    tensors = {table.canonical(name): source for name, source in tensors.items()}
    whole = (base.sources(table) if base and chosen.adapter else {}) | tensors
    modules = {module: table.canonical(name) for module, name in chosen.modules.items()}
    merged = adapters.merge(chosen.factors, sources, modules, whole, settings, str(weights))
    tensors = (whole if chosen.adapter else tensors) | merged
  return _plan(layout, tensors, weights, config, base, table)


def _plan(
  layout: ModuleType,
  sources: Mapping[str, Source],
  weights: Path,
  config: Config | None,
  base: Base | None = None,
  table: Table | None = None,
) -> Plan:
  """Accounts for every tensor.

  A size that was read off a damaged tensor would make all others wrong: without a configuration the
  released one is tried too, and the shorter list of faults is told.
  """
  table, path = table or _table(layout, sources, base), weights.parent / "config.json"
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  if config is None and path.exists() and hasattr(layout, "read_config"):
    config = layout.read_config(_read_json(path), str(path))
  if base:
    return _plan_on(base, table, sources, weights, config)
  if config is not None:
    _check_size(table, sources, config, weights)
    _check_parts(table, sources, weights)
    planned, faults = account(table, sources, shapes(config), config)
    _raise_incomplete(planned, faults, weights)
    return planned
  _check_parts(table, sources, weights)
  if layout is keras_hub or table is huggingface.LITE:
    raise FileNotFoundError(f"{path} is missing; it belongs beside the weights.")
  error, faults, planned = None, [], None
  try:
    config = infer_config(table, {name: source.shape for name, source in sources.items()})
    _check_size(table, sources, config, weights)
    planned, faults = account(table, sources, shapes(config), config)
    if not faults:
      return planned
  except ValueError as unclear:
    error = unclear
  released = dataclasses.replace(RELEASED, concept_points=layout is meta)
  second, others = account(table, sources, shapes(released), released)
  if not others:
    return second
  if error and len(others) > _FEW:
    raise ValueError(f"{weights}: {error}") from error
  if planned is None or len(others) < len(faults):
    planned, faults = second, others
  _raise_incomplete(planned, faults, weights)
  return planned


def _plan_on(
  base: Base, table: Table, sources: Mapping[str, Source], weights: Path, config: Config | None
) -> Plan:
  """Likewise, with the base's tensors for the parts of which the source has none."""
  if config is not None:
    check_same_size(config, base, str(weights.parent / "config.json"))
  own = {table.canonical(name): source for name, source in sources.items()}
  if len(own) < len(sources):
    own = dict(sources)  # two are of one name, which `account` says
  parts = parts_of(table.name)
  there = {part for part, count in parts.in_file(own).items() if count}
  theirs = base.sources(table)
  added = {
    name: source
    for name, source in theirs.items()
    if name not in own and (parts.of(name) not in there)
  }
  whole = own | added
  points = [name for name in whole if "geometry_encoder.points_" in name]
  has_points = bool(points) if any(_is_point(rule.targets[0]) for rule in table.rules) else None
  config = dataclasses.replace(
    base.config,
    concept_points=base.config.concept_points if has_points is None else has_points,
  )
  visual = table.has_visual(whole) or (base.visual and not table.visual)
  shapes = expected_shapes(config, visual=visual)
  entries = table.entries(config, visual=visual and bool(table.visual))
  filled = {path for entry in entries.values() for path, _ in entry.slots}
  direct = {path: functools.partial(base.read, path) for path in shapes if path not in filled}
  optional = lambda name: parts.of(name) not in there  # noqa: E731
  planned, faults = account(table, whole, shapes, config, optional=optional, direct=direct)
  _raise_incomplete(planned, faults, weights, base)
  return planned


def _is_point(target: str) -> bool:
  return target.startswith("geometry/point_")


def _check_parts(table: Table, sources: Mapping[str, Source], weights: Path) -> None:
  """Says which parts of the model a file lacks as a whole, rather than each of their tensors."""
  counts = parts_of(table.name).in_file(table.canonical(name) for name in sources)
  absent = [part for part in DETECTOR if not counts[part]]
  if not absent:
    return
  tracker = counts["visual"] or any("prompt_encoder." in name for name in sources)
  if tracker and {*absent} >= {*DETECTOR} - {"trunk", "neck"}:
    model = " (Sam3TrackerModel: no text encoder, no detector)" if table.name != "meta" else ""
    raise ValueError(
      f"{weights} holds only SAM 3's tracker{model}; convert the model.safetensors of "
      "facebook/sam3 (Sam3VideoModel) or of Sam3Model, or sam3.pt."
    )
  if absent == ["masks"]:
    raise ValueError(
      f"{weights} holds SAM 3 without the segmentation head (as Meta's recipes with "
      "enable_segmentation: False save it). Say --base CHECKPOINT to take it from a converted "
      "checkpoint, such as that of facebook/sam3."
    )
  there = list_words(part for part in WORDS if counts[part])
  has = (
    f"has only {there} of SAM 3, without" if len(absent) > len(DETECTOR) / 2 else "has no part of"
  )
  raise ValueError(
    f"{weights} {has} {list_words(absent)}. If they were left out on purpose, say --base "
    "CHECKPOINT to take them from a converted checkpoint; else give the file of the whole model."
  )


def _raise_incomplete(
  planned: Plan, faults: list[str], weights: Path, base: Base | None = None
) -> None:
  """Raises ValueError for all faults; one that sums them up where most tensors are not there."""
  wanted = (
    len(planned.missing)
    + len(planned.entries)
    - sum(name in planned.entries for name in planned.missing)
  )
  if len(planned.missing) > wanted / 2:
    parts = parts_of(planned.table.name)
    counts = parts.in_file(planned.sources)
    lost = parts.in_file(planned.missing)
    said = [
      f"{WORDS[part]} {counts[part]:,} of {counts[part] + lost[part]:,}"
      for part in WORDS
      if counts[part] + lost[part]
    ]
    raise ValueError(
      f"{weights} has few of the tensors that SAM 3 has in the layout {planned.table.name}: "
      f"{', '.join(said)}. Give the file of the whole model, and its config.json beside it."
    )
  raise_incomplete(planned.table, faults, str(weights))


def _check_size(table: Table, sources: Mapping[str, Source], config: Config, weights: Path) -> None:
  """Refuses a model far too large for its file before its tensors are listed, one by one."""
  wanted = table.tensors(config)
  if wanted > _MORE * len(sources):
    counts = parts_of(table.name).in_file(table.canonical(name) for name in sources)
    there = list_words(part for part in WORDS if counts[part])
    raise ValueError(
      f"{weights} has {len(sources):,} tensors, where its configuration wants {wanted:,}"
      f"{f', and only some of {there}' if there else ''}: it is a part of a model, or its "
      "config.json is of another one; give the file of the whole model."
    )


def _table(layout: ModuleType, names: Iterable[str], base: Base | None) -> Table:
  """The layout's table for the models that these names, or that of the base, are of."""
  names = list(names)
  if layout is meta and meta.is_multiplex(names):
    return meta.MULTIPLEX
  if layout is huggingface:
    encoder = any("text_encoder." in name for name in names)
    if huggingface.is_lite(names) or (base and base.lite and not encoder):
      return huggingface.LITE
  return layout.TABLE


def _lacks(planned: Plan, unread: list[str]) -> list[str]:
  """What sam3.pt has and this source has not; a bundle of Meta's layout has it all."""
  table, names = planned.table, [*unread, *planned.entries]
  if table is keras_hub.TABLE:
    names += keras_hub.names_in_huggingface()
  found = lacking(planned.config, names)
  if not planned.config.concept_points:
    found.append("geometry/point_* (concept points)")
  if not any(rule.skip for rule in table.rules) and not any("[:, :" in name for name in unread):
    found.append("the class token's row of the position table")
  return found


def _read_json(path: Path) -> Any:
  try:
    return parse_json(read_text(path))
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); download it again.") from error


def _tokenizer(given: str | Path | None, folder: Path, base: Base | None) -> bytes:
  if given is None and base:
    return base.stored.tokenizer
  path = Path(given).expanduser() if given else find_vocabulary(folder)
  return Tokenizer(path).model if path.suffix == ".model" else build_tokenizer(path)


def _describe_dropped(planned: Plan) -> dict[str, dict[str, Any]]:
  return {
    name: {
      "shape": list(planned.sources[name].shape),
      "dtype": planned.sources[name].dtype,
      "reason": reason,
    }
    for name, reason in planned.dropped.items()
  }
