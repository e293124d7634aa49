"""`convert` from files: every layout gives the tree of golden_model.py; errors name the fault."""

import hashlib
import shutil
import signal
import subprocess
import sys

import conversions
import jax.numpy as jnp
import numpy as np
import pytest
from conversions import HUB, HUB_VIDEO, assert_tree, converted, refused
from golden_model import CONFIG, VIDEO_CONFIG, meta_weights
from layouts import TOKENIZER, huggingface_weights, layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.sources import find_weights

from sam3_jax.checkpoint import bundle

hub = conversions.hub


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
  loaded = converted(source, tmp_path / "out")
  assert_tree(loaded.params, visual=kind != "detector")
  assert loaded.config == (HUB if kind == "detector" else HUB_VIDEO)
  assert loaded.tokenizer == TOKENIZER.read_bytes()
  assert loaded.info["trained"] is True
  assert "layout huggingface" in loaded.info["source"]
  kept = bundle.load_unread(tmp_path / "out")
  names = {n for n in layout("hub") if kind != "detector" or n.startswith("detector_model.")}
  assert kept.keys() < names
  for name, array in kept.items():
    np.testing.assert_array_equal(array, layout("hub")[name])
  whole = [] if kind != "detector" else ["neck of the tracker", "tracker"]
  points, row = "geometry/point_* (concept points)", "the class token's row of the position table"
  assert loaded.info["lacks"] == [*whole, points, row]
  counts = bundle.inspect(tmp_path / "out").source_tensors
  assert sum(group["tensors"] for group in counts.values()) == len(names)
  assert sum(group["parameters"] for group in counts.values()) == sum(
    layout("hub")[name].size for name in names
  )


@pytest.mark.slow
def test_meta_layout_in_safetensors(tmp_path):
  save_file(meta_weights(""), tmp_path / "sam3.safetensors")
  loaded = converted(tmp_path / "sam3.safetensors", tmp_path / "out", config=CONFIG)
  assert loaded.config == VIDEO_CONFIG
  assert_tree(loaded.params, points=True)
  kept = bundle.load_unread(tmp_path / "out")
  position = "detector.backbone.vision_backbone.trunk.pos_embed"
  np.testing.assert_array_equal(kept[f"{position}[:, :1]"], meta_weights()[position][:, :1])
  assert [name for name in kept if name.startswith("tracker.")] == ["tracker.no_mem_pos_enc"]
  assert "a class token's row: cut off before use" in bundle.inspect(tmp_path / "out").unread


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("requested", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, requested):
  arrays = {name: array.astype(jnp.dtype(stored)) for name, array in layout("detector").items()}
  source = write_folder(tmp_path / "source", arrays)
  loaded = converted(source, tmp_path / "out", dtype=requested)
  assert_tree(loaded.params, visual=False, dtype=jnp.dtype(requested), through=jnp.dtype(stored))
  assert {str(x.dtype) for x in bundle.load_unread(tmp_path / "out").values()} == {stored}


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
  assert bundle.load(tmp_path / "out").tokenizer == TOKENIZER.read_bytes()


def test_invalid_tokenizer_model(hub, tmp_path):
  (tmp_path / "junk.model").write_bytes(b"junk")
  with pytest.raises(ValueError, match=r"junk\.model is not a SentencePiece model") as caught:
    convert(hub, tmp_path / "out", tokenizer=tmp_path / "junk.model")
  assert "\n" not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ["junk.model"]


def test_progress_is_reported(hub, tmp_path):
  reports = []
  convert(hub, tmp_path / "out", tokenizer=TOKENIZER, progress=lambda *step: reports.append(step))
  assert [step for step, _ in reports][1:-2] == list(bundle.inspect(tmp_path / "out").parts)
  fractions = [fraction for _, fraction in reports]
  assert fractions == sorted(fractions)
  assert (fractions[0], fractions[-1]) == (0, 1)


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
    bundle.load(out)
  if stop != "rename":  # then the checkpoint is complete, except for its name
    with pytest.raises(ValueError, match="only part of one"):
      bundle.load(left)
  assert_tree(converted(hub, out).params)
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
