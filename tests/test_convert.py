"""`convert` from files: every layout gives the tree of golden_model.py; errors name the fault."""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import (
  CONFIG,
  VIDEO_CONFIG,
  meta_weights,
  parameters,
  video_parameters,
  visual_parameters,
)
from layouts import TOKENIZER, huggingface_weights, layout, tiny_config, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.layouts import huggingface
from sam3_jax.converters.readers.safetensors import open_safetensors
from sam3_jax.converters.sources import find_weights, open_weights

from sam3_jax.checkpoint import bundle as checkpoint
from sam3_jax.config import RELEASED
from sam3_jax.utils.param_tree import flatten

HUB = dataclasses.replace(CONFIG, concept_points=False)
HUB_VIDEO = dataclasses.replace(VIDEO_CONFIG, concept_points=False)
SCALE = "detector_model.vision_encoder.backbone.layer_norm.weight"


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
  return write_folder(tmp_path_factory.mktemp("source") / "hub", layout("hub"))


def converted(source, out, **options):
  convert(source, out, tokenizer=TOKENIZER, **options)
  return checkpoint.load(out, verify=True)


def assert_tree(params, points=False, visual=True, dtype="float32", through=None):
  tracker = {"visual": visual_parameters(), "video": video_parameters()}
  whole = parameters() | (tracker if visual else {})
  want = flatten(jax.tree.map(np.asarray, whole))
  want = {name: x for name, x in want.items() if points or not name.startswith("geometry/point_")}
  got = flatten(params)
  assert got.keys() == want.keys()
  for name, array in want.items():
    expected = array.astype(through or array.dtype).astype(dtype)
    np.testing.assert_array_equal(np.asarray(got[name]), expected, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("shards", [1, 3])
def test_origin_is_recorded(tmp_path, shards):
  """Names, sizes and checksums; repository and commit for files in the hub's cache; no path."""
  commit = "0123456789abcdef0123456789abcdef01234567"
  (tmp_path / "models--org--some.name" / "snapshots").mkdir(parents=True)
  cached = tmp_path / "models--org--some.name" / "snapshots" / commit
  for folder in (tmp_path / "source", cached):
    source = write_folder(folder, layout("detector"), shards)
    origin = converted(source, tmp_path / f"out-{folder.name}").info["origin"]
    assert origin.get("repository") == (f"org/some.name@{commit}" if folder == cached else None)
    files = [*source.glob("model*")]
    assert len(files) == (shards if shards == 1 else shards + 1)
    assert origin["files"] == {
      path.name: {
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
      }
      for path in files
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hub", "doubled", "detector"])
@pytest.mark.parametrize("shards", [1, 3])
def test_huggingface_layouts(tmp_path, kind, shards):
  source = write_folder(tmp_path / "source", layout(kind), shards)
  bundle = converted(source, tmp_path / "out")
  assert_tree(bundle.params, visual=kind != "detector")
  assert bundle.config == (HUB if kind == "detector" else HUB_VIDEO)
  assert bundle.tokenizer == TOKENIZER.read_bytes()
  assert bundle.info["trained"] is True
  assert "layout huggingface" in bundle.info["source"]
  kept = checkpoint.load_unread(tmp_path / "out")
  names = {n for n in layout("hub") if kind != "detector" or n.startswith("detector_model.")}
  assert kept.keys() < names
  for name, array in kept.items():
    np.testing.assert_array_equal(array, layout("hub")[name])
  whole = [] if kind != "detector" else ["neck of the tracker", "tracker"]
  points, row = "geometry/point_* (concept points)", "the class token's row of the position table"
  assert bundle.info["lacks"] == [*whole, points, row]
  counts = checkpoint.inspect(tmp_path / "out").source_tensors
  assert sum(group["tensors"] for group in counts.values()) == len(names)
  assert sum(group["parameters"] for group in counts.values()) == sum(
    layout("hub")[name].size for name in names
  )


@pytest.mark.slow
def test_meta_layout_in_safetensors(tmp_path):
  save_file(meta_weights(""), tmp_path / "sam3.safetensors")
  bundle = converted(tmp_path / "sam3.safetensors", tmp_path / "out", config=CONFIG)
  assert bundle.config == VIDEO_CONFIG
  assert_tree(bundle.params, points=True)
  kept = checkpoint.load_unread(tmp_path / "out")
  position = "detector.backbone.vision_backbone.trunk.pos_embed"
  np.testing.assert_array_equal(kept[f"{position}[:, :1]"], meta_weights()[position][:, :1])
  assert [name for name in kept if name.startswith("tracker.")] == ["tracker.no_mem_pos_enc"]
  assert "a class token's row: cut off before use" in checkpoint.inspect(tmp_path / "out").unread


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("requested", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, requested):
  arrays = {name: array.astype(jnp.dtype(stored)) for name, array in layout("detector").items()}
  source = write_folder(tmp_path / "source", arrays)
  bundle = converted(source, tmp_path / "out", dtype=requested)
  assert_tree(bundle.params, visual=False, dtype=jnp.dtype(requested), through=jnp.dtype(stored))
  assert {str(x.dtype) for x in checkpoint.load_unread(tmp_path / "out").values()} == {stored}


@pytest.mark.slow
def test_file_index_and_directory_are_equivalent(hub, tmp_path):
  index = write_folder(tmp_path / "s", layout("hub"), shards=2) / "model.safetensors.index.json"
  for i, source in enumerate([hub, hub / "model.safetensors", str(hub), index]):
    assert_tree(converted(source, tmp_path / str(i)).params)
  renamed = shutil.copytree(hub, tmp_path / "renamed")
  (renamed / "model.safetensors").rename(renamed / "sam3.safetensors")
  assert find_weights(renamed) == renamed / "sam3.safetensors"
  shutil.copy(renamed / "sam3.safetensors", renamed / "b.safetensors")
  with pytest.raises(
    ValueError, match=r"holds 2 files of weights \(b.safetensors, sam3.safetensors\); name one"
  ):
    find_weights(renamed)


@pytest.mark.slow
def test_vocabulary_beside_the_weights(hub, tmp_path):
  import gzip

  from clip_bpe import merges

  with pytest.raises(FileNotFoundError, match="holds no vocabulary"):
    convert(hub, tmp_path / "out")
  assert not any(tmp_path.iterdir())
  source = shutil.copytree(hub, tmp_path / "source")
  lines = ["#version: 0.2", *(" ".join(merge) for merge in merges())]
  with gzip.open(source / "bpe_simple_vocab_16e6.txt.gz", "wt", encoding="utf-8") as file:
    file.write("\n".join(lines) + "\n")
  convert(source, tmp_path / "out")
  assert checkpoint.load(tmp_path / "out").tokenizer == TOKENIZER.read_bytes()


def test_invalid_tokenizer_model(hub, tmp_path):
  (tmp_path / "junk.model").write_bytes(b"junk")
  with pytest.raises(ValueError, match=r"junk\.model is not a SentencePiece model") as caught:
    convert(hub, tmp_path / "out", tokenizer=tmp_path / "junk.model")
  assert "\n" not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["junk.model"]


def test_progress_is_reported(hub, tmp_path):
  reports = []
  convert(hub, tmp_path / "out", tokenizer=TOKENIZER, progress=lambda *step: reports.append(step))
  assert [step for step, _ in reports][1:-2] == list(checkpoint.inspect(tmp_path / "out").parts)
  fractions = [fraction for _, fraction in reports]
  assert fractions == sorted(fractions)
  assert (fractions[0], fractions[-1]) == (0, 1)


def test_configurations_of_detector_and_video_model():
  values = tiny_config()
  assert huggingface.read_config(values, "x") == HUB
  assert huggingface.read_config(values["detector_config"], "x") == HUB
  released = dataclasses.replace(RELEASED, concept_points=False)
  assert huggingface.read_config({"model_type": "sam3"}, "x") == released
  assert huggingface.read_config({"model_type": "sam3_video"}, "x") == released


BACKBONE = ("vision_config", "backbone_config")


@pytest.mark.parametrize(
  ("path", "value", "match"),
  [
    (("model_type",), "sam2", "model_type 'sam2'; expected one of sam3"),
    (("model_type",), None, "model_type None"),
    ((*BACKBONE, "hidden_act"), "relu", "hidden_act = 'relu'; only 'gelu' can be converted"),
    ((*BACKBONE, "rope_parameters", "rope_theta"), 500.0, "rope_theta = 500.0; only 10000.0"),
    ((*BACKBONE, "global_attn_indexes"), [1, 2], r"global_attn_indexes \[1, 2\] of 4 blocks"),
    ((*BACKBONE, "global_attn_indexes"), [], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), ["x"], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), [-1], "expected equal groups"),
    ((*BACKBONE, "global_attn_indexes"), [0, 1, 2, 3], "expected equal groups"),
    ((*BACKBONE, "num_hidden_layers"), 5, "of 5 blocks; expected equal groups"),
    ((*BACKBONE, "patch_size"), 0, "patch_size = 0; expected at least 1"),
    ((*BACKBONE, "hidden_size"), "64", "hidden_size = '64'; expected something like 1024"),
    ((*BACKBONE, "hidden_size"), 66, "trunk width 66 must be a multiple of 4"),
    ((*BACKBONE, "window_size"), 5, "must be a multiple of the window"),
    (("detr_encoder_config", "hidden_size"), 64, "one hidden_size for these parts"),
    (("text_config",), 3, "has text_config = 3; expected an object"),
  ],
)
def test_unsupported_configurations(hub, tmp_path, path, value, match):
  config = tiny_config()["detector_config"] | {"model_type": "sam3"}
  node = config
  for key in path[:-1]:
    node = node[key]
  node[path[-1]] = value
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(json.dumps(config))
  refused(source, tmp_path, match)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_configuration(hub, tmp_path, text):
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(text)
  refused(source, tmp_path, "config.json (is not readable JSON|has model_type None)")


def test_a_configuration_of_another_size(hub, tmp_path):
  config = tiny_config()
  config["detector_config"]["detr_decoder_config"]["num_queries"] = 11
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").write_text(json.dumps(config))
  refused(source, tmp_path, r"query_embed.weight is \[10, 128\]; expected \[11, 128\]")


@pytest.mark.slow
def test_no_configuration(hub, tmp_path):
  source = shutil.copytree(hub, tmp_path / "source")
  (source / "config.json").unlink()
  refused(source, tmp_path, "do not determine its heads and windows; put the model's config.json")


def refused(source, tmp_path, match, error=ValueError, **options):
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(error, match=match) as caught:
    convert(source, tmp_path / "out", tokenizer=TOKENIZER, **options)
  assert "\n" not in str(caught.value)
  assert type(caught.value) is error
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (b"", "is not a safetensors"),
    (b"hello, this is a text file\n", "is not a safetensors"),
    (b"12345678{", "is not a safetensors"),
    (b"PK\x03\x04 and so on", "cannot be used: it is truncated or damaged"),
    (b"\x80\x02ctorch", "cannot be used: it is in the format of PyTorch before 1.6"),
    ((1 << 60).to_bytes(8, "little") + b"{}", "is not a safetensors"),
    ((50).to_bytes(8, "little") + b"{}", "is truncated at 10 bytes"),
    ((2).to_bytes(8, "little") + b"{]", "header of .* is damaged"),
    ((2).to_bytes(8, "little") + b"{}", "holds no tensors, only a header"),
    ((2).to_bytes(8, "little") + b"{}abc", "3 bytes that belong to no tensor"),
  ],
)
def test_files_of_another_kind(tmp_path, content, match):
  (tmp_path / "model.safetensors").write_bytes(content)
  refused(tmp_path / "model.safetensors", tmp_path, match)


def safetensors(path, header, data=b""):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + data)
  return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
  return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
  ("header", "match"),
  [
    ({"a": entry(shape=[3])}, r"a in the header .*float32 \[3\] does not take 8 bytes"),
    ({"a": entry(dtype="F4")}, "dtype 'F4' is unknown"),
    ({"a": entry(shape=[-2])}, "a size is not an integer of 0 or more"),
    ({"a": entry(shape=[2.0])}, "a size is not an integer of 0 or more"),
    ({"a": entry(shape=[1 << 62, 4], offsets=(0, 1 << 66))}, "is truncated"),
    ({"a": entry(offsets=(0,))}, "a in the header .* is damaged"),
    ({"a": {"dtype": "F32"}}, "a in the header .* is damaged: 'shape'"),
    ({"a": 3}, "a in the header .* is damaged"),
    ({"a": entry(), "b": entry()}, "b in .* does not begin where the tensor before it ends"),
    ({"a": entry(offsets=(4, 12))}, "does not begin where"),
    (b'{"a": {"dtype": "F32"}, "a": 3}', "'a' is given twice"),
    (b"\xff\xfe", "is not a safetensors"),
  ],
)
def test_inconsistent_header(tmp_path, header, match):
  path = safetensors(tmp_path / "model.safetensors", header, bytes(8))
  with pytest.raises(ValueError, match=match):
    open_safetensors(path)


def test_tensors_are_read_as_written(tmp_path):
  arrays = {
    "zero": np.zeros((0, 3), np.float32),
    "one": np.float32([[1.5]]),
    "half": np.arange(5, dtype=np.float16),
    "brain": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "int": np.arange(3),
  }
  save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
  found = open_safetensors(tmp_path / "x.safetensors")
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert (found[name].shape, found[name].dtype) == (array.shape, str(array.dtype))
    assert found[name].parameters == array.size
    np.testing.assert_array_equal(found[name].read(), array)


def test_header_length_that_looks_like_another_file_type(tmp_path):
  """The first byte of the length may be that of a zip archive or of a pickle."""
  header = {"a": entry()}
  for first in (0x50, 0x80):
    text = json.dumps(header).encode()
    text += b" " * ((first - len(text)) % 256)
    path = safetensors(tmp_path / "x.safetensors", text, bytes(8))
    assert path.read_bytes()[0] == first
    assert list(open_weights(path)) == ["a"]


def test_truncation_at_any_length_is_refused(hub, tmp_path):
  source = Path(shutil.copy(hub / "model.safetensors", tmp_path))
  lengths = [8, 9, 100, *np.random.default_rng(0).integers(101, source.stat().st_size, 100)]
  for length in sorted(lengths, reverse=True):
    os.truncate(source, int(length))
    refused(source, tmp_path, "is truncated at|is not a safetensors")


def test_missing_and_misplaced_shards(tmp_path):
  source = write_folder(tmp_path / "source", layout("hub"), shards=3)
  index = source / "model.safetensors.index.json"
  values = json.loads(index.read_text())
  shard = source / "model-00002-of-00003.safetensors"
  content = shard.read_bytes()
  shard.unlink()
  refused(source, tmp_path, "00002-of-00003.safetensors, one of 3 shards", FileNotFoundError)
  shard.write_bytes(content)
  values["weight_map"][SCALE] = "model-00001-of-00003.safetensors"
  values["weight_map"]["more"] = "model-00001-of-00003.safetensors"
  index.write_text(json.dumps(values))
  refused(source, tmp_path, "disagree about .* more tensors")
  values["weight_map"][SCALE] = "../elsewhere.safetensors"
  index.write_text(json.dumps(values))
  refused(source, tmp_path, "a shard must be in the directory of its index")
  for text in ("{", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}'):
    index.write_text(text)
    refused(source, tmp_path, "is not an index of shards")


def test_tracker_alone_is_refused(tmp_path):
  source = write_folder(tmp_path / "source", layout("tracker"))
  refused(source, tmp_path, r"only SAM 3's tracker \(Sam3TrackerModel.*Sam3VideoModel")


def test_missing_empty_unrelated_and_converted_sources(hub, tmp_path):
  refused(
    tmp_path / "none", tmp_path, "none does not exist; give model.safetensors", FileNotFoundError
  )
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", tmp_path, "holds no model.safetensors")
  save_file({"bert.weight": np.ones(3, np.float32)}, tmp_path / "bert.safetensors")
  refused(tmp_path / "bert.safetensors", tmp_path, "does not hold SAM 3 in any known layout")
  convert(hub, tmp_path / "done", tokenizer=TOKENIZER)
  refused(tmp_path / "done", tmp_path, "is a checkpoint of sam3-jax already")


def test_invalid_options(hub, tmp_path):
  refused(hub, tmp_path, "dtype must be float32 or bfloat16; got 'float64'", dtype="float64")
  refused(hub, tmp_path, "format 'tf' must be auto or one of huggingface, meta", format="tf")
  refused(hub, tmp_path, "does not hold SAM 3 in the meta layout", format="meta")
  assert_tree(converted(hub, tmp_path / "x", format="huggingface").params)


def test_output_that_exists_or_cannot_be_written(hub, tmp_path):
  (tmp_path / "taken").mkdir()
  (tmp_path / "taken" / "mine").write_text("keep")
  (tmp_path / "file").write_text("keep")
  for out in ("taken", "file", "file/x"):
    with pytest.raises(ValueError, match=r"exists already|cannot write to"):
      convert(hub, tmp_path / out, tokenizer=TOKENIZER)
  assert (tmp_path / "taken" / "mine").read_text() == (tmp_path / "file").read_text() == "keep"
  assert len(list(tmp_path.rglob("*"))) == 3


def one_fault(rng, arrays):
  """Changes one tensor; returns its name."""
  name = str(rng.choice(list(arrays)))
  array = arrays[name]
  match rng.choice(["missing", "extra", "renamed", "shape", "dtype", "nan", "rank"]):
    case "missing":
      del arrays[name]
    case "extra":
      name += "2"
      arrays[name] = array
    case "renamed":
      arrays[name[:-1]] = arrays.pop(name)
    case "shape":
      arrays[name] = array[:-1]
    case "dtype":
      arrays[name] = array.astype(np.int32)
    case "nan":
      arrays[name] = array.copy()
      arrays[name].flat[rng.integers(array.size)] = rng.choice([np.nan, np.inf])
    case "rank":
      arrays[name] = array[None]
  return name


@pytest.mark.slow
def test_single_faults_are_named(tmp_path):
  rng = np.random.default_rng(0)
  source = write_folder(tmp_path / "source", {"x": np.ones(1)})
  for _ in range(40):
    changed = dict(layout("hub"))
    name = one_fault(rng, changed)
    save_file(
      {n: np.ascontiguousarray(a) for n, a in changed.items()}, source / "model.safetensors"
    )
    refused(source, tmp_path, name.replace(".", r"\."))


def test_unread_tensor_that_is_not_finite(tmp_path):
  arrays = dict(huggingface_weights())
  arrays["tracker_neck.fpn_layers.3.proj1.bias"] = np.full(128, np.nan, np.float32)
  source = write_folder(tmp_path / "source", arrays)
  refused(source, tmp_path, "1 fault: tracker_neck.fpn_layers.3.proj1.bias holds values that are")


KILLED = """
import os, signal, sys
sys.path[:0] = sys.argv[4:]
from sam3_jax.checkpoint import writer
from sam3_jax.converters import convert
writer.OWN_ITEM = 500_000
stop = sys.argv[3]
def progress(what, fraction):
  if what == stop:
    os.kill(os.getpid(), signal.SIGKILL)
if stop == "rename":
  os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], tokenizer=%r, progress=progress)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["fusion", "rename"])
def test_a_killed_conversion_leaves_nothing_that_loads(hub, tmp_path, stop):
  out = tmp_path / "out"
  done = subprocess.run(
    [sys.executable, "-c", KILLED % str(TOKENIZER), hub, out, stop, *sys.path], check=False
  )
  assert done.returncode == -signal.SIGKILL
  (left,) = tmp_path.glob(".out.*.partial")
  assert {path.name for path in tmp_path.iterdir()} == {left.name, ".out.lease"}
  with pytest.raises(FileNotFoundError):
    checkpoint.load(out)
  if stop != "rename":  # then the checkpoint is complete, except for its name
    with pytest.raises(ValueError, match="only part of one"):
      checkpoint.load(left)
  assert_tree(converted(hub, out).params)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_source_tensors_are_views_of_a_memory_map(hub):
  sources = open_safetensors(Path(hub) / "model.safetensors")
  array = sources[SCALE].read()
  while array.base is not None and not isinstance(array, np.memmap):
    array = array.base
  assert isinstance(array, np.memmap)
  assert not sources[SCALE].read().flags.writeable
  assert os.path.samefile(array.filename, hub / "model.safetensors")
