"""Prompts: validation, error messages and packing."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sam3_jax.inputs.prompts import BOX_SIZES, Prompt, as_prompts, check_boxes, pack
from sam3_jax.inputs.visual_prompts import (
  ComputedPrompt,
  VisualPrompt,
  as_visual_prompts,
  check_visual,
)
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


def test_prompts_are_hashable():
  assert len({Prompt("a"), Prompt("a"), Prompt("b", [BOX], [0])}) == 2


def test_single_prompt_becomes_a_list():
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
    ({"boxes": [BOX], "box_labels": [7]}, r"or 0 \(negative exemplar\); got 7"),
    ({"boxes": [BOX], "box_labels": [1, 0]}, "needs one label for each box: 1"),
    ({"boxes": [BOX], "box_labels": 1}, "needs one label for each box: 1"),
    ({"boxes": [BOX, BOX], "box_labels": [[1], [1, 2]]}, r"got \[1\]"),
    ({"boxes": 5}, "boxes must be a list of x0, y0, x1, y1 in pixels; got 5"),
    ({"text": "&nbsp;"}, "phrase is empty"),
    ({"text": "a", "box_labels": [1]}, "needs one label for each box: 0"),
    ({"boxes": [BOX] * 129}, "at most 128 boxes; got 129"),
  ],
)
def test_invalid_prompts(arguments, message):
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


def test_empty_list_of_prompts():
  with pytest.raises(ValueError, match="no prompt given"):
    as_prompts([])


@pytest.mark.parametrize("box", [[0, 0, 0, 0], [-5, -5, 0, 3], [100, 50, 120, 60], [0, 0, 100, 50]])
def test_boxes_that_touch_the_image(box):
  check_boxes(Prompt(boxes=[box]), height=50, width=100)


@pytest.mark.parametrize("box", [[-9, 0, -1, 5], [101, 0, 120, 5], [0, -9, 5, -1], [0, 51, 5, 60]])
def test_boxes_outside_the_image(box):
  with pytest.raises(ValueError, match="completely outside the 100 x 50 image"):
    check_boxes(Prompt(boxes=[box]), height=50, width=100)


def test_boxes_larger_than_twice_the_image():
  with pytest.raises(ValueError, match="more than twice as large as the 100 x 50 image"):
    check_boxes(Prompt(boxes=[[0, 0, 201, 5]]), height=50, width=100)


def test_pack_normalizes_and_pads():
  prompts = [Prompt("a", [[0, 0, 100, 50], [10, 20, 30, 40]], [1, 0]), Prompt("b")]
  got = packed(prompts, [(50, 100), (7, 9)])
  assert got.boxes.shape == (2, BOX_SIZES[0], 4)
  np.testing.assert_allclose(got.boxes[0, :2], [[0.5, 0.5, 1, 1], [0.2, 0.6, 0.2, 0.4]], rtol=1e-6)
  assert got.valid.sum(axis=1).tolist() == [2, 0]
  assert got.positive[0, :2].tolist() == [True, False]
  assert np.isfinite(got.boxes).all()


@pytest.mark.parametrize("count", [0, 1, 8, 9, 128])
def test_number_of_boxes_is_padded_to_few_sizes(count):
  prompt = Prompt("a", [BOX] * count)
  got = packed([prompt], [(100, 100)])
  assert got.boxes.shape[1] == (8 if count <= 8 else 128)
  assert int(got.valid.sum()) == count


# Whatever is given, it is a prompt or a fault in one line.

NUMBERS = st.one_of(
  st.floats(width=32), st.integers(-5000, 5000), st.booleans(), st.none(), st.text(max_size=3),
  st.just(10**400), st.complex_numbers(),
)  # fmt: skip
THINGS = st.recursive(
  NUMBERS,
  lambda inner: st.one_of(
    st.lists(inner, max_size=5),
    st.lists(inner, max_size=4).map(tuple),
    st.dictionaries(st.text(max_size=2), inner, max_size=3),
    st.sets(st.integers(0, 4)),
    st.binary(max_size=4),
    st.lists(st.floats(width=32), min_size=4, max_size=4).map(np.array),
    st.lists(st.integers(0, 99), max_size=4).map(jnp.array),
    st.lists(st.text(max_size=2), max_size=3).map(lambda one: np.array(one, str)),
    st.integers(0, 9).map(np.array),
  ),
  max_leaves=12,
)


def fault_of(make) -> str:
  try:
    make()
  except (ValueError, TypeError) as error:
    return str(error) or "no message\n"
  return ""


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.one_of(st.none(), st.text(), THINGS), THINGS, THINGS)
def test_any_input_gives_a_prompt_or_a_one_line_error(text, some, others):
  for make in (
    lambda: check_boxes(Prompt(text, some, others), 480, 640),
    lambda: check_visual(VisualPrompt(some, others), 480, 640),
    lambda: check_visual(VisualPrompt(box=some, mask=others), 480, 640),
    lambda: as_prompts(some),
    lambda: as_visual_prompts(some),
  ):
    fault = fault_of(make)
    assert "\n" not in fault
    assert len(fault) < 300


@pytest.mark.parametrize("wrap", [list, tuple, np.array, jnp.array])
def test_arrays_of_other_libraries(wrap):
  prompt = Prompt("cat", wrap([[1.0, 2, 30, 40]]), wrap([0]))
  assert (prompt.boxes, prompt.box_labels) == (((1, 2, 30, 40),), (False,))
  assert Prompt("cat", [wrap([1, 2, 30, 40])], [wrap([1])[0]]) == Prompt("cat", [[1, 2, 30, 40]])
  assert Prompt("cat", [[1, 2, 30, 40]], wrap([True])).box_labels == (True,)
  one = VisualPrompt(wrap([[3, 4]]), wrap([0]), wrap([1, 2, 30, 40]), wrap([[1.0, 2.0]]))
  assert (one.points, one.point_labels, one.box) == (((3, 4),), (0,), (1, 2, 30, 40))
  np.testing.assert_array_equal(one.mask, [[1, 2]])
  assert as_prompts(np.array(["cat", "dog"])) == [Prompt("cat"), Prompt("dog")]


@pytest.mark.parametrize(
  "given",
  [{"text": "cat"}, {"cat", "dog"}, b"cat", None, 3, [["cat"]], [b"cat"], np.array(["a"])[0:0]],
)
def test_invalid_lists_of_prompts(given):
  with pytest.raises((TypeError, ValueError)) as error:
    as_prompts(given)
  assert "\n" not in str(error.value)


def test_boxes_in_fractions_are_rejected():
  for box in ([0, 0, 1, 1], [0.25, 0.5, 0.75, 0.9], [0, 0, 0.5, 0]):
    with pytest.raises(ValueError, match=r"within the first pixel.* multiply fractions by width"):
      check_boxes(Prompt(boxes=[[100, 100, 200, 200], box]), 480, 640)
    check_boxes(Prompt(boxes=[box]), 8, 640)  # the image is so small that pixels may be meant
  with pytest.raises(ValueError, match="within the first pixel"):
    check_visual(VisualPrompt(box=[0.1, 0.1, 0.9, 0.9]), 480, 640)
  for points in ([[0.5, 0.5]], [[0.5, 0.3], [1, 1]]):
    with pytest.raises(ValueError, match=r"within the first pixel.* multiply fractions by width"):
      check_visual(VisualPrompt(points), 480, 640)
    check_visual(ComputedPrompt(points, box=[0, 0, 1, 1]), 480, 640)
  for points in ([[0, 0]], [[1, 1], [0, 1]], [[0.5, 0.5], [30, 2]]):
    check_visual(VisualPrompt(points), 480, 640)
  check_boxes(Prompt(boxes=[[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 1, 2]]), 480, 640)
