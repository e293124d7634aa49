"""A checkpoint is a folder: what is in it, and how it is written and read.

  config.json       format version, model configuration, what the checkpoint says of itself
  params/ITEM/      Orbax; a large part of the tree (trunk, text) is an item, the others are `rest`;
                    the part `visual`, the head for visual prompts, may be missing
  unread/           Orbax; tensors of the source that nothing reads, under the source's names
  tokenizer.model   SentencePiece
  fingerprint.json  what its programs gave for a picture that never changes; may be missing
  manifest.json     each parameter's shape, dtype and checksum, and a seal that they fit the
                    configuration; where the source's tensors went

Orbax restores a wrong shape silently when no sharding is given, and a flipped bit always: hence the
manifest, which is compared with the model and with what is stored before anything is restored. A
folder appears under its name only when it is complete.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sam3_jax import fingerprint
from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.devices import default_device
from sam3_jax.fingerprint import Fingerprint
from sam3_jax.identity import checkpoint_identity
from sam3_jax.items import Shardings, read_item, restore_item, stored_arrays
from sam3_jax.places import exists, file_sizes, place
from sam3_jax.tokenizer import Tokenizer
from sam3_jax.trees import compare, flatten, nest, not_finite, raise_faults
from sam3_jax.writer import (
  FORMAT_VERSION,
  REST,
  Writer,
  compare_checksums,
  find_damage,
  find_differing,
  fit,
  read_compared,
)

DTYPES = ("float32", "bfloat16")
VISUAL = "visual"  # the part that a checkpoint may lack: the head for visual prompts
INDEX = 2**20  # bytes below which a file may be an index of Orbax's, and is compared before use


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A loaded checkpoint.

  Attributes:
    config: the model's.
    params: the tree that the Flax modules take as `{"params": params}`; its part `visual` is the
      parameters of `visual.head.VisualHead`, if the checkpoint has one.
    tokenizer: the bytes of tokenizer.model.
    info: what it says of itself: name, source, licence, whether it is trained; see `save`.
    identity: digest of parameters, configuration and tokenizer; see `identity.py`.
  """

  config: Config
  params: dict[str, Any]
  tokenizer: bytes
  info: dict[str, Any]
  identity: str


@dataclasses.dataclass(frozen=True)
class Stored:
  """An opened checkpoint, for programs that must not hold all of it in memory.

  Attributes:
    path: of the folder.
    config: the model's.
    info: what it says of itself; see `save`.
    tokenizer: the bytes of tokenizer.model.
    dtypes: of the parameters as stored, by path.
    items: the paths of the parameters that are stored together, whole top-level parts of the tree.
    read: an item's parameters as stored, by path, each compared with its checksum.
    unread: likewise, the tensors that nothing reads.
  """

  path: str
  config: Config
  info: dict[str, Any]
  tokenizer: bytes
  dtypes: dict[str, str]
  items: dict[str, tuple[str, ...]]
  read: Callable[[str], dict[str, np.ndarray]]
  unread: Callable[[], dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Summary:
  """What `inspect` says.

  Attributes:
    path: of the folder.
    config: the model's.
    info: what it says of itself; see `save`.
    parts: number of parameters of each top-level part.
    parameters: their sum.
    dtype: as stored, `mixed` if there are several.
    stored_bytes: of all files.
    memory: bytes that the parameters take, by the dtype that they are loaded in.
    source_tensors: for a converted checkpoint, tensors and parameters of the source that were read,
      kept unread and dropped: `{"read": {"tensors": .., "parameters": ..}, ..}`; otherwise empty.
    unread: reason, tensors and parameters of what the bundle keeps but the model does not read.
    dropped: likewise, of what the source had and the bundle has not.
    cannot: what it cannot be used for, and why, a line each.
    checks: what became of `checksums` and of the `fingerprint`, in words.
    fingerprint: what was kept of a run of the model, if it was run; see fingerprint.py.
  """

  path: str
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
    """Plain values, ready for JSON."""
    return dataclasses.asdict(self)


def save(
  path: str | Path,
  params: Mapping[str, Any],
  config: Config,
  tokenizer: bytes,
  *,
  info: Mapping[str, Any] | None = None,
  unread: Mapping[str, np.ndarray] | None = None,
) -> None:
  """Writes a checkpoint; it appears at `path` when it is complete.

  Args:
    path: a folder that does not exist yet, or is empty; may be `gs://bucket/path`, where it counts
      as complete once its manifest.json is there.
    params: NumPy or JAX arrays, float32 or bfloat16; each process must hold all of them.
    config: the model's.
    tokenizer: the bytes of a SentencePiece model.
    info: what it should say of itself, plain values: `name`, `source` (what it was made from),
      `licence` (of the weights), `trained` (False for random parameters), `origin` (of what was
      converted: `files` with `bytes` and `sha256` by name, and the `repository` on the hub).
    unread: tensors to keep beside the parameters, by name.

  Raises:
    ValueError: the parameters do not fit the configuration or are not finite, `tokenizer` is no
      CLIP vocabulary, or `path` is not empty or cannot be written.
  """
  flat = flatten(params)
  wanted = expected_shapes(config, visual=VISUAL in params)
  faults = compare({name: array.shape for name, array in flat.items()}, wanted)
  faults += [
    f"{name} is {array.dtype}; expected one of {', '.join(DTYPES)}"
    for name, array in flat.items()
    if str(array.dtype) not in DTYPES
  ]
  raise_faults(faults or not_finite(flat), "these parameters cannot be saved")
  Tokenizer(tokenizer)
  with Writer(path) as writer:
    for part, tree in params.items():
      writer.add(part, jax.tree.map(np.asarray, tree))
    reasons = dict.fromkeys(unread or {}, "kept from the source")
    writer.finish(config, tokenizer, info=info or {}, unread=unread, unread_reasons=reasons)


def load(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  sharding: Shardings | None = None,
  verify: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> Bundle:
  """Reads a checkpoint, after checking that it is complete and fits the model.

  Args:
    path: the folder, of this machine or `gs://bucket/path` (needs the extra `gcs`).
    dtype: of the parameters, one of `DTYPES`, whatever they are stored in; None leaves them.
    sharding: of the parameters; None puts them on `devices.default_device()`.
    verify: compare every tensor's checksum first; see the function `verify`.
    progress: is told what is being read, and which fraction of all parameters was read before that.

  Raises:
    FileNotFoundError: there is nothing at `path`.
    ValueError: it is not a complete checkpoint of this format version, or a parameter is missing,
      unknown, of the wrong shape or not finite; or `dtype` is another.
  """
  bundle, read = begin(path, dtype=dtype, sharding=sharding, verify=verify, progress=progress)
  return dataclasses.replace(bundle, params=read())


def begin(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  sharding: Shardings | None = None,
  verify: bool = False,
  progress: Callable[[str, float], None] | None = None,
) -> tuple[Bundle, Callable[[], dict[str, Any]]]:
  """What `load` knows before it reads: a bundle whose parameters are `jax.ShapeDtypeStruct`s, and
  what reads them. Takes and raises what `load` does."""
  if dtype is not None:
    check_dtype(dtype)
  tell = progress or (lambda what, fraction: None)
  path, info, manifest, config = _open_verified(path) if verify else _open(path)
  given = sharding or jax.sharding.SingleDeviceSharding(default_device())

  def wanted(name: str, shape: tuple[int, ...], stored: DTypeLike) -> jax.ShapeDtypeStruct:
    placed = given(name, shape) if callable(given) else given
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype or stored), sharding=placed)

  shapes = {
    name: wanted(name, tuple(entry["shape"]), entry["dtype"])
    for name, entry in manifest["parameters"].items()
  }

  def read() -> dict[str, Any]:
    params: dict[str, Any] = {}
    total, done = sum(x.size for x in shapes.values()), 0
    for item in manifest["items"]:
      tell("parameters" if item == REST else item, done / total)
      restored = restore_item(path / "params" / item, shapes)
      done += sum(array.size for array in jax.tree.leaves(restored))
      params |= restored
    tell("parameters that are not finite", 1.0)
    raise_faults(not_finite(flatten(params)), f"{path} cannot be used")
    return params

  tokenizer = (path / "tokenizer.model").read_bytes()
  same = checkpoint_identity(manifest["parameters"], config.to_dict(), tokenizer)
  return Bundle(config, nest(shapes), tokenizer, info, same), read


def open_stored(path: str | Path) -> Stored:
  """Everything but the arrays, which are read part by part; raises as `load` does."""
  path, info, manifest, config = _open(path)

  def read(item: str) -> dict[str, np.ndarray]:
    return read_compared(path / "params" / item, manifest["parameters"])

  def unread() -> dict[str, np.ndarray]:
    return read_compared(path / "unread", manifest["unread"]) if manifest["unread"] else {}

  dtypes = {name: entry["dtype"] for name, entry in manifest["parameters"].items()}
  model = (path / "tokenizer.model").read_bytes()
  items = {item: tuple(stored_arrays(path / "params" / item)) for item in manifest["items"]}
  return Stored(str(path), config, info, model, dtypes, items, read, unread)


def load_unread(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors that the source had and nothing reads, by the source's names."""
  path, _, manifest, _ = _open(path)
  return read_item(path / "unread") if manifest["unread"] else {}


def verify(path: str | Path) -> None:
  """Reads every stored tensor and compares its checksum; ValueError names those that differ."""
  _open_verified(path)


def inspect(path: str | Path, *, verify: bool = False) -> Summary:
  """Says what a checkpoint holds; raises as `load` does, but reads no parameter unless `verify`
  has all checksums compared."""
  path, info, manifest, config = (_open_verified if verify else _open)(path)
  parameters = manifest["parameters"]
  parts: dict[str, int] = {}
  for name, entry in parameters.items():
    part = name.partition("/")[0]
    parts[part] = parts.get(part, 0) + math.prod(entry["shape"])
  dtypes = {entry["dtype"] for entry in parameters.values()}
  kept, tensors = fingerprint.read(path), len(parameters) + len(manifest["unread"])
  return Summary(
    path=str(path),
    config=config,
    info=info,
    parts=parts,
    parameters=sum(parts.values()),
    dtype=dtypes.pop() if len(dtypes) == 1 else "mixed",
    stored_bytes=sum(file_sizes(path).values()),
    memory={dtype: sum(parts.values()) * jnp.dtype(dtype).itemsize for dtype in DTYPES},
    source_tensors=manifest["source_tensors"],
    unread=_by_reason(manifest["unread"]),
    dropped=_by_reason(manifest["dropped"]),
    cannot=_cannot(config, visual=VISUAL in parts),
    checks={
      "checksums": f"those of all {tensors:,} tensors are right" if verify else "not compared",
      "fingerprint": "not compared" if kept else "none",
    },
    fingerprint=kept,
  )


def check_dtype(dtype: DTypeLike) -> np.dtype:
  """The dtype of parameters or computation; ValueError unless it is one of `DTYPES`."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = None
  if found is None or found.name not in DTYPES:
    raise ValueError(f"dtype must be {' or '.join(DTYPES)}; got {dtype!r}.")
  return found


@functools.lru_cache
def expected_shapes(config: Config, *, visual: bool = False) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter of the model, by path, as its modules make them; with `visual`,
  the head for visual prompts too, which a checkpoint may lack."""
  from sam3_jax.model.sam3 import parameter_shapes  # a second of imports and tracing
  from sam3_jax.visual import head

  parts = parameter_shapes(config) | ({VISUAL: head.parameter_shapes(config)} if visual else {})
  return {name: leaf.shape for name, leaf in flatten(parts).items()}


def _open_verified(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any], Config]:
  """Likewise, after comparing all checksums; a file that keeps all from being read is named."""
  folder = place(path)
  try:
    path, info, manifest, config = _open(path)
  except ValueError:
    try:
      manifest = _read_json(folder / "manifest.json")
      _check_manifest(manifest)
      faults = find_damage(folder, manifest)
    except (KeyError, TypeError, ValueError, AttributeError):
      faults = []  # the manifest itself is at fault
    raise_faults(faults, f"{folder} is damaged")
    raise
  compare_checksums(path, manifest)
  return path, info, manifest, config


def _open(path: str | Path) -> tuple[Path, dict[str, Any], dict[str, Any], Config]:
  """Everything but the arrays, after all checks that need none."""
  path = place(path)
  if not exists(path):
    raise FileNotFoundError(f"there is no checkpoint at {path}; `sam3-jax convert` makes one.")
  if not path.is_dir():
    raise ValueError(f"{path} is a file, but a checkpoint is a folder; convert it first.")
  if not any(path.iterdir()):
    raise ValueError(f"{path} is an empty folder; `sam3-jax convert` makes a checkpoint.")
  lacking = [
    name
    for name in ("config.json", "manifest.json", "params", "tokenizer.model")
    if not (path / name).exists()
  ]
  if lacking:
    raise ValueError(
      f"{path} is no checkpoint or only part of one: it lacks {', '.join(lacking)}. "
      "Convert or copy it again."
    )
  settings, manifest = _read_json(path / "config.json"), _read_json(path / "manifest.json")
  for values in (settings, manifest):
    if (version := values.get("format_version")) != FORMAT_VERSION:
      raise ValueError(
        f"{path} is of format version {version!r}, this is sam3-jax for version {FORMAT_VERSION}; "
        "convert the weights again."
      )
  try:
    info, model = dict(settings["info"]), settings["model"]
    parameters = _check_manifest(manifest)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"config.json or manifest.json in {path} is damaged ({error!r}); convert the weights again."
    ) from error
  try:
    config = Config.from_dict(model)
  except ValueError as error:
    raise ValueError(f"{path / 'config.json'}: {error}") from error
  Tokenizer(path / "tokenizer.model")
  visual = any(name.startswith(f"{VISUAL}/") for name in parameters)
  sealed = manifest.get("fits") == fit(config, parameters)
  faults = [] if sealed else compare(parameters, expected_shapes(config, visual=visual))
  stored: dict[str, Any] = {}
  for item in manifest["items"]:
    if not re.fullmatch(r"\w+", item):
      raise ValueError(f"{path}/manifest.json names an item {item!r}; convert the weights again.")
    sums = manifest.get("checksums", {}).get(item, {})
    _check_files(path / "params" / item, manifest["files"].get(item, {}), sums)
    stored |= stored_arrays(path / "params" / item)
  faults = faults or compare({name: entry.shape for name, entry in stored.items()}, parameters)
  faults = faults or [
    f"{name} is {entry.dtype}, expected {manifest['parameters'][name].get('dtype')}"
    for name, entry in stored.items()
    if str(entry.dtype) != manifest["parameters"][name].get("dtype")
  ]
  raise_faults(faults, f"{path} does not fit the model")
  return path, info, manifest, config


def _cannot(config: Config, *, visual: bool) -> list[str]:
  lines = []
  if not visual:
    lines.append("visual prompts: it has no head for points, boxes and masks")
  if not config.concept_points:
    lines.append("concept points: its geometry encoder takes boxes alone")
  if config.trunk.stem:
    lines.append("convert --to: no other program has its convolutional stem")
  elif isinstance(config.text, LiteTextConfig):
    target = "" if visual else " meta"
    lines.append(f"convert --to{target}: no program of that layout has its text encoder")
  return lines


def _check_manifest(manifest: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The parameters' shapes. Raises what Python does when a manifest is not as `Writer` makes it."""
  for counts in [*manifest["files"].values(), *manifest["source_tensors"].values()]:
    for name, count in counts.items():
      if type(count) is not int:
        raise TypeError(f"{name}: {count!r}")
  for sums in manifest.get("checksums", {}).values():
    for name, checksum in sums.items():
      if type(checksum) is not str:
        raise TypeError(f"{name}: {checksum!r}")
  _by_reason(manifest["unread"])
  _by_reason(manifest["dropped"])
  for item in manifest["items"]:
    if type(item) is not str:
      raise TypeError(f"item {item!r}")
  return {name: tuple(entry["shape"]) for name, entry in manifest["parameters"].items()}


def _check_files(folder: Path, wanted: Mapping[str, int], sums: Mapping[str, str]) -> None:
  """Finds what was not copied to its end, and damage to an index: Orbax would meet either halfway
  through, and leave threads at work that print a traceback each.

  An item that Orbax has written again has files of other names, and is left to the other checks.
  """
  found = file_sizes(folder)
  if found.keys() <= wanted.keys():
    faults = [f"{name} is missing" for name in wanted if name not in found]
    faults += [
      f"{name} has {size:,} bytes, expected {wanted[name]:,}"
      for name, size in found.items()
      if size != wanted[name]
    ]
    raise_faults(faults, f"{folder} is only part of what was written")
    small = {name: sums[name] for name, size in found.items() if size < INDEX and name in sums}
    raise_faults(find_differing(folder, small), f"{folder} is damaged")


def _by_reason(entries: Mapping[str, Any]) -> dict[str, dict[str, int]]:
  reasons: dict[str, dict[str, int]] = {}
  for entry in entries.values():
    sums = reasons.setdefault(entry["reason"], {"tensors": 0, "parameters": 0})
    sums["tensors"] += 1
    sums["parameters"] += math.prod(entry["shape"])
  return reasons


def _read_json(path: Path) -> dict[str, Any]:
  try:
    values = json.loads(path.read_bytes())
  except (OSError, ValueError) as error:
    raise ValueError(
      f"{path} is not readable JSON ({error}); convert the weights again."
    ) from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} must hold an object; convert the weights again.")
  return values
