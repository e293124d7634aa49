"""The layouts' tables and the plan, against the parameters that golden_model.py builds by hand."""

import collections
import dataclasses
import itertools
import math
import re

import jax
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
from layouts import layout
from sam3_jax.converters.in_memory import convert_arrays, convert_meta, export_arrays
from sam3_jax.converters.infer import infer_config
from sam3_jax.converters.layouts import huggingface, meta
from sam3_jax.converters.layouts.unread import translate, unread
from sam3_jax.converters.plan import plan
from sam3_jax.converters.plan_source import plan_source
from sam3_jax.converters.source import Source
from sam3_jax.converters.transforms import CONV, DECONV, DENSE, Grid, HalfSplit

from sam3_jax.checkpoint.bundle import expected_shapes
from sam3_jax.config import RELEASED, SIZES, VideoConfig
from sam3_jax.model.rope import rope_table
from sam3_jax.utils.param_tree import SHOWN_FAULTS, flatten

NO_POINTS = dataclasses.replace(CONFIG, concept_points=False)
VIDEO_NO_POINTS = dataclasses.replace(VIDEO_CONFIG, concept_points=False)
NO_MEMORY_POSITION = "tracker.no_mem_pos_enc", "tracker_model.no_memory_positional_encoding"
FIRST = "detector.backbone.vision_backbone.trunk.ln_pre.weight"


def sources(arrays):
  return {name: Source(a.shape, str(a.dtype), lambda a=a: a) for name, a in arrays.items()}


def planned(arrays, table=meta.TABLE, config=CONFIG):
  return plan(table, sources(arrays), expected_shapes(config), config)


def assert_same(got, want):
  got, want = flatten(got), flatten(want)
  assert got.keys() == want.keys()
  for name, array in want.items():
    np.testing.assert_array_equal(got[name], array, err_msg=name)


def oracle(points=True):
  tree = jax.tree.map(np.asarray, parameters())
  if not points:
    tree["geometry"] = {n: a for n, a in tree["geometry"].items() if not n.startswith("point_")}
  return tree


def tracker():
  return {"visual": visual_parameters(), "video": video_parameters()}


def test_meta_layout_gives_the_expected_tree():
  config, params = convert_meta(meta_weights(), CONFIG)
  assert config == CONFIG
  assert_same(params, oracle())


def test_image_model_names_without_prefix():
  arrays = {name.removeprefix("detector."): array for name, array in meta_weights().items()}
  arrays |= {
    name.replace("tracker.", "inst_interactive_predictor.model."): array
    for name, array in meta_weights("tracker.").items()
  }
  config, params = convert_meta(arrays, CONFIG)
  assert config == VIDEO_CONFIG
  assert_same(params, oracle() | tracker())
  assert set(planned(arrays).unread) == set(planned(layout("meta")).unread)


@pytest.mark.parametrize("kind", ["hub", "doubled", "detector"])
def test_huggingface_layouts_give_the_expected_tree_without_points(kind):
  shapes = expected_shapes(NO_POINTS)
  assert_same(convert_arrays(huggingface.TABLE, layout(kind), shapes, NO_POINTS), oracle(False))


@pytest.mark.parametrize("kind", ["meta", "hub", "doubled"])
@pytest.mark.parametrize("video", [False, True])
def test_tracker_is_converted(kind, video):
  """Its head for visual prompts always, and the rest if the configuration has it."""
  table, config = (meta.TABLE, CONFIG) if kind == "meta" else (huggingface.TABLE, NO_POINTS)
  assert table.has_visual(layout(kind))
  if video:
    config = table.with_video(config, layout(kind))
    assert config.video == VIDEO_CONFIG.video
  shapes = expected_shapes(config, visual=True)
  params = convert_arrays(table, layout(kind), shapes, config)
  for part, want in tracker().items():
    if part == "visual" or video:
      assert_same(params.pop(part), jax.tree.map(np.asarray, want))
  assert_same(params, oracle(kind == "meta"))


def test_configurations_of_sources_without_tracker():
  """Without a head for visual prompts, its neck, or one of the tracker's parts."""
  for table, whole in ((meta.TABLE, layout("meta")), (huggingface.TABLE, layout("hub"))):
    assert table.with_video(CONFIG, whole) == VIDEO_CONFIG
    given = dataclasses.replace(CONFIG, video=VideoConfig(layers=3))
    assert table.with_video(given, whole) == given
    for part in (*table.visual_parts, *table.video_parts):
      names = [name for name in whole if not name.startswith(part)]
      assert table.with_video(given, names) == CONFIG


def test_sources_without_visual_prompt_head():
  """Meta's image model may have the second neck without the head; the neck is unread then."""
  assert not meta.TABLE.has_visual(meta_weights())
  assert not huggingface.TABLE.has_visual(layout("detector"))
  reasons = planned(meta_weights()).unread
  necks = {why for name, why in reasons.items() if "sam2_convs" in name}
  assert necks == {"neck of visual prompts, no head", "half-resolution level: unused"}


def test_incomplete_visual_prompt_head_is_refused():
  arrays = layout("meta")
  arrays = {name: x for name, x in arrays.items() if "sam_prompt_encoder" not in name}
  with pytest.raises(ValueError, match=r"17 faults: tracker\.sam_prompt_encoder\.pe_layer"):
    convert_meta(arrays, CONFIG)


@pytest.mark.parametrize("part", ["", "visual", "video"])
@pytest.mark.parametrize("kind", ["meta", "hub"])
def test_export_round_trip_is_bit_equal_and_complete(kind, part):
  table, config = (meta.TABLE, CONFIG) if kind == "meta" else (huggingface.TABLE, NO_POINTS)
  if part == "video":
    config = VIDEO_CONFIG if kind == "meta" else VIDEO_NO_POINTS
  arrays, faults = layout(kind), []
  made = plan(table, sources(arrays), expected_shapes(config, visual=bool(part)), config)
  assert bool(part) == any(path.startswith("visual/") for path in made.shapes)
  if part == "video":
    video = {name: why for name, why in made.unread.items() if why.startswith("code that is never")}
    assert list(video) == [NO_MEMORY_POSITION[kind == "hub"]]
    assert "video" not in made.unread.values()
  params = {part: made.read(part, "float32", faults) for part in made.parts}
  unread = made.read_unread(faults)
  assert not faults
  assert_same(dict(export_arrays(table, params, unread, config)), arrays)
  bare = dict(export_arrays(table, params, {}, config))
  assert bare.keys() == made.entries.keys()
  if kind == "meta":
    position = bare["detector.backbone.vision_backbone.trunk.pos_embed"]
    assert position.shape == (1, 17, 64)
    assert not position[:, 0].any()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["", "visual", "video"])
@pytest.mark.parametrize("config", [SIZES["vit-tiny"], RELEASED], ids=["tiny", "released"])
@pytest.mark.parametrize("table", [meta.TABLE, huggingface.TABLE], ids=["meta", "huggingface"])
def test_each_parameter_is_filled_exactly_once(table, config, part):
  visual, video = bool(part), VideoConfig() if part == "video" else None
  config = dataclasses.replace(config, concept_points=table is meta.TABLE, video=video)
  shapes = expected_shapes(config, visual=visual)
  entries, concepts = table.entries(config, visual=visual), table.entries(config)
  filled = collections.Counter()
  slots = list(itertools.chain.from_iterable(entry.slots for entry in entries.values()))
  assert len(slots) == len(set(slots))
  for path, index in slots:
    filled[path] += math.prod(shapes[path][len(index) :])
  assert filled == {path: math.prod(shape) for path, shape in shapes.items()}
  for name in entries:
    assert table.canonical(name) == name
    # Tensors that only visual prompts need are unread if their head is missing.
    assert (table.reason(table.unread, name) is None) == (name in concepts)
    assert table.reason(table.dropped, name) is None


@pytest.mark.slow
def test_parameter_counts_equal_those_of_the_released_checkpoints():
  # Of 860,055,224 parameters in sam3.pt and 859,921,848 in facebook/sam3.
  assert sum(map(math.prod, expected_shapes(RELEASED).values())) == 838_541_366
  assert len(meta.TABLE.entries(RELEASED)) == 1093
  released = dataclasses.replace(RELEASED, concept_points=False)
  assert sum(map(math.prod, expected_shapes(released).values())) == 838_409_014
  assert len(huggingface.TABLE.entries(released)) == 1459
  # The tracker's, beyond those of visual prompts, without no_mem_pos_enc.
  whole = dataclasses.replace(RELEASED, video=VideoConfig())
  for table in (meta.TABLE, huggingface.TABLE):
    entries = table.entries(whole, visual=True).keys() - table.entries(RELEASED, visual=True).keys()
    assert len(entries) == 159


def test_unread_tensors_are_translated_between_layouts():
  """Against layouts.py, which has its own table."""
  tables = {"meta": (meta.TABLE, CONFIG), "hub": (huggingface.TABLE, NO_POINTS)}
  plans = {kind: planned(layout(kind), *table) for kind, table in tables.items()}
  for kind, other in (("meta", "hub"), ("hub", "meta")):
    table, config = tables[other]
    got = translate(plans[kind].read_unread([]), table.name, config)
    assert got.keys() == plans[other].unread.keys()
    for name, array in got.items():
      np.testing.assert_array_equal(array, plans[other].sources[name].read(), err_msg=name)


def test_stored_rope_tables_must_match_the_configuration():
  tables = meta.rope_tables(CONFIG)
  assert set(planned(meta_weights() | tables).dropped) == set(tables)
  first = next(iter(tables))
  for change, match in (
    (lambda x: x.T, rf"{first} is complex64 \[8, 16\]; expected complex64 \[16, 8\]"),
    (lambda x: x.real, rf"{first} is float32"),
    (lambda x: x * np.complex64(1j), f"{first} differs from what its configuration gives"),
    (lambda x: x + np.complex64(np.nan), f"{first} differs from"),
  ):
    with pytest.raises(ValueError, match=match):
      planned(meta_weights() | tables | {first: change(tables[first])})
  with pytest.raises(ValueError, match=f"{first} is missing"):
    planned(meta_weights() | {name: x for name, x in tables.items() if name != first})
  cosine, sine = rope_table(4, 1.0, 16)
  np.testing.assert_allclose(tables[first], cosine + 1j * sine, atol=3e-7)  # measured 6.0e-8


def test_a_single_tensor_of_another_dtype_is_refused():
  arrays = meta_weights() | {FIRST: meta_weights()[FIRST].astype(np.float16)}
  with pytest.raises(ValueError, match=f"{FIRST} is float16, all others are not; most are float32"):
    planned(arrays)


def test_transforms_by_element_and_their_inverses():
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((5, 4, 3, 2))  # out, in, rows, columns
  for o, i, r, c in np.ndindex(kernel.shape):
    assert CONV.apply(kernel, CONFIG)[r, c, i, o] == kernel[o, i, r, c]
    assert DECONV.apply(kernel, CONFIG)[r, c, o, i] == kernel[o, i, r, c]
  assert DENSE.apply(kernel[..., 0, 0], CONFIG).shape == (4, 5)
  heads, size = CONFIG.trunk.heads, CONFIG.trunk.width // CONFIG.trunk.heads
  rows = np.arange(CONFIG.trunk.width)
  turned = HalfSplit().apply(rows, CONFIG)
  for head, pair, which in np.ndindex(heads, size // 2, 2):
    assert turned[head * size + which * size // 2 + pair] == head * size + 2 * pair + which
  table = rng.standard_normal((1, 16, 3))
  np.testing.assert_array_equal(Grid().apply(table, CONFIG)[2, 3], table[0, 11])
  for transform, array in (
    (CONV, kernel),
    (DECONV, kernel),
    (HalfSplit(), rng.standard_normal((CONFIG.trunk.width, 3))),
    (Grid(), table),
  ):
    np.testing.assert_array_equal(transform.undo(transform.apply(array, CONFIG), CONFIG), array)


def test_all_faults_are_reported_together():
  arrays = meta_weights()
  missing, mis_shaped, broken = "ln_pre.weight", "ln_pre.bias", "blocks.1.attn.qkv.weight"
  trunk = "detector.backbone.vision_backbone.trunk."
  del arrays[trunk + missing]
  arrays[trunk + mis_shaped] = np.zeros((3, 2), np.float32)
  arrays[trunk + broken] = np.full_like(arrays[trunk + broken], np.nan)
  arrays["detector.nonsense"] = np.zeros(4, np.float32)
  arrays["backbone.language_backbone.resizer.bias"] = np.zeros(128, np.float32)
  with pytest.raises(ValueError) as caught:
    planned(arrays)
  text = str(caught.value)
  assert "\n" not in text
  assert "5 faults" in text
  assert "resizer.bias is there twice" in text
  assert "detector.nonsense [4] is not a name" in text
  assert f"{trunk}{missing} is missing" in text
  assert f"{trunk}{mis_shaped} is [3, 2]; expected [64]" in text
  assert f"{trunk}{broken} holds values that are not finite" in text


def test_faults_beyond_the_shown_ones_are_counted():
  # The 9 unread tensors of every file: a level of the neck, a pair of the pixel decoder, a matrix.
  count = len(meta.TABLE.entries(CONFIG)) + 9
  with pytest.raises(ValueError, match=f"{count} faults.*; and {count - SHOWN_FAULTS} more"):
    planned({})


@pytest.mark.parametrize(
  ("array", "match"),
  [
    (np.zeros(64, np.int64), "is int64; expected one of float32, bfloat16, float16"),
    (np.zeros((64, 0), np.float32), r"is \[64, 0\]; expected \[64\]"),
    (np.float32(1), r"is \[\]; expected \[64\]"),
  ],
)
def test_wrong_dtype_or_rank_is_refused(array, match):
  with pytest.raises(ValueError, match=match):
    planned(meta_weights() | {FIRST: np.asarray(array)})


def test_an_empty_unread_tensor_is_refused():
  name = "tracker.no_obj_ptr"
  with pytest.raises(ValueError, match=rf"{name} is \[0\]; expected \[1, 128\]"):
    planned(layout("meta") | {name: np.zeros(0, np.float32)})


def test_number_of_unread_tensors():
  assert len(planned(layout("meta")).unread) == 288
  assert len(planned(layout("hub"), huggingface.TABLE, NO_POINTS).unread) == 286
  for config, layers, count in ((CONFIG, 2, 288), (RELEASED, 4, 340)):
    items = unread(config, layers)
    assert sum(len(item.meta) for item in items) == count
    names = [name for item in items for name in item.names("huggingface")]
    assert len(names) == len(set(names)) == count - 2


def test_values_that_overflow_bfloat16_are_refused():
  arrays = meta_weights() | {FIRST: np.full(64, 3.4e38, np.float32)}
  with pytest.raises(ValueError, match=f"{FIRST} holds values that are not finite in bfloat16"):
    convert_meta(arrays, CONFIG, "bfloat16")


def test_incomplete_point_tensors_are_refused():
  arrays = meta_weights()
  del arrays["detector.geometry_encoder.points_pool_project.bias"]
  with pytest.raises(ValueError, match=r"points_pool_project.bias is missing"):
    convert_meta(arrays, CONFIG)


def released_shapes(table, config):
  shapes = expected_shapes(config)
  return {name: entry.shape(shapes, config) for name, entry in table.entries(config).items()}


@pytest.mark.slow
def test_configuration_of_released_checkpoints_is_inferred():
  assert infer_config(meta.TABLE, released_shapes(meta.TABLE, RELEASED)) == RELEASED
  released = dataclasses.replace(RELEASED, concept_points=False)
  assert infer_config(huggingface.TABLE, released_shapes(huggingface.TABLE, released)) == released


def test_trunk_configuration_is_inferred_from_rope_tables():
  config = dataclasses.replace(
    SIZES["vit-tiny"], trunk=dataclasses.replace(SIZES["vit-tiny"].trunk, window=12), image_size=672
  )
  shapes = released_shapes(meta.TABLE, config)
  name = "detector.backbone.vision_backbone.trunk.blocks.{}.attn.freqs_cis"
  shapes |= {name.format(i): (48**2 if i % 3 == 2 else 12**2, 32) for i in range(12)}
  assert infer_config(meta.TABLE, shapes) == config
  for block, damaged in ((0, (143, 32)), (2, (48**2, 31)), (2, (32, 48**2)), (5, (7,))):
    changed = shapes | {name.format(block): damaged}  # outvoted by the others
    assert infer_config(meta.TABLE, changed) == config


@pytest.mark.slow
def test_a_damaged_tensor_that_determines_a_size_is_named(tmp_path):
  """Only the damaged tensor of a released file is reported, not the others that contradict it."""
  shapes = released_shapes(meta.TABLE, RELEASED)
  shapes |= {name: item.shape for item in unread(RELEASED, 4) for name in item.meta}
  for name, shape in (
    ("detector.transformer.decoder.query_embed.weight", (256, 200)),
    ("detector.backbone.vision_backbone.trunk.patch_embed.proj.weight", (14, 14, 3, 1024)),
  ):
    zeros = {n: np.broadcast_to(np.float32(0), s) for n, s in (shapes | {name: shape}).items()}
    expected = f"1 fault: {name} is {list(shape)}; expected {list(shapes[name])}"
    with pytest.raises(ValueError, match=re.escape(expected)):
      plan_source(meta, sources(zeros), tmp_path / "sam3.pt", None)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda shapes: shapes, "trunk 64 wide with 4 blocks do not determine its heads"),
    (lambda shapes: {}, "is missing; this is not a complete SAM 3"),
    (lambda shapes: shapes | {FIRST.replace("ln_pre", "patch_embed.proj"): (64,)}, r"is \[64\]"),
  ],
)
def test_shapes_that_do_not_determine_the_configuration(change, match):
  shapes = {name: array.shape for name, array in meta_weights().items()}
  with pytest.raises(ValueError, match=match):
    infer_config(meta.TABLE, change(shapes))
