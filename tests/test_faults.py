"""Conversion refuses every fault in a single tensor, and names the tensor.

A transposed tensor is detected by its shape; transposing a square tensor cannot be detected. Most
faults here are in memory; `benchmarks/convert_faults.py` makes faults in files, a few of them here.
"""

import json
import re

import numpy as np
import pytest
from convert_faults import CHANGES, KINDS, LAYOUTS, change, run
from golden_model import CONFIG
from keras_preset import datasets, write_preset
from layouts import TOKENIZER, layout, write_folder
from sam3_jax.converters import conversion, convert
from sam3_jax.converters.layouts import meta
from sam3_jax.converters.source import Source

from sam3_jax.checkpoint import bundle

COUNT = 200
DTYPES = ("float64", "float16", "int32", "complex64", "bool")


def source(kind, folder):
  """The tensors of a layout, a directory with its configuration, and the configuration itself."""
  if kind == "meta":
    folder.mkdir()
    (folder / "sam3.pt").touch()
    return layout("meta") | meta.rope_tables(CONFIG), folder, CONFIG
  if kind == "keras":
    return datasets(), write_preset(folder, {"x": np.ones(1)}), None
  return layout("hub"), write_folder(folder, {"x": np.ones(1)}), None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["huggingface", "meta", "keras"])
def test_every_fault_is_found_and_named(tmp_path, monkeypatch, kind):
  arrays, folder, config = source(kind, tmp_path / "source")
  rng = np.random.default_rng(0)
  monkeypatch.setattr(conversion, "_tokenizer", lambda *_: TOKENIZER.read_bytes())
  before = sorted(tmp_path.rglob("*"))
  for number in range(COUNT):
    changed, name = change(rng, arrays, rng.choice(CHANGES), DTYPES)
    sources = {n: Source(a.shape, str(a.dtype), lambda a=a: a) for n, a in changed.items()}
    monkeypatch.setattr(conversion, "open_weights", lambda _, sources=sources: sources)
    with pytest.raises(ValueError) as caught:
      convert(folder, tmp_path / "out", config=config)
    message = str(caught.value)
    assert name in message, f"fault {number}, {name}: {message}"
    assert "\n" not in message
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("kind", LAYOUTS)
def test_one_fault_of_every_kind_in_files(kind):
  """`benchmarks/convert_faults.py` makes 200 in each layout."""
  missed = [outcome for outcome in run(kind, len(KINDS), seed=1) if not outcome.named]
  assert missed == []


@pytest.mark.slow
def test_every_flipped_bit_is_found(tmp_path):
  """In all files of params/, including those that only Orbax reads."""
  convert(write_folder(tmp_path / "hf", layout("detector")), tmp_path / "out", tokenizer=TOKENIZER)
  files = [file for file in (tmp_path / "out" / "params").rglob("*") if file.is_file()]
  parameters = json.loads((tmp_path / "out" / "manifest.json").read_text())["parameters"]
  rng, named = np.random.default_rng(0), 0
  sizes = np.array([file.stat().st_size for file in files])
  for _ in range(20):
    file = files[rng.choice(len(files), p=sizes / sizes.sum())]
    content = file.read_bytes()
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(changed)
    with pytest.raises(ValueError, match="differs from its checksum") as caught:
      bundle.verify(tmp_path / "out")
    message = str(caught.value)
    named += any(re.search(rf"\b{name} differs", message) for name in parameters)
    assert f"{file} differs" in message
    file.write_bytes(content)
  assert named >= 19  # the others are in metadata of Orbax, and are named by their file
  small = min((file for file in files if file.stat().st_size), key=lambda f: f.stat().st_size)
  content = small.read_bytes()
  small.write_bytes(bytes([content[0] ^ 1]) + content[1:])
  with pytest.raises(ValueError, match=f"{small.name} differs from its checksum"):
    bundle.verify(tmp_path / "out")
