"""Loads `sam3-jax serve` with many clients, and compares every answer with `Sam3.decode`.

  python benchmarks/serve_load.py --seconds 180 --out benchmarks/results

The clients upload images, prompt them and delete most of them, over one connection each. Beside
them, others disconnect, send half a body, or send a byte a second.

The server's throughput is compared with the same work in a loop without a server: encode each
image, decode each prompt. As the clients need the same processors, the loop is timed while they
load a server that answers at once, at the rate at which the real one answered.
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from load import bad_clients, processes
from load.clients import PROMPT, UPLOAD, Client, Material, Pace, read_material
from timing import machine

TARGET = 0.8  # of the loop's prompts per second
GROWTH = 0.05  # of the memory in the last two thirds
LOOP = 30.0  # seconds of the loop, at most
WARM = 0.1  # share of the run that is not counted
SERVED = ("--memory", str(2**28), "--disk", str(2**30), "--quiet")


def load(
  port: int, material: Material, count: int, seconds: float, rate: float | None = None
) -> dict[str, Any]:
  """Runs clients for some seconds; returns their figures.

  Args:
    port: of a server.
    material: images, requests and answers.
    count: number of clients.
    seconds: of the run.
    rate: requests a second of all clients together; None for as many as possible.
  """
  stop, pace = threading.Event(), Pace(rate)
  clients = [Client(port, material, seed, stop, pace) for seed in range(count)]
  start = time.monotonic()
  for client in clients:
    client.start()
  stop.wait(seconds)
  stop.set()
  for client in clients:
    client.join(90)
  return _figures(clients, start + WARM * seconds, start + seconds)


def _figures(clients: list[Client], start: float, end: float) -> dict[str, Any]:
  calls = [call for client in clients for call in client.calls]
  counted = [call for call in calls if start <= call.sent + call.seconds <= end]
  seconds = end - start
  figures: dict[str, Any] = {
    "clients": len(clients),
    "requests_per_second": len(counted) / seconds,
    "images_per_second": sum(call.kind == UPLOAD for call in counted) / seconds,
    "prompts_per_second": sum(call.prompts for call in counted) / seconds,
    "answers_equal": sum(client.exact for client in clients),
    "answers_within_1e-5": sum(client.close for client in clients),
    "busy": sum(client.busy for client in clients),
    "faults": [fault for client in clients for fault in client.faults],
  }
  for kind in (UPLOAD, PROMPT):
    times = sorted(1000 * call.seconds for call in counted if call.kind == kind)
    if len(times) > 1:
      cuts = statistics.quantiles(times, n=20, method="inclusive")
      figures[f"{kind}_ms"] = {"p50": cuts[9], "p95": cuts[18], "max": times[-1]}
  return figures


def serve_and_load(work: Path, cache: Path, arguments: argparse.Namespace) -> dict[str, Any]:
  """The run against the real server, with misbehaving clients."""
  material, port = read_material(work), processes.free_port()
  command = processes.serve(arguments.checkpoint, port, *SERVED)
  samples: list[tuple[float, int]] = []
  with processes.running(command, port, cache, work / "serve.log") as server:
    warm_up(port, material)
    stop, start = threading.Event(), time.monotonic()

    def watch() -> None:
      while not stop.wait(1):
        samples.append((time.monotonic() - start, processes.memory(server.pid)))

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    bad = bad_clients.start_all(port, material.images[0][0], stop)
    figures = load(port, material, arguments.clients, arguments.seconds)
    status, _ = processes.get(port, "/healthz")
    stop.set()
    bad_clients.wait(bad)
  third = arguments.seconds / 3
  return figures | {
    "misbehaving": bad_clients.report(bad),
    "healthy_after": status == 200,
    "exit_status": server.returncode,
    "memory_at_a_third": _around(samples, third),
    "memory_at_the_end": _around(samples, arguments.seconds),
  }


def warm_up(port: int, material: Material) -> None:
  """Sends each request once, so that all programs are compiled."""
  client = Client(port, material, 0, threading.Event(), Pace(None))
  for image, requests in material.images:
    client.cycle(image, requests)
  if client.faults:
    raise RuntimeError(f"the warm-up failed: {client.faults[0]}")


def _around(samples: list[tuple[float, int]], moment: float) -> int:
  """The median of the memory in the 10 seconds before a moment."""
  near = [memory for when, memory in samples if moment - 10 <= when <= moment]
  return int(statistics.median(near)) if near else 0


def loop(
  work: Path, cache: Path, arguments: argparse.Namespace, rate: float | None
) -> dict[str, Any]:
  """The loop's rates, while clients load a server that answers at once."""
  port, seconds = processes.free_port(), min(arguments.seconds, LOOP)
  command = processes.instant(work, port)
  with processes.running(command, port, cache, work / "instant.log"):
    timed = processes.material(work, cache, arguments.checkpoint, "--loop", str(seconds))
    assert timed.stdout is not None  # noqa: S101
    timed.stdout.readline()  # it is ready
    figures = load(port, read_material(work), arguments.clients, seconds, rate)
    rates = processes.last_json(timed)
  if figures["faults"]:
    raise RuntimeError(f"the server that answers at once failed: {figures['faults'][0]}")
  return {f"{name}_per_second": value for name, value in rates.items()} | {
    "requests_per_second": figures["requests_per_second"]
  }


def faults(result: dict[str, Any]) -> list[str]:
  """What a result should not have."""
  served, share = result["served"], result["share_of_loop"]
  found = list(served["faults"])
  if not served["healthy_after"] or served["exit_status"] not in (0, None):
    found.append(f"the server ended with status {served['exit_status']}")
  if share < TARGET:
    found.append(f"the server reaches {share:.0%} of the loop, less than {TARGET:.0%}")
  before, after = served["memory_at_a_third"], served["memory_at_the_end"]
  if after > (1 + GROWTH) * before:
    found.append(f"the memory grew from {before / 1e6:.0f} to {after / 1e6:.0f} MB")
  return found


def text(result: dict[str, Any], found: list[str]) -> str:
  """The result as Markdown."""
  served, paced = result["served"], result["loop"]
  lines = [
    f"{served['clients']} clients for {result['seconds']:.0f} s on {result['checkpoint']}; "
    f"{result['machine']}.",
    "",
    "| | images/s | prompts/s | requests/s |",
    "|---|---|---|---|",
  ]
  rows = [
    ("`sam3-jax serve`", served),
    ("a loop, clients at the same rate", paced),
    ("a loop, clients without a limit", result["loop_unpaced"]),
  ]
  for name, row in rows:
    rates = (row[f"{kind}_per_second"] for kind in ("images", "prompts", "requests"))
    lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in rates) + " |")
  lines += ["", "| latency | p50 | p95 | max |", "|---|---|---|---|"]
  for kind, name in ((UPLOAD, "upload and encode an image"), (PROMPT, "prompt")):
    times = served.get(f"{kind}_ms", {"p50": 0, "p95": 0, "max": 0})
    lines.append(f"| {name} | " + " | ".join(f"{times[k]:.0f} ms" for k in times) + " |")
  memory = " and ".join(
    f"{served[f'memory_at_{when}'] / 1e6:.0f} MB" for when in ("a_third", "the_end")
  )
  bad = "; ".join(
    f"{kind}: " + (", ".join(f"{n} {end}" for end, n in ends.items()) or "0")
    for kind, ends in served["misbehaving"].items()
  )
  lines += [
    "",
    f"{served['answers_equal']} answers equal to those of `Sam3.decode` to the bit, "
    f"{served['answers_within_1e-5']} within 1e-5, {len(served['faults'])} others; "
    f"{served['busy']} times 429. The server reaches {result['share_of_loop']:.0%} of the loop. "
    f"Its memory is {memory} after a third and at the end.",
    "",
    f"Misbehaving clients (connections): {bad}.",
    "",
    *[f"- {fault}" for fault in found[:20]],
  ]
  return "\n".join(lines).rstrip() + "\n"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--seconds", type=float, default=180)
  parser.add_argument("--clients", type=int, default=32)
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--cache", type=Path, help="directory of compiled programs")
  parser.add_argument("--out", type=Path, help="output directory, for serve-load.json and .md")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    cache = arguments.cache or work / "programs"
    if processes.material(work, cache, arguments.checkpoint).wait():
      return 1
    served = serve_and_load(work, cache, arguments)
    paced = loop(work, cache, arguments, served["requests_per_second"])
    unpaced = loop(work, cache, arguments, None)
  result = {
    "machine": machine(),
    "checkpoint": arguments.checkpoint,
    "seconds": arguments.seconds,
    "served": served,
    "loop": paced,
    "loop_unpaced": unpaced,
    "share_of_loop": served["prompts_per_second"] / paced["prompts_per_second"],
  }
  found = faults(result)
  print(text(result, found))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "serve-load.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "serve-load.md").write_text(text(result, found))
  return int(bool(found))


if __name__ == "__main__":
  sys.exit(main())
