"""The input list of a job, frozen when the job begins and compared with the files in later runs.

The list is a file named by its digest. It has the name, size and modification time of each image
or video, and a digest of its prompts. Changes are found by comparison and reported by name. Results
of two versions of an input, or of two lists, must never be mixed in one job.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch import job_files
from sam3_jax.batch.files import Draft, create_json
from sam3_jax.batch.image_bytes import UnusableFileError, read_image_bytes
from sam3_jax.batch.input_list import Input, image_file
from sam3_jax.batch.part_files import FORMAT_VERSION, read_resolved
from sam3_jax.batch.prompt_schema import prompt_to_json
from sam3_jax.utils.identity import FileIdentity, changes, digest, named
from sam3_jax.utils.os_errors import error_text

_Key = tuple[str, int]  # name of an input, and how many inputs of that name precede it

_ReadIdentity = Callable[[Input], FileIdentity]


class _Frozen(NamedTuple):
  """An input as it was when the job began."""

  prompts: str
  identity: FileIdentity | None
  span: tuple[int, int] | None
  record: tuple[str, str, int] | None


def open_job(
  out: Path,
  settings: Mapping[str, Any],
  inputs: Sequence[Input],
  *,
  noun: str = "image",
  read_identity: _ReadIdentity = lambda item: read_image_bytes(image_file(item))[1],
  add: bool = False,
  retry_failed: bool = False,
  frozen_input: Callable[[str, FileIdentity | None], Input] | None = None,
) -> tuple[dict[str, Any], Sequence[Input]]:
  """Creates a job, or verifies that the job in `out` is the same.

  Args:
    out: output directory.
    settings: everything that determines the results, except the inputs.
    inputs: the current list.
    noun: what an input is called.
    read_identity: reads an input for the digest of its content; may raise `UnusableFileError`.
    add: whether inputs that the job does not have extend it.
    retry_failed: whether failed inputs are done again, and so may have changed.
    frozen_input: see `Job`.

  Returns:
    The description of the job, and its inputs in the order of the job.

  Raises:
    ValueError: the directory has the results of another job; names the differences.
    OSError: the directory is not writable, or an input with a new modification time is unreadable.
  """
  new = {"format_version": FORMAT_VERSION, **settings}
  while True:
    try:
      job = job_files.read_job(out)
    except FileNotFoundError:
      created = _extended(out, new, inputs, noun)
      if create_json(out / job_files.JOB, created):
        return created, inputs
      continue
    changed = job_files.differences(job, new)
    if job.get("format_version") != FORMAT_VERSION or "segments" not in job:
      raise job_files.other_job_error(out, changed or [f"it has no list of its {noun}s"])
    if job_files.noun_of(job) != noun:  # the lists cannot be compared
      raise job_files.other_job_error(out, changed)
    comparison = _Comparison(out, job, inputs, frozen_input, noun, read_identity)
    if changed := changed + comparison.changed():
      remedy = (
        f"restore the {noun}s, list and settings of that job, or choose another --out for a new "
        "one."
      )
      raise job_files.other_job_error(out, changed, remedy)
    if (failed := comparison.changed_failures) and not retry_failed:
      raise ValueError(
        f"{named(f'{noun} that failed', f'{noun}s that failed', failed)} changed since; add "
        "--retry-failed to process these again."
      )
    if not comparison.added or (frozen_input is not None and not add):
      return job, comparison.ordered
    if not add:
      clause = changes({}, {item.name: item.identity for item in comparison.added})
      remedy = "add --add to extend that job, or choose another --out."
      raise job_files.other_job_error(out, clause, remedy)
    extended = _extended(out, job, comparison.added, noun)
    if create_json(job_files.next_job_path(out, job), extended):
      return extended, comparison.ordered + comparison.added


def _extended(
  out: Path, job: Mapping[str, Any], inputs: Sequence[Input], noun: str
) -> dict[str, Any]:
  """The description of a job with one more list; writes the list."""
  checksum = hashlib.sha256()
  for line in _lines(inputs, noun):  # the whole list may not fit into memory
    checksum.update(line)
  sha256 = checksum.hexdigest()
  path = out / f"inputs-{sha256[:12]}.jsonl"
  if not path.exists():
    with Draft(path) as draft:
      for line in _lines(inputs, noun):
        draft.write(line)
      draft.commit()
  segment = {"inputs": len(inputs), "sha256": sha256, "list": path.name}
  count = job.get("inputs", 0) + len(inputs)
  return {**job, "inputs": count, "segments": [*job.get("segments", []), segment]}


def _lines(inputs: Iterable[Input], noun: str) -> Iterable[bytes]:
  prompts = _PromptDigests()
  for item in inputs:
    values: dict[str, Any] = {noun: item.name, "prompts": prompts[item]}
    if item.span is not None:
      values["span"] = item.span
    if item.record is not None:
      values["record"] = item.record
    if item.identity is not None:
      values |= {"size": item.identity.size, "modified": item.identity.modified}
      values |= {"version": item.identity.version} if item.identity.version else {}
    yield json.dumps(values).encode() + b"\n"


class _PromptDigests:
  """Digests of the prompts of inputs; most inputs share one tuple of prompts."""

  def __init__(self):
    self._known: dict[int, str] = {}

  def __getitem__(self, item: Input) -> str:
    key = id(item.prompts)
    if key not in self._known:
      self._known[key] = digest([prompt_to_json(prompt) for prompt in item.prompts])[:16]
    return self._known[key]


def _read_list(out: Path, segment: Mapping[str, Any], noun: str) -> list[tuple[str, _Frozen]]:
  path = out / segment["list"]
  try:
    data = path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"{path}, the list of the job, cannot be read ({error_text(error)}); restore it, or choose "
      "another --out."
    ) from error
  if hashlib.sha256(data).hexdigest() != segment["sha256"]:
    raise ValueError(f"{path}, the list of the job, is damaged; choose another --out.")
  items = []
  for values in map(json.loads, data.splitlines()):
    size, span, record = map(values.get, ("size", "span", "record"))
    version = values.get("version", "")
    identity = None if size is None else FileIdentity(size, values["modified"], "", version)
    where = (None if value is None else tuple(value) for value in (span, record))
    frozen = _Frozen(values["prompts"], identity, *where)
    items.append((values[noun], frozen))
  return items


class _Comparison:
  """Compares the list of a job with the current inputs.

  Attributes:
    ordered: the inputs of the job, in its order.
    added: inputs that the job does not have.
    changed_failures: names of failed inputs that have changed.
  """

  def __init__(
    self,
    out: Path,
    job: Mapping[str, Any],
    inputs: Sequence[Input],
    frozen_input: Callable[[str, FileIdentity | None], Input] | None,
    noun: str,
    read_identity: _ReadIdentity,
  ):
    self._noun, self._read_identity = noun, read_identity
    self.changed_failures: list[str] = []
    self.ordered: list[Input] = []
    items = [item for segment in job_files.segments(job) for item in _read_list(out, segment, noun)]
    frozen = dict(_keyed(items))
    now = dict(_keyed((item.name, item) for item in inputs))
    prompts = _PromptDigests()
    self._prompts: list[str] = []
    self._then: dict[str, FileIdentity | None] = {}  # of the inputs that changed
    self._now: dict[str, FileIdentity | None] = {}
    candidates: dict[int, Input] = {}
    for index, (key, then) in enumerate(frozen.items()):
      item = now.pop(key, None)
      is_whole_file = then.span is None and then.record is None
      if item is None and frozen_input is not None and is_whole_file:
        item = frozen_input(key[0], then.identity)
      if item is None:
        self._then[key[0]] = then.identity
        continue
      self.ordered.append(dataclasses.replace(item, identity=item.identity or then.identity))
      if prompts[item] != then.prompts:
        self._prompts.append(item.name)
      elif item.identity is not None and not (
        item.identity.matches(then.identity)
        and (item.span, item.record) == (then.span, then.record)
      ):
        candidates[index] = item
    self.added = list(now.values())
    self._examine(out, job, candidates, [then for _, then in items])

  def changed(self) -> list[str]:
    """The changes to the inputs of the job, in words."""
    noun = self._noun
    prompts = self._prompts and [f"prompts changed of {named(noun, f'{noun}s', self._prompts)}"]
    return changes(self._then, self._now) + prompts

  def _examine(
    self, out: Path, job: Mapping[str, Any], candidates: dict[int, Input], frozen: list[_Frozen]
  ) -> None:
    """Decides which of the inputs with another size or time than listed have changed."""
    by_part: dict[int, dict[int, Input]] = collections.defaultdict(dict)
    for index, item in candidates.items():
      by_part[job_files.part_of(index, job)][index] = item
    for part, items in by_part.items():
      known = read_resolved(out, part, job_files.part_range(part, job))
      for index, item in items.items():
        if index in known.done:
          modified = not self._same_content(item, known.done[index])
        elif index in known.failed:
          modified = False
          if not self._same_content(item, known.failed[index]):
            self.changed_failures.append(item.name)
        else:  # a missing or retried input is done with its present content
          modified = frozen[index].identity is not None and index not in known.retried
        if modified:
          self._then[item.name], self._now[item.name] = None, item.identity

  def _same_content(self, item: Input, read: FileIdentity | None) -> bool:
    """Whether an input is unchanged since it was read: by size and time, else by content."""
    if read is None or item.identity is None:
      return False
    is_whole_file = item.span is None and item.record is None
    if is_whole_file and item.identity.same_stat(read):
      return True
    # Without a span, the size is that of the file with the record.
    if item.identity.size != read.size and (is_whole_file or item.span is not None):
      return False
    try:
      return self._read_identity(item).sha256 == read.sha256
    except UnusableFileError:
      return False


def _keyed(items: Iterable[tuple[str, Any]]) -> Iterable[tuple[_Key, Any]]:
  seen: collections.Counter[str] = collections.Counter()
  for name, value in items:
    yield (name, seen[name]), value
    seen[name] += 1
