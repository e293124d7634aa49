"""Parts on disk: written piece by piece, appearing whole, each with its manifest.

`sam3_jax.batch` shows the files and what is in them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch.files import Draft, read_json, remove_drafts, write_json

FORMAT_VERSION = 1
JOB, PARTS, ERRORS = "job.json", "parts", "errors.jsonl"
# Found again in another form than these, a value of job.json has a name that says more.
_SAID = {
  "inputs": "the number of pictures",
  "inputs_sha256": "the list of pictures and prompts",
  "part_size": "--part-size",
  "checkpoint_sha256": "the checkpoint",
}


class Failure(NamedTuple):
  """An input that was not done, and why, in one line."""

  input: int
  image: str
  reason: str


def begin(out: Path, job: Mapping[str, Any]) -> None:
  """Notes what job a folder is of, or checks that it is of this one.

  Raises:
    ValueError: it holds another job's results.
    OSError: it cannot be written to.
  """
  job = {"format_version": FORMAT_VERSION, **job}
  if read_json(out / JOB) is None:
    write_json(out / JOB, job)  # as other processes may do at this moment, with the same content
  there = read_job(out)
  differ = [key for key in job if there.get(key) != job[key]]
  if differ:
    said = [
      f"{_SAID.get(key, key)}: {there.get(key)!s:.20} then, {job[key]!s:.20} now" for key in differ
    ]
    raise ValueError(
      f"{out} holds the results of another job ({'; '.join(said)}); give the same command as "
      "then, or choose another --out."
    )


def read_job(out: Path) -> dict[str, Any]:
  """What job a folder is of.

  Raises:
    FileNotFoundError: it is none.
  """
  job = read_json(out / JOB)
  if job is None:
    raise FileNotFoundError(f"there are no results in {out}; run batch with this --out first.")
  return job


def bounds(part: int, job: Mapping[str, Any]) -> range:
  """Places in the list of a part's inputs."""
  size = job["part_size"]
  return range(part * size, min((part + 1) * size, job["inputs"]))


def count(job: Mapping[str, Any]) -> int:
  """The number of parts."""
  return -(-job["inputs"] // job["part_size"])


def done(out: Path) -> set[int]:
  """Parts that are done."""
  folder = out / PARTS
  names = (re.fullmatch(r"part-(\d+)\.json", path.name) for path in folder.glob("part-*.json"))
  return {int(name[1]) for name in names if name}


def manifest(out: Path, part: int) -> dict[str, Any]:
  """Of a part that is done.

  Raises:
    ValueError: it is not, or the manifest is damaged.
  """
  path = out / PARTS / f"{_stem(part)}.json"
  values = read_json(path)
  if values is None or values.get("part") != part or not isinstance(values.get("failed"), list):
    raise ValueError(f"{path} is no part's manifest; remove it and run batch again.")
  return values


def lines(out: Path, part: int) -> Iterator[dict[str, Any]]:
  """The records of a part that is done, checked against its manifest at the end.

  Raises:
    ValueError: they are not what was written.
  """
  entry, path = manifest(out, part), out / PARTS / f"{_stem(part)}.jsonl"
  damaged = f"{path} is damaged; remove {path.with_suffix('.json')} and run batch again."
  found = hashlib.sha256()
  try:
    with path.open("rb") as file:
      for line in file:
        found.update(line)
        yield json.loads(line)
  except (OSError, ValueError) as error:
    raise ValueError(f"{damaged} ({error})") from error
  if found.hexdigest() != entry["sha256"]:
    raise ValueError(damaged)


def write_errors(out: Path) -> int:
  """Collects the failures of all parts, done or begun, in errors.jsonl; returns their number."""
  failed: list[Any] = []
  seen: set[int] | None = None
  while (now := done(out)) != seen:  # another process may have ended meanwhile
    seen, failed = now, []
    begun = (_number(path.name) for path in (out / PARTS).glob("part-*.begun.json"))
    for part in sorted(seen.union(part for part in begun if part is not None)):
      entry = manifest(out, part) if part in seen else _begun(out / PARTS, part)[1]
      failed += entry["failed"]
    with Draft(out / ERRORS) as draft:
      draft.write(b"".join(json.dumps(one).encode() + b"\n" for one in failed))
      draft.commit()
  return len(failed)


def resumed(out: Path, part: int, inputs: range) -> int:
  """Place in the list of the part's first input that is not done yet."""
  _, values = _begun(out / PARTS, part)
  return inputs.start + values["inputs"]


class PartWriter:
  """One part, from its first input that is not done yet.

  Attributes:
    start: place in the list of that input.
  """

  def __init__(self, out: Path, part: int, inputs: range):
    """Goes on behind what a process that had to stop left of the part."""
    self._folder, self._part, self._inputs = out / PARTS, part, inputs
    self._failed: list[dict[str, Any]] = []
    self._done, self._bytes, self._sum = 0, 0, hashlib.sha256()
    self.start = inputs.start
    self._draft = Draft(self._folder / f"{_stem(part)}.jsonl")
    self._go_on()

  def add(self, records: Iterable[bytes], failures: Iterable[Failure], inputs: range) -> None:
    """Takes the records and failures of the inputs whose turn it is."""
    if inputs.start != self.start:
      raise RuntimeError(f"inputs from {inputs.start} were given, but it is {self.start}'s turn.")
    for record in records:
      self._write(record)
    self._failed += [failure._asdict() for failure in failures]
    self.start = inputs.stop

  def finish(self) -> None:
    """The part is done, for good."""
    self._draft.commit()
    write_json(self._folder / f"{_stem(self._part)}.json", self._manifest())
    for ending in ("json", "jsonl"):
      (self._folder / f"{_stem(self._part)}.begun.{ending}").unlink(missing_ok=True)

  def pause(self) -> None:
    """Keeps what there is of the part, for whoever goes on."""
    if self.start == self._inputs.start:
      self.discard()
      return
    records = self._folder / f"{_stem(self._part)}.begun.jsonl"
    self._draft.path = records
    self._draft.commit()
    write_json(records.with_suffix(".json"), self._manifest())

  def discard(self) -> None:
    self._draft.discard()

  def _write(self, record: bytes) -> None:
    self._draft.write(record)
    self._sum.update(record)
    self._bytes += len(record)
    self._done += 1

  def _manifest(self) -> dict[str, Any]:
    return {
      "format_version": FORMAT_VERSION,
      "part": self._part,
      "first": self._inputs.start,
      "inputs": self.start - self._inputs.start,
      "done": self._done,
      "failed": self._failed,
      "bytes": self._bytes,
      "sha256": self._sum.hexdigest(),
    }

  def _go_on(self) -> None:
    records, values = _begun(self._folder, self._part)
    if values["inputs"]:
      with records.open("rb") as file:
        for record in file:
          self._write(record)
      self._failed = list(values["failed"])
      self.start = self._inputs.start + values["inputs"]


def _begun(folder: Path, part: int) -> tuple[Path, dict[str, Any]]:
  """Records and manifest of a part's beginning; of no input, if there is no whole one."""
  records = folder / f"{_stem(part)}.begun.jsonl"
  values = read_json(records.with_suffix(".json"))
  if values is not None and records.is_file():
    with records.open("rb") as file:
      if hashlib.file_digest(file, "sha256").hexdigest() == values["sha256"]:
        return records, values
  return records, {"inputs": 0, "failed": []}


def clean(out: Path, mine: Callable[[int], bool]) -> None:
  """Removes what killed processes left: drafts of one's own parts, and beginnings of done ones.

  Raises:
    ValueError: a living process is writing one of these parts.
  """
  finished = done(out)
  remove_drafts(out, lambda name: name in (JOB, ERRORS))
  busy = remove_drafts(out / PARTS, lambda name: (part := _number(name)) is not None and mine(part))
  if busy:
    raise ValueError(
      f"another process is writing {busy[0]}, a part of this one's share; end it, or give each "
      "process a --process of its own."
    )
  for path in (out / PARTS).glob("part-*.begun.*"):
    part = _number(path.name)
    if part in finished and mine(part):
      path.unlink(missing_ok=True)


def _number(name: str) -> int | None:
  found = re.match(r"part-(\d+)\.", name)
  return int(found[1]) if found else None


def _stem(part: int) -> str:
  return f"part-{part:06}"
