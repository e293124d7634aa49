"""Converts released or fine-tuned weights to a sam3-jax checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint.bundle import check_dtype
from sam3_jax.checkpoint.writer import Writer
from sam3_jax.config import Config
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.param_tree import raise_faults

from .adapter_config import LoraSettings, read_settings
from .base import Base
from .layouts import keras_hub
from .layouts.unread import absent_tensors
from .parts import WORDS, list_words, parts_of
from .plan import REMEDY, Plan
from .plan_source import plan_selection
from .provenance import describe_origin
from .selection import Selection, select
from .sources import ADAPTERS, find_weights, open_weights
from .vocabulary import build_tokenizer, find_vocabulary

LICENCE = "that of the source; Meta's SAM 3 weights are under the SAM License"

Progress = Callable[[str, float], None]
Trial = Callable[[Path, Path, bool, Progress], str]


def convert(
  source: str | Path,
  out: str | Path,
  *,
  format: str = "auto",
  dtype: str = "float32",
  config: Config | None = None,
  tokenizer: str | Path | None = None,
  verify: bool = True,
  trial: Trial | None = None,
  progress: Progress | None = None,
  key: str | None = None,
  base: str | Path | None = None,
  lora_alpha: float | None = None,
  note: Callable[[str], None] | None = None,
) -> str | None:
  """Writes a sam3-jax checkpoint from released or fine-tuned weights.

  Args:
    source: model.safetensors, its index or a shard, sam3.pt or another file of torch.save,
      model.weights.h5 of a KerasHub preset, a LoRA adapter of PEFT, or the directory of these.
    out: the output directory. It must be empty or not exist; it appears when it is complete.
    format: the layout of the source, one of `FORMATS`; "auto" detects it.
    dtype: of the parameters, "float32" or "bfloat16"; unread tensors keep their dtype.
    config: the model's; None reads config.json beside the weights, or infers it from the shapes.
    tokenizer: a vocabulary (see `vocabulary.FORMS`) or tokenizer.model; None looks beside `source`.
    verify: read everything back and compare the checksums.
    trial: called with the complete checkpoint before it appears, the source file, whether
      transformers can read that file as it is, and `progress`; such as
      `inference.verify.verify_conversion`.
    progress: called with the current step and the fraction of the work done before it.
    key: in a file with several models, the key of the model's dictionary or the prefix of its
      names; None takes the only model, or the first of `selection.DEFAULT_KEYS`.
    base: a sam3-jax checkpoint that supplies parts that the source lacks, or an adapter's weights.
    lora_alpha: LoRA's alpha, if no adapter_config.json beside the source has it.
    note: called with a sentence for each decision that the caller may not expect.

  Returns:
    What `trial` returns, a line for the user; None without it.

  Raises:
    FileNotFoundError: the source, a shard or the vocabulary is missing.
    ValueError: the source cannot be converted, with all faults in one line; the output differs from
      transformers'; or `out` cannot be written. Nothing is left behind then.
  """
  check_dtype(dtype)
  conversion = _Conversion(Path(source).expanduser(), progress or (lambda step, fraction: None))
  conversion.plan(format, key, config, base, lora_alpha)
  return conversion.write(Path(out), dtype, tokenizer, verify, trial, note)


class _Conversion:
  """The conversion of one source: first planned, then written."""

  def __init__(self, source: Path, report: Progress):
    self.report = report
    report("reading names and shapes", 0.0)
    self.weights = find_weights(source)

  def plan(
    self,
    format: str,
    key: str | None,
    config: Config | None,
    base: str | Path | None,
    lora_alpha: float | None,
  ) -> None:
    weights = self.weights
    sources = open_weights(weights)
    adapter = weights.name in ADAPTERS
    self.chosen = chosen = select(sources, format, key, str(weights), adapter)
    settings = read_settings(weights.parent, lora_alpha) if chosen.factors or adapter else None
    self.base = Base(Path(base).expanduser()) if base is not None else None
    if chosen.adapter and self.base is None:
      raise ValueError(_needs_base(weights, settings))
    self.planned = plan_selection(chosen, sources, weights, config, self.base, settings)

  def write(
    self,
    out: Path,
    dtype: str,
    tokenizer: str | Path | None,
    verify: bool,
    trial: Trial | None,
    note: Callable[[str], None] | None,
  ) -> str | None:
    planned, chosen, weights, base = self.planned, self.chosen, self.weights, self.base
    tokenizer_model = _tokenizer(tokenizer, weights.parent, base)
    notes = [*chosen.notes, *_notes(planned, chosen, base, dtype)]
    if note:
      for line in notes:
        note(line)
    direct = chosen.layout == "huggingface" and not (base or chosen.factors or chosen.prefix)
    lines: list[str] = []
    with Writer(out) as writer:
      unread = _write_parts(writer, planned, dtype, self.report, weights)
      unread |= base.other_unread(unread) if base else {}
      self.report("checksums of the source", 1.0)
      info = _info(planned, weights, out.name, base, notes, [*unread])
      self.report("checking what was written" if verify else "finishing", 1.0)
      reasons = dict.fromkeys(unread, "kept from the base") | planned.reasons()
      writer.finish(
        planned.config,
        tokenizer_model,
        info=info,
        unread=unread,
        unread_reasons=reasons,
        dropped=_describe_dropped(planned),
        source_tensors=planned.counts(),
        verify=verify,
        run=(lambda new: lines.append(trial(new, weights, direct, self.report))) if trial else None,
      )
    return lines[0] if lines else None


def _write_parts(
  writer: Writer, planned: Plan, dtype: str, report: Progress, weights: Path
) -> dict[str, np.ndarray]:
  """Writes the parameters, one part at a time, and returns the unread tensors."""
  faults, done = [], 0
  for part in planned.parts:
    report(part, done / planned.parameter_count())
    writer.add(part, planned.read(part, dtype, faults))
    done += planned.parameter_count(part)
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
  """The description that the checkpoint stores."""
  own = sum(source.in_file for source in planned.sources.values())
  info = {
    "name": name,
    "source": f"{weights.name}, {own} tensors in the layout {planned.table.name}",
    "origin": describe_origin(weights),
    "licence": LICENCE,
    "trained": True,
    "lacks": _absent(planned, unread),
  }
  if base:
    info["base"] = {
      "name": base.name,
      "identity": base.identity,
      "parts": sorted(_parts_from_base(planned)),
      "parameters": sorted(planned.from_base),
    }
  return info | ({"notes": notes} if notes else {})


def _parts_from_base(planned: Plan) -> set[str]:
  """The parts of the model that come from the base as a whole; see `parts.WORDS`."""
  parts = parts_of(planned.table.name)
  own, other = (
    {parts.of(name) for name in planned.entries if planned.sources[name].in_file is in_file}
    for in_file in (True, False)
  )
  return other - own


def _notes(planned: Plan, chosen: Selection, base: Base | None, dtype: str) -> list[str]:
  """Decisions that the caller may not expect, a sentence each."""
  notes = []
  if chosen.factors:
    notes.append(f"merged LoRA into {len(chosen.modules):,} weights")
  if base and not chosen.adapter and (parts := _parts_from_base(planned)):
    words = list_words(part for part in WORDS if part in parts)
    notes.append(f"took from the base {base.name}: {words}")
  dtypes = [source.dtype for source in planned.sources.values() if source.in_file]
  if halves := dtypes.count("float16"):
    how = "rounded to bfloat16" if dtype == "bfloat16" else "kept exactly in float32"
    notes.append(f"{halves:,} tensors of the source are float16; their values are {how}")
  return notes


def _needs_base(weights: Path, settings: LoraSettings | None) -> str:
  on = f" of {settings.base}" if settings and settings.base else ""
  return (
    f"{weights} is a LoRA adapter{on}, which holds only changes to a model; convert that model "
    "first, then use --base CHECKPOINT to merge the adapter into it."
  )


def _absent(planned: Plan, unread: list[str]) -> list[str]:
  """Tensors and parts that sam3.pt has and this source lacks."""
  table, names = planned.table, [*unread, *planned.entries]
  if table is keras_hub.TABLE:
    names += keras_hub.names_in_huggingface()
  found = absent_tensors(planned.config, names)
  if not planned.config.concept_points:
    found.append("geometry/point_* (concept points)")
  if not any(rule.skip for rule in table.rules) and not any("[:, :" in name for name in unread):
    found.append("the class token's row of the position table")
  return found


def _tokenizer(given: str | Path | None, directory: Path, base: Base | None) -> bytes:
  if given is None and base:
    return base.stored.tokenizer
  path = Path(given).expanduser() if given else find_vocabulary(directory)
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
