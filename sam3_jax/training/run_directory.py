"""The output directory of a run: its configuration, checks before resuming, and bundles in it.

OUT/config.json     the configuration; another one is refused
OUT/run-data.json   identities of the data; other data are refused
OUT/metrics.jsonl   a line per step, and one per evaluation
OUT/steps/          checkpoints to resume from
OUT/best/           bundle with the best evaluation so far
OUT/final/          bundle at the end of the run
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sam3_jax.training.config_file import differences, with_defaults
from sam3_jax.training.renamed_fields import FORMAT_VERSION, renames
from sam3_jax.training.run_data import RUN_DATA_FILE, RunData
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.json_text import parse, shown
from sam3_jax.utils.lease import PARTIAL, is_abandoned
from sam3_jax.utils.os_errors import reason

CONFIG_FILE = "config.json"
MAX_NAMES = 20  # field names in an error message


def run_values(config: dict[str, Any], start: str) -> dict[str, Any]:
  """The content of OUT/config.json.

  Args:
    config: from `TrainConfig.to_dict`.
    start: from `Start.checksum`.
  """
  return {"format_version": FORMAT_VERSION, "config": config, "start": start}


def check_output(out: Path, values: dict[str, Any], data: RunData) -> None:
  """Raises ValueError unless `out` is new, empty or of the same run with the same data."""
  file = out / CONFIG_FILE
  if not file.exists():
    if out.exists() and not all(_before_config(path.name) for path in out.iterdir()):
      raise ValueError(f"{out} is not empty and contains no training run; give another --out.")
    return
  _check_config(out, file, values)
  # The first process decides: copies of the images on other hosts may have other modification
  # times.
  fault = data.fault(out) if is_writer() else ""
  if jax.process_count() > 1 and multihost_utils.process_allgather(np.array(bool(fault))).any():
    fault = fault or f"{out} has a run that was started with other data; see the first process."
  if fault:
    raise ValueError(fault)


def _check_config(out: Path, file: Path, values: dict[str, Any]) -> None:
  try:
    before = parse(file.read_bytes(), "it")
    before = {**before, "config": with_defaults(before["config"])}
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{file} is damaged ({error}); give another --out.") from error
  if (version := before.get("format_version", 1)) != FORMAT_VERSION:
    names = renames(before["config"])
    raise ValueError(
      f"{out} has a run of format version {shown(version)}, but this release resumes version "
      f"{FORMAT_VERSION}; give another --out"
      + (f", with the fields renamed: {names}." if names else ".")
    )
  if names := differences(before, values):
    labels = {"start": "the starting checkpoint"}
    listed = [labels.get(name, name.removeprefix("config.")) for name in names[:MAX_NAMES]]
    raise ValueError(
      f"{out} has a run that differs in {', '.join(listed)}; resume with its own configuration "
      f"({file}), or give another --out."
    )


def _before_config(name: str) -> bool:
  """Whether a process may write this file before OUT/config.json, and leave it if killed."""
  draft = name.endswith(PARTIAL) and name.startswith((f".{CONFIG_FILE}.", f".{RUN_DATA_FILE}."))
  return name == RUN_DATA_FILE or draft


def write_config(out: Path, values: dict[str, Any], data: RunData) -> None:
  """Makes the directory, and writes the configuration and the identities of the data."""
  try:
    out.mkdir(parents=True, exist_ok=True)
    if data != RunData():
      data.write(out)
    else:  # of another run, which was killed before it wrote its configuration
      (out / RUN_DATA_FILE).unlink(missing_ok=True)
    write_json(out / CONFIG_FILE, values, indent=2)
    for draft in out.glob(f".*{PARTIAL}"):
      if _before_config(draft.name) and is_abandoned(draft):
        draft.unlink(missing_ok=True)
  except OSError as error:
    raise ValueError(f"cannot write to {out}: {reason(error)}.") from error


def is_writer() -> bool:
  """Whether this is the process that writes."""
  return jax.process_index() == 0


def replace_directory(path: Path, write: Callable[[Path], None]) -> None:
  """Writes a directory, or replaces it by two renames; `recover` completes a killed replacement."""
  recover(path)
  if not path.exists():
    write(path)
    return
  new, old = _temporary(path)
  write(new)
  os.rename(path, old)
  os.rename(new, path)
  shutil.rmtree(old, ignore_errors=True)


def recover(path: Path) -> None:
  """Restores a directory if `replace_directory` was killed between its renames, and cleans up."""
  new, old = _temporary(path)
  if old.exists() and not path.exists():
    os.rename(old, path)
  for leftover in (new, old):
    shutil.rmtree(leftover, ignore_errors=True)


def _temporary(path: Path) -> tuple[Path, Path]:
  """Paths of the new directory, and of the one that it replaces."""
  return path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
