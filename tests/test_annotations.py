"""Reading annotation files of both layouts, and errors for files of another structure."""

import annotation_files
import pytest
from annotation_files import HEIGHT, WIDTH, annotation, entry, instances, sa_co

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import AbsentPhrases, read
from sam3_jax.outputs.rle import decode

folder = annotation_files.folder
write = annotation_files.write


def test_sa_co_layout(write):
  pairs = read(write(sa_co()))
  assert [(p.id, p.file_name, p.phrase, p.exhaustive) for p in pairs] == [
    (7, "a.png", "red apple", True),
    (3, "a.png", "green apple", True),
    (9, "b.png", "dog", False),
  ]
  assert [(p.width, p.height) for p in pairs] == [(WIDTH, HEIGHT)] * 3
  assert [[one.box for one in p.objects] for p in pairs] == [
    [(2, 3, 4, 5), (10, 2, 5, 6)],
    [],
    [(0, 0, 20, 12)],
  ]
  assert [one.crowd for p in pairs for one in p.objects] == [False, False, True]
  assert decode(pairs[0].objects[1].rle)[2:8, 10:15].all()
  assert decode(pairs[0].objects[1].rle).sum() == 30


def test_boxes_are_fractions_or_pixels_by_file(write):
  content = sa_co()
  for one in content["annotations"]:
    x, y, w, h = one["bbox"]
    one["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]
  boxes = [one.box for pair in read(write(content)) for one in pair.objects]
  assert boxes == [(2, 3, 4, 5), (10, 2, 5, 6), (0, 0, 20, 12)]
  content["annotations"][0]["bbox"] = [2, 3, 4, 5]  # a value above 1, so all boxes are in pixels
  with pytest.raises(
    ValueError, match=r"1 fault: annotation 3: .*looks like x, y, width, height in"
  ):
    read(write(content))


def test_small_coco_boxes_are_pixels(write):
  content = instances()
  content["annotations"] = [annotation(1, 10, (0, 0, 1, 1), category_id=5)]
  assert read(write(content))[0].objects[0].box == (0, 0, 1, 1)


def test_missing_box_is_computed_from_the_mask(write):
  content = sa_co()
  del content["annotations"][2]["bbox"]
  assert read(write(content))[0].objects[1].box == (10, 2, 5, 6)


@pytest.mark.parametrize("counts", ["P", "111", "o0"])
def test_missing_box_of_a_damaged_mask(write, counts):
  """COCO's code would read beyond the end of the string."""
  content = sa_co()
  del content["annotations"][2]["bbox"]
  content["annotations"][2]["segmentation"]["counts"] = counts
  with pytest.raises(ValueError, match=r"1 fault: annotation 3: its mask's run(s cover| lengths)"):
    read(write(content))


def test_all_forms_of_segmentations(write):
  content = sa_co()
  content["annotations"][0]["segmentation"] = [[2, 3, 6, 3, 6, 8, 2, 8]]
  before = [10 * HEIGHT + 2, *[6, 6] * 4, 6, HEIGHT - 8 + 5 * HEIGHT - HEIGHT]
  before[-1] = HEIGHT * WIDTH - sum(before[:-1])
  content["annotations"][2]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": before}
  want = read(write(sa_co()))
  got = read(write(content))
  for a, b in zip(got, want, strict=True):
    for one, other in zip(a.objects, b.objects, strict=True):
      assert (decode(one.rle) == decode(other.rle)).all()


def test_coco_layout(write):
  pairs = read(write(instances()), negatives=0)
  assert [(p.id, p.file_name, p.phrase, len(p.objects)) for p in pairs] == [
    (0, "a.png", "cat", 2),
    (1, "a.png", "dog", 1),
    (2, "b.png", "traffic light", 1),
  ]
  assert [one.crowd for p in pairs for one in p.objects] == [False, False, True, False]
  assert [(p.image_id, p.category_ids) for p in pairs] == [(10, (5,)), (10, (6,)), (20, (7,))]
  assert {(p.image_id, p.category_ids) for p in read(write(sa_co()))} == {(None, ())}


def test_negatives_are_absent_categories(write):
  """As many as present phrases, at least one; images without annotations have only negatives."""
  pairs = read(write(instances()))
  phrases = {name: [p for p in pairs if p.file_name == f"{name}.png"] for name in "abc"}
  assert [len(p.objects) for p in phrases["a"]] == [2, 1, 0, 0]
  assert [len(p.objects) for p in phrases["b"]] == [1, 0]
  assert [len(p.objects) for p in phrases["c"]] == [0]
  assert {p.phrase for p in phrases["a"][2:]} <= {"traffic light", "bird", "cow", "fox"}
  assert [p.id for p in pairs] == list(range(7))


def test_negatives_depend_only_on_the_seed(write):
  path = write(instances())
  assert read(path, negatives=2, seed=4) == read(path, negatives=2, seed=4)
  drawn = {tuple(p.phrase for p in read(path, negatives=2, seed=seed)) for seed in range(8)}
  assert len(drawn) > 4


@pytest.mark.parametrize("negatives", [0, 1, 3, 100])
def test_number_of_negatives(write, negatives):
  pairs = read(write(instances()), negatives=negatives)
  absent = {name: {p.phrase for p in pairs if p.file_name == f"{name}.png" and not p.objects}
            for name in "abc"}  # fmt: skip
  assert {name: len(phrases) for name, phrases in absent.items()} == {
    "a": min(negatives, 4),
    "b": min(negatives, 5),
    "c": min(negatives, 6),
  }


def test_negatives_do_not_depend_on_other_images(write):
  whole = read(write(instances()))
  content = instances()
  content["images"] = content["images"][:2]
  assert read(write(content)) == whole[:6]


def test_lvis_lists_of_categories(write):
  content = instances()
  content["images"][0] |= {"neg_category_ids": [10], "not_exhaustive_category_ids": [5]}
  pairs = [p for p in read(write(content), negatives=5) if p.file_name == "a.png"]
  assert [(p.phrase, p.exhaustive) for p in pairs] == [
    ("cat", False),
    ("dog", True),
    ("fox", True),
  ]


def test_absent_phrases_of_each_image(write):
  """All of them, without those that an image shows or may show; LVIS verifies some."""
  content = instances()
  content["images"][1] |= {"neg_category_ids": [10, 6]}
  content["images"][2] |= {"not_exhaustive_category_ids": [5]}
  absent: dict[str, AbsentPhrases] = {}
  annotations.read_checked(write(content), None, negatives=0, absent=absent)
  assert {name: one.listed() for name, one in absent.items()} == {
    "a.png": ["traffic light", "bird", "cow", "fox"],
    "b.png": ["dog", "fox"],
    "c.png": ["dog", "traffic light", "bird", "cow", "fox"],
  }
  annotations.read_checked(write(sa_co()), None, absent=(others := {}))
  assert not others


def test_categories_of_the_same_name_are_one_phrase(write):
  content = instances()
  content["categories"][1]["name"] = "cat"
  pairs = read(write(content), negatives=0)
  assert [(p.phrase, len(p.objects)) for p in pairs] == [("cat", 3), ("traffic light", 1)]
  assert [p.category_ids for p in pairs] == [(5, 6), (7,)]


def test_file_without_images(write):
  assert read(write(instances() | {"images": [], "annotations": []})) == []


@pytest.mark.parametrize(
  ("content", "message"),
  [
    ("{", "is not valid JSON"),
    ("\x00", "is not valid JSON"),
    ("[]", "is not an annotation file"),
    ("{}", "is not an annotation file"),
    ({"images": []}, "is not an annotation file"),
    ({"images": {}, "annotations": []}, "is not an annotation file"),
    ({"images": [1], "annotations": []}, "is not an annotation file"),
    ({"images": [entry(1)], "annotations": []}, "neither text_input"),
  ],
  ids=str,
)
def test_files_of_another_structure(write, content, message):
  with pytest.raises(ValueError, match=message) as error:
    read(write(content))
  assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"there is no annotation file .*x\.json"):
    read(tmp_path / "x.json")


def test_negative_number_of_negatives(write):
  with pytest.raises(ValueError, match="at least 0 phrases per image; got -1"):
    read(write(instances()), negatives=-1)


def replaced(kind: str, index: int, **values):
  """An SA-Co file with some values of an entry replaced; `...` removes a value."""
  content = sa_co()
  for key, value in values.items():
    content[kind][index].pop(key, None)
    if value is not ...:
      content[kind][index][key] = value
  return content


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (replaced("images", 1, id=7), "image 7: this id occurs twice"),
    (replaced("images", 0, id="7"), "image '7': id is the string '7'; write the number 7"),
    (replaced("images", 0, width=...), "image 7: width must be a whole number; got None"),
    (replaced("images", 0, height=12.5), "image 7: height must be a whole number; got 12.5"),
    (replaced("images", 0, height=0), "image 7: width and height must be at least 1; got 20 x 0"),
    (replaced("images", 0, file_name=5), "image 7: file_name must be a string; got 5"),
    (replaced("images", 0, text_input=...), "image 7: text_input must be a string; got None"),
    (replaced("annotations", 0, image_id=8), "annotation 1: there is no image 8"),
    (
      replaced("annotations", 0, image_id=[8]),
      r"annotation 1: image_id must be a whole number; got \[8\]",
    ),
    (replaced("annotations", 1, id=1), "annotation 1: this id occurs twice"),
    (replaced("annotations", 0, bbox=[1, 2, 3]), r"annotation 1: its bbox must be \[x, y, width"),
    (replaced("annotations", 0, bbox=[1, 2, 3, None]), r"annotation 1: its bbox must be \[x, y"),
    (replaced("annotations", 0, segmentation=...), "annotation 1: it has no segmentation"),
    (replaced("annotations", 0, segmentation=[[1, 2]]), "annotation 1: its polygons must be"),
  ],
)
def test_contradicting_entries(write, content, message):
  with pytest.raises(ValueError, match=message) as error:
    read(write(content))
  assert "\n" not in str(error.value)


def test_unknown_and_duplicate_coco_categories(write):
  content = instances()
  content["annotations"][0]["category_id"] = 99
  content["categories"][1]["id"] = 5
  content["categories"].append({"id": 3})
  with pytest.raises(ValueError, match="4 faults") as error:
    read(write(content))
  for part in (
    "category 5: this id occurs twice",
    "annotation 1: there is no category 99",
    "annotation 3: there is no category 6",
    "it must have an id and a name",
  ):
    assert part in str(error.value)


@pytest.mark.parametrize("key", ["neg_category_ids", "not_exhaustive_category_ids"])
@pytest.mark.parametrize("value", [3, [[1]], None, "12", [True], {"1": 2}])
def test_invalid_lists_of_category_ids(write, key, value):
  content = instances()
  content["images"][0][key] = value
  path = write(content)
  with pytest.raises(ValueError) as error:
    read(path)
  number = content["images"][0]["id"]
  wanted = f"image {number}: {key} must be a list of category ids, or be left out; got {value!r}"
  assert str(error.value).startswith(f"{path}, ")
  assert wanted in str(error.value)
  assert "\n" not in str(error.value)


def test_lists_of_categories_are_ignored_with_phrases(write):
  assert read(write(replaced("images", 0, neg_category_ids=3))) == read(write(sa_co()))


@pytest.mark.parametrize("value", [5, "cat", {"id": 1, "name": "cat"}])
def test_categories_that_are_not_a_list(write, value):
  with pytest.raises(ValueError, match="categories must be a list of objects") as error:
    read(write(instances() | {"categories": value, "annotations": []}))
  assert f"got {value!r}"[:40] in str(error.value)
  assert "\n" not in str(error.value)
