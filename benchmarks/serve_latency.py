"""Times `sam3-jax serve`: from its start to the first segmentation, and each kind of request.

  python benchmarks/serve_latency.py --out benchmarks/results

The server starts twice, with an empty and with a full compilation cache. The time of a request
is split by what the server reports; the rest is the network: HTTP, and JSON at both ends.
"""

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from load import processes
from timing import machine

ROOT = Path(__file__).parents[1]
IMAGE = ROOT / "docs" / "scene.jpg"
PHRASE = "lion"
WARM = 3  # calls of each kind that are not counted


class Connection:
  """One HTTP connection to the server."""

  def __init__(self, port: int):
    self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

  def call(self, path: str, body: bytes, kind: str) -> tuple[Any, float]:
    """The answer to a POST, and its milliseconds.

    Raises:
      RuntimeError: the answer is an error.
    """
    start = time.perf_counter()
    self._http.request("POST", path, body, {"Content-Type": kind})
    response = self._http.getresponse()
    value = json.loads(response.read())
    if response.status not in (200, 201):
      raise RuntimeError(f"{path}: {response.status} {value}")
    return value, 1000 * (time.perf_counter() - start)

  def upload(self) -> tuple[Any, float]:
    return self.call("/v1/images", IMAGE.read_bytes(), "image/jpeg")

  def prompt(self, identity: str, **request: Any) -> tuple[Any, float]:
    body = json.dumps(request).encode()
    return self.call(f"/v1/images/{identity}/prompts", body, "application/json")


def start(work: Path, cache: Path, checkpoint: str, repeats: int) -> dict[str, Any]:
  """Starts a server, segments an image, and times requests."""
  port, began = processes.free_port(), time.perf_counter()
  command = processes.serve(checkpoint, port, "--quiet")
  with processes.running(command, port, cache, work / "serve.log"):
    ready = time.perf_counter() - began
    connection = Connection(port)
    uploaded, _ = connection.upload()
    found, _ = connection.prompt(uploaded["id"], concepts=[{"phrase": PHRASE}])
    first = time.perf_counter() - began
    if not found["concepts"][0]["instances"]:
      raise RuntimeError(f"no {PHRASE} was found in {IMAGE.name}")
    requests = measure(connection, uploaded, found, repeats) if repeats else {}
  return {"ready": ready, "first_segmentation": first, "requests": requests}


def measure(
  connection: Connection, uploaded: Any, found: Any, repeats: int
) -> dict[str, dict[str, float]]:
  """Medians and the 95th percentile of each kind of request, in milliseconds."""
  x0, y0, x1, y1 = found["concepts"][0]["instances"][0]["box"]
  identity, click = uploaded["id"], {"points": [[(x0 + x1) / 2, (y0 + y1) / 2]]}
  exemplar = {"phrase": PHRASE, "boxes": [[x0, y0, x1, y1]]}
  kinds: dict[str, Callable[[], tuple[Any, float]]] = {
    "upload and encode an image": connection.upload,
    "a phrase": lambda: connection.prompt(identity, concepts=[{"phrase": PHRASE}]),
    "a phrase, boxes only": lambda: connection.prompt(
      identity, concepts=[{"phrase": PHRASE}], format="none"
    ),
    "a phrase with an exemplar": lambda: connection.prompt(identity, concepts=[exemplar]),
    "4 phrases": lambda: connection.prompt(
      identity, concepts=[{"phrase": word} for word in (PHRASE, "cat", "dog", "tree")]
    ),
    "a click, 3 masks": lambda: connection.prompt(identity, visual=[click]),
    "a click, 1 mask": lambda: connection.prompt(identity, visual=[click | {"multimask": False}]),
  }
  return {
    name: _summary([call() for _ in range(WARM + repeats)][WARM:]) for name, call in kinds.items()
  }


def _summary(calls: list[tuple[Any, float]]) -> dict[str, float]:
  parts: dict[str, list[float]] = {}
  for value, total in calls:
    own = value["milliseconds"]
    row = {"total": total, "network": total - sum(own.values())} | own
    row["masks"] = row.pop("masks", 0.0) + row.pop("read", 0.0)
    row["device"] = row.pop("decode", 0.0) + row.pop("encode", 0.0)
    for name, milliseconds in row.items():
      parts.setdefault(name, []).append(milliseconds)
  cuts = statistics.quantiles(parts["total"], n=20, method="inclusive")
  return {name: statistics.median(values) for name, values in parts.items()} | {"p95": cuts[18]}


def text(result: dict[str, Any]) -> str:
  """The result as Markdown."""
  lines = [
    f"{result['checkpoint']}, {IMAGE.name} (640 x 480), medians of {result['repeats']} calls over "
    f"one connection; {result['machine']}.",
    "",
    "| milliseconds | total | p95 | network | queue | device | masks, or reading the image |",
    "|---|---|---|---|---|---|---|",
  ]
  for name, row in result["full"]["requests"].items():
    columns = (row[key] for key in ("total", "p95", "network", "queue", "device", "masks"))
    lines.append(f"| {name} | " + " | ".join(f"{value:.1f}" for value in columns) + " |")
  lines += ["", "| compilation cache | ready after | first segmentation after |", "|---|---|---|"]
  for cache in ("empty", "full"):
    row = result[cache]
    lines.append(f"| {cache} | {row['ready']:.1f} s | {row['first_segmentation']:.1f} s |")
  return "\n".join(lines) + "\n"


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--repeats", type=int, default=40)
  parser.add_argument("--checkpoint", default="sam3-tiny")
  parser.add_argument("--out", type=Path, help="output directory, for serve-latency.json and .md")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as temporary:
    work = Path(temporary)
    empty = start(work, work / "programs", arguments.checkpoint, 0)
    full = start(work, work / "programs", arguments.checkpoint, arguments.repeats)
  result = {
    "machine": machine(),
    "checkpoint": arguments.checkpoint,
    "repeats": arguments.repeats,
    "empty": empty,
    "full": full,
  }
  print(text(result))
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "serve-latency.json").write_text(json.dumps(result, indent=2) + "\n")
    (arguments.out / "serve-latency.md").write_text(text(result))
  return 0


if __name__ == "__main__":
  sys.exit(main())
