"""What the campaigns against batch jobs share: a job's process without a model, and its results.

The engine of the tests stands for the model: it is quick, and its results depend on the pixels and
the prompts alone, to the byte. As a program it is `sam3-jax batch` with that engine; environment
variables make it slow, or make reads hang, as a network mount that is away does.
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

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import batches  # noqa: E402

from sam3_jax.batch import image_bytes  # noqa: E402

HANG = "BATCH_JOB_HANG"  # name of a file that exists while reads of images called hang* block
PAUSE = "BATCH_JOB_PAUSE"  # seconds a batch
COMMAND = (
  "batch", "--quiet", "--max-error-rate", "1", "--device", "cpu", "--batch-images", "2",
  "--part-size", "5",
)  # fmt: skip
RENAME = "BATCH_JOB_RENAME"  # number of the rename at which the process stands still


class _Hanging:
  """The module `os`, but for opening images called hang*, which blocks as in the kernel."""

  def __getattr__(self, name: str) -> Any:
    return getattr(os, name)

  def open(self, path: Any, *arguments: Any) -> int:
    if "hang" in str(path) and os.path.exists(os.environ[HANG]):
      os.read(os.pipe()[0], 1)
    return os.open(path, *arguments)


if HANG in os.environ:  # also where a process for reading imports this module
  image_bytes.os = _Hanging()  # pyright: ignore[reportAttributeAccessIssue]


def entry() -> None:
  """The program."""
  from sam3_jax.cli import main

  _patch()
  batches.Engine.pause = float(os.environ.get(PAUSE, "0"))
  if RENAME in os.environ:
    stand_still(int(os.environ[RENAME]))
  main.entry()


def inside(folder: Path, *typed: str) -> int:
  """Runs the command in this process; returns its exit status."""
  from sam3_jax.cli import main

  _patch()
  with contextlib.chdir(folder):
    return main.main([*COMMAND, *typed])


def _patch() -> None:
  from sam3_jax.batch import pipeline
  from sam3_jax.inference.predictor import Sam3

  pipeline.BACKOFF = (0.05, 0.1, 0.2)
  pipeline.Engine = batches.Engine
  Sam3.from_checkpoint = lambda *_, **__: batches.MODEL


def stand_still(number: int) -> None:
  """Has the process stop for a while before the rename or link that comes up as some number."""
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
  folder: Path, *typed: str, pause: float = 0.0, hang: Path | None = None, rename: int | None = None
) -> Any:
  """Starts a process of a job whose files are in a directory."""
  environment = os.environ | {"JAX_PLATFORMS": "cpu", PAUSE: str(pause)}
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
  """Exit status, what it said, and seconds until it ended; -9 if it had to be killed."""
  began = time.monotonic()
  try:
    _, said = process.communicate(timeout=limit)
  except subprocess.TimeoutExpired:
    process.kill()
    _, said = process.communicate()
  return process.returncode, said, time.monotonic() - began


def descendants(pid: int) -> list[int]:
  """Processes that a process started and that are alive."""
  listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True)
  return [int(line) for line in listed.stdout.split()]


def alive(pids: list[int], patience: float = 5.0) -> list[int]:
  """Those of some processes that do not end."""
  end = time.monotonic() + patience
  while left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]:
    if time.monotonic() > end:
      return left
    time.sleep(0.05)
  return []


def results(out: Path) -> dict[str, bytes]:
  """All files of a job's results, without what names the process or the moment."""
  return {
    str(path.relative_to(out)): path.read_bytes()
    for path in sorted(out.rglob("*"))
    if path.is_file()
  }


def records(out: Path) -> dict[str, Any]:
  """Every record, by image, without its place in the list and its file's time."""
  found = {}
  for path in sorted((out / "parts").glob("part-??????.jsonl")):
    for line in path.read_bytes().splitlines():
      record = json.loads(line)
      del record["input"], record["file"]["modified"]
      found[record["image"]] = record
  return found


if __name__ == "__main__":
  entry()
