"""Prompts: what is accepted, what is refused and in which words, and how they are packed."""

import jax.numpy as jnp
import numpy as np
import pytest

from sam3_jax.prompts import BOX_SIZES, Prompt, as_prompts, check_boxes, pack
from sam3_jax.types import TextEmbedding

BOX = [10, 20, 30, 60]


def packed(prompts, sizes):
  rows = len(prompts)
  text = TextEmbedding(jnp.zeros((rows, 4, 8)), jnp.ones((rows, 4), bool))
  image = np.zeros(rows, np.int32)
  return pack(prompts, np.array(sizes), image=image, first_id=image, text=text)


def test_defaults():
  assert Prompt("ear").phrase == "ear"
  assert Prompt("ear").boxes == ()
  assert Prompt(boxes=[BOX]).phrase == "visual"
  assert Prompt(boxes=[BOX]).box_labels == (True,)
  assert Prompt(boxes=np.array([BOX], np.float32)) == Prompt(boxes=[BOX], box_labels=[1])


def test_prompts_can_be_keys():
  assert len({Prompt("a"), Prompt("a"), Prompt("b", [BOX], [0])}) == 2


def test_one_prompt_is_a_list_of_one():
  assert as_prompts("ear") == as_prompts(Prompt("ear")) == as_prompts(["ear"])
  assert as_prompts(["a", Prompt("b")]) == [Prompt("a"), Prompt("b")]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({}, "needs a phrase or a box"),
    ({"boxes": []}, "needs a phrase or a box"),
    ({"text": ""}, "phrase is empty"),
    ({"text": " \n"}, "phrase is empty"),
    ({"boxes": [[1, 2, 3]]}, r"box 0 must be four numbers .* got \[1, 2, 3\]"),
    ({"boxes": [BOX, "abcd"]}, "box 1 must be four numbers"),
    ({"boxes": BOX}, "box 0 must be four numbers .* got 10"),
    ({"boxes": [[0, 0, np.nan, 1]]}, "box 0 must be finite; got .*nan"),
    ({"boxes": [[0, 0, np.inf, 1]]}, "box 0 must be finite"),
    ({"boxes": [[5, 0, 4, 1]]}, "box 0 has a negative extent"),
    ({"boxes": [[0, 5, 1, 4]]}, "box 0 has a negative extent"),
    ({"boxes": [BOX], "box_labels": [7]}, r"1 \(example\) or 0 \(counterexample\); got 7"),
    ({"boxes": [BOX], "box_labels": [1, 0]}, "one a box: 1"),
    ({"boxes": [BOX], "box_labels": 1}, "one a box: 1"),
    ({"boxes": [BOX, BOX], "box_labels": [[1], [1, 2]]}, r"got \[1\]"),
    ({"boxes": 5}, "boxes must be a list of x0, y0, x1, y1 in pixels; got 5"),
    ({"text": "&nbsp;"}, "phrase is empty"),
    ({"text": "a", "box_labels": [1]}, "one a box: 0"),
    ({"boxes": [BOX] * 129}, "at most 128 boxes; got 129"),
  ],
)
def test_faults_are_one_line(arguments, message):
  with pytest.raises(ValueError, match=message) as caught:
    Prompt(**arguments)
  assert "\n" not in str(caught.value)


def test_text_must_be_a_string():
  with pytest.raises(TypeError, match="text must be a string; got 3"):
    Prompt(text=3)
  with pytest.raises(TypeError, match="text must be a string"):
    as_prompts([["a"]])
  with pytest.raises(TypeError, match="a list of them; got 3"):
    as_prompts(3)


def test_arrays_of_phrases():
  assert as_prompts(np.array(["a", "b"])) == [Prompt("a"), Prompt("b")]


def test_no_prompt():
  with pytest.raises(ValueError, match="no prompt given"):
    as_prompts([])


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [-5, -5, 0, 3], [100, 50, 120, 60], [0, 0, 100, 50]])
def test_boxes_that_touch_the_picture(box):
  check_boxes(Prompt(boxes=[box]), height=50, width=100)


@pytest.mark.parametrize("box", [[-9, 0, -1, 5], [101, 0, 120, 5], [0, -9, 5, -1], [0, 51, 5, 60]])
def test_boxes_outside_the_picture(box):
  with pytest.raises(ValueError, match="wholly outside the 100 x 50 picture"):
    check_boxes(Prompt(boxes=[box]), height=50, width=100)


def test_boxes_far_larger_than_the_picture():
  with pytest.raises(ValueError, match="more than twice as large as the 100 x 50 picture"):
    check_boxes(Prompt(boxes=[[0, 0, 201, 5]]), height=50, width=100)


def test_pack_normalises_and_pads():
  prompts = [Prompt("a", [[0, 0, 100, 50], [10, 20, 30, 40]], [1, 0]), Prompt("b")]
  got = packed(prompts, [(50, 100), (7, 9)])
  assert got.boxes.shape == (2, BOX_SIZES[0], 4)
  np.testing.assert_allclose(got.boxes[0, :2], [[0.5, 0.5, 1, 1], [0.2, 0.6, 0.2, 0.4]], rtol=1e-6)
  assert got.valid.sum(axis=1).tolist() == [2, 0]
  assert got.positive[0, :2].tolist() == [True, False]
  assert np.isfinite(got.boxes).all()


@pytest.mark.parametrize("count", [0, 1, 8, 9, 128])
def test_boxes_are_padded_to_few_sizes(count):
  prompt = Prompt("a", [BOX] * count)
  got = packed([prompt], [(100, 100)])
  assert got.boxes.shape[1] == (8 if count <= 8 else 128)
  assert int(got.valid.sum()) == count
