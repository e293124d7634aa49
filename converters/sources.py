"""What a path holds: which files have the weights, and how they are opened.

A folder may be a snapshot of a release, a KerasHub preset, a PEFT adapter, or hold a single file of
weights. Kinds of files are told by how they begin, not by their names.
"""

import re
from pathlib import Path

from .identify import describe_content
from .readers.hdf5 import INDEX as KERAS_INDEX
from .readers.hdf5 import open_hdf5
from .readers.safetensors import INDEX, TORCH_INDEX, open_safetensors, open_shards, shards_in
from .readers.torch_files import open_torch
from .rules import Source

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
_SUFFIXES = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.h5", "*.ckpt")
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")
# What trainers write beside a model.
_OF_TRAINING = re.compile(
  r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|sampler|dataloader"
  r"|.*optim_states|custom_checkpoint).*"
)


def find_weights(source: Path) -> Path:
  """The file to open: `source` itself, or the one in that folder; of shards the index, or the first
  where there is none.

  Raises:
    FileNotFoundError: there is nothing at `source`.
    ValueError: it is a folder without weights, or with several files of them.
  """
  if not source.exists():
    raise FileNotFoundError(_nothing_at(source))
  if not source.is_dir():
    return source
  if (source / "manifest.json").exists() and (source / "params").is_dir():
    raise ValueError(
      f"{source} is a checkpoint of sam3-jax already; it needs no conversion. To write it in "
      "another layout, say --to huggingface or --to meta."
    )
  names = ("model.safetensors", INDEX, *OTHERS)
  known = [source / name for name in names if (source / name).is_file()]
  if known:
    return known[0]
  found = [path for suffix in _SUFFIXES for path in sorted(source.glob(suffix))]
  found = [path for path in found if not _OF_TRAINING.fullmatch(path.name)]
  _refuse_distributed(source)
  first = [path for path in found if not (shard := _SHARD.fullmatch(path.name)) or shard[2] in _ONE]
  if not first and found:
    shards_of(found[0])  # says which is missing
  if not first:
    raise ValueError(_no_weights(source, names))
  if len(first) > 1:
    names = ", ".join(path.name for path in first[:3])
    raise ValueError(f"{source} holds {len(first)} files of weights ({names}); name one of them.")
  return first[0]


_ONE = ("00000", "00001")  # the number of a first shard


def shards_of(path: Path) -> list[Path]:
  """All shards of a checkpoint without an index, by the numbers in their names; else the file.

  Raises:
    FileNotFoundError: some are not there.
  """
  if not (match := _SHARD.fullmatch(path.name)):
    return [path]
  stem, _, count, suffix = match.groups()
  begin = 0 if (path.parent / f"{stem}-00000-of-{count}{suffix}").is_file() else 1
  if int(count) > MAX_SHARDS:
    raise ValueError(f"{path} says that it is one of {int(count):,} shards; that cannot be.")
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


MAX_SHARDS = 1000


def files_of(weights: Path) -> list[Path]:
  """All files that `open_weights` reads for a path."""
  if weights.suffix == ".json":
    return sorted({weights, *(weights.parent / name for name in shards_in(weights))})
  return shards_of(weights)


def open_weights(path: Path) -> dict[str, Source]:
  """The tensors in a file, or in all its shards, by name.

  Raises:
    FileNotFoundError: a shard is not there.
    ValueError: a file is truncated, damaged, hostile or of no known kind.
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
  if start[8:9] == b"{" and not any(start[4:8]):  # the length of a header, which may be any number
    return open_safetensors(path)
  if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # an archive, or a bare pickle
    return open_torch(path)
  if start[:8] == b"\x89HDF\r\n\x1a\n":
    return open_hdf5(path)
  raise ValueError(
    f"{path} is no safetensors file, nor one of PyTorch or of Keras: {describe_content(start)}."
  )


def _nothing_at(source: Path) -> str:
  """What to say of a path that does not exist, which may be the name of something else."""
  from sam3_jax.checkpoint.local import find_local

  scheme, *place = source.parts or ("",)
  if scheme in ("http:", "https:", "hf:"):
    hub = place[:1] == ["huggingface.co"]
    name = "/".join(place[1:3] if hub else place)
    known = hub or scheme == "hf:"
    return (
      f"{scheme}//{'/'.join(place)} is no path; say `sam3-jax convert "
      f"hf://{name if known else 'facebook/sam3'} OUT`, or download the file and give its path."
    )
  try:
    checkpoint = find_local(source)
  except (FileNotFoundError, ValueError):
    return (
      f"there is nothing at {source}; give model.safetensors or sam3.pt of facebook/sam3, or the "
      "folder of either."
    )
  return (
    f"{source} is the name of a checkpoint of sam3-jax ({checkpoint}): it needs no conversion. To "
    "write it in another layout, say --to huggingface or --to meta."
  )


def _refuse_distributed(folder: Path) -> None:
  """Refuses checkpoints whose tensors are in pieces, which only their own tools put together."""
  if next(folder.glob("*.distcp"), None) or next(folder.glob("*/*.distcp"), None):
    raise ValueError(
      f"{folder} is a distributed checkpoint of PyTorch (.distcp), with each tensor in pieces; put "
      "it together first: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
      f"{folder} model.pt`, or `accelerate merge-weights {folder} OUT`, then convert that."
    )
  states = [*folder.glob("*zero_pp_rank_*"), *folder.glob("*/*zero_pp_rank_*")]
  if states or (folder / "zero_to_fp32.py").is_file():
    raise ValueError(
      f"{folder} is a checkpoint of DeepSpeed, with its parameters in pieces; put it together "
      f"first: `python {folder / 'zero_to_fp32.py'} {folder} OUT`, then convert OUT."
    )


def _no_weights(source: Path, names: tuple[str, ...]) -> str:
  """What to say of a folder without weights."""
  inside = sorted(path for path in source.iterdir() if path.is_dir())
  if below := [path for path in inside if any(next(path.glob(s), None) for s in _SUFFIXES)]:
    said = ", ".join(path.name for path in below[:3])
    return f"{source} itself holds no weights, but its folders do ({said}); give one of them."
  return (
    f"{source} holds no {', '.join(names[:5])} and no other file of weights; download those of "
    "facebook/sam3 into it."
  )
