"""Opens a checkpoint and checks all that needs no parameter: files, sizes, shapes, checksums."""

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sam3_jax.checkpoint import integrity
from sam3_jax.checkpoint.manifest import check_manifest
from sam3_jax.checkpoint.orbax_items import stored_arrays
from sam3_jax.checkpoint.parameters import VISUAL, expected_shapes
from sam3_jax.checkpoint.writer import FORMAT_VERSION, seal
from sam3_jax.config import Config
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.identity import checkpoint_identity
from sam3_jax.utils.param_tree import compare, raise_faults
from sam3_jax.utils.paths import exists, resolve_path

PARTS = ("config.json", "manifest.json", "params", "tokenizer.model")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".h5", ".ckpt")


@dataclasses.dataclass(frozen=True)
class OpenedCheckpoint:
  """A checkpoint that passed all checks without reading a parameter.

  Attributes:
    path: of the directory.
    info: its metadata; see `bundle.save`.
    manifest: see manifest.py.
    config: sizes of the model.
    tokenizer: bytes of tokenizer.model.
    compared: which checksums were compared.
  """

  path: Path
  info: dict[str, Any]
  manifest: dict[str, Any]
  config: Config
  tokenizer: bytes
  compared: integrity.Comparison

  @property
  def identity(self) -> str:
    """Digest of parameters, configuration and tokenizer; see utils/identity.py."""
    return checkpoint_identity(self.manifest["parameters"], self.config.to_dict(), self.tokenizer)


def open_checkpoint(
  path: str | Path,
  *,
  verify: bool = False,
  tensors: bool = False,
  trust: bool = False,
  progress: Callable[[float], None] | None = None,
) -> OpenedCheckpoint:
  """Opens and checks a checkpoint.

  Args:
    path: as in `bundle.load`.
    verify, tensors, progress: as in `integrity.compare`.
    trust: ignores SHA256SUMS, and compares all tensors with the manifest instead.

  Raises:
    FileNotFoundError, ValueError: as `bundle.load`.
  """
  path = resolve_path(path)
  _check_parts(path)
  own = integrity.read_own(path, trust=trust)
  settings, manifest = own.json(path, "config.json"), own.json(path, "manifest.json")
  info, config, shapes = _parse(path, settings, manifest)
  tokenizer = own.data["tokenizer.model"]
  _check_tokenizer(path, tokenizer)
  for item in manifest["items"]:
    if not re.fullmatch(r"\w+", item):
      raise ValueError(
        f"{path}/manifest.json names an item {item!r:.80}; convert the weights again."
      )
  if trust:
    count = integrity.compare_tensors(path, manifest)
    compared = integrity.Comparison(0, 0, count, (), ())
  else:
    compared = integrity.compare(
      path, own, manifest, verify=verify, tensors=tensors, progress=progress
    )
  _check_arrays(path, manifest, config, shapes)
  return OpenedCheckpoint(path, info, manifest, config, tokenizer, compared)


def _parse(
  path: Path, settings: Mapping[str, Any], manifest: Mapping[str, Any]
) -> tuple[dict[str, Any], Config, dict[str, tuple[int, ...]]]:
  """Metadata, configuration, and the shapes of the parameters."""
  for values in (settings, manifest):
    if (version := values.get("format_version")) != FORMAT_VERSION:
      raise ValueError(
        f"{path} is of format version {version!r:.80}, and this sam3-jax reads version "
        f"{FORMAT_VERSION}; convert the weights again."
      )
  try:
    info, model = dict(settings["info"]), settings["model"]
    shapes = check_manifest(manifest)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"config.json or manifest.json in {path} is damaged ({error!r:.300}); convert the weights "
      "again."
    ) from error
  try:
    return info, Config.from_dict(model), shapes
  except ValueError as error:
    raise ValueError(f"{path / 'config.json'}: {error}") from error


def _check_tokenizer(path: Path, tokenizer: bytes) -> None:
  try:
    Tokenizer(tokenizer)
  except ValueError as error:  # does not name the file
    name = str(path / "tokenizer.model")
    raise ValueError(str(error).replace("the given bytes", name)) from error


def _check_parts(path: Path) -> None:
  """Raises an error that says what the path is, unless it has all parts of a checkpoint."""
  if not exists(path):
    raise FileNotFoundError(f"there is no checkpoint at {path}; `sam3-jax convert` makes one.")
  if not path.is_dir():
    raise ValueError(
      f"{path} is a file, but a checkpoint is a directory; if it holds released weights, convert "
      f"it: `sam3-jax convert {path} OUT`."
    )
  names = {one.name for one in path.iterdir()}
  if not names:
    raise ValueError(f"{path} is an empty directory; `sam3-jax convert` makes a checkpoint.")
  lacking = [name for name in PARTS if name not in names]
  if not lacking:
    return
  if "manifest.json" not in names:
    if weights := sorted(name for name in names if name.endswith(WEIGHTS)):
      raise ValueError(
        f"{path} holds weights in another layout ({weights[0]}), and is not a checkpoint of "
        f"sam3-jax; convert it: `sam3-jax convert {path} OUT`."
      )
    inside = (one / "manifest.json" for one in sorted(path.iterdir()) if one.is_dir())
    if found := next((one for one in inside if one.exists()), None):
      raise ValueError(f"{path} is not a checkpoint, but {found.parent} is; use that.")
  raise ValueError(
    f"{path} is not a checkpoint, or only part of one: it lacks {', '.join(lacking)}. "
    "Convert or copy it again."
  )


def _check_arrays(
  path: Path, manifest: Mapping[str, Any], config: Config, parameters: dict[str, tuple[int, ...]]
) -> None:
  """Raises ValueError unless model, manifest and stored arrays agree in shapes and dtypes."""
  visual = any(name.startswith(f"{VISUAL}/") for name in parameters)
  sealed = manifest.get("fits") == seal(config, parameters)
  faults = [] if sealed else compare(parameters, expected_shapes(config, visual=visual))
  stored: dict[str, Any] = {}
  for item in manifest["items"]:
    stored |= stored_arrays(path / "params" / item)
  faults = faults or compare({name: entry.shape for name, entry in stored.items()}, parameters)
  faults = faults or [
    f"{name} is {entry.dtype}, expected {manifest['parameters'][name]['dtype']}"
    for name, entry in stored.items()
    if str(entry.dtype) != manifest["parameters"][name]["dtype"]
  ]
  raise_faults(faults, f"{path} does not fit the model")
