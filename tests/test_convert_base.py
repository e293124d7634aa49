"""Parts that a source lacks come from a base checkpoint; without one they are named."""

import functools
import json

import numpy as np
import pytest
from conversions import refused
from golden_model import CONFIG
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import TOKENIZER, layout, tiny_config, write_folder
from sam3_jax.converters import convert
from sam3_jax.converters.base import Base
from sam3_jax.converters.layouts import meta
from sam3_jax.converters.parts import OPTIONAL, WORDS, parts_of
from sam3_jax.converters.plan_source import plan_with_base
from sam3_jax.converters.source import Source
from sam3_jax.converters.wrappers import FORMATS
from torch_archive import save_arrays

from sam3_jax.checkpoint import bundle
from sam3_jax.utils.param_tree import flatten

opened = functools.cache(Base)
KINDS = {"meta": "meta", "hub": "huggingface"}


def doubled(arrays):
  """The weights of another model of the same size."""
  return {name: array * 2 for name, array in arrays.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """From Meta's layout: with all parts, concept points and the class token's row."""
  folder = tmp_path_factory.mktemp("base")
  save_arrays(folder / "sam3.pt", doubled(layout("meta")))
  convert(folder, folder / "base", tokenizer=TOKENIZER, config=CONFIG)
  return folder / "base"


@pytest.fixture(scope="module")
def theirs(base):
  return {name: np.asarray(x) for name, x in flatten(bundle.load(base).params).items()}


def without(arrays, layout, parts):
  table = FORMATS[layout].TABLE
  found = parts_of(table.name)
  return {n: a for n, a in arrays.items() if found.of(table.canonical(n)) not in parts}


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_belongs_to_a_part(kind):
  table = FORMATS[KINDS[kind]].TABLE
  found = parts_of(table.name)
  assert {found.of(table.canonical(name)) for name in layout(kind)} == set(WORDS)


@pytest.mark.slow
@settings(
  max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  st.sampled_from(sorted(KINDS)), st.sets(st.sampled_from(sorted(WORDS)), min_size=1, max_size=9)
)
def test_missing_parts_come_from_the_base(base, theirs, kind, parts):
  name = KINDS[kind]
  table = FORMATS[name].TABLE
  arrays = without(layout(kind), name, parts)
  sources = {n: Source.of(a) for n, a in arrays.items()}
  planned = plan_with_base(opened(base), table, sources, base / "x", None)
  got = flatten({part: planned.read(part, "float32", []) for part in planned.parts})
  assert got.keys() == theirs.keys()
  for path, array in got.items():
    part = "visual/neck" if path.startswith("visual/neck/") else path.partition("/")[0]
    # Hugging Face's layout has no concept points: they come from the base.
    of_base = part in parts or (kind == "hub" and path.startswith("geometry/point_"))
    np.testing.assert_array_equal(array, theirs[path] / (1 if of_base else 2), err_msg=path)


@pytest.mark.slow
def test_training_checkpoint_without_masks(base, theirs, tmp_path):
  """As Meta's trainer saves it: without prefix and tracker."""
  whole = {
    n.removeprefix("detector."): a for n, a in layout("meta").items()
    if n.startswith("detector.") and "sam2_convs" not in n and "segmentation_head" not in n
  }  # fmt: skip
  source = save_arrays(tmp_path / "checkpoint.pt", whole)
  match = (
    r"holds SAM 3 without the segmentation head \(as Meta's recipes with enable_segmentation: False"
  )
  refused(source, tmp_path, match, config=CONFIG)
  notes = []
  convert(source, tmp_path / "out", base=base, note=notes.append)
  got = flatten(bundle.load(tmp_path / "out", verify=True).params)
  for path, array in got.items():
    of_base = path.startswith(("masks/", "visual/", "video/"))
    np.testing.assert_array_equal(np.asarray(array), theirs[path] / (1 if of_base else 2))
  info = bundle.inspect(tmp_path / "out").info
  assert info["base"]["parts"] == ["masks", "video", "visual", "visual/neck"]
  assert info["base"]["identity"] == bundle.begin(base)[0].identity
  assert notes[0].startswith("took from the base base: the segmentation head")
  assert info["lacks"] == []
  unread = bundle.load_unread(tmp_path / "out")
  assert unread.keys() == bundle.load_unread(base).keys()


def test_incomplete_part_is_refused_with_a_base(base, tmp_path):
  arrays = dict(layout("meta"))
  name = "detector.segmentation_head.instance_seg_head.weight"
  del arrays[name]
  source = save_arrays(tmp_path / "sam3.pt", arrays)
  refused(source, tmp_path, f"1 fault: {name} is missing", base=base)


@pytest.mark.slow
def test_base_of_another_size(base, tmp_path):
  config = tiny_config()
  config["detector_config"]["detr_decoder_config"]["num_queries"] = 11
  arrays = without(layout("hub"), "huggingface", {"masks", *OPTIONAL})
  source = write_folder(tmp_path / "source", arrays, config=config)
  refused(
    source, tmp_path, "is of another model than the base .* they differ in queries", base=base
  )
  (source / "config.json").write_text(json.dumps(tiny_config()))
  smaller = {n: a[:-1] if "query_embed" in n else a for n, a in arrays.items()}
  source = write_folder(tmp_path / "smaller", smaller)
  refused(source, tmp_path, r"query_embed.weight is \[9, 128\]; expected \[10, 128\]", base=base)


def test_missing_parts_are_named(tmp_path):
  arrays = without(layout("detector"), "huggingface", {"text", "masks"})
  source = write_folder(tmp_path / "source", arrays)
  refused(source, tmp_path, "has no part of the text encoder and the segmentation head. If they")


def test_interactive_names_of_meta_image_model():
  names = {
    name.replace("tracker.", "inst_interactive_predictor.model.").removeprefix("detector.")
    for name in layout("meta")
  }
  assert {meta.canonical(name) for name in names} == layout("meta").keys()
