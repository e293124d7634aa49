"""Annotation files that contradict themselves or repeat entries: rejected or noted."""

import json

import annotation_content
import numpy as np
import pytest
from annotation_content import HEIGHT, WIDTH, content, fault_of, image, one, square
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_jax.datasets import annotations
from sam3_jax.outputs.rle import encode
from sam3_jax.utils.notes import Notes

read = annotation_content.read

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def sa_co(*objects, images):
  return {"images": images, "annotations": list(objects)}


def found(pairs):
  return [(pair.phrase, len(pair.objects)) for pair in pairs]


@pytest.mark.parametrize(
  ("box", "looks"),
  [
    ([30, 20, 40, 30], "corners x0, y0, x1, y1"),
    ([35, 25, 10, 10], "a center, width and height"),
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
  kind = data.draw(st.sampled_from(["corners", "center", "moved", "fractions"]))
  box = {
    "corners": [x, y, x + w, y + h],
    "center": [x + w / 2, y + h / 2, w, h],
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


def test_category_visual_has_no_phrase(read):
  notes = Notes()
  values = content(one(), one(2, category=2, box=(40, 10, 20, 20)), categories=["cat", "visual"])
  assert found(read(values, notes)) == [("cat", 1)]
  assert (
    "instances of the category 'visual', no phrase, left out: 1 (annotation 2)" in notes.lines()[0]
  )
