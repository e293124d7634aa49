"""Checkpoints of other programs into ours: `convert`.

`sources.py` finds and opens files, which `safetensors.py`, `torch_files.py` and `hdf5.py` read;
`meta.py`, `huggingface.py` and `keras_hub.py` hold the names and layouts of each source,
`unread.py` those of what our model does not read. `rules.py` is the language they are written in,
and `engine.py` carries them out. `infer.py` reads a configuration off shapes, `vocabulary.py` makes
the tokenizer, `origin.py` says which files these were, and `foreign.py` what a file is that cannot
be converted. `export.py` is the way back.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sam3_jax.checkpoint import check_dtype, expected_shapes
from sam3_jax.config import RELEASED, Config
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import raise_faults
from sam3_jax.writer import Writer

from . import huggingface, keras_hub, meta
from .engine import REMEDY, Plan, account, raise_incomplete
from .foreign import recognise, recognise_variant
from .infer import infer_config
from .origin import describe_origin
from .rules import Source
from .sources import find_weights, open_weights
from .unread import lacking
from .vocabulary import build_tokenizer, find_vocabulary

FORMATS: dict[str, ModuleType] = {"huggingface": huggingface, "meta": meta, "keras": keras_hub}
LICENCE = "that of the source; Meta's SAM 3 weights are under the SAM License"
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
) -> None:
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
    fingerprint: run the model too, and keep a few numbers of what it gave; see fingerprint.py.
    progress: is told what is being done, and which fraction of the whole was done before that.

  Raises:
    FileNotFoundError: the source, a shard or the vocabulary is not there.
    ValueError: the source is something else, is damaged, or does not fit its configuration, with
      all faults in one line; what the model computes is not finite; or `out` is not empty or
      cannot be written. Nothing is left then.
  """
  check_dtype(dtype)
  tell = progress or (lambda what, fraction: None)
  tell("reading names and shapes", 0.0)
  weights = find_weights(Path(source).expanduser())
  sources = open_weights(weights)
  layout = _layout(sources, format, weights)
  planned = _plan(layout, sources, weights, config)
  table = planned.table
  model = _tokenizer(tokenizer, weights.parent)
  with Writer(out) as writer:
    faults, done = [], 0
    for part in planned.parts:
      tell(part, done / planned.parameters())
      writer.add(part, planned.read(part, dtype, faults))
      done += planned.parameters(part)
    unread = planned.read_unread(faults)
    raise_faults(faults, f"{weights} cannot be converted", REMEDY)
    tell("checksums of the source", 1.0)
    origin = describe_origin(weights)
    tell("checking what was written" if verify else "finishing", 1.0)
    writer.finish(
      planned.config,
      model,
      info={
        "name": Path(out).name,
        "source": f"{weights.name}, {len(sources)} tensors in the layout {table.name}",
        "origin": origin,
        "licence": LICENCE,
        "trained": True,
        "lacks": _lacks(planned),
      },
      unread=unread,
      unread_reasons=planned.reasons(),
      dropped=_describe_dropped(planned),
      source_tensors=planned.counts(),
      verify=verify,
      run=functools.partial(_fingerprint, tell=tell) if fingerprint else None,
    )


def _fingerprint(folder: Path, tell: Callable[[str, float], None]) -> None:
  """Runs the checkpoint in a folder and keeps its fingerprint there."""
  from sam3_jax import fingerprint
  from sam3_jax.inference import Sam3

  tell("running the model", 1.0)
  fingerprint.write(fingerprint.compute(Sam3.from_checkpoint(folder, dtype="float32")), folder)


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
  table, path = layout.TABLE, weights.parent / "config.json"
  if layout is meta and meta.is_multiplex(sources):
    table = meta.MULTIPLEX
  if layout is huggingface and huggingface.is_lite(sources):
    table = huggingface.LITE
  shapes = functools.partial(expected_shapes, visual=table.has_visual(sources))
  if config is None and path.exists() and hasattr(layout, "read_config"):
    config = layout.read_config(_read_json(path), str(path))
  if config is not None:
    planned, faults = account(table, sources, shapes(config), config)
    raise_incomplete(table, faults)
    return planned
  if layout is keras_hub or table is huggingface.LITE:
    raise FileNotFoundError(f"{path} is missing; it belongs beside the weights.")
  error, faults = None, []
  try:
    config = infer_config(table, {name: source.shape for name, source in sources.items()})
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
    raise error
  raise_incomplete(table, others if error else min(faults, others, key=len))
  return planned


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
    return json.loads(path.read_bytes())
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
