"""Checkpoints that cannot be loaded: incomplete, inconsistent or damaged files."""

import errno
import shutil

import bundle_files
import numpy as np
import pytest
from bundle_files import SCALE, edit, refused

from sam3_jax.checkpoint import bundle, checksums
from sam3_jax.checkpoint.orbax_items import read_item, save_item
from sam3_jax.utils.param_tree import flatten, nest

saved = bundle_files.saved
copy = bundle_files.copy

ENTRY = {"shape": [1], "dtype": "float32", "sha256": "0" * 64}


def test_missing_path_file_or_empty_folder(tmp_path):
  refused(tmp_path / "none", "there is no checkpoint at .*none", FileNotFoundError)
  (tmp_path / "file").write_text("hello")
  refused(tmp_path / "file", "is a file, but a checkpoint is a directory")
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "is an empty directory")


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
  edit(copy, "config.json", lambda v: v["model"].update(color="red"))
  refused(copy, r"config\.json: config must .* unknown: \['color'\]")


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
  refused(copy, f"incomplete or damaged, 1 fault: .*{file.name} has .* bytes, expected")
  file.unlink()
  refused(copy, f"1 fault: .*{file.name} is missing")
  file.write_bytes(content)
  bundle.load(copy, verify=True)
  shutil.rmtree(copy / "params" / "rest" / "ocdbt.process_0")
  refused(copy, "is missing; .* is missing")
  shutil.rmtree(copy / "params" / "rest")
  refused(copy, "is missing")
