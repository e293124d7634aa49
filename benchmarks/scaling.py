"""Estimates the throughput and cost of a batch job on a pod, from host time and chip time.

  python benchmarks/scaling.py --encode 17.6 --decode 4.6 --price PRICE --out benchmarks/results
  python benchmarks/scaling.py --encode 17.6 --decode 4.6 --hosts benchmarks/results/scaling.json

The host time is measured on this machine: CPU seconds of one thread, which other work on the
machine hardly changes. `--hosts` reads it from an earlier run instead. The chip time is given:
`--encode` and `--decode` are the milliseconds that a chip takes for an image and for a prompt,
measured on a chip or estimated by the compiler. `--price` is the price of a chip per hour, in $.
Nothing was run on a pod.
"""

import argparse
import io
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from timing import machine

from sam3_jax import Instances, Masks, Prompt
from sam3_jax.batch.records import make_record
from sam3_jax.inputs.preprocess import read_image, resize

SIZES = ((480, 640), (1080, 1920), (3000, 4000))
CHIPS = (1, 16, 256)
SIDE, GRID = 1008, 288  # sides of the released model's input and masks


class Host(NamedTuple):
  """Host time and bytes for images of one size.

  Attributes:
    size: height and width of an image.
    file_bytes: size of the JPEG file.
    reading: seconds to decode and resize the image.
    mask: seconds per instance to resize its mask and write it as run lengths in JSON.
    record_bytes: bytes per instance in the results.
  """

  size: tuple[int, int]
  file_bytes: int
  reading: float
  mask: float
  record_bytes: float


class Job(NamedTuple):
  """A batch job and the hosts that run it.

  Attributes:
    encode, decode: seconds that a chip takes for an image, and for a prompt.
    prompts, instances: number per image.
    chips_per_host, cores_per_host: of a TPU VM.
  """

  encode: float
  decode: float
  prompts: int
  instances: int
  chips_per_host: int
  cores_per_host: int


def measure(size: tuple[int, int], repeats: int) -> Host:
  """Measures the host time for a synthetic image of this size."""
  height, width = size
  y, x = np.mgrid[:height, :width]
  waves = [127 + 120 * np.sin(x * a + y * b) for a, b in ((0.05, 0.02), (0.01, 0.11), (0.2, 0.1))]
  noise = np.random.default_rng(0).integers(-8, 8, (height, width, 1))
  file = io.BytesIO()
  Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)).save(
    file, "jpeg", quality=90
  )
  data = file.getvalue()
  v, u = np.mgrid[:GRID, :GRID] / GRID
  # A shape with a wavy outline that covers a tenth of the image.
  radius = 0.18 + 0.02 * np.sin(9 * np.arctan2(v - 0.5, u - 0.5))
  logits = (20 * (radius - np.hypot(v - 0.5, u - 0.5))).astype(np.float32)[None]
  boxes = np.array([[0.3, 0.3, 0.7, 0.7]], np.float32) * np.float32([width, height] * 2)
  found = Instances(np.array([1]), np.array([0.9], np.float32), boxes, Masks(logits, size))
  line = make_record(0, "a.jpg", size, [Prompt("a")], [found])
  return Host(
    size=size,
    file_bytes=len(data),
    reading=_seconds(lambda: resize(read_image(data), SIDE), repeats),
    mask=_seconds(lambda: make_record(0, "a.jpg", size, [Prompt("a")], [found]), repeats),
    record_bytes=len(line),
  )


def _seconds(function: Callable[[], object], repeats: int) -> float:
  """The median CPU time of `repeats` calls after the first one."""
  function()
  seconds = []
  for _ in range(repeats):
    start = time.thread_time()
    function()
    seconds.append(time.thread_time() - start)
  return statistics.median(seconds)


def rates(host: Host, job: Job, chips: int) -> dict[str, float]:
  """Images per second of the chips alone and together with the hosts, and their needs per chip."""
  device = chips / (job.encode + job.prompts * job.decode)
  seconds = host.reading + job.instances * host.mask
  cores = chips / job.chips_per_host * job.cores_per_host
  rate = min(device, cores / seconds)
  return {
    "device": device,
    "rate": rate,
    "cores_per_chip": device / chips * seconds,
    "bytes_in": rate * host.file_bytes,
    "bytes_out": rate * job.instances * host.record_bytes,
    "chip_hours_per_million": 1e6 / rate * chips / 3600,
  }


def markdown(hosts: list[Host], job: Job, price: float | None) -> str:
  """The estimates as Markdown tables."""
  money = "" if price is None else f"; ${price:g} per chip and hour"
  lines = [
    f"A chip takes {1e3 * job.encode:g} ms per image and {1e3 * job.decode:g} ms per prompt; "
    f"{job.prompts} prompts and {job.instances} instances per image; "
    f"{job.cores_per_host} cores per {job.chips_per_host} chips{money}.",
    "",
    "| image | JPEG, KB | read and resize, ms | per instance, ms | record of an instance, KB |",
    "|---|---|---|---|---|",
  ]
  for host in hosts:
    lines.append(
      f"| {host.size[1]} x {host.size[0]} | {host.file_bytes / 1e3:.0f} "
      f"| {1e3 * host.reading:.1f} | {1e3 * host.mask:.2f} | {host.record_bytes / 1e3:.1f} |"
    )
  lines += [
    "",
    "| image | chips | images/s, chips alone | images/s with the hosts | cores per chip | MB/s in "
    "| MB/s out | chip hours per million |" + ("" if price is None else " $ per million |"),
    "|---|---|---|---|---|---|---|---|" + ("" if price is None else "---|"),
  ]
  for host in hosts:
    for chips in CHIPS:
      found = rates(host, job, chips)
      hours = found["chip_hours_per_million"]
      lines.append(
        f"| {host.size[1]} x {host.size[0]} | {chips} | {found['device']:.0f} "
        f"| {found['rate']:.0f} | {found['cores_per_chip']:.1f} | {found['bytes_in'] / 1e6:.1f} "
        f"| {found['bytes_out'] / 1e6:.2f} | {hours:,.1f} |"
        + ("" if price is None else f" {hours * price:,.2f} |")
      )
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--encode", type=float, required=True, help="ms per image on a chip")
  parser.add_argument("--decode", type=float, required=True, help="ms per prompt on a chip")
  parser.add_argument("--price", type=float, help="$ per chip and hour")
  parser.add_argument("--prompts", type=int, default=2, help="prompts per image")
  parser.add_argument("--instances", type=int, default=6, help="instances per image")
  parser.add_argument("--chips-per-host", type=int, default=4)
  parser.add_argument("--cores-per-host", type=int, default=112)
  parser.add_argument("--repeats", type=int, default=5, help="timed calls")
  parser.add_argument("--name", default="scaling", help="name of the files")
  parser.add_argument(
    "--hosts", type=Path, help="NAME.json of an earlier run, to use its host times"
  )
  parser.add_argument("--out", type=Path, help="output directory, for NAME.md and NAME.json")
  arguments = parser.parse_args()
  job = Job(
    encode=arguments.encode / 1e3, decode=arguments.decode / 1e3, prompts=arguments.prompts,
    instances=arguments.instances, chips_per_host=arguments.chips_per_host,
    cores_per_host=arguments.cores_per_host,
  )  # fmt: skip
  if arguments.hosts:
    found = json.loads(arguments.hosts.read_text())
  else:
    hosts = [measure(size, arguments.repeats)._asdict() for size in SIZES]
    found = {"machine": machine(), "hosts": hosts}
  text = f"Host: {found['machine']}. "
  text += markdown([Host(**host) for host in found["hosts"]], job, arguments.price)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.name}.md").write_text(text + "\n")
    (arguments.out / f"{arguments.name}.json").write_text(json.dumps(found, indent=2) + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main())
