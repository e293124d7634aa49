"""Checkpoints of other programs into ours: `convert`.

`sources.py` finds and opens files, which `safetensors.py`, `torch_files.py` (by `pickles.py`) and
`hdf5.py` read; `meta.py`, `huggingface.py` and `keras_hub.py` hold the names and layouts of each
source, `shared.py` the rules that several have, `huggingface_config.py` the config.json of one, and
`unread.py` the names of what our model does not read. `rules.py` is the language they are written
in, and `engine.py` carries them out. Before that, `selection.py` finds the model in the file,
`wrappers.py` takes what training programs add off its names, `adapters.py` merges LoRA, and
`base.py` gives from a checkpoint of ours what a file lacks, by `parts.py`; `planning.py` then
accounts for every tensor. `infer.py` reads a
configuration off shapes, `vocabulary.py` makes the tokenizer, `origin.py` says which files these
were, and `foreign.py` what a file is that cannot be converted. `settings.py` reads values of a
config.json, and `checks.py` bounds what is believed. `export.py` writes the other layouts, with
`torch_writer.py` and `vocabulary_files.py` for its files; `live.py` compares with transformers,
which `peer.py` sets right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint.bundle import check_dtype
from sam3_jax.checkpoint.writer import Writer
from sam3_jax.config import Config
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.param_tree import raise_faults

from . import adapters
from .base import Base
from .engine import REMEDY, Plan
from .layouts import keras_hub
from .layouts.unread import lacking
from .parts import WORDS, list_words, parts_of
from .planning import plan_selection
from .provenance import describe_origin
from .selection import Selection, select
from .sources import ADAPTERS, find_weights, open_weights
from .vocabulary import build_tokenizer, find_vocabulary
from .wrappers import FORMATS as FORMATS

LICENCE = "that of the source; Meta's SAM 3 weights are under the SAM License"


def convert(
  source: str | Path,
  out: str | Path,
  *,
  format: str = "auto",
  dtype: str = "float32",
  config: Config | None = None,
  tokenizer: str | Path | None = None,
  verify: bool = True,
  trial: Callable[..., str] | None = None,
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
    trial: called with the complete checkpoint before it appears, the source file, whether
      transformers can read that file as it is, and `progress`; such as
      `inference.verify.verify_conversion`.
    progress: is told what is being done, and which fraction of the whole was done before that.
    key: which model of a file with several is meant, such as "ema": the key of its dictionary or
      the beginning of its names. None takes the only one, or the one under the first of
      `selection.DEFAULT_KEYS`.
    base: a checkpoint of ours, from which parts come that the source lacks as a whole, and to
      whose weights an adapter is added.
    lora_alpha: of LoRA, where no adapter_config.json beside the source says it.
    note: is told, in a sentence each, what was decided that the caller may not expect.

  Returns:
    What `trial` returns, a line for the user; None without it.

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
  planned = plan_selection(chosen, sources, weights, config, below, scales)
  model = _tokenizer(tokenizer, weights.parent, below)
  notes = [*chosen.notes, *_notes(planned, chosen, below, dtype)]
  for line in notes:
    (note or (lambda line: None))(line)
  direct = chosen.layout == "huggingface" and not (below or chosen.factors or chosen.prefix)
  lines: list[str] = []
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
      run=(lambda folder: lines.append(trial(folder, weights, direct, tell))) if trial else None,
    )
  return lines[0] if lines else None


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


def _needs_base(weights: Path, settings: adapters.Settings | None) -> str:
  on = f" of {settings.base}" if settings and settings.base else ""
  return (
    f"{weights} is a LoRA adapter{on}, which holds only changes to a model; convert that model "
    "first, then say --base CHECKPOINT to merge the adapter into it."
  )


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
