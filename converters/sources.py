"""What a path holds: which file has the weights, and how it is opened.

A folder may be a snapshot of a release, a KerasHub preset, or hold a single file of weights. Kinds
of files are told by how they begin, not by their names.
"""

from pathlib import Path

from .hdf5 import INDEX as KERAS_INDEX
from .hdf5 import open_hdf5
from .rules import Source
from .safetensors import INDEX, open_safetensors
from .torch_files import open_torch

OTHERS = ("sam3.pt", "pytorch_model.bin", "model.weights.h5", KERAS_INDEX)
_SUFFIXES = ("*.safetensors", "*.pt", "*.pth", "*.bin", "*.h5", "*.ckpt")


def find_weights(source: Path) -> Path:
  """The file to open: `source` itself, or the one in that folder.

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
  if not found:
    raise ValueError(
      f"{source} holds no {', '.join(names)}; download the weights of facebook/sam3 into it."
    )
  if len(found) > 1:
    names = ", ".join(path.name for path in found[:3])
    raise ValueError(f"{source} holds {len(found)} files of weights ({names}); name one of them.")
  return found[0]


def _nothing_at(source: Path) -> str:
  """What to say of a path that does not exist, which may be the name of something else."""
  from sam3_jax.hub import find_checkpoint  # a second of imports

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
    checkpoint = find_checkpoint(source)
  except (FileNotFoundError, ValueError):
    return (
      f"there is nothing at {source}; give model.safetensors or sam3.pt of facebook/sam3, or the "
      "folder of either."
    )
  return (
    f"{source} is the name of a checkpoint of sam3-jax ({checkpoint}): it needs no conversion. To "
    "write it in another layout, say --to huggingface or --to meta."
  )


def open_weights(path: Path) -> dict[str, Source]:
  """The tensors in a file, or in the shards that an index names, by name.

  Raises:
    FileNotFoundError: a shard is not there.
    ValueError: a file is truncated, damaged, hostile or of no known kind.
  """
  with path.open("rb") as file:
    start = file.read(9)
  if start[8:] == b"{" and not any(start[4:8]):  # the length of a header, which may be any number
    return open_safetensors(path)
  if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":  # an archive, or a bare pickle
    return open_torch(path)
  if start[:8] == b"\x89HDF\r\n\x1a\n" or path.name.endswith(KERAS_INDEX):
    return open_hdf5(path)
  return open_safetensors(path)
