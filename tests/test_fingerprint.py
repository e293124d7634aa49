"""Fingerprints: written by `convert --verify`, compared by `inspect --verify`."""

import copy
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import layouts
import pytest
import training_model
from support import quick

from sam3_jax.checkpoint import checksums, fingerprint
from sam3_jax.checkpoint.bundle import load
from sam3_jax.checkpoint.fingerprint import TOLERANCES, Fingerprint, compare
from sam3_jax.cli.main import main
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inference.verify import compute_fingerprint

RESULTS = 12  # without a head for visual prompts, which has 3 more


@pytest.fixture(scope="module")
def loads():
  """Makes `Sam3.from_checkpoint` compile quickly, and once for each configuration."""
  load, first = Sam3.from_checkpoint, {}

  def again(*args, **kwargs):
    model = load(*args, **kwargs)
    key = model.config, model.dtype
    if key not in first:
      first[key] = quick(model)
    same = copy.copy(first[key])
    same.params, same._load_unread = model.params, model._load_unread
    return same

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(Sam3, "from_checkpoint", again)
    yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, loads):
  """The toy model with a head for visual prompts, and its fingerprint."""
  folder = training_model.save(tmp_path_factory.mktemp("fingerprint") / "toy", visual=True)
  fingerprint.write(compute_fingerprint(Sam3.from_checkpoint(folder, dtype="float32")), folder)
  return folder


@pytest.fixture
def copied(bundle, tmp_path):
  return shutil.copytree(bundle, tmp_path / "toy")


def kept(folder) -> Fingerprint:
  found = fingerprint.read(folder)
  assert found is not None
  return found


def inspect(capsys, folder, *options):
  status = main(["inspect", str(folder), "--json", *options])
  out, err = capsys.readouterr()
  assert err.count("\n") == (status != 0)
  return json.loads(out) if status == 0 else err


@pytest.mark.slow
def test_every_program_is_run(bundle, tmp_path):
  found = kept(bundle)
  assert (found.dtype, len(found.numbers)) == ("float32", RESULTS + 3)
  without = compute_fingerprint(
    Sam3.from_checkpoint(training_model.save(tmp_path / "toy"), dtype="float32")
  )
  assert len(without.numbers) == RESULTS
  assert {name: found.numbers[name] for name in without.numbers} == without.numbers


@pytest.mark.slow
def test_other_modes_of_jax_give_the_same(bundle):
  """64-bit mode, and dtypes that are never promoted implicitly; in a process of its own, as users
  set them."""
  modes = {"JAX_ENABLE_X64": "1", "JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_PLATFORMS": "cpu"}
  flags = "--xla_backend_optimization_level=0"
  run = "import sys; from sam3_jax.cli.main import main; sys.exit(main(sys.argv[1:]))"
  done = subprocess.run(
    [sys.executable, "-c", run, "inspect", str(bundle), "--verify", "--json"],
    env=os.environ | modes | {"XLA_FLAGS": flags},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout)["checks"]["fingerprint"].endswith("1e-04 allowed")


@pytest.mark.slow
def test_bfloat16_is_within_its_tolerance(bundle):
  found = compute_fingerprint(Sam3.from_checkpoint(bundle, dtype="bfloat16"))
  assert TOLERANCES["float32"] < compare(found, kept(bundle)) < TOLERANCES["bfloat16"]


@pytest.mark.slow
def test_inspect_compares_the_fingerprint(bundle, capsys):
  before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
  checks = inspect(capsys, bundle)["checks"]
  assert checks["fingerprint"] == "not compared"
  assert "--verify compares the others" in checks["checksums"]
  summary = inspect(capsys, bundle, "--verify")
  tensors = len(training_model.parameters() | training_model.visual_parameters())
  assert summary["checks"]["fingerprint"] == "equal within 0.0e+00, 1e-04 allowed"
  assert f"{tensors} tensors match" in summary["checks"]["checksums"]
  assert summary["fingerprint"] == dataclasses.asdict(kept(bundle))
  assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_other_parameters_have_another_fingerprint(bundle, tmp_path, capsys):
  model = Sam3.from_checkpoint(bundle, dtype="float32")
  table = model.params["decoder"]["query_embedding"]
  model.params = model.params | {
    "decoder": model.params["decoder"] | {"query_embedding": 1.1 * table}
  }
  model.save(tmp_path / "changed")
  assert inspect(capsys, tmp_path / "changed", "--verify")["checks"]["fingerprint"] == "none"
  shutil.copy(bundle / fingerprint.FILE, tmp_path / "changed")
  line = inspect(capsys, tmp_path / "changed", "--verify")
  assert "of 'decode " in line
  assert "but the fingerprint has" in line


@pytest.mark.slow
def test_output_is_not_finite(bundle):
  model = Sam3.from_checkpoint(bundle, dtype="float32")
  trunk = model.params["trunk"]
  trunk = trunk | {"position": trunk["position"] * float("inf")}
  model.params = model.params | {"trunk": trunk}
  with pytest.raises(ValueError, match="encode image: coarse is not finite"):
    compute_fingerprint(model)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda found: found | {"recipe": 9}, "recipe 9, this version of sam3-jax has recipe 1"),
    (lambda found: found | {"dtype": "int8"}, "is damaged"),
    (lambda found: found | {"numbers": {"a": [1.0]}}, "is damaged"),
    (lambda found: found | {"numbers": [1.0]}, "is damaged"),
    (lambda found: found | {"numbers": {"a": [math.nan] * 3}}, "is damaged"),
    (lambda found: found | {"numbers": {"a": [1.0, 2.0, 3.0]}}, "only one of them has"),
    (lambda found: {}, "is damaged"),
  ],
)
def test_incompatible_fingerprint(copied, bundle, change, message):
  found = json.loads((copied / fingerprint.FILE).read_text())
  (copied / fingerprint.FILE).write_text(json.dumps(change(found)))
  with pytest.raises(ValueError, match=message) as caught:
    compare(kept(bundle), kept(copied))
  assert "\n" not in str(caught.value)
  load(copied, verify=True)


@pytest.mark.slow
def test_bundle_without_fingerprint(copied, capsys):
  (copied / fingerprint.FILE).unlink()
  assert inspect(capsys, copied, "--verify")["checks"]["fingerprint"] == "none"
  manifest = json.loads((copied / "manifest.json").read_text())
  manifest["parameters"]["trunk/position"]["sha256"] = "0" * 64
  (copied / "manifest.json").write_text(json.dumps(manifest))
  checksums.write(copied)
  assert "trunk/position differs" in inspect(capsys, copied, "--verify")
  assert "match; --verify" in inspect(capsys, copied)["checks"]["checksums"]


@pytest.mark.slow
def test_convert_writes_a_fingerprint(tmp_path, loads, capsys, monkeypatch):
  """Without transformers, it says that nothing was compared."""
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  layouts.write_folder(tmp_path / "source", layouts.layout("detector"))
  typed = [tmp_path / "source", tmp_path / "new", "--tokenizer", layouts.TOKENIZER, "--verify"]
  assert main(["convert", *map(str, typed)]) == 0
  assert len(kept(tmp_path / "new").numbers) == RESULTS
  said = " ".join(capsys.readouterr().out.split())
  assert "not compared with transformers: torch and transformers are not installed; pip" in said
  summary = inspect(capsys, tmp_path / "new", "--verify")
  assert summary["checks"]["fingerprint"].startswith("equal within 0.0e+00")
  typed = ["convert", str(tmp_path / "new"), str(tmp_path / "out"), "--to", "huggingface"]
  assert main([*typed, "--verify"]) == 0
  assert "tensors are bit-equal to the checkpoint's" in capsys.readouterr().out
  assert not (tmp_path / "out" / fingerprint.FILE).exists()


@pytest.mark.slow
def test_convert_refuses_a_model_with_infinite_outputs(tmp_path, loads, capsys):
  """The parameters are finite, but the trunk overflows."""
  arrays = dict(layouts.layout("detector"))
  name = "vision_encoder.backbone.layer_norm.weight"
  arrays[name] = arrays[name] * 0 + 3e38
  layouts.write_folder(tmp_path / "source", arrays)
  typed = [tmp_path / "source", tmp_path / "new", "--tokenizer", layouts.TOKENIZER, "--verify"]
  assert main(["convert", *map(str, typed)]) == 2
  assert "encode image: coarse is not finite" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["source"]
