"""Kills batch jobs at random moments and compares what comes of them with an undisturbed one.

  python benchmarks/batch_faults.py --kills 30 --renames 5 --out benchmarks/results

Each job of the first kind is killed by -9 at a random moment, started again, and so on until it is
done; those of the second kind are killed while files are renamed, in turn in merging and in the
job. Every
merged file must be the undisturbed one's to the byte, and no temporary file may be left. The
embedded checkpoint is used, and JAX's cache of programs, so that a start takes seconds.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import batch_scenes
from timing import machine

# The program, which stops for a while at the rename that comes up as number RENAME.
SLOW = """
import os, pathlib, time
replace, count = pathlib.Path.replace, [int(os.environ.get("RENAME", "-1"))]
def slow(self, target):
  count[0] -= 1
  if count[0] == -1 and "RENAME" in os.environ:
    open("renaming", "w").close()
    time.sleep(60)
  return replace(self, target)
pathlib.Path.replace = slow
from sam3_jax.cli import entry
entry()
"""


class Jobs:
  """Runs of one job in a folder of their own, with different `--out`."""

  def __init__(self, folder: Path, pictures: int):
    self.folder = folder
    self._list = batch_scenes.write(folder / "scenes", pictures)
    with self._list.open("a") as file:
      for i in range(max(1, pictures // 30)):
        (folder / f"scenes/broken-{i}.jpg").write_bytes(b"broken")
        file.write(json.dumps({"image": f"broken-{i}.jpg", "prompts": ["cat"]}) + "\n")

  def start(self, *typed: str, rename: int | None = None) -> subprocess.Popen:
    environment = os.environ | {
      "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    if rename is not None:
      environment["RENAME"] = str(rename)
    command = [sys.executable, "-c", SLOW, "batch", "--quiet", *typed]
    return subprocess.Popen(command, cwd=self.folder, env=environment)

  def work(self, out: str, rename: int | None = None) -> subprocess.Popen:
    typed = ["--images", str(self._list), "--max-error-rate", "0.5", "--part-size", "8"]
    return self.start(*typed, "--out", out, rename=rename)

  def merge(self, out: str, rename: int | None = None) -> subprocess.Popen:
    return self.start("--merge", "--out", out, rename=rename)

  def result(self, out: str) -> dict[str, bytes]:
    """All files of a job that is finished here."""
    if self.work(out).wait() or self.merge(out).wait():
      raise RuntimeError(f"{out}: the job or its merging failed")
    folder = self.folder / out
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    left = [name for name in files if name.endswith(".partial") or ".begun." in name]
    if left:
      raise RuntimeError(f"{out}: {', '.join(left)} left behind")
    return files

  def kill_while_renaming(self, process: subprocess.Popen) -> None:
    flag = self.folder / "renaming"
    while not flag.exists() and process.poll() is None:
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    flag.unlink(missing_ok=True)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--kills", type=int, default=30, help="jobs killed at random moments")
  parser.add_argument("--renames", type=int, default=5, help="jobs killed while renaming")
  parser.add_argument("--pictures", type=int, default=60)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="folder for batch-faults.md")
  arguments = parser.parse_args()
  rng = random.Random(arguments.seed)
  with tempfile.TemporaryDirectory() as temporary:
    jobs = Jobs(Path(temporary), arguments.pictures)
    jobs.result("first")  # compiles
    start = time.perf_counter()
    wanted = jobs.result("undisturbed")
    seconds = time.perf_counter() - start
    differ = 0
    for i in range(arguments.kills):
      process = jobs.work(f"kill{i}")
      time.sleep(rng.uniform(0, seconds))
      process.send_signal(signal.SIGKILL)
      process.wait()
      differ += jobs.result(f"kill{i}") != wanted
    for i in range(arguments.renames):
      if i % 2 == 0:
        jobs.result(f"rename{i}")
        jobs.kill_while_renaming(jobs.merge(f"rename{i}", rename=i // 2 % 2))
      else:
        jobs.kill_while_renaming(jobs.work(f"rename{i}", rename=rng.randrange(1, 12)))
      differ += jobs.result(f"rename{i}") != wanted
  merging = (arguments.renames + 1) // 2
  text = (
    f"{arguments.kills} jobs killed at random, {arguments.renames} while renaming ({merging} of "
    f"them in merging): {differ} differ from the undisturbed one ({arguments.pictures} pictures, "
    f"{len(wanted)} files); {machine()}."
  )
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "batch-faults.md").write_text(text + "\n")
  return int(differ > 0)


if __name__ == "__main__":
  sys.exit(main())
