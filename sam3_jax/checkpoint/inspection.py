"""Inspects and verifies checkpoints, and renews their checksums."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from sam3_jax.checkpoint import checksums, fingerprint, integrity
from sam3_jax.checkpoint.fingerprint import Fingerprint
from sam3_jax.checkpoint.manifest import count_by_reason
from sam3_jax.checkpoint.parameters import DTYPES, VISUAL, why_no_tracker
from sam3_jax.checkpoint.validate import open_checkpoint
from sam3_jax.checkpoint.writer import seal
from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.paths import file_sizes, require_local


@dataclasses.dataclass(frozen=True)
class Summary:
  """The result of `inspect`.

  Attributes:
    path: of the directory.
    identity: digest of parameters, configuration and tokenizer; see utils/identity.py.
    config: sizes of the model.
    info: its metadata; see `bundle.save`.
    parts: number of parameters of each top-level part.
    parameters: their sum.
    dtype: as stored; `mixed` if there are several.
    stored_bytes: of all files.
    memory: bytes of the parameters, by the dtype to load them in.
    source_tensors: for a converted checkpoint, the source's tensors and parameters that are read,
      kept unread and dropped: `{"read": {"tensors": .., "parameters": ..}, ..}`; otherwise empty.
    unread: tensors and parameters that the checkpoint keeps but the model does not read, by reason.
    dropped: tensors and parameters of the source that the checkpoint does not keep, by reason.
    cannot: uses that it does not support and why, one per line.
    checks: the state of the `checksums` and of the `fingerprint`, in words.
    fingerprint: outputs of a run of the model, if it was run; see fingerprint.py.
  """

  path: str
  identity: str
  config: Config
  info: dict[str, Any]
  parts: dict[str, int]
  parameters: int
  dtype: str
  stored_bytes: int
  memory: dict[str, int]
  source_tensors: dict[str, dict[str, int]]
  unread: dict[str, dict[str, int]]
  dropped: dict[str, dict[str, int]]
  cannot: list[str]
  checks: dict[str, str]
  fingerprint: Fingerprint | None

  def to_dict(self) -> dict[str, Any]:
    """The summary as plain values for JSON."""
    return dataclasses.asdict(self)


def inspect(
  path: str | Path,
  *,
  verify: bool = False,
  progress: Callable[[float], None] | None = None,
) -> Summary:
  """Summarizes a checkpoint; raises as `bundle.load`.

  Args:
    path: as in `bundle.load`.
    verify: compares all checksums; otherwise reads no parameter.
    progress: as in `verify`.
  """
  opened = open_checkpoint(path, verify=verify, tensors=verify, progress=progress)
  path, manifest = opened.path, opened.manifest
  parameters = manifest["parameters"]
  parts: dict[str, int] = {}
  for name, entry in parameters.items():
    part = name.partition("/")[0]
    parts[part] = parts.get(part, 0) + math.prod(entry["shape"])
  dtypes = {entry["dtype"] for entry in parameters.values()}
  kept = fingerprint.read(path)
  return Summary(
    path=str(path),
    identity=opened.identity,
    config=opened.config,
    info=opened.info,
    parts=parts,
    parameters=sum(parts.values()),
    dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
    stored_bytes=sum(file_sizes(path).values()),
    memory={dtype: sum(parts.values()) * jnp.dtype(dtype).itemsize for dtype in DTYPES},
    source_tensors=manifest["source_tensors"],
    unread=count_by_reason(manifest["unread"]),
    dropped=count_by_reason(manifest["dropped"]),
    cannot=_cannot(opened.config, manifest["unread"], visual=VISUAL in parts),
    checks={
      "checksums": _describe_comparison(opened.compared),
      "fingerprint": "not compared" if kept else "none",
    },
    fingerprint=kept,
  )


def verify(path: str | Path, *, progress: Callable[[float], None] | None = None) -> None:
  """Compares the checksums of every file and of every stored tensor.

  Args:
    path: as in `bundle.load`.
    progress: called with the fraction of the files' bytes that were read.

  Raises:
    FileNotFoundError, ValueError: as `bundle.load`; the message names the files and tensors that
      differ.
  """
  open_checkpoint(path, verify=True, tensors=True, progress=progress)


def add_checksums(path: str | Path) -> list[str]:
  """Writes SHA256SUMS for a checkpoint of an earlier version, or an edited one.

  Compares every tensor with the manifest first. Accepts configuration and tokenizer as they are, if
  they fit the parameters.

  Returns:
    Paths of the files with a new or changed checksum.

  Raises:
    FileNotFoundError, ValueError: as `bundle.load`; or a tensor differs from its checksum.
    OSError: the directory cannot be written.
  """
  require_local(path, "a checkpoint to add checksums to")
  opened = open_checkpoint(path, trust=True)
  path, manifest = opened.path, dict(opened.manifest)
  try:
    before = checksums.read(path) or {}
  except ValueError:  # damaged, and replaced below
    before = {}
  manifest.pop("checksums", None)
  manifest["files"] = {item: file_sizes(path / "params" / item) for item in manifest["items"]}
  manifest["unread_files"] = file_sizes(path / "unread")
  manifest["checksums_file"] = checksums.FILE
  shapes = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
  manifest["fits"] = seal(opened.config, shapes)  # `open_checkpoint` compared them
  if manifest != opened.manifest:
    write_json(path / "manifest.json", manifest, indent=1)
  sums = checksums.write(path)
  return [name for name, digest in sums.items() if before.get(name) != digest]


def _describe_comparison(compared: integrity.Comparison) -> str:
  """The state of the checksums, in words."""
  clauses = []
  if compared.compared == compared.files:
    if compared.files:
      clauses.append(f"all {compared.files:,} files match")
  else:
    clauses.append(f"{compared.compared:,} of {compared.files:,} files match")
    clauses.append("--verify compares the others")
  if compared.tensors:
    clauses.append(f"{compared.tensors:,} tensors match")
  if compared.missing:
    clauses.append(f"no checksums of {', '.join(compared.missing)}; {integrity.ADD} adds them")
  if compared.rewritten:
    clauses.append(f"{', '.join(compared.rewritten)} was rewritten by Orbax")
  return "; ".join(clauses)


def _cannot(config: Config, unread: Iterable[str], *, visual: bool) -> list[str]:
  lines = []
  if not visual:
    lines.append("visual prompts: it has no head for points, boxes and masks")
  if config.video is None:
    lines.append(f"video: {why_no_tracker(unread)}")
  if not config.concept_points:
    lines.append("concept points: its geometry encoder takes boxes alone")
  if config.trunk.stem:
    lines.append("convert --to: no other program has its convolutional stem")
  elif isinstance(config.text, LiteTextConfig):
    target = "" if visual else " meta"
    lines.append(f"convert --to{target}: no program of that layout has its text encoder")
  return lines
