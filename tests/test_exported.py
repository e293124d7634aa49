"""Programs as files: what a process that has only JAX makes of them, and what says what they take.

`test_export.py` has checkpoints in other layouts.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.flax import load_file
from support import difference
from training_model import CONFIG, parameters, visual_parameters

from sam3_jax import Prompt, Sam3, VisualPrompt
from sam3_jax.checkpoint import bundle
from sam3_jax.cli.main import main
from sam3_jax.export.bundle import export
from sam3_jax.export.exportable import Sizes, functions
from sam3_jax.export.onnx import write_onnx
from sam3_jax.inference import aot
from sam3_jax.inputs.prompts import pack
from sam3_jax.inputs.visual_prompts import pack_visual
from sam3_jax.utils.param_tree import flatten, nest

pytest.importorskip("flatbuffers")

PHOTO = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
BOX = [3, 4, 20, 25]
ALONE = """
import sys
for name in ("flax", "sam3_jax", "orbax"):
  sys.modules[name] = None
import jax, numpy as np
from safetensors.flax import load_file

params = load_file("exported/params.safetensors")

def call(name, inputs):
  with open(f"exported/cpu/{name}.stablehlo", "rb") as file:
    return jax.jit(jax.export.deserialize(file.read()).call)(params, inputs)

given = dict(np.load("given.npz"))
rows = {"image_index": np.zeros(1, np.int32)}
image = call("encode_image", {"pixels": given.pop("pixels")})
text = call("encode_text", {"tokens": given.pop("tokens")})
prompts = {name: given.pop(name) for name in ("boxes", "positive", "valid")}
found = call("decode", {"image": image, "text": text, **rows, **prompts})
visual = call("encode_visual", image)
pointed = {"visual": visual, **rows, **given}
three, one = (call(name, pointed) for name in ("decode_visual", "decode_visual_single"))
parts = {"image": image, "text": text, "found": found, "visual": visual, "three": three, "one": one}
np.savez("got.npz", **{f"{part}.{name}": x for part, it in parts.items() for name, x in it.items()})
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer_path):
  """A bundle with a head for visual prompts, and its export."""
  folder = tmp_path_factory.mktemp("export")
  params = nest(parameters() | visual_parameters())
  info = {"name": "toy", "licence": "CC0-1.0", "trained": False}
  bundle.save(folder / "toy", params, CONFIG, tokenizer_path.read_bytes(), info=info)
  platforms = "cpu", "tpu"
  export(folder / "toy", folder / "exported", platforms=platforms, phrases=["lion"])
  return folder


def run(folder: Path, code: str) -> str:
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=folder,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.mark.slow
def test_equals_the_live_programs(folder):
  """Bit-equal, in a process that cannot import this package."""
  model = Sam3.from_checkpoint(folder / "toy", dtype="float32")
  embedding, text = model.encode(PHOTO, visual=True), model.encode_text("lion")
  found = model.decode(embedding, Prompt("lion", [BOX]))
  mask = np.random.default_rng(1).normal(size=(CONFIG.mask_size, CONFIG.mask_size))
  prompt = VisualPrompt(points=[[5, 6]], box=BOX, mask=mask)
  three, one = (model.decode_visual(embedding, prompt, multimask=many) for many in (True, False))

  sizes, row = np.array([[32, 32]]), np.zeros(1, np.int32)
  packed = pack([Prompt("lion", [BOX])], sizes, image=row, first_id=row, text=text)
  pointed = pack_visual([prompt], sizes, row)
  np.savez(
    folder / "given.npz",
    pixels=PHOTO[None], tokens=model.tokenizer(["lion"]),
    **{name: getattr(packed, name) for name in ("boxes", "positive", "valid")},
    **{name: getattr(pointed, name) for name in ("xy", "labels", "mask", "has_mask")},
  )  # fmt: skip
  run(folder, ALONE)
  live = {
    "image": embedding, "text": text, "found": found,
    "visual": embedding.visual, "three": three, "one": one,
  }  # fmt: skip
  with np.load(folder / "got.npz") as got:
    names = [name for name in got if name != "image.trunk"]
    assert len(names) == 4 + 2 + 5 + 3 + 2 * 3
    for name in names:
      part, field = name.split(".")
      np.testing.assert_array_equal(got[name], getattr(live[part], field), err_msg=name)


@pytest.mark.slow
def test_code_of_the_guide(folder):
  """The guide's code, on this model's smaller images."""
  guide = (Path(__file__).parents[1] / "docs" / "guides" / "export.md").read_text(encoding="utf-8")
  [code] = re.findall(r"```python\n(.*?)```", guide, re.S)
  (folder / "docs").mkdir()
  Image.fromarray(PHOTO).save(folder / "docs" / "scene.jpg")
  printed = run(folder, code.replace("360", str(CONFIG.image_size)))
  assert re.fullmatch(r"0\.\d+ \[.*\]\n", printed, re.S)


@pytest.mark.slow
def test_manifest(folder):
  manifest = json.loads((folder / "exported" / "manifest.json").read_text())
  assert manifest["info"]["licence"] == "CC0-1.0"
  assert manifest["dtype"] == "float32"
  pixels = manifest["programs"]["encode_image"]["inputs"]["pixels"]
  assert (pixels["shape"], pixels["dtype"]) == ([1, 32, 32, 3], "uint8")
  assert manifest["programs"]["decode"]["outputs"]["scores"]["shape"] == [1, CONFIG.queries]
  params = load_file(folder / "exported" / "params.safetensors")
  for platform in manifest["platforms"]:
    for name, program in manifest["programs"].items():
      data = (folder / "exported" / platform / f"{name}.stablehlo").read_bytes()
      exported = jax.export.deserialize(bytearray(data))
      assert exported.platforms == (platform,)
      (given, inputs), _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
      assert {key: x.shape for key, x in given.items()} == {k: x.shape for k, x in params.items()}
      assert inputs.keys() == program["inputs"].keys()
      found = jax.tree.unflatten(exported.out_tree, exported.out_avals)
      shapes = {key: list(x.shape) for key, x in found.items()}
      assert shapes == {key: x["shape"] for key, x in program["outputs"].items()}


@pytest.mark.slow
def test_sizes_and_bfloat16(folder, tmp_path):
  """As for a TPU; with the token ids of one phrase."""
  sizes = Sizes(images=2, prompts=3, boxes=4, points=5, max_detections=2)
  manifest = export(folder / "toy", tmp_path / "out", platforms=["tpu"], sizes=sizes)
  found = manifest["programs"]["decode"]["outputs"]
  assert found["scores"] == {"shape": [3, 2], "dtype": "float32", "is": "of each query, in [0, 1]"}
  assert found["mask_logits"]["dtype"] == "bfloat16"
  assert load_file(tmp_path / "out" / "params.safetensors").keys() >= parameters().keys()
  assert json.loads((tmp_path / "out" / "tokens.json").read_text()).keys() == {"visual"}


@pytest.mark.slow
def test_command(folder, tmp_path, capsys):
  typed = ["export", str(folder / "toy"), str(tmp_path / "out"), "--platforms", "cpu", "--quiet"]
  assert main(typed) == 0
  assert (tmp_path / "out" / "cpu" / "decode.stablehlo").is_file()
  assert capsys.readouterr().out == ""
  assert main(typed) == 2
  captured = capsys.readouterr()
  assert "exists already" in captured.err
  assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
  ("typed", "message"),
  [
    (["nowhere", "out"], "no checkpoint 'nowhere'"),
    (
      ["sam3-tiny", "out", "--platforms", "cpu,abacus"],
      "platform 'abacus' is not one of tpu, cuda",
    ),
    (["sam3-tiny", "out", "--platforms", ","], "no platform given; name some of tpu"),
    (
      ["sam3-tiny", "out", "--to", "onnx", "--platforms", "tpu,cpu"],
      "leave out platforms 'tpu,cpu'",
    ),
    (["sam3-tiny", "out", "--prompts", "0"], "--prompts"),
  ],
)
def test_errors(typed, message, tmp_path, capsys, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert main(["export", *typed]) == 2
  captured = capsys.readouterr()
  assert message in captured.err
  assert captured.err.count("\n") == 1
  assert list(tmp_path.iterdir()) == []


def test_without_flatbuffers(folder, tmp_path, monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"flatbuffers: pip install 'sam3-jax\[export\]'"):
    export(folder / "toy", tmp_path / "out")


@pytest.mark.tpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["encode_image", "encode_text", "decode", "decode_visual"])
def test_compiles_for_a_tpu(folder, name):
  device = jax.sharding.SingleDeviceSharding(aot.described_tpu("v5e:1x1"))
  exported = jax.export.deserialize(
    bytearray((folder / "exported" / "tpu" / f"{name}.stablehlo").read_bytes())
  )
  args, _ = jax.tree.unflatten(exported.in_tree, exported.in_avals)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), args)
  compiled = jax.jit(exported.call).lower(*shapes).compile()
  assert compiled.memory_analysis().argument_size_in_bytes > 0


@pytest.mark.filterwarnings("default")  # of jax2onnx and what it imports
def test_onnx(folder, tmp_path):
  """In onnxruntime, relative to each output's largest value."""
  pytest.importorskip("jax2onnx")
  onnxruntime = pytest.importorskip("onnxruntime")
  params = load_file(folder / "exported" / "params.safetensors")
  rng = np.random.default_rng(0)
  kinds = {
    "bool": lambda shape: rng.random(shape) < 0.5,
    "int32": lambda shape: np.zeros(shape, np.int32),
    "float32": lambda shape: rng.random(shape, np.float32),
  }
  function, shapes = functions(CONFIG, "float32", Sizes(), visual=True)["decode"]
  inputs = jax.tree.map(lambda x: kinds[x.dtype.name](x.shape), shapes)
  requested = []

  def read(paths):
    requested.extend(paths)
    return {path: np.asarray(params[path]) for path in paths}

  write_onnx(tmp_path / "decode.onnx", function, params, shapes, read)
  assert {path.partition("/")[0] for path in requested} == {
    "decoder", "fusion", "geometry", "masks", "scoring",
  }  # fmt: skip
  session = onnxruntime.InferenceSession(tmp_path / "decode.onnx")
  flat = {f"in.{path.replace('/', '.')}": x for path, x in flatten(inputs).items()}
  names = {one.name for one in session.get_inputs()}
  got = session.run(None, {key: x for key, x in flat.items() if key in names})
  want = jax.jit(function)(params, inputs)
  for output, array in zip(session.get_outputs(), got, strict=True):
    assert difference(array, want[output.name]) < 1e-4, output.name
