"""Checkpoints of other programs into ours: `convert`.

`sources.py` finds and opens files, which `safetensors.py`, `torch_files.py` (by `pickles.py`) and
`hdf5.py` read; `meta.py`, `huggingface.py` and `keras_hub.py` hold the names and layouts of each
source, `shared.py` the rules that several have, `huggingface_config.py` the config.json of one, and
`unread.py` the names of what our model does not read. `rules.py` is the language they are written
in, and `engine.py` carries them out. `infer.py` reads a configuration off shapes, `vocabulary.py`
makes the tokenizer, `origin.py` says which files these were, and `foreign.py` what a file is that
cannot be converted. `settings.py` reads values of a config.json, and `checks.py` bounds what is
believed. `export.py` is the way back, with `torch_writer.py` and `vocabulary_files.py` for its
files; `live.py` compares with transformers, which `peer.py` sets right.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from sam3_jax.checkpoint import check_dtype, expected_shapes
from sam3_jax.config import RELEASED, Config
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import raise_faults
from sam3_jax.writer import Writer

from . import huggingface, keras_hub, meta
from .checks import parse_json, read_text
from .engine import REMEDY, Plan, account, raise_incomplete
from .foreign import recognise, recognise_variant
from .infer import infer_config
from .origin import describe_origin
from .rules import Source, Table
from .sources import find_weights, open_weights
from .unread import lacking
from .vocabulary import build_tokenizer, find_vocabulary

FORMATS: dict[str, ModuleType] = {"huggingface": huggingface, "meta": meta, "keras": keras_hub}
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
) -> str | None:
  """Writes a checkpoint of ours from released weights.

  Args:
    source: model.safetensors, its index of shards, sam3.pt or another file of torch.save,
      model.weights.h5 of a KerasHub preset, or the folder of any of these.
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
  planned = _plan(_layout(sources, format, weights), sources, weights, config)
  model = _tokenizer(tokenizer, weights.parent)
  trial = _Trial(weights, planned.table.name == huggingface.TABLE.name, tell)
  with Writer(out) as writer:
    unread = _add_parts(writer, planned, dtype, tell, weights)
    tell("checksums of the source", 1.0)
    info = _info(planned, weights, Path(out).name)
    tell("checking what was written" if verify else "finishing", 1.0)
    writer.finish(
      planned.config,
      model,
      info=info,
      unread=unread,
      unread_reasons=planned.reasons(),
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


def _info(planned: Plan, weights: Path, name: str) -> dict[str, Any]:
  """What the checkpoint says of itself."""
  return {
    "name": name,
    "source": f"{weights.name}, {len(planned.sources)} tensors in the layout {planned.table.name}",
    "origin": describe_origin(weights),
    "licence": LICENCE,
    "trained": True,
    "lacks": _lacks(planned),
  }


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


def _layout(sources: Mapping[str, Source], format: str, weights: Path) -> ModuleType:
  """The module of the layout that these names are in."""
  if format != "auto" and format not in FORMATS:
    raise ValueError(f"format {format!r} must be auto or one of {', '.join(FORMATS)}.")
  if variant := recognise_variant(sources):
    raise ValueError(
      f"{weights} is of {variant}; give the weights of transformers' Sam3LiteTextModel instead."
    )
  matching = [name for name, layout in FORMATS.items() if layout.matches(sources)]
  if matching and format in ("auto", matching[0]):
    if matching[0] == "huggingface":
      huggingface.require_detector(sources, str(weights))
    return FORMATS[matching[0]]
  kind = f"SAM 3 in the layout {matching[0]}" if matching else recognise(sources)
  raise ValueError(
    f"{weights} does not hold SAM 3 in {'any known' if format == 'auto' else f'the {format}'} "
    f"layout; it looks like {kind or 'nothing known'}, and its first tensor is "
    f"{next(iter(sources), 'missing')}. Give the weights of facebook/sam3."
  )


def _plan(
  layout: ModuleType, sources: Mapping[str, Source], weights: Path, config: Config | None
) -> Plan:
  """Accounts for every tensor.

  A size that was read off a damaged tensor would make all others wrong: without a configuration the
  released one is tried too, and the shorter list of faults is told.
  """
  table, path = _table(layout, sources), weights.parent / "config.json"
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  if config is None and path.exists() and hasattr(layout, "read_config"):
    config = layout.read_config(_read_json(path), str(path))
  if config is not None:
    _check_size(table, sources, config, weights)
    planned, faults = account(table, sources, shapes(config), config)
    raise_incomplete(table, faults)
    return planned
  if layout is keras_hub or table is huggingface.LITE:
    raise FileNotFoundError(f"{path} is missing; it belongs beside the weights.")
  error, faults = None, []
  try:
    config = infer_config(table, {name: source.shape for name, source in sources.items()})
    _check_size(table, sources, config, weights)
    planned, faults = account(table, sources, shapes(config), config)
    if not faults:
      return planned
  except ValueError as unclear:
    error = unclear
  released = dataclasses.replace(RELEASED, concept_points=layout is meta)
  planned, others = account(table, sources, shapes(released), released)
  if not others:
    return planned
  if error and len(others) > _FEW:
    raise ValueError(f"{weights}: {error}") from error
  raise_incomplete(table, others if error else min(faults, others, key=len))
  return planned


def _check_size(table: Table, sources: Mapping[str, Source], config: Config, weights: Path) -> None:
  """Refuses a model far too large for its file before its tensors are listed, one by one."""
  wanted = table.tensors(config)
  if wanted > _MORE * len(sources):
    raise ValueError(
      f"{weights} has {len(sources):,} tensors, where its configuration wants {wanted:,}: one of "
      "the two is of another model; download both again."
    )


def _table(layout: ModuleType, sources: Mapping[str, Source]) -> Table:
  """The layout's table for the models that these names are of."""
  if layout is meta and meta.is_multiplex(sources):
    return meta.MULTIPLEX
  if layout is huggingface and huggingface.is_lite(sources):
    return huggingface.LITE
  return layout.TABLE


def _lacks(planned: Plan) -> list[str]:
  """What sam3.pt has and this source has not; a bundle of Meta's layout has it all."""
  table, names = planned.table, [*planned.unread, *planned.entries]
  if table is keras_hub.TABLE:
    names += keras_hub.names_in_huggingface()
  found = lacking(planned.config, names)
  if not planned.config.concept_points:
    found.append("geometry/point_* (concept points)")
  if not any(rule.skip for rule in table.rules):
    found.append("the class token's row of the position table")
  return found


def _read_json(path: Path) -> Any:
  try:
    return parse_json(read_text(path))
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); download it again.") from error


def _tokenizer(given: str | Path | None, folder: Path) -> bytes:
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
