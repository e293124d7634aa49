"""Checkpoints by name: a directory, a packaged checkpoint, a bucket, or a repository on the hub."""

import contextlib
import re
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

from sam3_jax.checkpoint import hf_hub
from sam3_jax.checkpoint.local import find_local
from sam3_jax.checkpoint.writer import FORMAT_VERSION
from sam3_jax.utils.atomic_files import write_json
from sam3_jax.utils.identity import digest, identify
from sam3_jax.utils.json_text import parse
from sam3_jax.utils.lease import Lease
from sam3_jax.utils.os_errors import error_text
from sam3_jax.utils.paths import file_sizes, user_cache

# Names a cache entry; raise it when `convert` makes another bundle of the same source.
CONVERSION = 1
POLL_SECONDS = 0.5  # between two checks whether another process has converted an entry
Note = Callable[[str], None]  # called with a line that the user should see


def find_checkpoint(
  name: str | Path,
  *,
  progress: Callable[[str, float], None] | None = None,
  note: Note = warnings.warn,
) -> Path:
  """Resolves the name of a checkpoint to its directory.

  Tries, in this order:
    1. the directory of this path, `gs://bucket/path` (needs the extra `gcs`), or `s3://bucket/path`
       (needs the extra `s3`), which is copied into the cache;
    2. `$SAM3_JAX_CHECKPOINTS/name`, `./checkpoints/name`, and the packaged checkpoint `sam3-tiny`;
       underscores in a name may stand for hyphens;
    3. for `hf://org/name` or `hf://org/name@revision`, the repository on the Hugging Face hub
       (needs the extra `hub`).

  A repository is downloaded and converted once for each commit, into the cache, while other
  processes wait. Each call asks the hub for the current commit of a branch or tag. Without a
  connection the last known commit is used, with a note. `@commit` never asks.

  Args:
    name: the name.
    progress: called as by `converters.convert`.
    note: called while waiting for another process, and when the hub cannot be reached.

  Raises:
    FileNotFoundError: there is none; the message lists where it looked and how to convert one.
    ValueError: the name is empty, or names a file.
    ImportError, PermissionError: as `hf_hub.download`.
  """
  if str(name).startswith(hf_hub.SCHEME):
    return _find_on_hub(str(name), progress, note)
  return find_local(name)


def _find_on_hub(name: str, progress: Callable[[str, float], None] | None, note: Note) -> Path:
  """The cached bundle of the current commit of a repository's revision.

  The commit and the version of the conversion key an entry. Its config.json names the repository
  and the checksums of the converted files.
  """
  repository, revision = hf_hub.check_name(name)
  try:
    cache = user_cache()
  except RuntimeError as error:
    raise ValueError(f"no home directory to cache {name} in; set XDG_CACHE_HOME.") from error
  folder = cache / "hub" / repository.replace("/", "--")
  ref = folder / f"{quote(revision or 'main', safe='')}.json"
  commit, reason = hf_hub.resolve(repository, revision)
  if commit is None and (known := _last_commit(ref)) and _entry(folder, known).is_dir():
    note(f"cannot get the current commit of {name} from the hub ({reason}); using {known:.12}.")
    return _entry(folder, known)
  if commit and _entry(folder, commit).is_dir():
    with contextlib.suppress(OSError):  # of a cache that cannot be written
      _remember(ref, commit)
    return _entry(folder, commit)
  with _leased(folder / f"{commit or ref.stem}.lease", name, progress, note):
    if commit and _entry(folder, commit).is_dir():  # another process made it meanwhile
      target = _entry(folder, commit)
    else:
      target, commit = _convert(folder, repository, commit, name, progress)
      old = [*repository.split("/"), *(revision or "").replace("/", "-").split()]
      _note_old_entry(cache / "--".join(old), note)
    _remember(ref, commit)
  return target


def _convert(
  folder: Path,
  repository: str,
  commit: str | None,
  name: str,
  progress: Callable[[str, float], None] | None,
) -> tuple[Path, str]:
  """Downloads and converts a commit, or the one in the client's cache; its entry and hash."""
  # setuptools maps the directory converters/ to this name, which pyright cannot know.
  from sam3_jax.converters import convert  # pyright: ignore[reportMissingImports]

  if progress:
    progress(f"downloading {name}", 0.0)
  source = hf_hub.download(f"{hf_hub.SCHEME}{repository}@{commit}" if commit else name)
  commit = commit or hf_hub.commit_of(source) or _digest(source)
  target = _entry(folder, commit)
  if not target.is_dir():
    convert(source, target, progress=progress)
  return target, commit


@contextlib.contextmanager
def _leased(
  path: Path, name: str, progress: Callable[[str, float], None] | None, note: Note
) -> Iterator[None]:
  """Holds the lease on an entry; waits while another process converts it."""
  lease, noted = Lease(path), False
  try:
    while not lease.acquire():
      line = f"waiting for {lease.holder() or 'another process'} to convert {name}"
      if not noted:
        note(f"{line}.")
      noted = True
      if progress:
        progress(line, 0.0)
      time.sleep(POLL_SECONDS)
  except OSError as error:
    raise ValueError(
      f"cannot write to {path.parent}: {error_text(error)}; set XDG_CACHE_HOME to a "
      "writable directory."
    ) from error
  with lease:
    yield


def _entry(folder: Path, commit: str) -> Path:
  return folder / f"{commit}-{FORMAT_VERSION}.{CONVERSION}"


def _last_commit(ref: Path) -> str | None:
  """The commit of a revision when the hub last answered."""
  try:
    values = parse(ref.read_bytes(), "it")
  except (OSError, ValueError):
    return None
  commit = values.get("commit") if isinstance(values, dict) else None
  return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{40}", commit) else None


def _remember(ref: Path, commit: str) -> None:
  if _last_commit(ref) != commit:
    write_json(ref, {"commit": commit})


def _digest(folder: Path) -> str:
  """A key for a directory outside the client's cache, in place of a commit."""
  names = file_sizes(folder)
  found = {name: identify(folder / name) for name in names}
  return digest({name: [one.size, one.modified] for name, one in found.items() if one})[:40]


def _note_old_entry(path: Path, note: Note) -> None:
  if (path / "manifest.json").is_file():
    note(
      f"{path} was made by an earlier version from an unknown commit; it is no longer used and may "
      "be removed."
    )
