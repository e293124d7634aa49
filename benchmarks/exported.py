"""Compares exported programs with the model, on an image, a phrase, a box and a point.

  python benchmarks/exported.py sam3-tiny                  # StableHLO, by JAX without this package
  python benchmarks/exported.py sam3-tiny --to onnx        # onnxruntime; see docs/guides/export.md
  python benchmarks/exported.py sam3-tiny --topology v5e:1x1    # also compiles for a TPU (AOT)
  python benchmarks/exported.py --released --memory 9      # seeded parameters of the released size

The model, the export and the exported programs each run in a process of their own, one after the
other. Each exported program gets the outputs of the earlier exported programs, so errors add up.
The exit status is 1 if a difference exceeds its limit, relative to the largest value of its array:
0 for StableHLO, 1e-4 for ONNX. A process with more than --memory GB of anonymous memory is killed.
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
  parser.add_argument("checkpoint", nargs="?", default="sam3-tiny", help="directory or name")
  parser.add_argument(
    "--released",
    action="store_true",
    help="use seeded parameters of the released size instead of a checkpoint",
  )
  parser.add_argument("--to", choices=list(LIMITS), default="stablehlo", help="format to export")
  parser.add_argument(
    "--topology", help="also compile for this TPU topology, such as v5e:1x1; needs the extra tpu"
  )
  parser.add_argument("--image", type=Path, default=CLONE / "docs" / "scene.jpg")
  parser.add_argument(
    "--memory", type=float, metavar="GB", help="limit of each process's anonymous memory"
  )
  parser.add_argument(
    "--work", type=Path, help="directory that keeps the files for the next run, which reuses them"
  )
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory(prefix="sam3-jax-exported-") as temporary:
    work = (arguments.work or Path(temporary)).resolve()
    work.mkdir(parents=True, exist_ok=True)
    return compare(work, arguments)


def compare(work: Path, arguments: argparse.Namespace) -> int:
  """Runs all steps and prints the table; returns the exit status."""
  exported, image = work / arguments.to, arguments.image.resolve()
  bundle = arguments.checkpoint
  print(f"{machine()}\n")

  def step(name: str, *command: Any) -> str:
    out, seconds, memory = watch([sys.executable, *map(str, command)], arguments.memory)
    print(f"{name}: {seconds:.0f} s, peak {memory / 1e9:.2f} GB", flush=True)
    return out

  if arguments.released:
    bundle = work / "released"
    if not bundle.exists():
      step("seeded parameters", __file__, "_seed", bundle)
  if not exported.exists():
    kind = ["--to", "onnx"] if arguments.to == "onnx" else ["--platforms", "cpu,tpu"]
    command = ["export", bundle, exported, "--text", PHRASE, "--dtype", "float32", "--quiet"]
    step("export", "-c", "from sam3_jax.cli.main import entry; entry()", *command, *kind)
  if not (work / "model.npz").exists():
    step("model", __file__, "_model", bundle, image, work / "model.npz")
  output = step("exported programs", __file__, "_exported", exported, work / "model.npz")
  rows = json.loads(output.splitlines()[-1])
  print("\n| program | seconds | array | largest difference | relative to the largest value |")
  print("|---|---|---|---|---|")
  for row in rows:
    for name, (error, relative) in row["arrays"].items():
      print(f"| {row['program']} | {row['seconds']:.1f} | {name} | {error:.1e} | {relative:.1e} |")
  worst = max(relative for row in rows for _, relative in row["arrays"].values())
  if arguments.topology:
    for name in (*CONCEPTS, *VISUAL):
      file = exported / "tpu" / f"{name}.stablehlo"
      if file.exists():
        print(step(f"{name} for {arguments.topology}", __file__, "_tpu", file, arguments.topology))
  return int(not worst <= LIMITS[arguments.to])


def watch(command: list[str], limit: float | None) -> tuple[str, float, int]:
  """Runs a command; returns its output, its seconds, and its peak anonymous memory in bytes."""
  start, peak = time.perf_counter(), 0
  with tempfile.TemporaryFile("w+") as output:
    process = subprocess.Popen(command, stdout=output)
    while process.poll() is None:
      peak = max(peak, anonymous_memory(process.pid))
      if limit and peak > 1e9 * limit:
        process.kill()
        raise SystemExit(f"killed for using more than {limit} GB of memory: {' '.join(command)}")
      time.sleep(0.05)
    output.seek(0)
    if process.returncode:
      raise SystemExit(f"failed with status {process.returncode}: {' '.join(command)}")
    return output.read(), time.perf_counter() - start, peak


def anonymous_memory(pid: int) -> int:
  """Anonymous memory of a process in bytes; 0 if it has ended."""
  try:
    status = Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0
  rows = [line.split()[1] for line in status.splitlines() if line.startswith("RssAnon:")]
  return 1024 * int(rows[0]) if rows else 0


def seed(bundle: Path) -> None:
  """Writes a bundle of the released size; only one part is in memory at a time."""
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


def run_model(bundle: str, source_image: Path, out: Path) -> None:
  """Saves the inputs of each program as `PROGRAM in NAME` and its outputs as `PROGRAM NAME`."""
  from PIL import Image

  from sam3_jax import Prompt, Sam3, VisualPrompt
  from sam3_jax.inputs.prompts import pack
  from sam3_jax.inputs.visual_prompts import pack_visual
  from sam3_jax.registry import find_checkpoint

  model = Sam3.from_checkpoint(find_checkpoint(bundle), dtype="float32")
  side, visual = model.config.image_size, "visual" in model.params
  with Image.open(source_image) as image:
    pixels = np.asarray(image.convert("RGB").resize((side, side)))
  box, point = (np.multiply(fractions, side).tolist() for fractions in (BOX, POINT))
  prompt, point_prompt = Prompt(PHRASE, [box]), VisualPrompt(points=[point])
  embedding, text = model.encode(pixels, visual=visual), model.encode_text(PHRASE)
  sizes, row = np.array([[side, side]]), np.zeros(1, np.int32)
  inputs: dict[str, Any] = {
    "encode_image": {"pixels": pixels[None]},
    "encode_text": {"tokens": model.tokenizer([PHRASE])},
    "decode": pack([prompt], sizes, image=row, first_id=row, text=text),
  }
  outputs: dict[str, Any] = {
    "encode_image": embedding,
    "encode_text": text,
    "decode": model.decode(embedding, prompt),
  }
  if visual:
    inputs["decode_visual"] = pack_visual([point_prompt], sizes, row)
    outputs["encode_visual"] = embedding.visual
    outputs["decode_visual"] = model.decode_visual(embedding, point_prompt)
  arrays = {f"{name} in {key}": x for name, struct in inputs.items() for key, x in fields(struct)}
  arrays |= {f"{name} {key}": x for name, struct in outputs.items() for key, x in fields(struct)}
  np.savez(out, **arrays)


def fields(struct: Any) -> list[tuple[str, Any]]:
  """The arrays of a struct or a dictionary, with their names."""
  named = struct if isinstance(struct, dict) else vars(struct)
  return [(name, np.asarray(x)) for name, x in named.items() if hasattr(x, "shape")]


def run_exported(directory: Path, model_arrays: Path) -> None:
  """Runs the exported programs one after the other; prints their errors as JSON."""
  expected, manifest = np.load(model_arrays), json.loads((directory / "manifest.json").read_text())
  call = onnx_caller(directory) if manifest["platforms"] == ["onnx"] else jax_caller(directory)
  programs, outputs, rows = manifest["programs"], {}, []
  # Inputs that are all outputs of another program, and that program.
  producers = {"image": "encode_image", "text": "encode_text", "visual": "encode_visual"}
  for name in (*CONCEPTS, *VISUAL):
    if name not in programs:
      continue
    inputs: Any = {}
    for key, spec in programs[name]["inputs"].items():
      if name == "encode_visual":
        inputs = outputs["encode_image"]
      elif key in producers:
        inputs[key] = outputs[producers[key]]
      else:  # the index of the first image is zero, and so is a mask prompt that is not given
        zero = np.zeros(spec["shape"], spec["dtype"])
        inputs[key] = expected.get(f"{name} in {key}", zero).astype(spec["dtype"])
    start = time.perf_counter()
    outputs[name] = call(name, inputs)
    seconds, arrays = time.perf_counter() - start, {}
    for key, got in outputs[name].items():
      if f"{name} {key}" in expected:
        want = expected[f"{name} {key}"].astype(np.float64)
        error = float(np.abs(np.asarray(got, np.float64) - want).max())
        arrays[key] = error, error / float(np.abs(want).max() or 1)
    rows.append({"program": name, "seconds": seconds, "arrays": arrays})
  print(json.dumps(rows))


def jax_caller(directory: Path):
  """Returns a function that runs a StableHLO program with JAX alone."""
  modules: dict[str, Any] = sys.modules
  for name in ("flax", "sam3_jax", "orbax"):
    modules[name] = None  # importing it raises ImportError
  import jax
  from safetensors.flax import load_file

  params = load_file(directory / "params.safetensors")

  def call(name: str, inputs: Any) -> dict[str, np.ndarray]:
    data = bytearray((directory / "cpu" / f"{name}.stablehlo").read_bytes())
    found = jax.jit(jax.export.deserialize(data).call)(params, inputs)
    return {key: np.asarray(x) for key, x in found.items()}

  return call


def onnx_caller(directory: Path):
  """Returns a function that runs an ONNX program with onnxruntime."""
  import onnxruntime

  from sam3_jax.utils.param_tree import flatten

  options = onnxruntime.SessionOptions()
  options.log_severity_level = 3  # errors only; warnings name every constant that it removes

  def call(name: str, inputs: Any) -> dict[str, np.ndarray]:
    session = onnxruntime.InferenceSession(directory / f"{name}.onnx", options)
    input_names = {node.name for node in session.get_inputs()}
    flat = {f"in.{path.replace('/', '.')}": x for path, x in flatten(inputs).items()}
    found = session.run(None, {key: x for key, x in flat.items() if key in input_names})
    return dict(zip((node.name for node in session.get_outputs()), found, strict=True))

  return call


def compile_for_tpu(file: Path, topology: str) -> None:
  """Compiles a program ahead of time for a TPU; prints its peak memory on the chip."""
  import jax

  from sam3_jax.inference import aot

  sharding = jax.sharding.SingleDeviceSharding(aot.described_tpu(topology))
  program = jax.export.deserialize(bytearray(file.read_bytes()))
  args, _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
  memory = jax.jit(program.call).lower(*shapes).compile().memory_analysis()
  print(f"  peak on the chip: {memory.peak_memory_in_bytes / 1e9:.2f} GB")


if __name__ == "__main__":
  steps = {"_seed": seed, "_model": run_model, "_exported": run_exported, "_tpu": compile_for_tpu}
  if len(sys.argv) > 1 and sys.argv[1] in steps:
    first = sys.argv[2] if sys.argv[1] == "_model" else Path(sys.argv[2])
    others = [x if sys.argv[1] == "_tpu" else Path(x) for x in sys.argv[3:]]
    sys.exit(steps[sys.argv[1]](first, *others))
  sys.exit(main())
