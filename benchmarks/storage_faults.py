"""Runs batch jobs on a store that fails, kills their processes, and compares with a local job.

  python benchmarks/storage_faults.py --images 2000 --processes 4 --kills 20

The store is a server on this machine: `tests/buckets.py` for `gs`, moto for `s3`, and for `hf` (a
dataset of the hub) and `https` (a list of addresses), which are read only, that of
`tests/object_servers.py`; their results are written locally. The store is behind a server that
answers some requests with an error, cuts answers off and drops connections, also after the request
has taken effect; listings of `gs` are a second late. Processes are killed by SIGKILL at random
moments of their work and started again. The merged file must be byte-equal to that of a local job,
and the server must have received no request that the policy of retries does not count.

Then, without faults: the throughput of a job on the store and of a local job, side by side; the
memory of the process while it works; and the memory to list a million names. `batch_job.py`
replaces the model by a fake one, so reading and writing is all that takes time.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import batch_job
import numpy as np
from batch_job import batches
from timing import machine

sys.path.insert(0, str(batch_job.ROOT / "tests"))

import buckets
import object_servers

OPTIONS = ("--prompts", "cat, dog", "--part-size", "25", "--batch-images", "8")
LIST = """
import resource, sys
from sam3_jax.storage.find import find_objects
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.storage.store import locate
use = {"find": lambda url: sum(1 for _ in find_objects(url).objects),
       "inputs": lambda url: len(list_inputs(url, "cat"))}[sys.argv[1]]
locate("gs://bucket/x")[0].stat(locate("gs://bucket/x")[1])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
count = use("gs://bucket/images")
print(count, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


class Bucket:
  """A bucket called `bucket`, behind a server that makes faults.

  Attributes:
    faults: the server that makes faults.
    variables: of the environment, with which a process finds the bucket.
    images: arguments of the command for the images.
    local_images: those for the same images on this machine.
    results: where results are written, with a slash at its end.
  """

  local_images = ("--images", "images")

  def __init__(self, scheme: str, folder: Path, faults: Any, variables: dict[str, str]):
    self.folder, self.faults, self.variables = folder, faults, variables
    self.results = f"{scheme}://bucket/"
    self.images = ("--images", f"{self.results}images")

  def upload(self, images: Path) -> None:
    """Puts the files of a directory below `images/`, and waits until they are listed."""
    for path in sorted(images.iterdir()):
      self.put(f"images/{path.name}", path.read_bytes())
    time.sleep(1.5)

  def put(self, name: str, data: bytes) -> None:
    self._path(name).write(data)

  def get(self, name: str) -> bytes:
    """A result."""
    return self._path(name).read_bytes()

  def _path(self, name: str) -> Any:
    from sam3_jax.storage.objects import ObjectPath

    return ObjectPath(f"{self.results}{name}")


class Dataset(Bucket):
  """A dataset of the hub, behind a server that makes faults; results are local."""

  def __init__(self, server: Any, folder: Path, faults: Any, variables: dict[str, str]):
    super().__init__("hf", folder, faults, variables)
    self.server, self.results = server, "results/"
    self.images = ("--images", "hf://datasets/org/data/images")

  def put(self, name: str, data: bytes) -> None:
    self.server.files[f"/data/{name}"] = data

  def get(self, name: str) -> bytes:
    return (self.folder / self.results / name).read_bytes()


class WebServer(Dataset):
  """Images by address, behind a server that makes faults; results are local."""

  local_images = ("--images", "local.jsonl")

  def __init__(self, server: Any, folder: Path, faults: Any, variables: dict[str, str]):
    super().__init__(server, folder, faults, variables)
    self.root = f"{faults.address}/data/"
    self.images = ("--images", "web.jsonl", "--allow-https")

  def upload(self, images: Path) -> None:
    super().upload(images)
    names = [f"images/{path.name}" for path in sorted(images.iterdir())]
    for file, root in ("web.jsonl", self.root), ("local.jsonl", ""):
      lines = [json.dumps({"image": root + name}) for name in names]
      (self.folder / file).write_text("\n".join(lines))

  def get(self, name: str) -> bytes:
    """A result, in which images have their local names."""
    return super().get(name).replace(self.root.encode(), b"")


READ_ONLY = {"hf": Dataset, "https": WebServer}


@contextlib.contextmanager
def bucket(scheme: str, folder: Path, seed: int) -> Iterator[Bucket]:
  """Starts the servers, and sets the variables of the environment for this process too."""
  faults = object_servers.Faults(seed=seed)
  variables = {"TMPDIR": str(folder)}
  with contextlib.ExitStack() as stack:
    stack.enter_context(object_servers.serving(faults))
    if scheme in READ_ONLY:
      server = stack.enter_context(object_servers.serving(object_servers.Files()))
      faults.upstream = server.server_port
      variables |= {"HF_ENDPOINT": faults.address}
      yield READ_ONLY[scheme](server, folder, faults, variables)
      return
    if scheme == "gs":
      server = stack.enter_context(object_servers.serving(buckets.Server()))
      server.lag, faults.upstream = 1.0, server.server_port
      variables |= {"STORAGE_EMULATOR_HOST": faults.address, "FSSPEC_GS_TOKEN": "anon"}
    else:
      faults.upstream = stack.enter_context(object_servers.moto())
      variables |= {
        "AWS_ENDPOINT_URL": faults.address, "AWS_ACCESS_KEY_ID": "a", "AWS_DEFAULT_REGION":
        "us-east-1", "AWS_SECRET_ACCESS_KEY": "b",
      }  # fmt: skip
    os.environ |= variables
    import fsspec

    from sam3_jax.storage import store

    store._open.cache_clear()
    if scheme == "gs":
      fsspec.config.conf["gs"] = {"token": "anon"}
    yield Bucket(scheme, folder, faults, variables)


def make_images(folder: Path, count: int) -> Path:
  """Writes the images, one of which cannot be read; returns their directory."""
  batches.write_images(folder / "images", count)
  (folder / "images" / "001-broken.png").write_bytes(b"broken")
  return folder / "images"


def local_job(folder: Path, images: tuple[str, ...]) -> bytes:
  """Does the job locally; returns the merged file."""
  arguments = (*images, "--out", "local", *OPTIONS)
  if batch_job.run_inline(folder, *arguments) or batch_job.run_inline(
    folder, "--merge", "--out", "local"
  ):
    raise RuntimeError("the local job failed")
  return (folder / "local" / "annotations.json").read_bytes()


def kill_campaign(
  folder: Path, store: Bucket, processes: int, kills: int, rng: random.Random
) -> tuple[list[str], dict[str, Any]]:
  """Does the job in the bucket, while processes are killed; returns the faults and the counts."""
  log, faults = folder / "requests", list[str]()
  before = store.faults.requests
  variables = store.variables | {batch_job.REQUESTS: str(log)}

  def start(process: int) -> Any:
    return batch_job.start(
      folder, *store.images, "--out", f"{store.results}out", *OPTIONS, "--process", str(process),
      "--processes", str(processes), pause=0.1, variables=variables,
    )  # fmt: skip

  running, killed, runs = {i: start(i) for i in range(processes)}, 0, processes
  each = len(list((folder / "images").iterdir())) // (kills + 1)  # requests between two kills
  next_kill = before + rng.randint(1, each)
  while running:
    time.sleep(0.05)
    if killed < kills and store.faults.requests >= next_kill:
      victim = rng.choice(list(running))
      if running[victim].poll() is None:
        running[victim].kill()
        killed, next_kill = killed + 1, store.faults.requests + rng.randint(each // 2, each)
    for i, process in list(running.items()):
      if process.poll() is None:
        continue
      _, errors = process.communicate()
      if process.returncode == 0:
        del running[i]
      elif process.returncode in (-9, 75):
        running[i] = start(i)
        runs += 1
      else:
        faults.append(f"process {i}: exit status {process.returncode}: {errors}")
        del running[i]
    if killed < kills and not running:
      faults.append(f"the job was done after {killed} kills; give more --images")
  logged = log.read_bytes()
  received = store.faults.requests - before
  # A process that is killed may have logged requests of its threads that it has not made.
  if received > len(logged):
    faults.append(f"{received - len(logged)} requests were made that no policy counts")
  return faults, {
    "runs": runs, "kills": killed, "requests": received, "logged": len(logged),
    "repeated": logged.count(b"r"), "faults": store.faults.faults,
  }  # fmt: skip


def campaign(
  scheme: str,
  images: int,
  processes: int,
  kills: int,
  rate: float,
  seed: int,
  log: Callable[[str], object] = lambda _: None,
) -> tuple[list[str], dict[str, Any]]:
  """Compares a job on a failing bucket, whose processes are killed, with a local job.

  Returns:
    What is wrong, and counts.
  """
  rng = random.Random(seed)
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    with bucket(scheme, folder, seed) as store:
      store.upload(make_images(folder, images))
      wanted = local_job(folder, store.local_images)
      log("local job done")
      store.faults.rate = rate
      found, counts = kill_campaign(folder, store, processes, kills, rng)
      log(str(counts))
      store.faults.rate = 0.0
      if batch_job.run_inline(folder, "--merge", "--out", f"{store.results}out"):
        found.append("merging failed")
      if store.get("out/annotations.json") != wanted:
        found.append("the merged file differs from that of the local job")
      if store.get("out/errors.jsonl") != (folder / "local" / "errors.jsonl").read_bytes():
        found.append("the list of failures differs from that of the local job")
  return found, counts


def throughput(scheme: str, images: int, rounds: int, pause: float) -> dict[str, Any]:
  """Times jobs on the bucket and local jobs in turn, and the memory of those on the bucket."""
  seconds: dict[str, list[float]] = {"local": [], "bucket": []}
  memory: list[float] = []
  with tempfile.TemporaryDirectory() as temporary:
    folder = Path(temporary)
    with bucket(scheme, folder, 0) as store:
      store.upload(make_images(folder, images))
      for number in range(rounds):
        for kind, given, out in (
          ("local", store.local_images, f"again{number}"),
          ("bucket", store.images, f"{store.results}on-store{number}"),
        ):
          process = batch_job.start(
            folder, *given, "--out", out, *OPTIONS, pause=pause,
            variables=store.variables | {batch_job.TIMES: str(folder / "times")},
          )  # fmt: skip
          if kind == "bucket":
            memory = list(_memory(process))
          status, errors, _ = batch_job.finish(process)
          if status:
            raise RuntimeError(errors)
          seconds[kind].append(json.loads((folder / "times").read_text()))
  half = len(memory) // 2
  return {
    "local": float(np.median(seconds["local"])), "bucket": float(np.median(seconds["bucket"])),
    "early": float(np.median(memory[half - half // 4 : half])),
    "late": float(np.median(memory[-half // 4 :])), "highest": max(memory),
  }  # fmt: skip


def _memory(process: Any) -> Iterator[float]:
  """Resident memory of a process in MB, ten times a second, until it ends."""
  while process.poll() is None:
    with contextlib.suppress(OSError, IndexError):
      pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
      yield pages * resource.getpagesize() / 2**20
    time.sleep(0.1)


class _ManyNames(buckets.Server):
  """A bucket that lists made-up names."""

  def __init__(self, count: int):
    super().__init__()
    self.count = count

  def list(self, query):
    start, size = int(query.get("pageToken") or 0), int(query.get("maxResults", 1000))
    stop = min(start + size, self.count)
    items = [
      {"name": f"images/camera-01/{i:09}.jpg", "size": "81234", "generation": str(17 * 10**14 + i)}
      for i in range(start, stop)
    ]
    return {"items": items} | ({"nextPageToken": str(stop)} if stop < self.count else {})


def listing(count: int) -> dict[str, float]:
  """Memory in MB that listing `count` names adds to a process; and its list of inputs."""
  found = {}
  with object_servers.serving(_ManyNames(count)) as server:
    variables = {"STORAGE_EMULATOR_HOST": server.address, "FSSPEC_GS_TOKEN": "anon"}
    for kind in ("find", "inputs"):
      done = subprocess.run(
        [sys.executable, "-c", LIST, kind], env=os.environ | variables, capture_output=True,
        text=True, check=True,
      )  # fmt: skip
      number, megabytes = done.stdout.split()
      if int(number) != count:
        raise RuntimeError(f"{number} names were listed")
      found[kind] = float(megabytes)
  return found


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--store", choices=["gs", "s3", *READ_ONLY], default="gs")
  parser.add_argument("--images", type=int, default=2000)
  parser.add_argument("--processes", type=int, default=4)
  parser.add_argument("--kills", type=int, default=20, help="0 for no job with faults")
  parser.add_argument("--rate", type=float, default=0.03, help="fraction of requests that fail")
  parser.add_argument("--names", type=int, default=1_000_000, help="to list")
  parser.add_argument("--rounds", type=int, default=3, help="of the comparison of throughput")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--out", type=Path, help="output directory, for storage-faults.md")
  options = parser.parse_args()
  faults, lines = list[str](), list[str]()
  if options.kills:
    faults, counts = campaign(
      options.store, options.images, options.processes, options.kills, options.rate, options.seed,
      lambda line: print(line, flush=True),
    )  # fmt: skip
    lines.append(
      f"{options.images:,} images on {options.store}://, {options.processes} processes, "
      f"{counts['kills']} kills, {counts['faults']:,} faults in {counts['requests']:,} requests "
      f"({counts['repeated']:,} repeated by the policy): {len(faults)} differences from the local "
      "job."
    )
  for pause in (0.0, 0.2) if options.rounds else ():
    times = throughput(options.store, options.images, options.rounds, pause)
    lines.append(
      f"With {pause} s of device time per batch of 8: {options.images / times['local']:.0f} "
      f"images/s local, {options.images / times['bucket']:.0f} on the store "
      f"({times['local'] / times['bucket']:.0%}); memory on the store {times['early']:.0f} MB "
      f"before the middle of the job, {times['late']:.0f} MB at its end."
    )
    print(lines[-1], flush=True)
  if options.names:
    memory = listing(options.names)
    lines.append(
      f"Listing {options.names:,} names adds {memory['find']:.0f} MB; the list of inputs of a job "
      f"{memory['inputs']:.0f} MB."
    )
  lines.append(f"{machine()}.")
  print("\n".join([*faults, *lines]))
  if options.out:
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"storage-faults-{options.store}.md").write_text("\n\n".join(lines) + "\n")
  return int(bool(faults))


if __name__ == "__main__":
  sys.exit(main())
