"""The command from the start of its process to its end, with an empty cache of compiled programs
and with a filled one."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed.client import FOLDER
from speed.server import Unable

PROGRAM = """
import atexit, sys
from timing import peak_memory
atexit.register(lambda: print(peak_memory(), file=sys.stderr))
from sam3_jax.cli.main import entry
entry()
"""

Figures = dict[str, float]


def segment(
  bundle: Path, image: Path, device: str | None, repeats: int
) -> dict[str, list[Figures]]:
  """Seconds (`first`), processor seconds and peak memory of `sam3-jax segment`: of one run that
  compiles, and of `repeats` that need not. Raises Unable if it fails."""
  with tempfile.TemporaryDirectory(prefix="sam3-jax-cache-") as folder:
    typed = ["segment", str(image), "--text", "red cat", "--checkpoint", str(bundle)]
    typed += ["--out", f"{folder}/out", *(["--device", device] if device else [])]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache", "JAX_ENABLE_COMPILATION_CACHE": "1"}
    command = [sys.executable, "-c", PROGRAM, *typed]
    empty = [_run(command, cache)]
    filled = [_run(command, cache) for _ in range(max(1, repeats))]
  return {"segment, nothing compiled": empty, "segment, compiled before": filled}


def _run(command: list[str], environment: dict[str, str]) -> Figures:
  pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
  start = time.perf_counter()
  with subprocess.Popen(
    command, **pipes, env=os.environ | environment, cwd=FOLDER, text=True
  ) as process:
    said = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    words = " ".join(line for line in said if not line.isdigit())
    raise Unable(f"it ended with status {process.returncode}: {words[-200:]}")
  seen = {"processor": usage.ru_utime + usage.ru_stime, "memory": int(said[-1])}
  return {"first": seconds} | seen
