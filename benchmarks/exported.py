"""Exported programs beside the live ones, on an image, a phrase, a box and a point.

  python benchmarks/exported.py sam3-tiny                  # StableHLO, by JAX without this package
  python benchmarks/exported.py sam3-tiny --to onnx        # onnxruntime; see docs/guides/export.md
  python benchmarks/exported.py sam3-tiny --topology v5e:1x1    # compiled for a TPU not here, too
  python benchmarks/exported.py --released --memory 9      # seeded parameters of the released size

Live programs, the export and the exported programs run in processes of their own, one after the
other. Each exported program is given what the ones before it returned, so errors add up. The exit
status is 1 if a difference is over its limit, relative to the largest value of its array: 0 for
StableHLO, 1e-4 for ONNX. A process with more than --memory GB of its own is ended.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from timing import machine

CLONE = Path(__file__).parents[1]
PHRASE, BOX, POINT = "lion", (0.3, 0.2, 0.6, 0.7), (0.4, 0.5)  # fractions of width and height
LIMITS = {"stablehlo": 0.0, "onnx": 1e-4}
CONCEPTS, VISUAL = ("encode_text", "encode_image", "decode"), ("encode_visual", "decode_visual")


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("checkpoint", nargs="?", default="sam3-tiny", help="folder or name")
  parser.add_argument("--released", action="store_true", help="seeded, in place of a checkpoint")
  parser.add_argument("--to", choices=list(LIMITS), default="stablehlo")
  parser.add_argument("--topology", help="of TPUs, such as v5e:1x1; needs the extra tpu")
  parser.add_argument("--image", type=Path, default=CLONE / "docs" / "scene.jpg")
  parser.add_argument("--memory", type=float, help="GB")
  parser.add_argument("--work", type=Path, help="keeps what is written here, and reuses it")
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="sam3-jax-exported-") as temporary:
    work = (arguments.work or Path(temporary)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    return compare(work, arguments)


def compare(work: Path, arguments: argparse.Namespace) -> int:
  """Runs everything, prints the table; the exit status."""
  exported, image = work / arguments.to, arguments.image.resolve()
  bundle = arguments.checkpoint
  print(f"{machine()}\n")

  def step(name: str, *command: Any) -> str:
    out, seconds, memory = watched([sys.executable, *map(str, command)], arguments.memory)
    print(f"{name}: {seconds:.0f} s, {memory / 1e9:.2f} GB at most", flush=True)
    return out

  if arguments.released:
    bundle = work / "released"
    if not bundle.exists():
      step("seeded parameters", __file__, "_seed", bundle)
  if not exported.exists():
    kind = ["--to", "onnx"] if arguments.to == "onnx" else ["--platforms", "cpu,tpu"]
    command = ["export", bundle, exported, "--text", PHRASE, "--dtype", "float32", "--quiet"]
    step("export", "-c", "from sam3_jax.cli.main import entry; entry()", *command, *kind)
  if not (work / "live.npz").exists():
    step("live", __file__, "_live", bundle, image, work / "live.npz")
  found = step("exported", __file__, "_exported", exported, work / "live.npz")
  rows = json.loads(found.splitlines()[-1])
  print("\n| program | seconds | array | largest difference | of its largest value |")
  print("|---|---|---|---|---|")
  for row in rows:
    for name, (off, relative) in row["arrays"].items():
      print(f"| {row['program']} | {row['seconds']:.1f} | {name} | {off:.1e} | {relative:.1e} |")
  worst = max(relative for row in rows for _, relative in row["arrays"].values())
  if arguments.topology:
    for name in (*CONCEPTS, *VISUAL):
      file = exported / "tpu" / f"{name}.stablehlo"
      if file.exists():
        print(step(f"{name} for {arguments.topology}", __file__, "_tpu", file, arguments.topology))
  return int(not worst <= LIMITS[arguments.to])


def watched(command: list[str], limit: float | None) -> tuple[str, float, int]:
  """What a command prints, its seconds, and the most bytes of memory that no file backs."""
  start, most = time.perf_counter(), 0
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen(command, stdout=output)
    while process.poll() is None:
      most = max(most, anonymous_memory(process.pid))
      if limit and most > 1e9 * limit:
        process.kill()
        raise SystemExit(f"over {limit} GB of memory: {' '.join(command)}")
      time.sleep(0.05)
    output.seek(0)
    if process.returncode:
      raise SystemExit(f"failed with status {process.returncode}: {' '.join(command)}")
    return output.read(), time.perf_counter() - start, most


def anonymous_memory(pid: int) -> int:
  """Bytes; 0 of a process that has ended."""
  try:
    status = Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0
  rows = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
  return 1024 * int(rows[0]) if rows else 0


def seed(bundle: Path) -> None:
  """Writes a bundle of the released size, a part in memory at a time."""
  from speed.material import VOCABULARY, drawn

  from sam3_jax.checkpoint.bundle import expected_shapes
  from sam3_jax.checkpoint.writer import Writer
  from sam3_jax.config import RELEASED
  from sam3_jax.utils.param_tree import nest

  parts: dict[str, dict[str, tuple[int, ...]]] = {}
  for path, shape in expected_shapes(RELEASED, visual=True).items():
    parts.setdefault(path.partition("/")[0], {})[path] = shape
  rng, info = np.random.default_rng(0), {"name": "seeded", "licence": "none", "trained": False}
  with Writer(bundle) as writer:
    for part, shapes in parts.items():
      writer.add(part, nest(drawn(rng, shapes))[part])
    writer.finish(RELEASED, VOCABULARY.read_bytes(), info=info)


def live(bundle: str, source_image: Path, out: Path) -> None:
  """Keeps what each program is asked and what it answers, `PROGRAM in NAME` and `PROGRAM NAME`."""
  from PIL import Image

  from sam3_jax import Prompt, Sam3, VisualPrompt
  from sam3_jax.inputs.prompts import pack
  from sam3_jax.inputs.visual_prompts import pack_visual
  from sam3_jax.registry import find_checkpoint

  model = Sam3.from_checkpoint(find_checkpoint(bundle), dtype="float32")
  side, visual = model.config.image_size, "visual" in model.params
  with Image.open(source_image) as image:
    pixels = np.asarray(image.convert("RGB").resize((side, side)))
  box, point = (np.multiply(place, side).tolist() for place in (BOX, POINT))
  prompt, pointed = Prompt(PHRASE, [box]), VisualPrompt(points=[point])
  embedding, text = model.encode(pixels, visual=visual), model.encode_text(PHRASE)
  sizes, row = np.array([[side, side]]), np.zeros(1, np.int32)
  given: dict[str, Any] = {
    "encode_image": {"pixels": pixels[None]},
    "encode_text": {"tokens": model.tokenizer([PHRASE])},
    "decode": pack([prompt], sizes, image=row, first_id=row, text=text),
  }
  answers: dict[str, Any] = {
    "encode_image": embedding,
    "encode_text": text,
    "decode": model.decode(embedding, prompt),
  }
  if visual:
    given["decode_visual"] = pack_visual([pointed], sizes, row)
    answers["encode_visual"] = embedding.visual
    answers["decode_visual"] = model.decode_visual(embedding, pointed)
  arrays = {f"{name} in {key}": x for name, it in given.items() for key, x in fields(it)}
  arrays |= {f"{name} {key}": x for name, it in answers.items() for key, x in fields(it)}
  np.savez(out, **arrays)


def fields(struct: Any) -> list[tuple[str, Any]]:
  """Arrays of a struct or a dictionary by name."""
  named = struct if isinstance(struct, dict) else vars(struct)
  return [(name, np.asarray(x)) for name, x in named.items() if hasattr(x, "shape")]


def exported(folder: Path, kept: Path) -> None:
  """Runs the programs in turn; prints what differs, as JSON."""
  stored, manifest = np.load(kept), json.loads((folder / "manifest.json").read_text())
  call = onnx_caller(folder) if manifest["platforms"] == ["onnx"] else jax_caller(folder)
  programs, answers, rows = manifest["programs"], {}, []
  # The name of an input that is another program's whole answer, and that program's.
  whole = {"image": "encode_image", "text": "encode_text", "visual": "encode_visual"}
  for name in (*CONCEPTS, *VISUAL):
    if name not in programs:
      continue
    given: Any = {}
    for key, one in programs[name]["inputs"].items():
      if name == "encode_visual":
        given = answers["encode_image"]
      elif key in whole:
        given[key] = answers[whole[key]]
      else:  # a mask that is not given, and the first image, are zero
        zero = np.zeros(one["shape"], one["dtype"])
        given[key] = stored.get(f"{name} in {key}", zero).astype(one["dtype"])
    start = time.perf_counter()
    answers[name] = call(name, given)
    seconds, arrays = time.perf_counter() - start, {}
    for key, got in answers[name].items():
      if f"{name} {key}" in stored:
        want = stored[f"{name} {key}"].astype(np.float64)
        off = float(np.abs(np.asarray(got, np.float64) - want).max())
        arrays[key] = off, off / float(np.abs(want).max() or 1)
    rows.append({"program": name, "seconds": seconds, "arrays": arrays})
  print(json.dumps(rows))


def jax_caller(folder: Path):
  """Runs a program of StableHLO with JAX alone."""
  for name in ("flax", "sam3_jax", "orbax"):
    sys.modules[name] = None  # type: ignore
  import jax
  from safetensors.flax import load_file

  params = load_file(folder / "params.safetensors")

  def call(name: str, given: Any) -> dict[str, np.ndarray]:
    data = bytearray((folder / "cpu" / f"{name}.stablehlo").read_bytes())
    found = jax.jit(jax.export.deserialize(data).call)(params, given)
    return {key: np.asarray(x) for key, x in found.items()}

  return call


def onnx_caller(folder: Path):
  """Runs a program with onnxruntime."""
  import onnxruntime

  from sam3_jax.utils.param_tree import flatten

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors; else it names every constant that it removes

  def call(name: str, given: Any) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options)
    wanted = {one.name for one in session.get_inputs()}
    flat = {f"in.{path.replace('/', '.')}": x for path, x in flatten(given).items()}
    found = session.run(None, {key: x for key, x in flat.items() if key in wanted})
    return dict(zip((one.name for one in session.get_outputs()), found, strict=True))

  return call


def tpu(file: Path, topology: str) -> None:
  """Compiles a program for a TPU that is not here."""
  import jax

  from sam3_jax.inference import aot

  place = jax.sharding.SingleDeviceSharding(aot.described_tpu(topology))
  program = jax.export.deserialize(bytearray(file.read_bytes()))
  given, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), given)
  memory = jax.jit(program.call).lower(*shapes).compile().memory_analysis()
  print(f"  on the chip: {memory.peak_memory_in_bytes / 1e9:.2f} GB at most")


if __name__ == "__main__":
  steps = {"_seed": seed, "_live": live, "_exported": exported, "_tpu": tpu}
  if len(sys.argv) > 1 and sys.argv[1] in steps:
    first = sys.argv[2] if sys.argv[1] == "_live" else Path(sys.argv[2])
    last = [x if sys.argv[1] == "_tpu" else Path(x) for x in sys.argv[3:]]
    sys.exit(steps[sys.argv[1]](first, *last))
  sys.exit(main())
