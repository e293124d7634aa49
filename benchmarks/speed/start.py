"""Measures the whole command, with an empty and with a filled compilation cache."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed.client import DIRECTORY
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
  """Measures seconds (`first`), CPU seconds and peak memory of `sam3-jax segment`: one run that
  compiles, and `repeats` runs that find their programs in the cache. Raises Unable if it fails."""
  with tempfile.TemporaryDirectory(prefix="sam3-jax-cache-") as directory:
    typed = ["segment", str(image), "--text", "red cat", "--checkpoint", str(bundle)]
    typed += ["--out", f"{directory}/out", *(["--device", device] if device else [])]
    cache = {"JAX_COMPILATION_CACHE_DIR": f"{directory}/cache", "JAX_ENABLE_COMPILATION_CACHE": "1"}
    command = [sys.executable, "-c", PROGRAM, *typed]
    empty = [_run(command, cache)]
    filled = [_run(command, cache) for _ in range(max(1, repeats))]
  return {"segment, empty cache": empty, "segment, filled cache": filled}


def _run(command: list[str], environment: dict[str, str]) -> Figures:
  pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
  start = time.perf_counter()
  with subprocess.Popen(
    command, **pipes, env=os.environ | environment, cwd=DIRECTORY, text=True
  ) as process:
    lines = process.stderr.read().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    errors = " ".join(line for line in lines if not line.isdigit())
    raise Unable(f"it ended with status {process.returncode}: {errors[-200:]}")
  processor = usage.ru_utime + usage.ru_stime
  return {"first": seconds, "processor": processor, "memory": int(lines[-1])}
