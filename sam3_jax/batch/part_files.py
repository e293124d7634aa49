"""The files of a part: their names, and how to read them.

`part_writer` writes them. The files of an unfinished part are called `.begun.`.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.files import Draft, read_json, scratch, write_json
from sam3_jax.storage.objects import object_path
from sam3_jax.utils.identity import FileIdentity, digest
from sam3_jax.utils.lease import sync_directory

FORMAT_VERSION = 2
PARTS, LEASES = "parts", "leases"


class Failure(NamedTuple):
  """An input without results, and the reason in one line.

  Attributes:
    input: its index in the list.
    name: of the image or video.
    identity: of the file that was read; None if none could be read.
  """

  input: int
  name: str
  reason: str
  identity: FileIdentity | None = None

  def to_json(self, noun: str) -> dict[str, Any]:
    """Plain values; `noun` is the key of the name."""
    identity = identity_to_json(self.identity)
    return {"input": self.input, noun: self.name, "reason": self.reason, "identity": identity}


class Resolved(NamedTuple):
  """The inputs of a part that are done or failed, with the identities of the files read for them.

  Attributes:
    retried: inputs that had failed and are pending again.
  """

  done: dict[int, FileIdentity | None]
  failed: dict[int, FileIdentity | None]
  retried: set[int]


def manifest_path(out: Path, part: int) -> Path:
  """The manifest of a finished part; see `records_path`."""
  return out / PARTS / f"part-{part:06}.json"


def begun_path(out: Path, part: int) -> Path:
  """The manifest of an unfinished part; see `records_path`."""
  return out / PARTS / f"part-{part:06}.begun.json"


def records_path(manifest: Path, values: Mapping[str, Any]) -> Path:
  """The records of a part, given its manifest: a file with the same name and another suffix; in a
  bucket the object that the manifest names, since objects of other content have other names."""
  return manifest.with_name(values.get("records") or manifest.with_suffix(".jsonl").name)


def lease_path(out: Path, part: int) -> Path:
  return out / LEASES / f"part-{part:06}.lease"


def journal_path(out: Path, part: int) -> Path:
  """The journal of a part; on this machine if the job is in a bucket."""
  local = object_path(out) is None
  folder = out / LEASES if local else scratch() / "journals" / digest(str(out))[:12]
  return folder / f"part-{part:06}.journal"


def part_number(name: str) -> int | None:
  """The part to which a file belongs, from the name of the file."""
  found = re.match(r"part-(\d+)\.", name)
  return int(found[1]) if found else None


def identity_to_json(identity: FileIdentity | None) -> dict[str, Any] | None:
  """The identity of a file as plain values."""
  if identity is None:
    return None
  values = {"size": identity.size, "modified": identity.modified, "sha256": identity.sha256}
  return values | ({"version": identity.version} if identity.version else {})


def identity_from_json(values: Any) -> FileIdentity | None:
  if not isinstance(values, dict):
    return None
  version = values.get("version", "")
  return FileIdentity(values["size"], values["modified"], values["sha256"], version)


def check_job(manifest: Mapping[str, Any], job: str | None, out: Path, part: int) -> None:
  """Raises ValueError if a part belongs to another job than the directory."""
  if job is not None and manifest.get("job", job) not in (None, job):
    raise ValueError(
      f"part {part} in {out} is of another job than {out / 'job.json'}: two jobs wrote into the "
      "same directory; choose another --out and run batch again."
    )


def reopen_part(out: Path, part: int) -> None:
  """Makes a finished part unfinished, with its failed inputs pending.

  If the process is killed at any step, the part is either finished or unfinished.
  """
  path, begun = manifest_path(out, part), begun_path(out, part)
  values = read_json(path)
  if values is None:
    return
  retried = [failure["input"] for failure in values["failed"]]
  unfinished = values | {"failed": [], "inputs": values["done"], "retried": retried}
  if object_path(out) is not None:  # both manifests name the same records
    write_json(begun, unfinished)
    path.unlink()
    return
  with Draft(begun.with_suffix(".jsonl")) as draft:
    draft.copy(path.with_suffix(".jsonl"))
    draft.commit()
  write_json(begun, unfinished)
  path.unlink()
  sync_directory(path.parent)
  path.with_suffix(".jsonl").unlink(missing_ok=True)


def read_resolved(out: Path, part: int, inputs: range) -> Resolved:
  """The inputs of a part that are done or failed, whether or not the part is finished."""
  path = manifest_path(out, part)
  values = read_json(path)
  if values is None:
    path = begun_path(out, part)
    values = read_begun(out, part)
  if values is None:
    return Resolved({}, {}, set())
  done: dict[int, FileIdentity | None] = {}
  for i, _, record in read_lines(records_path(path, values), inputs.start):
    if i not in done:  # the first line of a record has the identity
      done[i] = identity_from_json(record.get("file"))
  failed = {one["input"]: identity_from_json(one.get("identity")) for one in values["failed"]}
  return Resolved(done, failed, set(values.get("retried", ())))


def read_lines(records: Path, first: int) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
  """The lines of a part: index of the input, the line, and its content."""
  with records.open("rb") as file:
    for index, line in enumerate(file, start=first):
      try:
        record = json.loads(line)
      except (ValueError, RecursionError) as error:
        raise ValueError(
          f"{records} is damaged; remove {records.with_suffix('.json')} and run batch again."
        ) from error
      yield record.get("input", index), line, record


def read_begun(out: Path, part: int) -> dict[str, Any] | None:
  """The manifest of an unfinished part; None unless its records are complete."""
  path = begun_path(out, part)
  values = read_json(path)
  if values is None:
    return None
  try:
    with records_path(path, values).open("rb") as file:
      sha256 = hashlib.file_digest(file, "sha256").hexdigest()
  except (FileNotFoundError, IsADirectoryError):
    return None
  return values if sha256 == values["sha256"] else None
