"""The command from the start of its process to its end, with an empty cache of compiled programs
and with a filled one."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = (sys.executable, "-c", "from sam3_jax.cli import entry; entry()")

Figures = dict[str, float]


def segment(
  bundle: Path, picture: Path, device: str | None, repeats: int
) -> dict[str, list[Figures]]:
  """Figures of `sam3-jax segment` as `timing.timed` has them: of one run that compiles, and of
  `repeats` that need not."""
  with tempfile.TemporaryDirectory(prefix="sam3-jax-cache-") as folder:
    typed = ["segment", str(picture), "--text", "red cat", "--checkpoint", str(bundle)]
    typed += ["--out", f"{folder}/out", *(["--device", device] if device else [])]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    empty = [_run([*COMMAND, *typed], environment)]
    filled = [_run([*COMMAND, *typed], environment) for _ in range(max(1, repeats))]
  return {"segment, nothing compiled": empty, "segment, compiled before": filled}


def _run(command: list[str], environment: dict[str, str]) -> Figures:
  start = time.perf_counter()
  process = subprocess.Popen(
    command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
  )
  said = process.stderr.read() if process.stderr else ""
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f"`sam3-jax segment` failed: {said.strip()[-200:]}")
  return {
    "first": time.perf_counter() - start,
    "processor": usage.ru_utime + usage.ru_stime,
    "memory": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
  }
