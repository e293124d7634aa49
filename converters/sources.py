"""Finds the weight files of a path and opens them.

A directory may be a snapshot of a release, a KerasHub preset, a PEFT adapter, or hold a single file
of weights. The kind of a file is detected by its first bytes, not by its name.
"""

import re
from pathlib import Path

from .identify import describe_content
from .readers.hdf5 import INDEX as KERAS_INDEX
from .readers.hdf5 import open_hdf5
from .readers.safetensors import INDEX, TORCH_INDEX, open_safetensors, open_shards, shards_in
from .readers.torch_files import open_torch
from .source import Source

ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
OTHERS = (
  "sam3.pt",
  "pytorch_model.bin",
  TORCH_INDEX,
  "pytorch_model_fsdp.bin",
  "model.weights.h5",
  KERAS_INDEX,
  *ADAPTERS,
)
MAX_SHARDS = 1000
_FIRST_SHARD = ("00000", "00001")  # shards count from 0 or 1
_SUFFIXES = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.h5", "*.ckpt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
# Files that trainers write beside a model.
_OF_TRAINING = re.compile(
  r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|sampler|dataloader"
  r"|.*optim_states|custom_checkpoint).*"
)


def find_weights(source: Path) -> Path:
  """Returns the file to open: `source` itself, or the weights in that directory.

  For shards it is their index, or the first shard if there is no index.

  Raises:
    FileNotFoundError: `source` does not exist.
    ValueError: it is a directory without weights, or with several files of them.
  """
  if not source.exists():
    raise FileNotFoundError(_not_found(source))
  if not source.is_dir():
    return source
  if (source / "manifest.json").exists() and (source / "params").is_dir():
    raise ValueError(
      f"{source} is a checkpoint of sam3-jax already; it needs no conversion. To write it in "
      "another layout, use --to huggingface or --to meta."
    )
  names = ("model.safetensors", INDEX, *OTHERS)
  known = [source / name for name in names if (source / name).is_file()]
  if known:
    return known[0]
  found = [path for suffix in _SUFFIXES for path in sorted(source.glob(suffix))]
  found = [path for path in found if not _OF_TRAINING.fullmatch(path.name)]
  _refuse_distributed(source)
  first = [path for path in found if _is_first(path)]
  if not first and found:
    shards_of(found[0])  # raises an error that names the missing shard
  if not first:
    raise ValueError(_no_weights(source, names))
  if len(first) > 1:
    names = ", ".join(path.name for path in first[:3])
    raise ValueError(f"{source} holds {len(first)} files of weights ({names}); name one of them.")
  return first[0]


def _is_first(path: Path) -> bool:
  """Whether a file is the first of its shards, or not sharded."""
  shard = _SHARD.fullmatch(path.name)
  return shard is None or shard[2] in _FIRST_SHARD


def shards_of(path: Path) -> list[Path]:
  """All shards of a checkpoint without an index, in order; or the file itself.

  Raises:
    FileNotFoundError: shards are missing.
  """
  if not (match := _SHARD.fullmatch(path.name)):
    return [path]
  stem, _, count, suffix = match.groups()
  begin = 0 if (path.parent / f"{stem}-00000-of-{count}{suffix}").is_file() else 1
  if int(count) > MAX_SHARDS:
    raise ValueError(
      f"{path} claims to be one of {int(count):,} shards; at most {MAX_SHARDS:,} are supported."
    )
  shards = [
    path.with_name(f"{stem}-{number + begin:05}-of-{count}{suffix}") for number in range(int(count))
  ]
  if missing := [shard.name for shard in shards if not shard.is_file()]:
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    raise FileNotFoundError(
      f"{path.parent} has {len(shards) - len(missing)} of the {len(shards)} shards of {stem}; "
      f"{', '.join(missing[:3])}{more} {'is' if len(missing) == 1 else 'are'} missing: download or "
      "copy what is missing."
    )
  return shards


def files_of(weights: Path) -> list[Path]:
  """All files that `open_weights` reads for a path."""
  if weights.suffix == ".json":
    return sorted({weights, *(weights.parent / name for name in shards_in(weights))})
  return shards_of(weights)


def open_weights(path: Path) -> dict[str, Source]:
  """Opens a file, or all its shards; returns the tensors by name.

  Raises:
    FileNotFoundError: a shard is missing.
    ValueError: a file is truncated, damaged, hostile or of an unknown kind.
  """
  if path.name.endswith(KERAS_INDEX):
    return open_hdf5(path)
  if path.name == TORCH_INDEX or path.suffix == ".json":
    return open_shards(path, _open_file)
  sources: dict[str, Source] = {}
  for shard in shards_of(path):
    found = _open_file(shard)
    if twice := found.keys() & sources.keys():
      raise ValueError(f"{min(twice)} is in {shard} and in another shard; download both again.")
    sources |= found
  return sources


def _open_file(path: Path) -> dict[str, Source]:
  with path.open("rb") as file:
    start = file.read(1000)
  if start[8:9] == b"{" and not any(start[4:8]):  # after the length of a safetensors header
    return open_safetensors(path)
  if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # a zip archive, or a bare pickle
    return open_torch(path)
  if start[:8] == b"\x89HDF\r\n\x1a\n":
    return open_hdf5(path)
  raise ValueError(
    f"{path} is not a safetensors, PyTorch or Keras file: {describe_content(start)}."
  )


def _not_found(source: Path) -> str:
  """The message for a path that does not exist but may be the name of something else."""
  from sam3_jax.checkpoint.local import find_local

  scheme, *rest = source.parts or ("",)
  if scheme in ("http:", "https:", "hf:"):
    hub = rest[:1] == ["huggingface.co"]
    name = "/".join(rest[1:3] if hub else rest)
    known = hub or scheme == "hf:"
    return (
      f"{scheme}//{'/'.join(rest)} is not a path; run `sam3-jax convert "
      f"hf://{name if known else 'facebook/sam3'} OUT`, or download the file and give its path."
    )
  try:
    checkpoint = find_local(source)
  except (FileNotFoundError, ValueError):
    return (
      f"{source} does not exist; give model.safetensors or sam3.pt of facebook/sam3, or the "
      "directory of either."
    )
  return (
    f"{source} is the name of a checkpoint of sam3-jax ({checkpoint}): it needs no conversion. To "
    "write it in another layout, use --to huggingface or --to meta."
  )


def _refuse_distributed(directory: Path) -> None:
  """Refuses checkpoints with split tensors, which only their own tools can merge."""
  if next(directory.glob("*.distcp"), None) or next(directory.glob("*/*.distcp"), None):
    raise ValueError(
      f"{directory} is a distributed checkpoint of PyTorch (.distcp), with split tensors; merge "
      "it first: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
      f"{directory} model.pt`, or `accelerate merge-weights {directory} OUT`, then convert that."
    )
  states = [*directory.glob("*zero_pp_rank_*"), *directory.glob("*/*zero_pp_rank_*")]
  if states or (directory / "zero_to_fp32.py").is_file():
    raise ValueError(
      f"{directory} is a checkpoint of DeepSpeed, with split parameters; merge it "
      f"first: `python {directory / 'zero_to_fp32.py'} {directory} OUT`, then convert OUT."
    )


def _no_weights(source: Path, names: tuple[str, ...]) -> str:
  """The message for a directory without weights."""
  inside = sorted(path for path in source.iterdir() if path.is_dir())
  if below := [path for path in inside if any(next(path.glob(s), None) for s in _SUFFIXES)]:
    listed = ", ".join(path.name for path in below[:3])
    return (
      f"{source} itself holds no weights, but its subdirectories do ({listed}); give one of them."
    )
  return (
    f"{source} holds no {', '.join(names[:5])} and no other file of weights; download those of "
    "facebook/sam3 into it."
  )
