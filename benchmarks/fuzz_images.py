"""Fuzzes the image readers of `segment` and `batch`, and a few images through the commands.

    python benchmarks/fuzz_images.py --count 500 --seed 0

Images of all supported formats are truncated, bit-flipped, spliced, given other header fields,
turned into decompression bombs, or replaced by PostScript, PDF, archives, pipes etc. A subprocess
reads each of them by header, by path, by bytes and as `batch` does. Faults are crashes, more than
30 seconds, more than 1.5 GB of memory, anything but a one-line ValueError or FileNotFoundError, and
readers that disagree. Prints a summary; exits with 1 if there is a fault.
"""

import argparse
import json
import resource
import select
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from image_mutants import Mutant, base_images, mutants, write

SECONDS, BYTES, LETTERS = 30, 1_500_000_000, 400
CHUNK = 100  # images per subprocess
COMMANDS = 10  # images given to the commands


def read_all(path: Path) -> dict[str, str]:
  """The result of each reader: the size or the error message."""
  from sam3_jax.batch.image_bytes import ImageFile
  from sam3_jax.batch.load_image import load_image
  from sam3_jax.inputs.preprocess import displayed_size, read_image

  def result(read: Callable[[], Any]) -> str:
    try:
      return "size {} {}".format(*read())
    except (ValueError, FileNotFoundError) as error:
      return str(error)
    except BaseException as error:
      return f"FAULT {type(error).__name__}: {error}"

  found = {
    "header": result(lambda: displayed_size(path)),
    "path": result(lambda: read_image(path).shape[:2]),
  }
  if path.is_file():
    data = path.read_bytes()
    found["bytes"] = result(lambda: read_image(data).shape[:2])
  one = load_image(ImageFile(path.name, str(path), None, None), 64, 300_000_000)
  found["batch"] = one.reason or "size {} {}".format(*one.size)
  return found


def faults_of(results: dict[str, str]) -> list[str]:
  """The faults in the results of the readers."""
  faults = [f"{reader}: {one[:200]}" for reader, one in results.items() if one.startswith("FAULT")]
  for reader, one in results.items():
    if not one or "\n" in one or len(one) > LETTERS or "Error" in one.partition(":")[0]:
      faults.append(f"{reader} has no one-line message: {one[:200]!r}")
  ends = {
    one if one.startswith("size ") else "refused" for r, one in results.items() if r != "header"
  }
  if len(ends) > 1:
    faults.append(f"readers disagree: {results}")
  read = next(iter(ends))
  if read.startswith("size ") and results["header"] != read:
    faults.append(f"the header's reader disagrees: {results}")
  return faults


def child(folder: Path) -> None:
  """Reads the files named on stdin; prints the results of each as JSON."""

  resource.setrlimit(resource.RLIMIT_AS, (32 * 2**30,) * 2)  # prevents swapping
  for line in sys.stdin:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    start = time.process_time()  # independent of other processes
    results = read_all(folder / line.strip())
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    seconds = time.process_time() - start
    print(json.dumps({"results": results, "seconds": seconds, "peak": peak}), flush=True)


class Reader:
  """A subprocess that reads images; restarted after it ends."""

  def __init__(self, folder: Path):
    self._folder = folder
    self._process: subprocess.Popen | None = None

  def read(self, name: str) -> dict[str, Any] | str:
    """The results of a file, or how the process ended."""
    if self._process is None:
      command = [sys.executable, "-W", "ignore", __file__, "--child", str(self._folder)]
      self._process = subprocess.Popen(  # stderr: libtiff writes its warnings there
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
      )
    process = self._process
    process.stdin.write(f"{name}\n")
    process.stdin.flush()
    if not select.select([process.stdout], [], [], 10 * SECONDS)[0]:
      self.end()
      return f"hangs for more than {10 * SECONDS} seconds"
    if line := process.stdout.readline():
      return json.loads(line)
    with process:
      status = process.wait()
    self._process = None
    return f"the process ended with status {status}"

  def end(self) -> None:
    """Ends the process."""
    if self._process is not None:
      with self._process:  # closes the pipes
        self._process.kill()
      self._process = None


def run(count: int, seed: int, *, bombs: bool = True) -> tuple[list[str], dict[str, Any]]:
  """Reads `count` mutants; returns the faults and statistics."""
  faults, figures = [], {"read": 0, "refused": 0, "seconds": 0.0, "peak": 0}
  by_kind: Counter[str] = Counter()
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made)
    reader = Reader(folder)
    try:
      for number, found in enumerate(mutants(count, seed, bombs=bombs)):
        if number % CHUNK == 0:
          reader.end()
        path = write(folder, found)
        answer = reader.read(found.name)
        path.unlink()
        if isinstance(answer, str):
          faults.append(f"{found.name}: {answer}")
          continue
        wrong = faults_of(answer["results"])
        if answer["seconds"] > SECONDS:
          wrong.append(f"took {answer['seconds']:.0f} seconds")
        if answer["peak"] > BYTES:
          wrong.append(f"took {answer['peak'] / 1e9:.2f} GB: {answer['results']}")
        faults += [f"{found.name}: {one}" for one in wrong]
        whole = answer["results"]["path"].startswith("size")
        figures["read" if whole else "refused"] += 1
        by_kind[found.name.split("-")[1].partition(".")[0]] += 1
        for key in ("seconds", "peak"):
          figures[key] = max(figures[key], answer[key])
    finally:
      reader.end()
  return faults, figures | {"kinds": dict(by_kind)}


def run_commands(seed: int) -> list[str]:
  """Faults of the commands `segment` and `batch` with some mutants."""
  faults = []
  with tempfile.TemporaryDirectory() as made:
    folder = Path(made) / "images"
    folder.mkdir()
    chosen = [m for m in mutants(400, seed) if m.data is not None][:: 400 // COMMANDS][:COMMANDS]
    for one in [*chosen, Mutant("sound.png", base_images()["png"])]:
      write(folder, one)
    files = sorted(str(path) for path in folder.iterdir())
    program = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
    for command in (
      [*program, "segment", *files, "--text", "cat", "--out", f"{made}/a"],
      [*program, "batch", "--images", str(folder), "--prompts", "cat", "--out", f"{made}/b"],
    ):
      done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
      shown = done.stdout + done.stderr
      name = command[3]
      if done.returncode not in (0, 2):
        faults.append(f"{name} ended with status {done.returncode}: {shown[-300:]}")
      if (
        "Traceback" in shown or "\x1b" in shown or not (Path(made) / "ab"[name == "batch"]).exists()
      ):
        faults.append(f"{name} printed: {shown[-1000:]!r}")
  peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
  if peak > BYTES:
    faults.append(f"a command took {peak / 1e9:.2f} GB")
  return faults


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--count", type=int, default=500)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--no-commands", action="store_true")
  parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.child:
    child(arguments.child)
    return 0
  faults, figures = run(arguments.count, arguments.seed)
  if not arguments.no_commands:
    faults += run_commands(arguments.seed)
  print(
    f"{arguments.count} mutated images, seed {arguments.seed}: {figures['read']} read, "
    f"{figures['refused']} refused, at most {figures['seconds']:.1f} s and "
    f"{figures['peak'] / 1e9:.2f} GB; kinds {figures['kinds']}"
  )
  for fault in faults:
    print(f"FAULT {fault}")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
