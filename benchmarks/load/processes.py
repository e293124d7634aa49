"""Starts the processes of the load test, and measures their memory."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
COMMAND = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
STARTING = 300.0  # seconds at most


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environment(cache: Path) -> dict[str, str]:
  """Variables of the processes: compiled programs are kept in `cache`, whatever their size."""
  path = os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)])
  return os.environ | {
    "PYTHONPATH": path,
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  }


@contextlib.contextmanager
def running(command: list[str], port: int, cache: Path, log: Path) -> Iterator[subprocess.Popen]:
  """A server that responds on `port`; it is ended by SIGTERM, and must then exit in order."""
  with log.open("w") as output:
    process = subprocess.Popen(
      command, env=environment(cache), stdout=output, stderr=output, cwd=log.parent
    )
    try:
      wait_for(port, process, log)
      yield process
      process.send_signal(signal.SIGTERM)
      process.wait(60)
    finally:
      process.kill()
      process.wait()


def serve(checkpoint: str, port: int, *options: str) -> list[str]:
  """The command of the server."""
  return [*COMMAND, "serve", "--checkpoint", checkpoint, "--port", str(port), *options]


def instant(work: Path, port: int) -> list[str]:
  """The command of the server that answers at once."""
  return [sys.executable, "-m", "load.instant", str(work), str(port)]


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
  """Waits until `/readyz` says 200."""
  end = time.monotonic() + STARTING
  while time.monotonic() < end:
    if process.poll() is not None:
      break
    with contextlib.suppress(OSError, http.client.HTTPException):
      if get(port, "/readyz")[0] == 200:
        return
    time.sleep(0.05)
  raise RuntimeError(f"the server did not start: {log.read_text()[-1000:]}")


def get(port: int, path: str) -> tuple[int, bytes]:
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  try:
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()
  finally:
    connection.close()


def material(work: Path, cache: Path, checkpoint: str, *options: str) -> subprocess.Popen:
  """Starts `load.material`, whose standard output is a pipe."""
  command = [sys.executable, "-m", "load.material", str(work), "--checkpoint", checkpoint, *options]
  return subprocess.Popen(command, env=environment(cache), stdout=subprocess.PIPE, text=True)


def last_json(process: subprocess.Popen) -> Any:
  """The JSON value in the last line that a process prints, after its end."""
  output, _ = process.communicate()
  if process.returncode:
    raise RuntimeError(f"{process.args} ended with status {process.returncode}")
  return json.loads(output.strip().splitlines()[-1])


def memory(pid: int) -> int:
  """Resident bytes of a process and its descendants."""
  parents: dict[int, list[int]] = {}
  for path in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      fields = path.read_text().rpartition(")")[2].split()
      parents.setdefault(int(fields[1]), []).append(int(path.parent.name))
  total, waiting = 0, [pid]
  while waiting:
    one = waiting.pop()
    waiting += parents.get(one, [])
    with contextlib.suppress(OSError):
      pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
      total += pages * os.sysconf("SC_PAGE_SIZE")
  return total
