"""Checks a bundle's manifest.json.

  format_version   of the bundle
  items            names of the Orbax items in params/
  parameters       shape, dtype and sha256 (of the little-endian bytes) of each, by path
  fits             a digest that marks them as compared with the model, see `writer.seal`
  unread           likewise, of the tensors in unread/, with the reason
  dropped          shape, dtype and reason of the source's tensors that are not kept
  source_tensors   numbers of the source's tensors and parameters: read, kept unread, dropped
  files            bytes of each file of an item, by item and path
  unread_files     bytes of each file in unread/
  checksums_file   SHA256SUMS, which has the checksums of all files

Earlier versions had `checksums`, of the files in params/ only, in place of the last two.
"""

import math
import re
import reprlib
from collections.abc import Mapping
from typing import Any

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_SIZE = 2**40  # elements along an axis


def check_manifest(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The shapes of the parameters, by path.

  Raises:
    KeyError, TypeError, ValueError, AttributeError: `Writer` would not write this manifest.
  """
  unread_files = manifest.get("unread_files", {})
  for counts in (*manifest["files"].values(), *manifest["source_tensors"].values(), unread_files):
    _check_values(counts, int)
  for sums in manifest.get("checksums", {}).values():
    _check_values(sums, str)
  for key in ("fits", "checksums_file"):
    if key in manifest and type(manifest[key]) is not str:
      raise TypeError(f"{key}: {reprlib.repr(manifest[key])}")
  for key in ("parameters", "unread", "dropped"):
    for name, entry in manifest[key].items():
      _check_entry(name, entry, stored=key != "dropped", reason=key != "parameters")
  for item in manifest["items"]:
    if type(item) is not str:
      raise TypeError(f"item {reprlib.repr(item)}")
  return {name: tuple(entry["shape"]) for name, entry in manifest["parameters"].items()}


def count_by_reason(entries: Mapping[str, Any]) -> dict[str, dict[str, int]]:
  """Numbers of tensors and parameters for each reason in `unread` or `dropped`."""
  reasons: dict[str, dict[str, int]] = {}
  for entry in entries.values():
    sums = reasons.setdefault(entry["reason"], {"tensors": 0, "parameters": 0})
    sums["tensors"] += 1
    sums["parameters"] += math.prod(entry["shape"])
  return reasons


def _check_values(values: Mapping[str, Any], kind: type) -> None:
  for name, value in values.items():
    if type(value) is not kind:
      raise TypeError(f"{name:.100}: {reprlib.repr(value)}")


def _check_entry(name: str, entry: Mapping[str, Any], *, stored: bool, reason: bool) -> None:
  shape = entry["shape"]
  if type(shape) is not list or any(type(n) is not int or not 0 <= n < _MAX_SIZE for n in shape):
    raise TypeError(f"{name:.100} has the shape {reprlib.repr(shape)}")
  texts = ["dtype"] if stored else []
  for key in [*texts, *(["reason"] if reason else [])]:
    if type(entry[key]) is not str:
      raise TypeError(f"{name:.100} has the {key} {reprlib.repr(entry[key])}")
  if stored and not (type(entry["sha256"]) is str and _SHA256.fullmatch(entry["sha256"])):
    raise ValueError(f"{name:.100} has the sha256 {reprlib.repr(entry['sha256'])}")
