"""Checkpoints of other programs into ours: `convert`.

`safetensors.py` reads files; `meta.py` and `huggingface.py` hold the names and layouts of each
source, `rules.py` is the language they are written in and `engine.py` carries them out; `infer.py`
reads a configuration off shapes, and `vocabulary.py` makes the tokenizer.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam3_jax.checkpoint import check_dtype, expected_shapes
from sam3_jax.config import Config
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import raise_faults
from sam3_jax.writer import Writer

from . import huggingface, meta
from .engine import REMEDY, Plan, plan
from .infer import infer_config
from .rules import Source, Table
from .safetensors import INDEX, open_safetensors
from .vocabulary import build_tokenizer, find_vocabulary

FORMATS = {"huggingface": huggingface, "meta": meta}
LICENCE = "that of the source; Meta's SAM 3 weights are under the SAM License"
_MAGIC = {
  b"PK\x03\x04": "a PyTorch file, which this version does not read",
  b"\x80\x02": "a PyTorch file, which this version does not read",
  b"\x89HDF": "an HDF5 file (KerasHub?), which this version does not read",
}


def convert(
  source: str | Path,
  out: str | Path,
  *,
  format: str = "auto",
  dtype: str = "float32",
  config: Config | None = None,
  tokenizer: str | Path | None = None,
  verify: bool = True,
  progress: Callable[[str, float], None] | None = None,
) -> None:
  """Writes a checkpoint of ours from released weights.

  Args:
    source: model.safetensors, model.safetensors.index.json, or the folder of either.
    out: a folder that does not exist yet, or is empty; it appears when it is complete.
    format: whose names the tensors have, one of `FORMATS`; "auto" looks at them.
    dtype: of the parameters, "float32" or "bfloat16"; tensors that nothing reads keep theirs.
    config: the model's; None reads config.json beside the weights, or else the shapes.
    tokenizer: a vocabulary (see `vocabulary.FORMS`) or tokenizer.model; None looks beside the
      weights.
    verify: read everything back and compare the checksums.
    progress: is told what is being done, and which fraction of the whole was done before that.

  Raises:
    FileNotFoundError: the source, a shard or the vocabulary is not there.
    ValueError: the source is something else, is damaged, or does not fit its configuration, with
      all faults in one line; or `out` is not empty or cannot be written. Nothing is left then.
  """
  check_dtype(dtype)
  tell = progress or (lambda what, fraction: None)
  tell("reading names and shapes", 0.0)
  weights = find_weights(Path(source).expanduser())
  sources = open_safetensors(weights)
  table = _table(sources, format, weights)
  config = config or _config(sources, table, weights)
  model = _tokenizer(tokenizer, weights.parent)
  planned = plan(table, sources, expected_shapes(config), config)
  with Writer(out) as writer:
    faults, done = [], 0
    for part in planned.parts:
      tell(part, done / planned.parameters())
      writer.add(part, planned.read(part, dtype, faults))
      done += planned.parameters(part)
    unread = planned.read_unread(faults)
    raise_faults(faults, f"{weights} cannot be converted", REMEDY)
    tell("checking what was written" if verify else "finishing", 1.0)
    writer.finish(
      config,
      model,
      info={
        "name": Path(out).name,
        "source": f"{weights.name}, {len(sources)} tensors in the layout {table.name}",
        "licence": LICENCE,
        "trained": True,
      },
      unread=unread,
      unread_reasons=planned.reasons(),
      dropped=_describe_dropped(planned),
      source_tensors=planned.counts(),
      verify=verify,
    )


def find_weights(source: Path) -> Path:
  """The file to open: `source` itself, or the one in that folder.

  Raises:
    FileNotFoundError: there is nothing at `source`.
    ValueError: it is a folder without weights, or a file of another kind.
  """
  if not source.exists():
    raise FileNotFoundError(
      f"there is nothing at {source}; give model.safetensors of facebook/sam3, or its folder."
    )
  if source.is_dir():
    if (source / "manifest.json").exists() and (source / "params").is_dir():
      raise ValueError(f"{source} is a checkpoint of sam3-jax already; it needs no conversion.")
    found = [source / name for name in ("model.safetensors", INDEX) if (source / name).exists()]
    found = found or sorted(source.glob("*.safetensors"))
    if not found:
      raise ValueError(
        f"{source} holds no model.safetensors and no {INDEX}; download the weights of "
        "facebook/sam3 into it."
      )
    if len(found) > 1 and found[1].name != INDEX:
      raise ValueError(f"{source} holds {len(found)} .safetensors files; name the one to convert.")
    return found[0]
  with source.open("rb") as file:
    start = file.read(4)
  for magic, kind in _MAGIC.items():
    if start.startswith(magic):
      raise ValueError(f"{source} is {kind}; convert the model.safetensors of facebook/sam3.")
  return source


def _table(sources: Mapping[str, Source], format: str, weights: Path) -> Table:
  if format != "auto" and format not in FORMATS:
    raise ValueError(f"format {format!r} must be auto or one of {', '.join(FORMATS)}.")
  matching = [name for name, layout in FORMATS.items() if layout.matches(sources)]
  if not matching or format not in ("auto", matching[0]):
    raise ValueError(
      f"{weights} does not hold SAM 3 in {'any known' if format == 'auto' else f'the {format}'} "
      f"layout; its first tensor is {next(iter(sources))}. Give the weights of facebook/sam3."
    )
  if matching[0] == "huggingface":
    huggingface.require_detector(sources, str(weights))
  return FORMATS[matching[0]].TABLE


def _config(sources: Mapping[str, Source], table: Table, weights: Path) -> Config:
  path = weights.parent / "config.json"
  if table is not huggingface.TABLE or not path.exists():
    return infer_config(table, {name: source.shape for name, source in sources.items()})
  try:
    values = json.loads(path.read_bytes())
  except ValueError as error:
    raise ValueError(f"{path} is not readable JSON ({error}); download it again.") from error
  return huggingface.read_config(values, str(path))


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
