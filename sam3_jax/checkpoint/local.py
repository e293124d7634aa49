"""Checkpoints on this machine or in a bucket, by path or by name."""

import os
from pathlib import Path

from sam3_jax.checkpoint.mirror import mirror
from sam3_jax.storage.urls import parse
from sam3_jax.utils.paths import exists, resolve_path, scheme_of


def find_local(name: str | Path) -> Path:
  """Finds a checkpoint without the Hugging Face hub; see `registry.find_checkpoint`.

  Raises:
    FileNotFoundError: there is none; the message lists where it looked and how to convert one.
    ValueError: the name is empty, or names a file.
  """
  if scheme_of(name) == "s3":
    return mirror(parse(name).url)
  if scheme_of(name):
    return _in_bucket(resolve_path(name))
  if not str(name):
    raise ValueError(
      "the checkpoint's name is empty; give a directory or a name, such as sam3-tiny."
    )
  roots = [Path("checkpoints"), *_packaged_roots()]
  if root := os.environ.get("SAM3_JAX_CHECKPOINTS"):
    roots.insert(0, Path(root))
  spellings = dict.fromkeys((str(name), str(name).replace("_", "-")))
  folders = [Path(name).expanduser(), *(root / one for root in roots for one in spellings)]
  for folder in folders:
    if folder.is_dir():
      return folder
  if folders[0].is_file():
    raise ValueError(
      f"{name} is a file, but a checkpoint is a directory; if it holds released weights, convert "
      f"it: `sam3-jax convert {name} OUT`."
    )
  looked = ", ".join(map(str, dict.fromkeys(folders)))
  raise FileNotFoundError(
    f"no checkpoint {str(name)!r}; looked in {looked}. Convert the released weights with "
    f"`sam3-jax convert SOURCE checkpoints/{Path(name).name}`, or use sam3-tiny."
  )


def _in_bucket(path: Path) -> Path:
  if not exists(path):
    raise FileNotFoundError(
      f"there is no checkpoint at {path}; `sam3-jax convert` makes one there."
    )
  return path


def _packaged_roots() -> list[Path]:
  """Directories of packaged checkpoints: in the package, or beside the package in a clone."""
  package = Path(__file__).parents[1]
  clone = package.parent
  beside = [clone / "checkpoints"] if (clone / "pyproject.toml").is_file() else []
  return [package / "checkpoints", *beside]
