"""Measures time and memory of conversion, export and restoring at full size; compares all bits.

  pip install -e ".[reference]"
  python benchmarks/convert.py                 # 860 M parameters: 21 GB of disk, 9 GB of memory
  python benchmarks/convert.py --size tiny     # the same path in a minute or two

Writes seeded weights as `model.safetensors` in the layout of transformers, and the same tensors as
`sam3.pt` by torch.save under Meta's names, which come from a list that the converters do not use.
Each step runs in its own process, whose anonymous memory is sampled every 10 ms; it excludes pages
of mapped files. The exit status is 1 if anything differs or exceeds the memory limit.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from convert_restore import COPIES
from timing import machine
from weights import weights

HERE = Path(__file__).parent
GOLDENS = HERE.parent / "tests" / "goldens"
PHOTO = "coffee"  # as in parity.py, which can reuse the source
LIMIT = 1.5  # anonymous memory of a conversion, relative to the bytes that it writes
COMMAND = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()"]
# The shapes of a tiny sam3.pt do not determine its heads: take the configuration of a bundle.
WITH_CONFIG = """
import dataclasses, sys
from sam3_jax.checkpoint import bundle
from sam3_jax.converters import convert
source, out, tokenizer, directory = sys.argv[1:]
config = dataclasses.replace(bundle.inspect(directory).config, concept_points=True)
convert(source, out, tokenizer=tokenizer, config=config)
"""


def write_meta(source: Path, out: Path) -> None:
  """Writes the tensors of transformers' layout under Meta's names, by torch.save; needs torch.

  tiny_names.tsv has the name in each layout (`*` for a layer) and how the second follows from the
  first. Tensors that only Meta has, the points of the geometry encoder and a row of the position
  table, are seeded.
  """
  import torch
  from safetensors import safe_open

  tensors: dict[str, Any] = {}
  pieces: dict[str, dict[int, Any]] = {}
  shapes = [line.split("\t") for line in (GOLDENS / "tiny_keys.txt").read_text().splitlines()]
  with safe_open(source / "model.safetensors", "pt") as file:
    width = file.get_slice("detector_model.geometry_encoder.final_proj.weight").get_shape()[0]
    for name, theirs, *how in _rows():
      if theirs == "-" and "points_" in name:
        (shape,) = (json.loads(f"[{s.strip('(),')}]") for n, s, _ in shapes if n == name)
        tensors[name] = torch.from_numpy(
          weights(name, tuple(width if n == 128 else n for n in shape))
        )
      pattern = re.escape(theirs).replace(r"\*", r"(\d+)")
      for match in filter(None, (re.fullmatch(pattern, key) for key in file.keys())):  # noqa: SIM118
        target = name.replace("*", match[1]) if match.groups() else name
        array = file.get_tensor(match[0])
        match how:
          case [part] if part.endswith("/3"):
            pieces.setdefault(target, {})[int(part[0])] = array
          case ["T"]:
            tensors[target] = array.T.contiguous()
          case ["[:,1:]"]:
            row = torch.from_numpy(weights(f"{target}.row", (1, 1, array.shape[2])))
            tensors[target] = torch.cat([row, array], 1)
          case [row]:
            number = int(row.split()[1])
            tensors[target] = array[number : number + 1].clone()
          case []:
            tensors[target] = array.clone()
  for target, thirds in pieces.items():
    tensors[target] = torch.cat([thirds[i] for i in range(3)])
  torch.save({"model": tensors}, out)


def _rows() -> list[list[str]]:
  return [line.split("\t") for line in (GOLDENS / "tiny_names.tsv").read_text().splitlines()]


def watch(command: list[Any], **environment: str) -> dict[str, Any]:
  """Runs a process; returns its last line, wall and CPU seconds, and peak anonymous memory."""
  start, peak = time.perf_counter(), 0
  process = subprocess.Popen(
    list(map(str, command)), stdout=subprocess.PIPE, text=True, env=os.environ | environment
  )
  status = Path(f"/proc/{process.pid}/status")
  while True:
    if found := re.search(r"RssAnon:\s+(\d+)", status.read_text()):
      peak = max(peak, 1024 * int(found[1]))
    pid, code, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
      break
    time.sleep(0.01)
  seconds, process.returncode = time.perf_counter() - start, os.waitstatus_to_exitcode(code)
  lines = (process.stdout.read() if process.stdout else "").splitlines()
  if process.returncode:
    raise SystemExit(f"{' '.join(map(str, command))} failed with status {process.returncode}")
  return {
    "seconds": seconds,
    "processor": usage.ru_utime + usage.ru_stime,
    "memory": peak,
    "last_line": lines[-1] if lines else "",
  }


class Bench:
  """Runs the steps in a directory; collects their cost and what differs."""

  def __init__(self, work: Path, size: str, reference: str):
    self.work, self.tiny, self.rows, self.equal = work, size == "tiny", {}, {}
    self.source, self.meta = work / "huggingface", work / "meta"
    if not (self.source / "photo.png").exists():
      make = ["make", "--size", size, "--photo", PHOTO, self.source]
      subprocess.run([reference, HERE / "reference.py", *make], check=True)
    if not (self.meta / "sam3.pt").exists():
      self.meta.mkdir(exist_ok=True)
      subprocess.run([reference, __file__, "--write-meta", self.source, self.meta], check=True)

  def convert(self, step: str, source: Path, target: Path, *options: str) -> Path:
    """Runs `sam3-jax convert` and stores its cost under `step`."""
    shutil.rmtree(target, ignore_errors=True)
    tokenizer = GOLDENS / "tokenizer.model"  # CLIP's, to avoid a download
    command = [*COMMAND, "convert", source, target, "--quiet", *options]
    if self.tiny and step.startswith("meta"):
      bundle = self.work / "bundle"
      command = [sys.executable, "-c", WITH_CONFIG, source, target, tokenizer, bundle]
    elif not options:
      command += ["--tokenizer", tokenizer]
    row = watch(command)
    written = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    self.rows[step] = {**row, "written": written, "ratio": row["memory"] / written}
    print(f"{step}: {row['seconds']:.0f} s, {row['memory'] / written:.2f} of what it wrote")
    return target

  def run(self) -> None:
    """Runs all steps; keeps the bundle made from transformers' layout."""
    bundle = self.convert("huggingface to bundle", self.source, self.work / "bundle")
    second = self.convert("meta to bundle", self.meta / "sam3.pt", self.work / "from-meta")
    ours, theirs = (_manifest(path)["parameters"] for path in (bundle, second))
    both = {name: ours[name] == theirs[name] for name in ours.keys() & theirs.keys()}
    self.equal["parameters of both bundles"] = [sum(both.values()), len(both)]
    only = {name for name in ours.keys() ^ theirs.keys() if not name.startswith("geometry/point_")}
    self.equal["parameters in only one bundle, without Meta's points"] = [0, len(only)]

    exported = self.convert("bundle to meta", second, self.work / "exported", "--to", "meta")
    third = self.convert("exported meta to bundle", exported, self.work / "third")
    first_entries, entries = (
      _manifest(path)["parameters"] | _manifest(path)["unread"] for path in (second, third)
    )
    same = sum(entries.get(name) == entry for name, entry in first_entries.items())
    self.equal["round trip of sam3.pt through a bundle"] = [same, len(first_entries | entries)]
    for path in (exported, third):
      shutil.rmtree(path)
    expected = _tensors(self.source / "model.safetensors")
    for name, path in (("huggingface", bundle), ("meta", second)):
      exported = self.convert(
        f"bundle of {name} to huggingface", path, self.work / "exported", "--to", "huggingface"
      )
      found = _tensors(exported / "model.safetensors")
      same = sum(found.get(name) == entry for name, entry in expected.items())
      self.equal[f"bundle of {name} exported to huggingface"] = [same, len(expected | found)]
      shutil.rmtree(exported)
    shutil.rmtree(second)
    devices = "--xla_force_host_platform_device_count=8"
    for kind in COPIES:
      row = watch([sys.executable, HERE / "convert_restore.py", bundle, kind], XLA_FLAGS=devices)
      self.rows[f"restore, {kind}"] = row | json.loads(row["last_line"])

  def faults(self) -> list[str]:
    """Everything that differs or exceeds a limit."""
    lines = [
      f"{name}: {same} of {count} are equal"
      for name, (same, count) in self.equal.items()
      if same != count
    ]
    lines += [
      f"{step}: a sharded parameter is not held exactly once"
      for step, row in self.rows.items()
      if not row.get("sharded_held_once", True)
    ]
    return lines + [
      f"{step}: {row['ratio']:.2f} of what it wrote in anonymous memory, limit {LIMIT}"
      for step, row in self.rows.items()
      if row.get("ratio", 0) > LIMIT
      and row["written"] > 1e9  # smaller ones are mostly the interpreter
    ]


def _manifest(path: Path) -> dict[str, Any]:
  return json.loads((path / "manifest.json").read_text())


def _tensors(path: Path) -> dict[str, str]:
  """A checksum of dtype, shape and bytes of each tensor in a safetensors file, by name."""
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(length))
  data = np.memmap(path, np.uint8, "r", offset=8 + length)
  header.pop("__metadata__", None)
  found = {}
  for name, entry in header.items():
    begin, end = entry["data_offsets"]
    digest = hashlib.sha256(f"{entry['dtype']} {entry['shape']}".encode())
    digest.update(data[begin:end].data)
    found[name] = digest.hexdigest()
  return found


def markdown(report: dict[str, Any]) -> str:
  """The report as Markdown tables."""
  lines = [
    f"Seeded weights of size {report['size']}, float32; {report['machine']}, load "
    f"{report['load'][0]:.1f} before and {report['load'][1]:.1f} after.",
    "",
    "| conversion | seconds | CPU seconds | written | anonymous memory | relative to written |",
    "|---|---|---|---|---|---|",
  ]
  restored = []
  for step, row in report["steps"].items():
    times = f"| {step} | {row['seconds']:.0f} s | {row['processor']:.0f} s |"
    if "written" in row:
      numbers = row["written"] / 1e9, row["memory"] / 1e9, row["ratio"]
      lines.append("{} {:.2f} GB | {:.2f} GB | {:.2f} |".format(times, *numbers))
    else:
      numbers = row["devices"], row["held"] / 1e9, row["copies"], row["memory"] / 1e9
      restored.append("{} {} | {:.2f} GB | {:.3f} | {:.2f} GB |".format(times, *numbers))
  lines += [
    "",
    "| restore onto devices of this host | seconds | CPU seconds | devices | held by all devices "
    "| copies | anonymous memory |",
    "|---|---|---|---|---|---|---|",
    *restored,
    "",
    "| bit-equal | of |",
    "|---|---|",
    *(f"| {name} | {same:,} of {count:,} |" for name, (same, count) in report["equal"].items()),
  ]
  return "\n".join(lines)


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--size", choices=("full", "tiny"), default="full")
  parser.add_argument(
    "--reference-python", default=sys.executable, help="interpreter with the extra `reference`"
  )
  parser.add_argument(
    "--work",
    type=Path,
    help="directory that keeps the sources and the bundle; the next run reuses the sources",
  )
  parser.add_argument(
    "--out", type=Path, help="output directory of convert-SIZE.md and convert-SIZE.json"
  )
  parser.add_argument("--write-meta", nargs=2, type=Path, help=argparse.SUPPRESS)
  arguments = parser.parse_args()
  if arguments.write_meta:
    source, out = arguments.write_meta
    write_meta(source, out / "sam3.pt")
    return 0
  with tempfile.TemporaryDirectory(prefix="sam3-jax-convert-") as temporary:
    work = (arguments.work or Path(temporary)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    before = os.getloadavg()[0]
    bench = Bench(work, arguments.size, arguments.reference_python)
    bench.run()
  report = {
    "size": arguments.size,
    "machine": machine(),
    "load": [before, os.getloadavg()[0]],
    "steps": bench.rows,
    "equal": bench.equal,
  }
  text = markdown(report)
  print(text)
  if arguments.out:
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = f"convert-{arguments.size}"
    (arguments.out / f"{name}.md").write_text(text + "\n")
    (arguments.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
  for fault in bench.faults():
    print(fault, file=sys.stderr)
  return 1 if bench.faults() else 0


if __name__ == "__main__":
  sys.exit(main())
