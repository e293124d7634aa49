"""The list of a job is frozen when the job begins, and compared with the files at each later run.

The list is a file of its own, named by its digest: name, size and modification time of each image,
and a digest of its prompts. What has changed since is found by comparing, and told by name: it must
never happen that results of two versions of an image, or of two lists, end up in one job.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sam3_jax.batch import parts
from sam3_jax.batch.fetch import File, NotAFileError, fetch
from sam3_jax.batch.files import Draft, create_json
from sam3_jax.batch.inputs import Input
from sam3_jax.batch.part_files import FORMAT_VERSION, resolved
from sam3_jax.batch.prompt_schema import as_json
from sam3_jax.utils.identity import FileIdentity, changes, digest, named
from sam3_jax.utils.os_errors import error_text

_Key = tuple[str, int]  # an image's name, and how often it came up before: lists may share names


class _Frozen(NamedTuple):
  """An input as it was when the job began."""

  prompts: str
  identity: FileIdentity | None
  span: tuple[int, int] | None


def agree(
  out: Path,
  settings: Mapping[str, Any],
  inputs: Sequence[Input],
  *,
  add: bool = False,
  retry_failed: bool = False,
) -> tuple[dict[str, Any], list[Input]]:
  """Begins a job, or makes sure that it is the one that was begun.

  Args:
    out: output directory.
    settings: what decides the results beside the list.
    inputs: the list as it is now.
    add: whether inputs that the job does not have extend it.
    retry_failed: whether failed inputs are done again, so they may have changed.

  Returns:
    The description of the job, and its inputs in the job's order.

  Raises:
    ValueError: the directory holds another job's results; names what differs.
    OSError: it cannot be written to, or an image cannot be read whose time has changed.
  """
  first = {"format_version": FORMAT_VERSION, **settings}
  while True:
    try:
      there = parts.read_job(out)
    except FileNotFoundError:
      created = _extended(out, first, inputs)
      if create_json(out / parts.JOB, created):
        return created, list(inputs)
      continue
    changed = parts.differences(there, first)
    if there.get("format_version") != FORMAT_VERSION or "segments" not in there:
      raise parts.other_job(out, changed or ["it has no list of its images"])
    found = _Comparison(out, there, inputs)
    if changed := changed + found.changed():
      raise parts.other_job(out, changed, _RESTORE)
    if (failed := found.modified_failures) and not retry_failed:
      raise ValueError(
        f"{named('image that failed', 'images that failed', failed)} changed since; add "
        "--retry-failed to do these again."
      )
    if not found.added:
      return there, found.ordered
    if not add:
      clause = changes({}, {one.name: one.identity for one in found.added})
      raise parts.other_job(out, clause, "add --add to extend that job, or choose another --out.")
    extended = _extended(out, there, found.added)
    if create_json(parts.addition(out, there), extended):
      return extended, found.ordered + found.added


_RESTORE = (
  "restore the images, list and settings of that job, or choose another --out for a new one."
)


def _extended(out: Path, job: Mapping[str, Any], inputs: Sequence[Input]) -> dict[str, Any]:
  """A job and one more list, which is written."""
  data = b"".join(_lines(inputs))
  sha256 = hashlib.sha256(data).hexdigest()
  path = out / f"inputs-{sha256[:12]}.jsonl"
  if not path.exists():
    with Draft(path) as draft:
      draft.write(data)
      draft.commit()
  segment = {"inputs": len(inputs), "sha256": sha256, "list": path.name}
  count = job.get("inputs", 0) + len(inputs)
  return {**job, "inputs": count, "segments": [*job.get("segments", []), segment]}


def _lines(inputs: Iterable[Input]) -> Iterable[bytes]:
  prompts = _PromptDigests()
  for one in inputs:
    values: dict[str, Any] = {"image": one.name, "prompts": prompts[one]}
    if one.span is not None:
      values["span"] = one.span
    if one.identity is not None:
      values |= {"size": one.identity.size, "modified": one.identity.modified}
    yield json.dumps(values).encode() + b"\n"


class _PromptDigests:
  """Mostly, all inputs share their prompts."""

  def __init__(self):
    self._known: dict[int, str] = {}

  def __getitem__(self, one: Input) -> str:
    key = id(one.prompts)
    if key not in self._known:
      self._known[key] = digest([as_json(prompt) for prompt in one.prompts])[:16]
    return self._known[key]


def _read_list(out: Path, segment: Mapping[str, Any]) -> list[tuple[str, _Frozen]]:
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
  rows = []
  for values in map(json.loads, data.splitlines()):
    size, span = values.get("size"), values.get("span")
    identity = None if size is None else FileIdentity(size, values["modified"])
    rows.append(
      (values["image"], _Frozen(values["prompts"], identity, None if span is None else tuple(span)))
    )
  return rows


class _Comparison:
  """A job's list, and the files now.

  Attributes:
    ordered: the inputs of the job, in its order.
    added: others.
    modified_failures: names of images that had failed and are other ones now.
  """

  def __init__(self, out: Path, job: Mapping[str, Any], inputs: Sequence[Input]):
    self.modified_failures: list[str] = []
    self.ordered: list[Input] = []
    rows = [row for segment in parts.segments(job) for row in _read_list(out, segment)]
    frozen = dict(_keyed((name, one) for name, one in rows))
    now = dict(_keyed((one.name, one) for one in inputs))
    prompts = _PromptDigests()
    self._prompts: list[str] = []
    self._then: dict[str, FileIdentity | None] = {}  # of the images that changed
    self._now: dict[str, FileIdentity | None] = {}
    candidates: dict[int, Input] = {}
    for index, (key, then) in enumerate(frozen.items()):
      one = now.pop(key, None)
      if one is None:
        self._then[key[0]] = then.identity
        continue
      self.ordered.append(dataclasses.replace(one, identity=one.identity or then.identity))
      if prompts[one] != then.prompts:
        self._prompts.append(one.name)
      elif one.identity is not None and not (
        one.identity.matches(then.identity) and one.span == then.span
      ):
        candidates[index] = one
    self.added = list(now.values())
    self._examine(out, job, candidates, [then for _, then in rows])

  def changed(self) -> list[str]:
    """What of the job is not as it was, in words."""
    prompts = self._prompts and [f"prompts changed of {named('image', 'images', self._prompts)}"]
    return changes(self._then, self._now) + prompts

  def _examine(
    self, out: Path, job: Mapping[str, Any], candidates: dict[int, Input], listed: list[_Frozen]
  ) -> None:
    """Sees to the images whose size or time is another one than listed."""
    by_part: dict[int, dict[int, Input]] = collections.defaultdict(dict)
    for index, one in candidates.items():
      by_part[parts.part_of(index, job)][index] = one
    for part, some in by_part.items():
      known = resolved(out, part, parts.bounds(part, job))
      for index, one in some.items():
        if index in known.done:
          modified = not _same(one, known.done[index])
        elif index in known.failed:
          modified = False
          if not _same(one, known.failed[index]):
            self.modified_failures.append(one.name)
        else:  # it was not there, or failed and is retried: so it is done as it is now
          modified = listed[index].identity is not None and index not in known.retried
        if modified:
          self._then[one.name], self._now[one.name] = None, one.identity


def _same(one: Input, read: FileIdentity | None) -> bool:
  """Whether an image is the one that was read: by size and time, else by content."""
  if read is None or one.identity is None:
    return False
  if (one.identity.size, one.identity.modified) == (read.size, read.modified) and one.span is None:
    return True
  if one.identity.size != read.size:
    return False
  try:
    _, now = fetch(File(one.name, one.path, one.span, one.identity))
  except NotAFileError:
    return False
  return now.sha256 == read.sha256


def _keyed(rows: Iterable[tuple[str, Any]]) -> Iterable[tuple[_Key, Any]]:
  seen: collections.Counter[str] = collections.Counter()
  for name, value in rows:
    yield (name, seen[name]), value
    seen[name] += 1
