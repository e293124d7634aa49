"""Annotation files with contradictions or values that could crash a reader: rejected or noted."""

import importlib.util
import json
import random
import resource
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from sam3_jax.datasets import annotations
from sam3_jax.evaluation import predictions
from sam3_jax.outputs import rle
from sam3_jax.outputs.rle import areas, decode, encode, runs
from sam3_jax.outputs.segmentations import compress, compress_all
from sam3_jax.utils.notes import Notes

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
coco: Any = mask
WIDTH, HEIGHT = 80, 60


def square(x=10, y=10, w=20, h=20):
  return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def one(number: Any = 1, image: Any = 1, category: Any = 1, box=(10, 10, 20, 20), **values: Any):
  base = {"id": number, "image_id": image, "category_id": category, "iscrowd": 0}
  return base | {"bbox": list(box), "segmentation": square(*box)} | values


def image(number=1, name="a.png", **values):
  return {"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT} | values


def content(*objects, images=None, categories=("cat", "dog")):
  named = [
    {"id": i, "name": c} if isinstance(c, str) else c for i, c in enumerate(categories, start=1)
  ]
  return {"images": images or [image()], "categories": named, "annotations": list(objects)}


def sa_co(*objects, images):
  return {"images": images, "annotations": list(objects)}


@pytest.fixture
def read(tmp_path):
  def to_pairs(values, notes=None, **options):
    path = tmp_path / "a.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return annotations.read(path, notes=Notes() if notes is None else notes, **options)

  return to_pairs


def fault_of(call, *values, **options):
  """The message of the error that a call raises; "" if it returns."""
  try:
    call(*values, **options)
  except ValueError as error:
    return str(error)
  return ""


def found(pairs):
  return [(pair.phrase, len(pair.objects)) for pair in pairs]


# Malformed data before C.


@pytest.mark.parametrize(
  ("segmentation", "message"),
  [
    ([[10, 10, 30, 10, -5e9, -5e9, 10, 30]], "a vertex at -5e+09, -5e+09, far outside the 80 x 60"),
    ([[10, 10, 30, 10, 1e300, 30, 10, 30]], "a vertex at 1e+300, 30, far outside"),
    ([[10, 10, 30, 10, 161, 30, 10, 30]], "a vertex at 161, 30, far outside"),
    ([[10, 10, 30, 10, 30, 121]], "a vertex at 30, 121, far outside"),
    ([[10, 10, 30, 10, 10**400, 30]], "must be lists of at least three points"),
    ([[10, 10, 30, 10, True, 30]], "must be lists of at least three points"),
    ([[10, 10, 30, 10, "30", 30]], "must be lists of at least three points"),
    ([[0, 0, 79, 59] * 30_000], "is over 4,000,000 pixels long"),
    ({"size": [HEIGHT, WIDTH], "counts": [2**31] * 4}, "cover 8589934592 pixels"),
    ({"size": [HEIGHT, WIDTH], "counts": [10**30, 4800]}, "cover 1000"),
    ({"size": [10**9, 10**9], "counts": "0"}, "more than 2,147,483,647"),
    ({"size": [True, WIDTH], "counts": "0"}, "must be [height, width]"),
    ({"size": [HEIGHT, WIDTH], "counts": "oooooooooooo"}, "damaged"),
    ({"size": [HEIGHT, WIDTH], "counts": "\u00e9"}, "damaged"),
  ],
)
def test_polygons_are_checked_before_drawing(read, segmentation, message):
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  with pytest.raises(ValueError, match="1 fault: annotation 1: ") as caught:
    read(content(one(segmentation=segmentation)))
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


def test_huge_boxes_are_faults_without_warnings(read):
  for size in (1e200, 1e308):  # products and sums are infinite
    huge = one(box=(10, 10, size, size), segmentation=square())
    assert "extends beyond the 80 x 60" in fault_of(read, content(huge))


def test_polygons_outside_the_image_are_noted(read):
  notes = Notes()
  [pair] = read(content(one(box=(60, 10, 40, 20))), notes, negatives=0)
  assert pair.objects[0].box == (60, 10, 20, 20)
  [line] = notes.lines()
  what = "polygons that extend beyond their image, clipped at its border"
  assert line == f"note: {what}: 1 (annotation 1)"


def test_huge_images_take_no_memory(read):
  with pytest.raises(ValueError, match=r"image 1: .* more than 2,147,483,647 pixels"):
    read(content(one(), images=[image(width=10**9, height=10**9)]))


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ('{"images": ' + "[" * 100_000, "nested too deeply"),
    ('{"images": [], "annotations": [NaN]}', "NaN is not a JSON number"),
    ('{"images": [], "images": [], "annotations": []}', "the key 'images' is given twice"),
    ('{"images": [{"id": 1, "id": 2}], "annotations": []}', "the key 'id' is given twice"),
    ('{"images": [' + "9" * 5000 + '], "annotations": []}', "digits"),
  ],
  ids=lambda text: text[:20],
)
def test_invalid_json(read, text, message):
  with pytest.raises(ValueError, match="is not valid JSON") as caught:
    read(text)
  assert message in str(caught.value)
  assert len(str(caught.value)) < 500


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("0123456789PQXZlmno\u007f\u00e9", max_size=12), max_size=8))
def test_many_strings_equal_single_strings(strings):
  rles = [{"size": [3, 4], "counts": one} for one in strings]
  pixels, faults = areas(rles, [(3, 4)] * len(rles))
  for rle_, area, fault in zip(rles, pixels.tolist(), faults, strict=True):
    assert fault == fault_of(runs, rle_, (3, 4))
    assert fault or area == runs(rle_)[1::2].sum()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_polygons_equal_pycocotools(data):
  reach = st.floats(-HEIGHT, 2 * HEIGHT, width=32)
  polygons = st.lists(st.lists(reach, min_size=6, max_size=12).filter(lambda x: len(x) % 2 == 0),
                      min_size=1, max_size=3)  # fmt: skip
  several = data.draw(st.lists(polygons, min_size=1, max_size=4))
  got = compress_all(several, [(HEIGHT, WIDTH)] * len(several))
  for i, parts in enumerate(several):
    want = coco.merge(coco.frPyObjects(parts, HEIGHT, WIDTH))
    assert got.faults[i] == ""
    assert got.rles[i] == compress(parts, HEIGHT, WIDTH)
    assert compress(parts, HEIGHT, WIDTH)["counts"] == want["counts"].decode()
    assert got.empty[i] == (coco.area(want) == 0)
    assert (got.bounds[i] == coco.toBbox(want)).all()


def test_more_than_255_masks():
  """pycocotools' `area` accepts at most 255."""
  polygons = [[[0, 0, 1 + i % 70, 0, 1 + i % 70, 9, 0, 9]] for i in range(700)]
  got = compress_all(polygons, [(HEIGHT, WIDTH)] * len(polygons))
  pixels, _ = areas([one for one in got.rles if one], [(HEIGHT, WIDTH)] * 700)
  assert pixels.tolist() == [9 * (1 + i % 70) for i in range(700)]
  assert got.bounds.tolist() == [[0, 0, 1 + i % 70, 9] for i in range(700)]


def test_damaged_strings_are_rejected_or_valid():
  """Every flip of a bit is rejected or gives a mask of the same size."""
  rng = np.random.default_rng(0)
  counts = encode(rng.random((30, 40)) < 0.3)["counts"].encode()
  for i in range(min(len(counts), 60)):
    for bit in range(8):
      text = bytes([*counts[:i], counts[i] ^ (1 << bit), *counts[i + 1 :]]).decode("latin-1")
      pixels, [fault] = areas([{"size": [30, 40], "counts": text}], [(30, 40)])
      assert fault or decode({"size": [30, 40], "counts": text}).sum() == pixels[0]


# Agreement of fields.


@pytest.mark.parametrize(
  ("box", "looks"),
  [
    ([30, 20, 40, 30], "corners x0, y0, x1, y1"),
    ([35, 25, 10, 10], "a centre, width and height"),
    ([20, 30, 10, 10], "y, x, height, width"),
    ([30 / 80, 20 / 60, 10 / 80, 10 / 60], "x, y, width, height in fractions of the image"),
    ([30 / 80, 20 / 60, 40 / 80, 30 / 60], "corners x0, y0, x1, y1 in fractions of the image"),
    ([2, 2, 8, 8], "that of another object, 'dog'"),
    ([60, 40, 5, 5], None),
  ],
)
def test_box_of_another_object_is_rejected(read, box, looks):
  other = one(2, category=2, box=(2, 2, 8, 8))
  with pytest.raises(
    ValueError, match=r"1 fault: annotation 1: its box .* 30, 20, 10, 10"
  ) as error:
    read(content(other, one(1, bbox=box, segmentation=square(30, 20, 10, 10))))
  assert (f"(it looks like {looks})" in str(error.value)) == (looks is not None)


@pytest.mark.parametrize("change", [{"bbox": [12, 13, 20, 22]}, {"bbox": [9, 8, 30, 25]}])
def test_imprecise_box_is_replaced_by_the_bounds_of_its_mask(read, change):
  notes = Notes()
  [pair] = read(content(one(**change)), notes, negatives=0)
  assert pair.objects[0].box == (10, 10, 20, 20)
  assert "boxes unlike their masks, replaced by the masks' bounds: 1" in notes.lines()[0]


def test_rounded_box_is_kept(read):
  notes = Notes()
  [pair] = read(content(one(bbox=[10.4, 9.1, 20.5, 21.5])), notes, negatives=0)
  assert pair.objects[0].box == (10.4, 9.1, 20.5, 21.5)
  assert not notes.lines()


@pytest.mark.parametrize(
  "box", [[1, 2, 3, 10**400], [1, 2, 3], [1, 2, 3, True], "all", [1e999] * 4]
)
def test_invalid_boxes(read, box):
  text = json.dumps(content(one(bbox=box))).replace("Infinity", "1e999")
  with pytest.raises(ValueError, match=r"annotation 1: its bbox must be \[x, y, width, height\]"):
    read(text)


def test_boxes_of_crowds_and_predictions_are_accepted(read):
  far = {"bbox": [50, 40, 5, 5]}
  pairs = read(content(one(1, iscrowd=1, **far), one(2, category=2, score=0.9, **far)), negatives=0)
  assert [pair.objects[0].box for pair in pairs] == [(50, 40, 5, 5), (10, 10, 20, 20)]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 60), st.integers(0, 40), st.integers(1, 20), st.integers(1, 20), st.data())
def test_no_wrong_box_becomes_a_target(tmp_path_factory, x, y, w, h, data):
  kind = data.draw(st.sampled_from(["corners", "centre", "moved", "fractions"]))
  box = {
    "corners": [x, y, x + w, y + h],
    "centre": [x + w / 2, y + h / 2, w, h],
    "moved": [data.draw(st.integers(0, 60)), data.draw(st.integers(0, 40)), w, h],
    "fractions": [x / 80, y / 60, w / 80, h / 60],
  }[kind]
  path = tmp_path_factory.getbasetemp() / "box.json"
  path.write_text(json.dumps(content(one(box=(x, y, w, h), bbox=box))))
  fault = fault_of(annotations.read, path, negatives=0, notes=Notes())
  assert not fault or "annotation 1: its box" in fault
  if not fault:
    [pair] = annotations.read(path, negatives=0, notes=Notes())
    got = np.array(pair.objects[0].box)
    gap = np.abs(np.concatenate([got[:2], got[:2] + got[2:]]) - [x, y, x + w, y + h])
    assert gap.max() <= 2


def test_polygons_in_fractions_are_rejected(read):
  box = (0.2, 0.2, 0.3, 0.3)
  with pytest.raises(ValueError, match="must be pixels, not fractions"):
    read(content(one(1, box=box), one(2, box=box, category=2)))


@pytest.mark.parametrize(
  "categories",
  [
    [{"id": 9, "name": "animals", "supercategory": "none"},
     {"id": 1, "name": "cat", "supercategory": "animals"}],
    ["cat", "_background_"],
    ["cat", "__background__"],
    ["cat", "Background"],
  ],
)  # fmt: skip
def test_supercategories_and_backgrounds_are_never_negatives(read, categories):
  notes = Notes()
  assert found(read(content(one(), categories=categories), notes)) == [("cat", 1)]
  assert "never used as negatives: 1 " in notes.lines()[0]


def test_category_that_is_its_own_supercategory(read):
  categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "person", "supercategory": "person"}]
  assert found(read(content(one(), categories=categories))) == [("cat", 1), ("person", 0)]


def test_image_listed_twice_is_one_image(read):
  notes = Notes()
  twice = [image(1), image(2)]
  values = content(one(), one(2, image=2, category=2), one(3, image=2), images=twice)
  assert found(read(values, notes)) == [("cat", 1), ("dog", 1)]
  assert notes.lines() == [
    "note: images listed again under another id, read as one: 1 (a.png)",
    "note: instances with the mask of another one, left out: 1 (annotation 3)",
  ]
  values["annotations"][2] |= {"bbox": [40, 10, 20, 20], "segmentation": square(40)}
  with pytest.raises(ValueError, match=r"images 1 and 2 are the same file, and each has .* 'cat'"):
    read(values)
  values["images"][1]["width"] = 81
  with pytest.raises(ValueError, match=r"image 2: a.png is 81 x 60, but as image 1 it is 80 x 60"):
    read(values)


@pytest.mark.parametrize("other", ["Cat", "CAT ", "c a t", "fire_cat", "cat&amp;"])
def test_names_that_are_equal_for_the_tokenizer(read, other):
  from sam3_jax.inputs.tokenizer import clean

  values = content(one(), categories=["cat", other, "Fire  Cat", "cat&"])
  phrases = [clean(pair.phrase) for pair in read(values, negatives=9)]
  assert len(phrases) == len(set(phrases))


def test_sa_co_pairs_listed_twice(read):
  images = [image(1, text_input="Cat"), image(2, text_input="cat ")]
  notes = Notes()
  both = one(1), one(2, image=2)
  assert len(read(sa_co(*both, images=images), notes)) == 2
  assert "pairs of an image and a phrase that are listed again: 1 (image 2)" in notes.lines()[0]
  with pytest.raises(
    ValueError, match=r"images 1 and 2 are both a.png with 'cat ', .* \(1 and 0\)"
  ):
    read(sa_co(one(1), images=images))


@pytest.mark.parametrize(
  ("lists", "message"),
  [
    ({"neg_category_ids": [1]}, "annotation 1: it is of category 1, which is in neg_category_ids"),
    (
      {"neg_category_ids": [2], "not_exhaustive_category_ids": [2]},
      "category 2 is in neg_category",
    ),
  ],
)
def test_contradicting_lists_of_categories(read, lists, message):
  with pytest.raises(ValueError, match=message):
    read(content(one(), images=[image(**lists)]))


def test_unknown_categories_in_lists_are_noted(read):
  notes = Notes()
  read(content(one(), images=[image(neg_category_ids=[2, 77])]), notes)
  assert "that are not categories: 1 (image 1)" in notes.lines()[0]


def test_empty_instances_are_left_out(read):
  notes = Notes()
  empty = {"segmentation": encode(np.zeros((HEIGHT, WIDTH), bool))}
  pairs = read(content(one(1), one(2), one(3, category=2, **empty)), notes)
  assert [(p.phrase, len(p.objects), p.exhaustive) for p in pairs] == [
    ("cat", 1, True),
    ("dog", 0, False),
  ]
  assert "note: instances without a pixel, left out: 1 (annotation 3)" in notes.lines()
  with pytest.raises(ValueError, match="1 of 1 masks are empty"):
    read(content(one(1, **empty)))
  assert [p.exhaustive for p in read(content(one(1, score=0.9, **empty)))] == [False, True]


@pytest.mark.parametrize(
  ("change", "fault"),
  [
    ({"category_id": 1.0, "image_id": 1.0, "id": 1.0, "iscrowd": 0.0}, None),
    ({"iscrowd": False}, None),
    ({"category_id": "1"}, "category_id is the string '1'; write the number 1"),
    ({"category_id": "1.0"}, "write the number 1"),
    ({"image_id": "one"}, "image_id is the string 'one'; write a whole number"),
    ({"image_id": 1.5}, "image_id must be a whole number; got 1.5"),
    ({"image_id": True}, "image_id must be a whole number; got True"),
    ({"iscrowd": "0"}, "iscrowd is the string '0'; write the number 0 or 1"),
    ({"iscrowd": 2}, "iscrowd must be 0 or 1; got 2"),
    ({"iscrowd": None}, "iscrowd must be 0 or 1; got None"),
  ],
)
def test_numbers_as_floats_and_strings(read, change, fault):
  if fault is None:
    [pair] = read(content(one(**change)), negatives=0)
    assert not pair.objects[0].crowd
    return
  with pytest.raises(ValueError, match="1 fault: annotation 1: ") as caught:
    read(content(one(**change)))
  assert fault in str(caught.value)


def test_category_visual_has_no_phrase(read):
  notes = Notes()
  values = content(one(), one(2, category=2, box=(40, 10, 20, 20)), categories=["cat", "visual"])
  assert found(read(values, notes)) == [("cat", 1)]
  assert (
    "instances of the category 'visual', no phrase, left out: 1 (annotation 2)" in notes.lines()[0]
  )


def test_notes_are_warnings_by_default(tmp_path):
  (tmp_path / "a.json").write_text(json.dumps(content(one(), one(2))))
  with pytest.warns(UserWarning, match="instances with the mask of another one, left out: 1"):
    annotations.read(tmp_path / "a.json")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    annotations.read(tmp_path / "a.json", notes=Notes())


def test_notes_count_all_and_name_some():
  notes = Notes()
  assert not notes.lines()
  for i in range(1200):
    notes.add("odd entries", f"entry {i}")
  notes.add("nothing", count=0)
  notes.add("more", count=5)
  assert notes.lines() == [
    "note: odd entries: 1,200 (entry 0, entry 1, entry 2, ...)",
    "note: more: 5",
  ]


MUTANTS = st.recursive(
  st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e30, 1e30)
  | st.sampled_from(["", "1", "cat", "\u001b[31m", "visual"]),
  lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(["id", "size", "counts", "name"]), inner, max_size=3),
  max_leaves=6,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_is_read_or_gives_a_one_line_error(tmp_path_factory, data):
  values = content(one(), one(2, category=2, segmentation=encode(np.eye(60, 80, dtype=bool))))
  kind = data.draw(st.sampled_from(["images", "categories", "annotations"]))
  entry = data.draw(st.sampled_from(values[kind]))
  entry[data.draw(st.sampled_from(sorted(entry)))] = data.draw(MUTANTS)
  path = tmp_path_factory.getbasetemp() / "mutant.json"
  path.write_text(json.dumps(values))
  assert "\n" not in fault_of(annotations.read_checked, path, None, notes=Notes())


def test_maximal_pixels_of_a_mask():
  assert rle.MAX_PIXELS == 2_147_483_647


def test_mutated_files_are_read_or_give_a_one_line_error(tmp_path):
  """A short run of benchmarks/fuzz_annotations.py in this process."""
  path = Path(__file__).parents[1] / "benchmarks" / "fuzz_annotations.py"
  spec: Any = importlib.util.spec_from_file_location("fuzz_annotations", path)
  fuzz = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(fuzz)
  generator = random.Random(0)
  (tmp_path / "truth.json").write_text(json.dumps(fuzz.base("polygons", random.Random(0))))
  truth = annotations.read(tmp_path / "truth.json")
  for i in range(60):
    kind = fuzz.KINDS[i % 4]
    fuzz.write(tmp_path / "mutant.json", kind, generator)
    if kind == "predictions":
      message = fault_of(predictions.read, tmp_path / "mutant.json", truth)
    else:
      message = fault_of(annotations.read_checked, tmp_path / "mutant.json", None, notes=Notes())
    assert "\n" not in message
