"""A checkpoint is a folder: what is in it, and how it is written and read.

  config.json       format version, model configuration, what the checkpoint says of itself
  params/ITEM/      Orbax; a large part of the tree (trunk, text) is an item, the others are `rest`;
                    the part `visual`, the head for visual prompts, may be missing
  unread/           Orbax; tensors of the source that nothing reads, under the source's names
  tokenizer.model   SentencePiece
  fingerprint.json  what its programs gave for an image that never changes; may be missing
  manifest.json     each parameter's shape, dtype and checksum, and a seal that they fit the
                    configuration; where the source's tensors went; see manifest.py
  SHA256SUMS        the checksum of every other file, in the format of sha256sum

Orbax restores a wrong shape silently when no sharding is given, and a flipped bit always: hence the
manifest, which is compared with the model and with the stored arrays before anything is restored,
and the checksums; integrity.py says which are compared when. A folder appears under its name only
when it is complete.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from sam3_jax.checkpoint import checksums, fingerprint, integrity
from sam3_jax.checkpoint.fingerprint import Fingerprint
from sam3_jax.checkpoint.manifest import check_manifest, count_by_reason
from sam3_jax.checkpoint.orbax_items import REST, Shardings, restore_item, stored_arrays
from sam3_jax.checkpoint.writer import FORMAT_VERSION, Writer, fit
from sam3_jax.config import Config, LiteTextConfig
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.devices import default_device
from sam3_jax.utils.identity import checkpoint_identity
from sam3_jax.utils.param_tree import compare, flatten, nest, not_finite, raise_faults
from sam3_jax.utils.paths import exists, file_sizes, require_local, resolve_path

DTYPES = ("float32", "bfloat16")
VERIFYING = 0.5  # fraction of loading that comparing all checksums takes, as progress has it
VISUAL = "visual"  # the part that a checkpoint may lack: the head for visual prompts
PARTS = ("config.json", "manifest.json", "params", "tokenizer.model")
WEIGHTS = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin", ".h5", ".ckpt")


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
    identity: digest of parameters, configuration and tokenizer; see `identity.py`.
    config: the model's.
    info: what it says of itself; see `save`.
    tokenizer: the bytes of tokenizer.model.
    dtypes: of the parameters as stored, by path.
    items: the paths of the parameters that are stored together, whole top-level parts of the tree.
    read: an item's parameters as stored, by path, each compared with its checksum.
    unread: likewise, the tensors that nothing reads.
  """

  path: str
  identity: str
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
    identity: digest of parameters, configuration and tokenizer; see `identity.py`.
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
      as complete once its SHA256SUMS is there.
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
    verify: compare every file's checksum first, not those of small files alone.
    progress: is told what is being read, and which fraction of the whole was done before that.

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
  first = VERIFYING if verify else 0.0  # the fraction that comparing the files takes
  told = (lambda fraction: tell("checksums", first * fraction)) if verify else None
  if told:
    told(0.0)
  opened = _open(path, verify=verify, progress=told)
  path, manifest = opened.path, opened.manifest
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
      what = "parameters" if item == REST else item
      tell(what, first + (1 - first) * done / max(1, total))
      restored = restore_item(path / "params" / item, shapes)
      done += sum(array.size for array in jax.tree.leaves(restored))
      params |= restored
    tell("parameters that are not finite", 1.0)
    raise_faults(not_finite(flatten(params)), f"{path} cannot be used")
    return params

  return Bundle(opened.config, nest(shapes), opened.tokenizer, opened.info, opened.identity), read


def open_stored(path: str | Path) -> Stored:
  """Everything but the arrays, which are read part by part; raises as `load` does."""
  opened = _open(path)
  path, manifest = opened.path, opened.manifest

  def read(item: str) -> dict[str, np.ndarray]:
    return integrity.read_compared(path / "params" / item, manifest["parameters"])

  dtypes = {name: entry["dtype"] for name, entry in manifest["parameters"].items()}
  items = {item: tuple(stored_arrays(path / "params" / item)) for item in manifest["items"]}
  return Stored(
    path=str(path),
    identity=opened.identity,
    config=opened.config,
    info=opened.info,
    tokenizer=opened.tokenizer,
    dtypes=dtypes,
    items=items,
    read=read,
    unread=functools.partial(_read_unread, opened),
  )


def load_unread(path: str | Path) -> dict[str, np.ndarray]:
  """The tensors that the source had and nothing reads, by the source's names."""
  return _read_unread(_open(path))


def verify(path: str | Path, *, progress: Callable[[float], None] | None = None) -> None:
  """Reads every file and every stored tensor and compares their checksums.

  Args:
    path: as `load` takes it.
    progress: is told which fraction of the files' bytes was read.

  Raises:
    FileNotFoundError, ValueError: as `load`; the message names the files and tensors that differ.
  """
  _open(path, verify=True, tensors=True, progress=progress)


def add_checksums(path: str | Path) -> list[str]:
  """Writes SHA256SUMS for a checkpoint as it is: one of an earlier version, or one that was edited.

  Every tensor is compared with the manifest first; configuration and tokenizer are taken as they
  are, if they fit the parameters.

  Returns:
    The files whose checksum is new or another, by path.

  Raises:
    FileNotFoundError, ValueError: as `load`; or a tensor differs from its checksum.
    OSError: the folder cannot be written.
  """
  require_local(path, "a checkpoint to add checksums to")
  opened = _open(path, trust=True)
  path, manifest = opened.path, dict(opened.manifest)
  try:
    before = checksums.read(path) or {}
  except ValueError:  # damaged; it is replaced
    before = {}
  manifest.pop("checksums", None)
  manifest["files"] = {item: file_sizes(path / "params" / item) for item in manifest["items"]}
  manifest["unread_files"] = file_sizes(path / "unread")
  manifest["checksums_file"] = checksums.FILE
  shapes = {name: entry["shape"] for name, entry in manifest["parameters"].items()}
  manifest["fits"] = fit(opened.config, shapes)  # which were compared with the model
  if manifest != opened.manifest:
    write_json(path / "manifest.json", manifest, indent=1)
  sums = checksums.write(path)
  return [name for name, digest in sums.items() if before.get(name) != digest]


def inspect(
  path: str | Path,
  *,
  verify: bool = False,
  progress: Callable[[float], None] | None = None,
) -> Summary:
  """Says what a checkpoint holds; raises as `load` does, but reads no parameter unless `verify`
  has all checksums compared, of which `progress` is told as by the function `verify`."""
  opened = _open(path, verify=verify, tensors=verify, progress=progress)
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
    cannot=_cannot(opened.config, visual=VISUAL in parts),
    checks={
      "checksums": _describe_comparison(opened.compared),
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
  from sam3_jax.model.visual import head

  parts = parameter_shapes(config) | ({VISUAL: head.parameter_shapes(config)} if visual else {})
  return {name: leaf.shape for name, leaf in flatten(parts).items()}


@dataclasses.dataclass(frozen=True)
class _Opened:
  """A checkpoint after all checks that need no array; `compared`: what became of its checksums."""

  path: Path
  info: dict[str, Any]
  manifest: dict[str, Any]
  config: Config
  tokenizer: bytes
  compared: integrity.Comparison

  @property
  def identity(self) -> str:
    return checkpoint_identity(self.manifest["parameters"], self.config.to_dict(), self.tokenizer)


def _open(
  path: str | Path,
  *,
  verify: bool = False,
  tensors: bool = False,
  trust: bool = False,
  progress: Callable[[float], None] | None = None,
) -> _Opened:
  """Everything but the arrays. Raises as `load` does.

  Args:
    path: as `load` takes it.
    verify, tensors, progress: as `integrity.compare` takes them.
    trust: ignore SHA256SUMS, and compare all tensors with the manifest instead.
  """
  path = resolve_path(path)
  _check_parts(path)
  own = integrity.read_own(path, trust=trust)
  settings, manifest = own.json(path, "config.json"), own.json(path, "manifest.json")
  for values in (settings, manifest):
    if (version := values.get("format_version")) != FORMAT_VERSION:
      raise ValueError(
        f"{path} is of format version {version!r:.80}, this is sam3-jax for version "
        f"{FORMAT_VERSION}; convert the weights again."
      )
  try:
    info, model = dict(settings["info"]), settings["model"]
    parameters = check_manifest(manifest)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise ValueError(
      f"config.json or manifest.json in {path} is damaged ({error!r:.300}); convert the weights "
      "again."
    ) from error
  try:
    config = Config.from_dict(model)
  except ValueError as error:
    raise ValueError(f"{path / 'config.json'}: {error}") from error
  tokenizer = own.data["tokenizer.model"]
  try:
    Tokenizer(tokenizer)
  except ValueError as error:  # which does not know where the bytes are from
    name = str(path / "tokenizer.model")
    raise ValueError(str(error).replace("the given bytes", name)) from error
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
  _check_arrays(path, manifest, config, parameters)
  return _Opened(path, info, manifest, config, tokenizer, compared)


def _check_parts(path: Path) -> None:
  """Says what is at a path, unless it has all parts of a checkpoint."""
  if not exists(path):
    raise FileNotFoundError(f"there is no checkpoint at {path}; `sam3-jax convert` makes one.")
  if not path.is_dir():
    raise ValueError(
      f"{path} is a file, but a checkpoint is a folder; if it holds released weights, convert it: "
      f"`sam3-jax convert {path} OUT`."
    )
  names = {one.name for one in path.iterdir()}
  if not names:
    raise ValueError(f"{path} is an empty folder; `sam3-jax convert` makes a checkpoint.")
  lacking = [name for name in PARTS if name not in names]
  if not lacking:
    return
  if "manifest.json" not in names:
    if weights := sorted(name for name in names if name.endswith(WEIGHTS)):
      raise ValueError(
        f"{path} holds weights in another layout ({weights[0]}), and is no checkpoint of sam3-jax; "
        f"convert it: `sam3-jax convert {path} OUT`."
      )
    inside = (one / "manifest.json" for one in sorted(path.iterdir()) if one.is_dir())
    if found := next((one for one in inside if one.exists()), None):
      raise ValueError(f"{path} is no checkpoint, but {found.parent} is one; give that.")
  raise ValueError(
    f"{path} is no checkpoint or only part of one: it lacks {', '.join(lacking)}. "
    "Convert or copy it again."
  )


def _check_arrays(
  path: Path, manifest: Mapping[str, Any], config: Config, parameters: dict[str, tuple[int, ...]]
) -> None:
  """Raises ValueError unless model, manifest and stored arrays agree in shapes and dtypes."""
  visual = any(name.startswith(f"{VISUAL}/") for name in parameters)
  sealed = manifest.get("fits") == fit(config, parameters)
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


def _read_unread(opened: _Opened) -> dict[str, np.ndarray]:
  entries = opened.manifest["unread"]
  return integrity.read_compared(opened.path / "unread", entries) if entries else {}


def _describe_comparison(compared: integrity.Comparison) -> str:
  """What became of the checksums, in words."""
  clauses = []
  if compared.compared == compared.files:
    if compared.files:
      clauses.append(f"those of all {compared.files:,} files are right")
  else:
    clauses.append(f"those of {compared.compared:,} of {compared.files:,} files are right")
    clauses.append("--verify compares the others")
  if compared.tensors:
    clauses.append(f"those of {compared.tensors:,} tensors are right")
  if compared.missing:
    clauses.append(f"there are none of {', '.join(compared.missing)}; {integrity.ADD} adds them")
  if compared.rewritten:
    clauses.append(f"{', '.join(compared.rewritten)} was written again by Orbax")
  return "; ".join(clauses)


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
