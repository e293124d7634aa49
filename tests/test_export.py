"""Export to the layouts of Meta and Hugging Face: bit-equal tensors, and zero-filled ones."""

import collections
import dataclasses
import gzip
import json
import re
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clip_bpe import merges as clip_merges
from golden_model import CONFIG, VIDEO_CONFIG, meta_weights, parameters
from layouts import TOKENIZER, layout, tiny_config, write_folder
from safetensors.numpy import load_file
from sam3_jax.converters import convert
from sam3_jax.converters.export import export
from sam3_jax.converters.layouts import meta
from sam3_jax.converters.layouts.huggingface_config import read_config, write_config
from sam3_jax.converters.readers.safetensors import open_safetensors
from sam3_jax.converters.readers.torch_files import open_torch
from sam3_jax.converters.selection import name_in_file
from sam3_jax.converters.vocabulary import build_tokenizer
from sam3_jax.converters.writers.safetensors import write_safetensors
from sam3_jax.converters.writers.torch_files import write_torch
from sam3_jax.converters.writers.vocabulary import merges, write_huggingface, write_openai
from torch_archive import save_arrays

from sam3_jax import Sam3
from sam3_jax.checkpoint import checksums
from sam3_jax.checkpoint.bundle import load, load_unread, save
from sam3_jax.config import RELEASED, StemConfig

POINTS = "detector.geometry_encoder.points_"
CLASS_ROW = "detector.backbone.vision_backbone.trunk.pos_embed"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
  """The tiny model from both layouts."""
  folder = tmp_path_factory.mktemp("bundles")
  source = save_arrays(folder / "sam3.pt", layout("meta") | meta.rope_tables(CONFIG))
  convert(source, folder / "meta", config=CONFIG, tokenizer=TOKENIZER)
  convert(write_folder(folder / "hf", layout("hub")), folder / "hub", tokenizer=TOKENIZER)
  write_folder(folder / "hf1", layout("detector"))
  convert(folder / "hf1", folder / "detector", tokenizer=TOKENIZER)
  return folder


def read(folder, kind):
  opened = (
    open_torch(folder / "sam3.pt")
    if kind == "meta"
    else open_safetensors(folder / "model.safetensors")
  )
  return {name_in_file(name, one): np.array(one.read()) for name, one in opened.items()}


def assert_arrays(got, want):
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert got[name].dtype == array.dtype, name
    np.testing.assert_array_equal(got[name], array, err_msg=name)


@pytest.mark.slow
def test_round_trip_of_meta(bundles, tmp_path):
  done = export(bundles / "meta", tmp_path / "out", "meta", verify=True)
  assert_arrays(read(tmp_path / "out", "meta"), layout("meta") | meta.rope_tables(CONFIG))
  assert done.zero_filled == ()
  assert done.left_out == {}
  assert (done.file, done.tensors) == ("sam3.pt", 623)
  with gzip.open(tmp_path / "out" / "bpe_simple_vocab_16e6.txt.gz", "rt") as file:
    assert len(file.read().splitlines()) == 48_895


@pytest.mark.slow
def test_round_trip_of_hugging_face(bundles, tmp_path):
  done = export(bundles / "hub", tmp_path / "out", "huggingface", verify=True)
  assert_arrays(read(tmp_path / "out", "huggingface"), layout("hub"))
  assert_arrays(load_file(tmp_path / "out" / "model.safetensors"), layout("hub"))
  assert (done.zero_filled, done.left_out) == ((), {})


@pytest.mark.slow
def test_export_of_a_saved_model(bundles, tmp_path):
  """What `Sam3` does not use goes with it: a changed model is written whole."""
  model = Sam3.from_checkpoint(bundles / "hub", dtype="float32")
  name = "detector_model.detr_decoder.presence_token.weight"
  model.params["decoder"]["presence_token"] += 1
  model.save(tmp_path / "saved")
  done = export(tmp_path / "saved", tmp_path / "out", "huggingface")
  assert (done.zero_filled, done.left_out) == ((), {})
  assert_arrays(
    read(tmp_path / "out", "huggingface"), layout("hub") | {name: layout("hub")[name] + 1}
  )


@pytest.mark.slow
def test_from_meta_to_hugging_face(bundles, tmp_path):
  done = export(bundles / "meta", tmp_path / "out", "huggingface")
  assert_arrays(read(tmp_path / "out", "huggingface"), layout("hub"))
  assert done.zero_filled == ()
  assert set(done.left_out) == {"geometry/point_*", f"{CLASS_ROW}[:, :1]"}


@pytest.mark.slow
def test_from_hugging_face_to_meta(bundles, tmp_path):
  done = export(bundles / "hub", tmp_path / "out", "meta", verify=True)
  got = read(tmp_path / "out", "meta")
  want = layout("meta") | meta.rope_tables(CONFIG)
  zero = {name for name in want if name.startswith(POINTS)}
  want |= {name: np.zeros_like(want[name]) for name in zero}
  want[CLASS_ROW] = want[CLASS_ROW].copy()
  want[CLASS_ROW][:, 0] = 0
  assert_arrays(got, want)
  assert set(done.zero_filled) == {*zero, f"{CLASS_ROW}[:, :1]"}
  assert len(zero) == 6
  report = json.loads((tmp_path / "out" / "export.json").read_text())
  assert report["zero_filled"] == list(done.zero_filled)


@pytest.mark.slow
def test_checkpoint_without_a_tracker(bundles, tmp_path):
  done = export(bundles / "detector", tmp_path / "hf", "huggingface", verify=True)
  assert set(done.left_out) == {"tracker", "neck of the tracker"}
  want = {f"detector_model.{name}": array for name, array in layout("detector").items()}
  assert_arrays(read(tmp_path / "hf", "huggingface"), want)
  config = json.loads((tmp_path / "hf" / "config.json").read_text())
  assert config["architectures"] == ["Sam3Model"]
  done = export(bundles / "detector", tmp_path / "meta", "meta")
  got = read(tmp_path / "meta", "meta")
  assert not any(name.startswith("tracker.") or "sam2_convs" in name for name in got)
  assert set(done.left_out) == {"tracker", "neck of the tracker"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["meta", "huggingface"])
def test_round_trip_without_the_source(bundles, tmp_path, kind):
  """The written folder has all that `convert` needs, but for Meta's configuration."""
  export(bundles / "meta", tmp_path / "out", kind)
  config = CONFIG if kind == "meta" else None
  convert(tmp_path / "out", tmp_path / "again", config=config)
  first, second = (load(p, verify=True) for p in (bundles / "meta", tmp_path / "again"))
  assert second.tokenizer == first.tokenizer
  assert second.config == dataclasses.replace(VIDEO_CONFIG, concept_points=kind == "meta")
  for path, array in jax.tree.leaves_with_path(second.params):
    want = first.params
    for key in path:
      want = want[key.key]
    np.testing.assert_array_equal(array, want)
  if kind == "meta":
    assert_arrays(load_unread(tmp_path / "again"), load_unread(bundles / "meta"))


@pytest.mark.slow
def test_fine_tuned_model(tmp_path):
  """Saved without `unread`, as nothing read it: all of the detector is there, some of it zero."""
  params = jax.tree.map(lambda x: (x * 1.5).astype(jnp.bfloat16), parameters())
  save(tmp_path / "tuned", params, CONFIG, TOKENIZER.read_bytes())
  done = export(tmp_path / "tuned", tmp_path / "out", "meta", verify=True)
  got = read(tmp_path / "out", "meta")
  want = meta_weights()
  assert got.keys() == {n for n in want if "sam2_convs" not in n} | meta.rope_tables(CONFIG).keys()
  zero = [name for name in done.zero_filled if "[" not in name]
  assert len(zero) == 9
  for name, array in got.items():
    if name in zero:
      assert not array.any()
    elif array.dtype == jnp.bfloat16 and name != CLASS_ROW:
      np.testing.assert_array_equal(array, (want[name] * np.float32(1.5)).astype(jnp.bfloat16))
  dtypes = collections.Counter(str(array.dtype) for array in got.values())
  assert dtypes == {"bfloat16": len(got) - 4, "complex64": 4}


@pytest.mark.slow
def test_unread_tensors_of_a_fine_tuned_model(bundles, tmp_path):
  bundle = load(bundles / "meta")
  save(
    tmp_path / "tuned",
    jax.tree.map(lambda x: x * 2, bundle.params),
    bundle.config,
    bundle.tokenizer,
    unread=load_unread(bundles / "meta"),
  )
  export(tmp_path / "tuned", tmp_path / "out", "meta")
  got = read(tmp_path / "out", "meta")
  # All of the tracker is read, and so tuned, but for a tensor that no code reads.
  tracker = {
    name: array if name == "tracker.no_mem_pos_enc" else array * 2
    for name, array in meta_weights("tracker.").items()
  }
  assert_arrays({name: got[name] for name in tracker}, tracker)
  norm = "detector.backbone.vision_backbone.trunk.ln_pre.weight"
  np.testing.assert_array_equal(got[norm], meta_weights()[norm] * 2)
  np.testing.assert_array_equal(got[CLASS_ROW][:, 0], meta_weights()[CLASS_ROW][:, 0])


@pytest.mark.slow
def test_training_keeps_unread_tensors(bundles):
  from sam3_jax.training.config import TrainConfig
  from sam3_jax.training.start import load_start

  start = load_start(TrainConfig(checkpoint=str(bundles / "hub")))
  assert_arrays(start.unread, load_unread(bundles / "hub"))
  assert start.untrained.keys() == {"visual", "video"}
  start = load_start(TrainConfig(checkpoint=str(bundles / "hub"), objective="visual"))
  assert start.untrained.keys() == {"video"}


# --- refusals


def refused(tmp_path, bundle, match, layout="meta", error=ValueError):
  before = sorted(tmp_path.rglob("*"))
  with pytest.raises(error, match=match) as caught:
    export(bundle, tmp_path / "out", layout)
  assert "\n" not in str(caught.value)
  assert sorted(tmp_path.rglob("*")) == before


def test_invalid_targets(bundles, tmp_path):
  refused(tmp_path, bundles / "meta", "layout 'keras' must be one of huggingface, meta", "keras")
  refused(tmp_path, tmp_path / "none", "there is no checkpoint at", error=FileNotFoundError)
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "mine").write_text("keep")
  refused(tmp_path, bundles / "meta", "exists already")


@pytest.mark.slow
def test_convolutional_stem_is_refused(tmp_path):
  stem = (StemConfig(stride=14, width=64, blocks=1),)
  config = dataclasses.replace(CONFIG, trunk=dataclasses.replace(CONFIG.trunk, stem=stem))
  from sam3_jax.model.sam3 import init

  save(tmp_path / "b", init(config, jax.random.key(0)), config, TOKENIZER.read_bytes())
  refused(tmp_path, tmp_path / "b", "has a trunk with a convolutional stem")


def test_damaged_checkpoint_is_refused(bundles, tmp_path):
  import shutil

  damaged = shutil.copytree(bundles / "meta", tmp_path / "damaged")
  manifest = json.loads((damaged / "manifest.json").read_text())
  manifest["parameters"]["trunk/norm_pre/scale"]["sha256"] = "0" * 64
  (damaged / "manifest.json").write_text(json.dumps(manifest))
  checksums.write(damaged)
  refused(tmp_path, damaged, "trunk/norm_pre/scale differs from its checksum")


SPOILT = {
  "huggingface": (
    "detector_model.detr_decoder.presence_token.weight",  # read
    "tracker_model.no_memory_positional_encoding",  # kept
  ),
  "meta": (
    "detector.transformer.decoder.presence_token.weight",
    CLASS_ROW,  # its first row is kept, the others are read
    "detector.geometry_encoder.points_direct_project.bias",  # zero
    "detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis",  # computed anew
  ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "name"), [(kind, name) for kind, names in SPOILT.items() for name in names]
)
def test_verify_finds_a_flipped_bit(bundles, tmp_path, monkeypatch, kind, name):
  """One bit of the tensor's first number, flipped on its way into the file."""
  write = {"huggingface": write_safetensors, "meta": write_torch}[kind]

  def spoil(path, listing, arrays):
    def flipped(entry, array):
      array = np.array(array, order="C")
      array.reshape(-1).view(np.uint8)[0] ^= entry[0] == name
      return array

    write(path, listing, map(flipped, listing, arrays))

  monkeypatch.setattr(f"sam3_jax.converters.export.{write.__name__}", spoil)
  export(bundles / "hub", tmp_path / "unseen", kind)
  with pytest.raises(ValueError, match=rf"1 fault: {re.escape(name)} ") as caught:
    export(bundles / "hub", tmp_path / "out", kind, verify=True)
  assert "\n" not in str(caught.value)
  assert not (tmp_path / "out").exists()


# --- the writers by themselves


ARRAYS = {
  "matrix": np.arange(6, dtype=np.float32).reshape(2, 3),
  "scalar": np.float32(3).reshape(()),
  "empty": np.zeros((0, 3), np.float32),
  "one": np.ones(1, np.float16),
  "brain": np.arange(5).astype(jnp.bfloat16),
  "complex": np.ones((1, 2), np.complex64) * 1j,
  "turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
}
LISTING = [(name, array.shape, str(array.dtype)) for name, array in ARRAYS.items()]


@pytest.mark.parametrize(
  ("write", "open_file"), [(write_torch, open_torch), (write_safetensors, open_safetensors)]
)
def test_readers_read_what_writers_write(tmp_path, write, open_file):
  write(tmp_path / "file", LISTING, iter(ARRAYS.values()))
  found = open_file(tmp_path / "file")
  assert_arrays({name_in_file(name, one): one.read() for name, one in found.items()}, ARRAYS)
  with pytest.raises(ValueError, match=r"matrix became float32 \[1\] while it was written"):
    write(tmp_path / "other", LISTING[:1], [np.ones(1, np.float32)])


def test_files_are_deterministic_and_aligned(tmp_path):
  for name in ("a", "b"):
    write_torch(tmp_path / name, LISTING, ARRAYS.values())
  content = (tmp_path / "a").read_bytes()
  assert content == (tmp_path / "b").read_bytes()
  with zipfile.ZipFile(tmp_path / "a") as archive:
    assert archive.testzip() is None
    for info in archive.infolist():
      data = archive.read(info)
      if len(data) > 8 and "/data/" in info.filename:
        assert content.index(data) % 64 == 0


@pytest.mark.slow
def test_merges_from_the_pieces(tmp_path):
  """clip_bpe.py reads them from tokenizer.json."""
  model = TOKENIZER.read_bytes()
  assert merges(model) == [tuple(merge) for merge in clip_merges()]
  write_openai(model, tmp_path)
  assert build_tokenizer(tmp_path / "bpe_simple_vocab_16e6.txt.gz") == model
  write_huggingface(model, tmp_path, 32)
  assert build_tokenizer(tmp_path / "vocab.json") == model
  assert json.loads((tmp_path / "tokenizer_config.json").read_text())["model_max_length"] == 32


def test_config_json_round_trip():
  for config in (CONFIG, RELEASED):
    for layers in (0, 4):
      points = dataclasses.replace(config, concept_points=False)
      assert read_config(write_config(config, layers), "x") == points


def test_config_json_equals_transformers():
  """Every key that is written is in the file that transformers wrote, with the same value."""

  def compare(got, want, path=""):
    for key, value in got.items():
      assert key in want, path + key
      if isinstance(value, dict):
        compare(value, want[key], f"{path}{key}.")
      else:
        assert value == want[key], path + key

  compare(write_config(CONFIG, 2), tiny_config())
