"""Faults of pairs: boxes, masks, phrases, ids, and images that differ from the file."""

import dataclasses
import pathlib

import annotation_files
import pytest
from annotation_files import HEIGHT, WIDTH, annotation, instances, rle, sa_co
from PIL import Image

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Object, Pair, check, read, read_checked
from sam3_jax.inputs.tokenizer import Tokenizer

folder = annotation_files.folder
write = annotation_files.write

TOKENIZER = pathlib.Path(__file__).parent / "goldens" / "tokenizer.model"


def pair(number: int = 0, *objects: Object, phrase: str = "cat", file_name: str = "a.png") -> Pair:
  return Pair(number, file_name, WIDTH, HEIGHT, phrase, True, objects)


def make_object(box: tuple = (2, 3, 4, 5), mask: dict | None = None) -> Object:
  return Object(rle(2, 3, 4, 5) if mask is None else mask, box)


def test_valid_pairs_have_no_faults(write, folder):
  tokenizer = Tokenizer(TOKENIZER)
  for content in (sa_co(), instances()):
    assert check(read(write(content)), folder, tokenizer) == []
    assert read_checked(write(content), folder, tokenizer) == read(write(content))
  assert check([], folder, tokenizer) == []


@pytest.mark.parametrize(
  ("box", "fault"),
  [
    ((-1, 0, 4, 5), None),  # a pixel beyond the border: annotators round
    ((16.5, 7.5, 4.5, 5.5), None),
    ((-1.5, 0, 4, 5), "extends beyond the 20 x 12 image"),
    ((0, -1.5, 4, 5), "extends beyond the 20 x 12 image"),
    ((17, 3, 4.5, 5), "extends beyond the 20 x 12 image"),
    ((2, 9, 4, 5), "extends beyond the 20 x 12 image"),
    ((2, 3, 0, 5), "has no area"),
    ((2, 3, 4, -1), "has no area"),
  ],
)
def test_boxes(folder, box, fault):
  faults = check([pair(0, make_object(), make_object(box))], folder)
  assert len(faults) == (fault is not None)
  if fault:
    assert faults[0].startswith("a.png, 'cat', object 2: its box ")
    assert fault in faults[0]


def test_long_phrases_are_cut(folder):
  [fault] = check([pair(0, make_object((2, 3, 0, 5)), phrase="x" * 500)], folder)
  assert len(fault) < 200


@pytest.mark.parametrize(
  ("mask", "fault"),
  [
    (rle(0, 0, 0, 0), "its mask is empty"),
    (
      rle(2, 3, 4, 5, (WIDTH, HEIGHT)),
      "its mask's size is [20, 12], but the image's [height, width] is [12, 20]",
    ),
    ({"size": [HEIGHT, WIDTH], "counts": "0"}, "its mask's runs cover 0 pixels, not 20 x 12"),
    ({"size": [HEIGHT, WIDTH], "counts": "P"}, "its mask's run lengths are damaged"),
  ],
)
def test_masks(folder, mask, fault):
  faults = check([pair(0, make_object(mask=mask))], folder)
  assert len(faults) == 1
  assert f"a.png, 'cat', object 1: {fault}" in faults[0]


def test_images(folder):
  """Each fault is reported once, even for several phrases."""
  Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "turned.png")
  (folder / "broken.png").write_bytes((folder / "a.png").read_bytes()[:20])
  names = ["a.png", "none.png", "turned.png", "broken.png"]
  pairs = [pair(2 * i + j, file_name=name) for i, name in enumerate(names) for j in (0, 1)]
  assert check(pairs, folder) == [
    f"{folder / 'none.png'}: there is no such image",
    f"{folder / 'turned.png'} is displayed as 12 x 20, but the annotation file says 20 x 12 "
    "(width x height)",
    f"{folder / 'broken.png'} is truncated or damaged (Truncated File Read): get the file again",
  ]
  assert check(pairs, None) == []


def test_all_stated_sizes_of_an_image_are_checked(folder):
  """Also the size stated by an earlier pair of the same image, with a mask that matches it."""
  wide = Pair(
    0, "a.png", WIDTH + 5, HEIGHT, "dog", True, (make_object(mask=rle(2, 3, 4, 5, (12, 25))),)
  )
  want = (
    f"{folder / 'a.png'} is displayed as 20 x 12, but the annotation file says 25 x 12 "
    "(width x height)"
  )
  assert check([wide, pair(1)], folder) == [want]
  assert check([pair(1), wide, dataclasses.replace(wide, id=2)], folder) == [want]


def test_image_sizes_are_checked_upright(folder):
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "exif.jpg", exif=exif)
  assert check([pair(0, file_name="exif.jpg")], folder) == []


def test_phrases(folder):
  tokenizer = Tokenizer(TOKENIZER)
  fits, long = " ".join(["cat"] * 30), " ".join(["cat"] * 31)
  pairs = [pair(i, phrase=phrase) for i, phrase in enumerate([fits, long, long, " ", ""])]
  assert check(pairs, folder, tokenizer) == [
    f"phrase {long[:60]!r} has 31 tokens, and at most 30 are read",
    "phrase ' ' is empty",
    "phrase '' is empty",
  ]


def test_duplicate_ids(folder):
  assert check([pair(4), pair(5), pair(4)], folder) == ["image 4: this id occurs twice"]


def test_all_faults_are_reported_together(write, folder):
  """Faults of reading and of checking, each once."""
  content = sa_co()
  content["images"][1]["id"] = 7
  content["images"][0]["text_input"] = "cat " * 40
  content["images"][2]["file_name"] = "none.png"
  content["annotations"][0] |= {"bbox": [15, 3, 14, 5]}
  content["annotations"][1] |= {"segmentation": rle(0, 0, 0, 0, (9, 9))}
  content["annotations"][2] |= {"image_id": 99}
  with pytest.raises(ValueError) as error:
    read_checked(write(content), folder, Tokenizer(TOKENIZER))
  message = str(error.value)
  assert "\n" not in message
  assert "6 faults: " in message
  assert message.endswith(annotations.REMEDY)
  for part in (
    "image 7: this id occurs twice",
    "annotation 3: there is no image 99",
    "none.png: there is no such image",
    "its box 15, 3, 14, 5 (x, y, width, height) extends beyond the 20 x 12 image",
    "its mask's size is [9, 9]",
    "has 40 tokens",
  ):
    assert message.count(part) == 1


def test_many_faults_are_counted(write, folder):
  content = sa_co()
  content["annotations"] += [annotation(i, 1000 + i) for i in range(10, 60)]
  with pytest.raises(ValueError, match=r"50 faults: .*; and 30 more\. "):
    read_checked(write(content), folder)
