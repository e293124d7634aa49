"""Runs batch jobs with a fake model, for the fault tests of batch jobs.

The engine of the tests replaces the model: it is fast, and its results depend only on the pixels
and the prompts, bit for bit. Run as a program, this is `sam3-jax batch` with that engine.
Environment variables slow it down, or make reads hang as on an unavailable network mount.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import batches  # noqa: E402

from sam3_jax.batch import image_bytes  # noqa: E402

HANG = "BATCH_JOB_HANG"  # a file; while it exists, reads of images called hang* block
PAUSE = "BATCH_JOB_PAUSE"  # seconds per batch
COMMAND = (
  "batch", "--quiet", "--max-error-rate", "1", "--device", "cpu", "--batch-images", "2",
  "--part-size", "5",
)  # fmt: skip
RENAME = "BATCH_JOB_RENAME"  # number of the rename before which the process stops
TIMES = "BATCH_JOB_TIMES"  # a file that gets the seconds that the job took, without the start
REQUESTS = "BATCH_JOB_REQUESTS"  # a file that gets a byte for each request to a store


def hanging(file: str | Path) -> Path:
  """The file that exists once a read hangs, given the file of `start(hang=)`."""
  return Path(f"{file}-begun")


class _Hanging:
  """The module `os`, except that opening an image called hang* blocks, as in the kernel."""

  def __getattr__(self, name: str) -> Any:
    return getattr(os, name)

  def open(self, path: Any, *arguments: Any) -> int:
    if "hang" in str(path) and os.path.exists(os.environ[HANG]):
      hanging(os.environ[HANG]).touch()
      os.read(os.pipe()[0], 1)
    return os.open(path, *arguments)


if HANG in os.environ:  # also in the reader processes, which import this module
  image_bytes.os = _Hanging()  # pyright: ignore[reportAttributeAccessIssue]


def entry() -> None:
  """Runs `sam3-jax batch` with the fake model, as the environment variables say."""
  from sam3_jax.cli.main import entry as run_command

  for patch in _patches():
    patch.start()
  batches.Engine.pause = float(os.environ.get(PAUSE, "0"))
  if RENAME in os.environ:
    stop_at_rename(int(os.environ[RENAME]))
  if TIMES in os.environ:
    log_seconds(os.environ[TIMES])
  run_command()


def run_inline(folder: Path, *typed: str) -> int:
  """Runs the command in this process; returns its exit status."""
  from sam3_jax.cli.main import main

  with contextlib.ExitStack() as restored:
    for patch in _patches():
      restored.enter_context(patch)
    restored.enter_context(contextlib.chdir(folder))
    return main([*COMMAND, *typed])


def _patches() -> list[Any]:
  """Patches that put the fake model into the command."""
  from sam3_jax.batch import pipeline
  from sam3_jax.inference.predictor import Sam3

  return [
    mock.patch.object(pipeline, "BACKOFF", (0.05, 0.1, 0.2)),
    mock.patch.object(pipeline, "Engine", batches.Engine),
    mock.patch.object(Sam3, "from_checkpoint", return_value=batches.MODEL),
  ]


def log_seconds(path: str) -> None:
  """Writes the seconds of the run into a file, without the start of the process and the listing."""
  from sam3_jax.cli import batch_images

  run = batch_images.run

  def timed(*arguments: Any) -> bool:
    start = time.perf_counter()
    done = run(*arguments)
    Path(path).write_text(str(time.perf_counter() - start))
    return done

  batch_images.run = timed


def log_requests(path: str) -> None:
  """Writes `r` for each repetition of a request to a store and `.` for each other request, before
  the request is made; and makes the waits between them short."""
  from sam3_jax.storage import retries

  count, log = retries.count, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

  def logged(requests: int, repeated: int = 0) -> None:
    os.write(log, b"r" * repeated + b"." * (requests - repeated))
    count(requests, repeated)

  retries.count = logged
  retries.POLICY = retries.RetryPolicy(first=0.02, longest=0.2)


def stop_at_rename(number: int) -> None:
  """Makes the process sleep before its rename or link of this number, from 0."""
  count = itertools.count()

  def slow(function: Any) -> Any:
    def call(*arguments: Any) -> Any:
      if next(count) == number:
        Path("renaming").touch()
        time.sleep(60)
      return function(*arguments)

    return call

  Path.replace, os.link = slow(Path.replace), slow(os.link)


def start(
  folder: Path,
  *typed: str,
  pause: float = 0.0,
  hang: Path | None = None,
  rename: int | None = None,
  variables: Any = None,
) -> Any:
  """Starts the command in a directory."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", PAUSE: str(pause)} | (variables or {})
  if hang is not None:
    environment[HANG] = str(hang)
  if rename is not None:
    environment[RENAME] = str(rename)
  return python(folder, __file__, *COMMAND, *typed, environment=environment)


def python(folder: Path, *typed: str, environment: Any = None) -> Any:
  """Starts a program in a directory."""
  return subprocess.Popen(
    [sys.executable, *typed], cwd=folder, env=environment, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def finish(process: Any, limit: float = 300.0) -> tuple[int, str, float]:
  """Waits; returns the exit status (-9 if it had to be killed), stderr, and seconds."""
  start = time.monotonic()
  try:
    _, errors = process.communicate(timeout=limit)
  except subprocess.TimeoutExpired:
    process.kill()
    _, errors = process.communicate()
  return process.returncode, errors, time.monotonic() - start


def children(pid: int) -> list[int]:
  """The running child processes of a process."""
  listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
  return [int(line) for line in listed.stdout.split()]


def alive(pids: list[int], patience: float = 5.0) -> list[int]:
  """The processes that do not end within `patience` seconds."""
  end = time.monotonic() + patience
  while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
    if time.monotonic() > end:
      return left
    time.sleep(0.05)
  return []


def results(out: Path) -> dict[str, bytes]:
  """The content of all files of a job, by relative path."""
  return {
    str(path.relative_to(out)): path.read_bytes()
    for path in sorted(out.rglob("*"))
    if path.is_file()
  }


def records(out: Path) -> dict[str, Any]:
  """All records by image, without the index in the list and the time of the file."""
  found = {}
  for path in sorted((out / "parts").glob("part-??????.jsonl")):
    for line in path.read_bytes().splitlines():
      record = json.loads(line)
      del record["input"], record["file"]["modified"]
      found[record["image"]] = record
  return found


if REQUESTS in os.environ:  # also in the reader processes, which import this module
  log_requests(os.environ[REQUESTS])

if __name__ == "__main__":
  entry()
