"""Checkpoints: save and load in any dtype and sharding, and all faults are found."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore
from golden_model import CONFIG, VIDEO_CONFIG, parameters, video_parameters, visual_parameters
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from layouts import TOKENIZER as TOKENIZER_PATH

from sam3_jax import Sam3
from sam3_jax.checkpoint import bundle, checksums, validate, writer
from sam3_jax.checkpoint.orbax_items import read_item, restore_item, save_item, stored_arrays
from sam3_jax.cli.inspect import describe
from sam3_jax.utils.param_tree import compare, flatten, nest, not_finite, raise_faults

TOKENIZER = TOKENIZER_PATH.read_bytes()
INFO = {"name": "tiny", "source": "a seed", "licence": "Apache-2.0", "trained": False}
UNREAD = {
  "../tracker.x[:, :1]": np.arange(6, dtype=np.float16).reshape(2, 3),
  "tracker.scalar": np.float32([2.5]),
}
SCALE = "trunk/norm_pre/scale"
ENTRY = {"shape": [1], "dtype": "float32", "sha256": "0" * 64}
CHECKED = "parameters that are not finite"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "tiny"
  bundle.save(path, parameters(), CONFIG, TOKENIZER, info=INFO, unread=UNREAD)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "tiny")


def assert_params(got, want, dtype=None):
  got, want = flatten(got), flatten(want)
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert isinstance(got[name], jax.Array)
    expected = np.asarray(array).astype(dtype or array.dtype)
    assert got[name].dtype == expected.dtype, name
    np.testing.assert_array_equal(np.asarray(got[name]), expected, err_msg=name)


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


@pytest.mark.parametrize(
  ("shape", "chunk"),
  [
    ((2, 3, 512, 1184), (2, 3, 512, 296)),
    ((2053, 513), (2053, 513)),  # of a prime Orbax alone would make as many chunks
    ((1024, 1024), (1024, 1024)),
  ],
)
def test_large_arrays_are_stored_in_chunks(tmp_path, shape, chunk):
  array = np.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
  save_item(tmp_path / "x", {"a": {"b": array}})
  store = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/"}
  stored = tensorstore.open({"driver": "zarr", "kvstore": store, "path": "a.b"}).result()
  assert stored.chunk_layout.read_chunk.shape == chunk
  np.testing.assert_array_equal(read_item(tmp_path / "x")["a"]["b"], array)


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


# --- what cannot be loaded


def refused(path, match, error=ValueError, **options):
  for use in (bundle.load, bundle.inspect) if not options else (bundle.load,):
    with pytest.raises(error, match=match) as caught:
      use(path, **options)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def test_missing_path_file_or_empty_folder(tmp_path):
  refused(tmp_path / "none", "there is no checkpoint at .*none", FileNotFoundError)
  (tmp_path / "file").write_text("hello")
  refused(tmp_path / "file", "is a file, but a checkpoint is a folder")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "is an empty folder")


@pytest.mark.parametrize("name", ["config.json", "manifest.json", "params", "tokenizer.model"])
def test_incomplete_checkpoint(copy, name):
  path = copy / name
  shutil.rmtree(path) if path.is_dir() else path.unlink()
  refused(copy, f"only part of one: it lacks {name}")


@pytest.mark.parametrize("name", ["config.json", "manifest.json"])
@pytest.mark.parametrize(
  ("text", "match"),
  [
    ("{", "is not readable JSON"),
    ("[]", "must hold an object"),
    ('{"format_version": 99}', "is of format version 99, and this sam3-jax reads version 1"),
    ("{}", "is of format version None"),
    ("[" * 100_000, "is not readable JSON .*nested too deeply"),
    ('{"a": ' * 100_000, "is not readable JSON .*nested too deeply"),
    ('{"items": [], "items": []}', "is not readable JSON .*key 'items' is given twice"),
    ('{"format_version": "' + "x" * 10**6 + '"}', "is of format version 'x+, and this"),
    ('{"format_version": 1}', "is damaged"),
    ('{"format_version": 1, "info": 3, "model": {}, "parameters": [], "items": []}', "damaged"),
  ],
)
def test_damaged_json(copy, name, text, match):
  (copy / name).write_text(text)
  refused(copy, f"{name} differs from its checksum")
  checksums.write(copy)
  refused(copy, match)


def edit(path, name, change):
  """Changes a JSON file and updates the checksums."""
  values = json.loads((path / name).read_text())
  change(values)
  (path / name).write_text(json.dumps(values))
  checksums.write(path)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda v: v["parameters"].pop(SCALE), f"1 fault: {SCALE} is missing"),
    (lambda v: v["parameters"].update(x=v["parameters"][SCALE]), "x is unknown"),
    (lambda v: v["parameters"][SCALE].update(shape=[32]), rf"{SCALE} is \[32\], expected \[64\]"),
    (lambda v: v["parameters"][SCALE].update(dtype="bfloat16"), f"{SCALE} is float32, expected bf"),
    (lambda v: v.update(items=["../params/rest"]), "names an item"),
    (lambda v: v.update(items=["other"]), "other cannot be read"),
    (lambda v: v.update(items=[]), "255 faults|[0-9]+ faults: .* is missing"),
  ],
)
def test_manifest_differs_from_model_or_files(copy, change, match):
  edit(copy, "manifest.json", change)
  refused(copy, match)


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "values"),
  [
    ("files", [3, None, [1], {"rest": 3}, {"rest": {"a": "b"}}]),
    ("unread", [3, [1], {"a": 3}, {"a": {"shape": ["x"], "reason": ""}}, {"a": {"shape": [1]}}]),
    ("dropped", [3, [1], {"a": {"shape": [1], "reason": []}}]),
    ("source_tensors", [3, [1], {"read": 3}, {"read": {"tensors": "many"}}]),
    (
      "parameters",
      [
        3,
        [1],
        {"a": 3},
        {"a": {"shape": 3}},
        {"a": {"shape": [1], "dtype": "float32"}},
        *(
          {"a": ENTRY | change}
          for change in (
            {"sha256": 3},
            {"sha256": "0" * 63},
            {"dtype": None},
            {"shape": [-1]},
            {"shape": [1.0]},
            {"shape": [True]},
            {"shape": [2**70]},
            {"shape": [[[1]]]},
            {"shape": "12"},
          )
        ),
      ],
    ),
    ("unread_files", [3, [1], {"a": "b"}]),
    ("checksums_file", [3, None]),
    ("items", [3, [1], None]),
  ],
)
def test_manifest_with_wrong_types(copy, name, values):
  for value in values:
    edit(copy, "manifest.json", lambda v, value=value: v.update({name: value}))
    refused(copy, r"manifest\.json in .* is damaged \(")
  if name not in ("unread_files", "checksums_file"):  # which earlier versions did not have
    edit(copy, "manifest.json", lambda v: v.pop(name))
    refused(copy, f"is damaged .*{name}")


@pytest.mark.parametrize("info", [3, "name", [1]])
def test_info_is_not_an_object(copy, info):
  edit(copy, "config.json", lambda v: v.update(info=info))
  refused(copy, r"config\.json or .* is damaged \(")


@pytest.mark.parametrize("model", [b"", b"junk"])
def test_damaged_tokenizer_is_found_before_reading_parameters(copy, model):
  (copy / "tokenizer.model").write_bytes(model)
  checksums.write(copy)
  shutil.rmtree(copy / "params" / "rest")
  refused(copy, f"^{copy}/tokenizer.model is not a SentencePiece model")


def test_invalid_configuration(copy):
  edit(copy, "config.json", lambda v: v["model"].update(heads=0))
  refused(copy, f"^{copy}/config.json: heads must be at least 1; got 0")


@pytest.mark.slow
def test_configuration_of_another_size_or_with_unknown_fields(copy):
  edit(copy, "config.json", lambda v: v["model"].update(queries=11))
  refused(copy, r"decoder/query_embedding is \[10, 128\], expected \[11, 128\]")
  edit(copy, "config.json", lambda v: v["model"].update(colour="red"))
  refused(copy, r"config\.json: config must .* unknown: \['colour'\]")


def tamper(path, change):
  """Rewrites the stored arrays without updating the manifest."""
  folder = path / "params" / "rest"
  flat = flatten(read_item(folder))
  change(flat)
  shutil.rmtree(folder)
  save_item(folder, nest(flat))


@pytest.mark.slow
@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda flat: flat.pop(SCALE), f"{SCALE} is missing"),
    (lambda flat: flat.update({"trunk/extra": np.ones(3)}), "trunk/extra is unknown"),
    (lambda flat: flat.update({SCALE: np.ones(63, np.float32)}), rf"{SCALE} is \[63\], expected"),
    (lambda flat: flat.update({SCALE: np.ones(64, np.float16)}), f"{SCALE} is float16, expected"),
  ],
)
def test_stored_arrays_differ_from_the_manifest(copy, change, match):
  tamper(copy, change)
  refused(copy, match)


@pytest.mark.slow
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensor_is_not_finite(copy, value):
  tamper(copy, lambda flat: flat[SCALE].put(5, value))
  refused(copy, f"1 fault: {SCALE} holds values that are not finite", dtype="bfloat16")


def test_checksums_find_changed_values(copy):
  tamper(copy, lambda flat: flat[SCALE].put(5, 0.25))
  bundle.load(copy)
  refused(copy, f"is damaged, 1 fault: {SCALE} differs from its checksum", verify=True)
  with pytest.raises(ValueError, match=SCALE):
    bundle.verify(copy)


def data_files(path):
  files = [file for file in (path / "params" / "rest").rglob("d/*") if file.is_file()]
  return sorted(files, key=lambda file: file.stat().st_size)


@pytest.mark.slow
def test_checksums_find_every_flipped_bit(copy):
  rng = np.random.default_rng(0)
  file = data_files(copy)[-1]
  content = file.read_bytes()
  for position in rng.integers(len(content) // 4, len(content), 3):
    changed = bytearray(content)
    changed[position] ^= 1 << int(rng.integers(8))
    file.write_bytes(changed)
    with pytest.raises(ValueError, match=r"differs from its checksum|cannot be read"):
      bundle.verify(copy)
  file.write_bytes(content)
  bundle.verify(copy)


@pytest.mark.slow
def test_damaged_index_is_found_before_orbax_reads_it(copy, monkeypatch):
  """Orbax would stop at the first of many reads, and print a traceback for each of the others."""
  monkeypatch.setattr(
    "sam3_jax.checkpoint.orbax_items._checkpointer", lambda: pytest.fail("Orbax was called")
  )
  rest = copy / "params" / "rest"
  files = [file for file in rest.rglob("*") if 0 < file.stat().st_size < 2**20 and file.is_file()]
  assert {"_METADATA", "manifest.ocdbt"} < {file.name for file in files}
  assert any(file.parent == rest / "d" for file in files)  # the tree of Orbax's database
  for file in files:
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    refused(copy, f"^{copy} is damaged, 1 fault: {file} differs from its checksum")
    with pytest.raises(ValueError, match=f"{file} differs from its checksum"):
      bundle.verify(copy)
    file.write_bytes(content)


def test_read_error(copy, monkeypatch):
  def fail(path, counter):
    return OSError(errno.EIO, "Input/output error", str(path))

  monkeypatch.setattr(checksums, "_digest", fail)
  refused(copy, "tiny is damaged, .*rest/_METADATA cannot be read: Input/output error")
  with pytest.raises(ValueError, match="_METADATA cannot be read: Input/output error"):
    bundle.verify(copy)


def test_truncated_or_missing_files(copy):
  file = data_files(copy)[-1]
  content = file.read_bytes()
  file.write_bytes(content[: len(content) // 2])
  refused(copy, f"only part of what was written, 1 fault: .*{file.name} has .* bytes, expected")
  file.unlink()
  refused(copy, f"1 fault: .*{file.name} is missing")
  file.write_bytes(content)
  bundle.load(copy, verify=True)
  shutil.rmtree(copy / "params" / "rest" / "ocdbt.process_0")
  refused(copy, "is missing; .* is missing")
  shutil.rmtree(copy / "params" / "rest")
  refused(copy, "is missing")


# --- what cannot be saved


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda flat: flat.pop(SCALE), f"{SCALE} is missing"),
    (lambda flat: flat.update(x=np.ones(3, np.float32)), "x is unknown"),
    (
      lambda flat: flat.update({SCALE: np.ones((64, 1), np.float32)}),
      r"\[64, 1\], expected \[64\]",
    ),
    (lambda flat: flat.update({SCALE: np.ones(64)}), f"{SCALE} is float64; expected one of"),
    (lambda flat: flat.update({SCALE: np.full(64, np.nan, np.float32)}), "not finite"),
  ],
)
def test_save_refuses_parameters_that_do_not_fit(tmp_path, change, match):
  flat = flatten(parameters())
  change(flat)
  with pytest.raises(ValueError, match=match):
    bundle.save(tmp_path / "x", nest(flat), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("model", [b"", b"junk", bytes(1000)])
def test_save_refuses_invalid_tokenizer(tmp_path, model):
  with pytest.raises(ValueError, match="the given bytes is not a SentencePiece model") as caught:
    bundle.save(tmp_path / "x", parameters(), CONFIG, model)
  assert "\n" not in str(caught.value)
  assert not any(tmp_path.iterdir())


def test_save_to_existing_or_unwritable_path(saved, tmp_path):
  before = sorted(saved.rglob("*"))
  with pytest.raises(ValueError, match="exists already; give another path"):
    bundle.save(saved, parameters(), CONFIG, TOKENIZER)
  assert sorted(saved.rglob("*")) == before
  (tmp_path / "file").write_text("")
  for path in (tmp_path / "file", tmp_path / "file" / "x"):
    with pytest.raises(ValueError, match=r"exists already|cannot write to"):
      bundle.save(path, parameters(), CONFIG, TOKENIZER)
  (tmp_path / "empty").mkdir()
  bundle.save(tmp_path / "empty", parameters(), CONFIG, TOKENIZER)
  bundle.save(tmp_path / "deep" / "er", parameters(), CONFIG, TOKENIZER)
  assert bundle.load(tmp_path / "deep" / "er").config == CONFIG


def test_unfinished_writer_leaves_nothing(tmp_path):
  with pytest.raises(KeyError), writer.Writer(tmp_path / "x") as unfinished:  # noqa: PT012
    unfinished.add("trunk", {"a": np.ones(3, np.float32)})
    assert [path.name for path in tmp_path.iterdir()] != ["x"]
    raise KeyError
  assert not any(tmp_path.iterdir())


def test_too_little_disk_space(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
  monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: usage)
  needed = sum(x.nbytes for x in jax.tree.leaves(parameters())) // 1_000_000 + 1
  with pytest.raises(ValueError, match=f"^cannot write to {tmp_path}: {needed} MB needed, 10 MB f"):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


def test_failed_write_leaves_nothing_and_names_the_checkpoint(tmp_path, monkeypatch):
  def late(folder):
    for i in range(20):
      folder.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):
        (folder / str(i)).write_text("late")
      time.sleep(0.02)

  def save_item(folder, tree):
    threading.Thread(target=late, args=[folder]).start()
    raise ValueError(f"{folder} cannot be written")

  monkeypatch.setattr(writer, "save_item", save_item)
  with pytest.raises(ValueError, match=f"^{tmp_path}/x/params/rest cannot be written$"):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())
  time.sleep(0.5)
  assert not any(tmp_path.iterdir())


def test_full_disk_at_the_last_files(tmp_path, monkeypatch):
  def full(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

  monkeypatch.setattr(checksums, "write", full)
  with pytest.raises(
    ValueError, match=f"^cannot write {tmp_path}/x: No space left on device; free some space.$"
  ):
    bundle.save(tmp_path / "x", parameters(), CONFIG, TOKENIZER)
  assert not any(tmp_path.iterdir())


def test_leftovers_of_killed_processes_are_removed(tmp_path):
  """Keeps other folders, and what an earlier version is writing without a lease."""
  token = "01234567-1-2-89abcdef"
  names = f".x.{token}.partial", ".x.1.abcdefgh.partial", ".x.2.abcdefgh.partial"
  others = f".y.{token}.partial", f".x.y.{token}.partial", ".x.partial"
  for name in (*names, *others):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text("{}")
  for path in (tmp_path / names[1], tmp_path / names[1] / "config.json"):
    os.utime(path, (0, 0))
  with writer.Writer(tmp_path / "x"):
    pass
  assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[2], *others])


def test_only_one_process_writes_a_folder(tmp_path):
  with writer.NewFolder(tmp_path / "x") as first:
    with pytest.raises(
      ValueError, match=f"x is being written by process {os.getpid()} on .*; wait"
    ):
      writer.NewFolder(tmp_path / "x")
    writer.NewFolder(tmp_path / "y").__exit__()
    (first.temporary / "a").write_text("1")
    first.appear()
  assert [path.name for path in tmp_path.rglob("*")] == ["x", "a"]


def test_stale_lease_of_another_host_is_taken_over(tmp_path):
  slow = writer.NewFolder(tmp_path / "x")
  lease = tmp_path / ".x.lease"
  lease.write_text(lease.read_text().replace('"system": "', '"system": "elsewhere '))
  os.utime(lease, (0, 0))
  with writer.NewFolder(tmp_path / "x") as fast:
    assert not slow.temporary.exists()
    fast.appear()
  slow.temporary.mkdir()
  with pytest.raises(ValueError, match=r"another process took over writing .*x"):
    slow.appear()
  slow.__exit__()
  assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_another_process_created_the_folder(tmp_path):
  with writer.NewFolder(tmp_path / "x") as folder:
    (tmp_path / "x" / "y").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"another process wrote .*x"):
      folder.appear()
  assert [path.name for path in tmp_path.rglob("*")] == ["x", "y"]


# --- the parts it is made of


def test_items(tmp_path):
  tree = {"a": {"b": np.ones((1, 2), np.float32), "c": np.float32([3])}}
  save_item(tmp_path / "item", tree)
  found = stored_arrays(tmp_path / "item")
  assert {name: (tuple(x.shape), str(x.dtype)) for name, x in found.items()} == {
    "a/b": ((1, 2), "float32"),
    "a/c": ((1,), "float32"),
  }
  device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  restored = restore_item(
    tmp_path / "item",
    {name: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=device) for name, x in found.items()},
  )
  assert restored["a"]["b"].devices() == {jax.devices()[3]}
  np.testing.assert_array_equal(read_item(tmp_path / "item")["a"]["c"], [3])
  with pytest.raises(ValueError, match="none cannot be read"):
    read_item(tmp_path / "none")
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"x cannot be written .*disk full") as caught:
    save_item(tmp_path / "file" / "x", tree)
  assert "\n" not in str(caught.value)


def test_flatten_and_nest():
  tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
  assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
  assert nest(flatten(tree)) == tree
  assert flatten({}) == nest({}) == {}


def test_compare_names_every_difference():
  wanted = {"a": (1,), "b": (2, 3), "c": ()}
  assert compare(wanted, wanted) == []
  assert compare({"a": (1,), "b": [2, 3], "c": ()}, wanted) == []
  assert compare({"b": (3, 2), "c": (), "d": (1,)}, wanted) == [
    "a is missing",
    "d is unknown",
    "b is [3, 2], expected [2, 3]",
  ]


def test_not_finite_looks_at_every_shard():
  sharding = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
  good = jax.device_put(jnp.ones(16), sharding)
  bad = jax.device_put(jnp.ones(16).at[13].set(jnp.nan), sharding)
  flat = {"good": good, "bad": bad, "empty": np.ones(0), "half": np.array([np.inf], jnp.bfloat16)}
  assert not_finite(flat) == [
    f"{name} holds values that are not finite" for name in ("bad", "half")
  ]


def test_raise_faults():
  raise_faults([], "nothing")
  with pytest.raises(ValueError, match=r"^x, 1 fault: a\. Do y\.$"):
    raise_faults(["a"], "x", "Do y.")
  with pytest.raises(ValueError, match=r"^x, 22 faults: 0; 1; 2; .*18; 19; and 2 more\. Do y\.$"):
    raise_faults([str(i) for i in range(22)], "x", "Do y.")


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
def test_incomplete_head_for_visual_prompts(tmp_path):
  half = {name: x for name, x in visual_parameters().items() if name != "no_memory"}
  with pytest.raises(ValueError, match=r"1 fault: visual/no_memory is missing\."):
    bundle.save(tmp_path / "x", parameters() | {"visual": half}, CONFIG, TOKENIZER)
  assert not list(tmp_path.iterdir())


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
