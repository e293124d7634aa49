"""Annotation files whose values could crash a reader: refused in one line, or read."""

import importlib.util
import json
import random
import resource
from pathlib import Path
from typing import Any

import annotation_content
import numpy as np
import pytest
from annotation_content import HEIGHT, WIDTH, content, fault_of, image, one, square
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask

from sam3_jax.datasets import annotations
from sam3_jax.evaluation import predictions
from sam3_jax.outputs import rle
from sam3_jax.outputs.rle import areas, decode, encode, runs
from sam3_jax.outputs.segmentations import compress, compress_all
from sam3_jax.utils.notes import Notes

read = annotation_content.read

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
coco: Any = mask


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


def test_polygons_in_fractions_are_rejected(read):
  box = (0.2, 0.2, 0.3, 0.3)
  with pytest.raises(ValueError, match="must be pixels, not fractions"):
    read(content(one(1, box=box), one(2, box=box, category=2)))


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
