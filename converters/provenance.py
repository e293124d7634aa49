"""Records which files a checkpoint was converted from."""

import re
from pathlib import Path
from typing import Any

from sam3_jax.utils.identity import file_sha256

from .sources import files_of

# Where the Hugging Face client caches a repository at a revision.
_SNAPSHOT = re.compile(r"models--([\w.-]+)--([\w.-]+)/snapshots/([0-9a-f]{40})", re.ASCII)


def describe_origin(weights: Path) -> dict[str, Any]:
  """Describes source files, so that they can be identified.

  Args:
    weights: a file, or an index of shards that has been read without a fault.

  Returns:
    `files`: size and SHA-256 of each file by its name; and `repository`: `org/name@commit`, if they
    are in the cache of the Hugging Face client. No path: it describes only this machine.
  """
  described: dict[str, Any] = {
    "files": {
      path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
      for path in files_of(weights)
    }
  }
  if found := _SNAPSHOT.search(weights.absolute().as_posix()):
    organisation, name, commit = found.groups()
    described["repository"] = f"{organisation}/{name}@{commit}"
  return described
