"""Saving, loading and inspecting checkpoints, in any dtype and sharding."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import bundle_files
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from bundle_files import INFO, TOKENIZER, UNREAD, assert_params, edit, refused
from golden_model import CONFIG, VIDEO_CONFIG, parameters, video_parameters, visual_parameters
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sam3_jax import Sam3
from sam3_jax.checkpoint import bundle, checksums, validate, writer
from sam3_jax.cli.inspect import describe
from sam3_jax.utils.param_tree import flatten

saved = bundle_files.saved
copy = bundle_files.copy

CHECKED = "parameters that are not finite"


@pytest.mark.slow
def test_save_and_load(saved):
  loaded = bundle.load(saved, verify=True)
  assert (loaded.config, loaded.tokenizer, loaded.info) == (CONFIG, TOKENIZER, INFO)
  assert_params(loaded.params, parameters())
  unread = bundle.load_unread(saved)
  assert unread.keys() == UNREAD.keys()
  for name, array in UNREAD.items():
    assert unread[name].dtype == array.dtype
    np.testing.assert_array_equal(unread[name], array)


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("wanted", [None, "float32", "bfloat16", jnp.bfloat16])
def test_load_in_another_dtype(tmp_path, stored, wanted):
  params = jax.tree.map(lambda x: x.astype(stored), parameters())
  bundle.save(tmp_path / "x", params, CONFIG, TOKENIZER)
  loaded = bundle.load(tmp_path / "x", dtype=wanted)
  assert_params(loaded.params, params, jnp.dtype(wanted or stored))
  assert loaded.info == {}
  assert bundle.load_unread(tmp_path / "x") == {}
  assert bundle.inspect(tmp_path / "x").dtype == stored


@pytest.mark.parametrize("dtype", ["int8", "float16", "bogus", jnp.float16, 3])
def test_unknown_dtype(saved, dtype):
  refused(saved, "dtype must be float32 or bfloat16; got ", dtype=dtype)
  with pytest.raises(ValueError, match="dtype must be"):
    bundle.check_dtype(dtype)
  assert bundle.check_dtype(jnp.bfloat16) == bundle.check_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.slow
def test_load_with_sharding(saved):
  mesh = Mesh(np.array(jax.devices()), ("devices",))

  def sharding(path, shape):
    axis = next((i for i, size in enumerate(shape) if size % 8 == 0 and "trunk" in path), None)
    spec = [None] * len(shape)
    if axis is not None:
      spec[axis] = "devices"
    return NamedSharding(mesh, PartitionSpec(*spec))

  params = bundle.load(saved, sharding=sharding).params
  assert_params(params, parameters())
  for name, array in flatten(params).items():
    assert array.sharding == sharding(name, array.shape)
  position = params["trunk"]["groups"]["windowed"]["mlp"]["fc1"]["kernel"]
  assert position.addressable_shards[0].data.size * 8 == position.size
  replicated = NamedSharding(mesh, PartitionSpec())
  assert bundle.load(saved, sharding=replicated).params["text"]["position"].is_fully_replicated


@pytest.mark.slow
def test_large_parts_are_separate_items(saved, tmp_path, monkeypatch):
  assert [path.name for path in (saved / "params").iterdir()] == ["rest"]
  assert sum(path.is_file() for path in saved.rglob("*")) < 40  # measured 22 to 25
  monkeypatch.setattr(writer, "OWN_ITEM", 500_000)
  bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  items = {path.name for path in (tmp_path / "x" / "params").iterdir()}
  assert {"rest", "trunk", "text"} < items
  steps = []
  loaded = bundle.load(tmp_path / "x", verify=True, progress=lambda *step: steps.append(step))
  assert_params(loaded.params, parameters())
  assert {name for name, _ in steps} == {"checksums", *items - {"rest"}, "parameters", CHECKED}
  assert [fraction for _, fraction in steps] == sorted({fraction for _, fraction in steps})
  assert (steps[0][1], steps[-1]) == (0, (CHECKED, 1))


def test_files_do_not_contain_the_path(saved):
  for file in saved.rglob("*"):
    assert not file.is_file() or str(saved.parent).encode() not in file.read_bytes(), file


def test_plain_orbax_reads_a_checkpoint(saved):
  with ocp.StandardCheckpointer() as checkpointer:
    tree = checkpointer.restore(saved / "params" / "rest")
  np.testing.assert_array_equal(tree["trunk"]["position"], parameters()["trunk"]["position"])


def test_writing_twice_gives_the_same_manifest(saved, tmp_path):
  bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER, info=INFO, unread=UNREAD)
  first, second = (
    json.loads((path / "manifest.json").read_text()) for path in (saved, tmp_path / "x")
  )
  of_tree = []  # the file whose name and date Orbax keeps
  for path, manifest in ((saved, first), (tmp_path / "x", second)):
    sizes, sums = manifest.pop("files")["rest"], checksums.read(path)
    sizes |= {f"unread/{name}": size for name, size in manifest.pop("unread_files").items()}
    folders = {name: "" if name.startswith("unread/") else "params/rest/" for name in sizes}
    contents = {name: (path / folders[name] / name).read_bytes() for name in sizes}
    assert sizes == {name: len(content) for name, content in contents.items()}
    for name, content in contents.items():
      assert sums[folders[name] + name] == hashlib.sha256(content).hexdigest()
    of_tree.append(sums["params/rest/_METADATA"])
  assert first == second
  assert of_tree[0] == of_tree[1]
  for name in ("config.json", "tokenizer.model"):
    assert (tmp_path / "x" / name).read_bytes() == (saved / name).read_bytes()


def test_inspect(saved):
  summary = bundle.inspect(saved)
  assert summary.parts == {
    part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in parameters().items()
  }
  assert summary.parameters == sum(x.size for x in jax.tree.leaves(parameters()))
  assert summary.stored_bytes > 4 * summary.parameters
  assert (summary.config, summary.info, summary.dtype) == (CONFIG, INFO, "float32")
  assert summary.unread == {"kept from the source": {"tensors": 2, "parameters": 7}}
  count = summary.parameters
  assert summary.memory == {"float32": 4 * count, "bfloat16": 2 * count}
  assert summary.cannot == [
    "visual prompts: it has no head for points, boxes and masks",
    "video: it has no tracker; convert the released weights, facebook/sam3 or sam3.pt, with "
    "`sam3-jax convert`",
  ]
  files = sum(path.is_file() for path in saved.rglob("*")) - 1
  assert summary.checks["fingerprint"] == "none"
  assert summary.checks["checksums"].endswith(
    f" of {files} files match; --verify compares the others"
  )
  assert summary.fingerprint is None
  assert json.loads(json.dumps(summary.to_dict()))["config"]["queries"] == 10
  tensors = len(flatten(parameters())) + len(UNREAD)
  checks = bundle.inspect(saved, verify=True).checks
  assert checks["checksums"] == (f"all {files} files match; {tensors} tensors match")


@pytest.mark.slow
def test_expected_shapes_equal_the_models():
  shapes = {name: array.shape for name, array in flatten(parameters()).items()}
  assert bundle.expected_shapes(CONFIG) == shapes
  other = bundle.expected_shapes(dataclasses.replace(CONFIG, concept_points=False))
  assert {name for name in shapes if name not in other} == {
    name for name in shapes if name.startswith("geometry/point_")
  }


@pytest.mark.slow
def test_head_for_visual_prompts_is_optional(tmp_path):
  whole = parameters() | {"visual": visual_parameters()}
  bundle.save(tmp_path / "x", whole, CONFIG, TOKENIZER, info=INFO)
  assert_params(bundle.load(tmp_path / "x", verify=True).params, whole)
  count = sum(x.size for x in jax.tree.leaves(visual_parameters()))
  assert bundle.inspect(tmp_path / "x").parts["visual"] == count


@pytest.mark.slow
def test_tracker_is_optional(tmp_path):
  whole = parameters() | {"visual": visual_parameters(), "video": video_parameters()}
  bundle.save(tmp_path / "x", whole, VIDEO_CONFIG, TOKENIZER, info=INFO)
  loaded = bundle.load(tmp_path / "x", verify=True)
  assert_params(loaded.params, whole)
  assert loaded.config == VIDEO_CONFIG
  summary = bundle.inspect(tmp_path / "x")
  assert summary.parts["video"] == sum(x.size for x in jax.tree.leaves(video_parameters()))
  assert summary.cannot == []
  assert "tracker with 7 memories of 64 channels, 2 layers" in cells(describe(summary))
  del whole["video"]
  with pytest.raises(ValueError, match=r"72 faults: video/.* is missing"):
    bundle.save(tmp_path / "y", whole, VIDEO_CONFIG, TOKENIZER)


def cells(table):
  return [str(cell) for column in table.columns for cell in column.cells]


def test_checkpoint_of_an_earlier_version_tells_to_convert_again(saved, tmp_path):
  """Its tracker is among the tensors that it keeps from its source."""
  unread = {"tracker.transformer.encoder.norm.weight": np.ones(2, np.float32)}
  bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER, info=INFO, unread=unread)
  summary = bundle.inspect(tmp_path / "x")
  remedy = "an earlier version of sam3-jax converted it, without the tracker; convert its source"
  assert summary.cannot[1].startswith(f"video: {remedy} again")
  for path, match in ((tmp_path / "x", remedy), (saved, "it has no tracker; convert the released")):
    with pytest.raises(ValueError, match=f"^tiny cannot track objects: {match}") as caught:
      Sam3.from_checkpoint(path).video_params()
    assert "\n" not in str(caught.value)


def test_sealed_shapes_are_not_traced_again(copy, monkeypatch):
  def trace(config, *, visual):
    raise AssertionError("traced")

  monkeypatch.setattr(validate, "expected_shapes", trace)
  bundle.inspect(copy)
  for name, change in (
    ("config.json", lambda v: v["model"].update(concept_points=False)),
    ("manifest.json", lambda v: v.pop("fits")),
  ):
    edit(copy, name, change)
    with pytest.raises(AssertionError, match="traced"):
      bundle.inspect(copy)


@pytest.mark.slow
def test_save_and_load_print_nothing(tmp_path):
  code = (
    "import sys; sys.path[:0] = sys.argv[2:]\n"
    "from sam3_jax.checkpoint import bundle; from golden_model import CONFIG, parameters\n"
    "from layouts import TOKENIZER\n"
    "bundle.save(sys.argv[1], parameters(), CONFIG, TOKENIZER.read_bytes())\n"
    "bundle.load(sys.argv[1], verify=True)\n"
    "bundle.inspect(sys.argv[1])\n"
  )
  done = subprocess.run(
    [sys.executable, "-W", "error", "-c", code, tmp_path / "x", *sys.path],
    capture_output=True,
    text=True,
    check=False,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
