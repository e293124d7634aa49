"""Visual prompts through `Sam3`: Meta's numbers, batching, refinement, compilations, errors."""

import dataclasses

import golden_model
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, difference, visual_model

from sam3_jax import Prompt, Sam3, Tokenizer, VisualPrompt
from sam3_jax.inference.visual import VISUAL_BATCHES
from sam3_jax.inputs.visual_prompts import POINT_SIZES, as_visual_prompts, pack_visual

SIDE = golden_model.CONFIG.image_size
MASK = golden_model.CONFIG.mask_size
CLOSE = 1e-5  # of the same prompts in batches of other sizes; measured 1.0e-6
GOLDEN = dict(np.load(golden_model.GOLDENS / "visual.npz"))
SCALE = SIDE / np.array([1800, 1200])  # from the goldens' image to the model's square


@pytest.fixture(scope="module")
def model(tokenizer_path):
  return visual_model(tokenizer_path)


@pytest.fixture(scope="module")
def images():
  """The goldens' image as the model sees it, and another."""
  pixels = np.load(golden_model.GOLDENS / "common.npz")["pixel_values"][0].transpose(1, 2, 0)
  golden = np.rint((pixels + 1) * 127.5).astype(np.uint8)
  other = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
  return [golden, other]


@pytest.fixture(scope="module")
def embedding(model, images):
  parts = [model.encode(image, visual=True) for image in images]
  return jax.tree.map(lambda *x: jnp.concatenate(x), *parts)


def golden_prompt(kind, mask=None):
  values = {name: GOLDEN.get(f"{kind}.{name}") for name in ("point_coords", "point_labels", "box")}
  points, labels, box = values.values()
  return VisualPrompt(
    points=None if points is None else points * SCALE,
    point_labels=labels,
    box=None if box is None else box * np.tile(SCALE, 2),
    mask=mask,
  )


def random_prompts(seed, count, size=(40, 60)):
  """Of every kind: points, a box, a mask, in all mixtures; three slots at most."""
  rng = np.random.default_rng(seed)
  height, width = size
  prompts = []
  for i in range(count):
    kind = i % 7 + 1  # bits: points, box, mask
    number = 1 if kind & 2 else int(rng.integers(1, 4))
    corner = rng.random(2) * 0.5
    box = np.concatenate([corner, corner + 0.4]) * [width, height, width, height]
    prompts.append(
      VisualPrompt(
        points=rng.random((number, 2)) * [width, height] if kind & 1 else None,
        point_labels=rng.integers(0, 2, number) if kind & 1 else None,
        box=box if kind & 2 else None,
        mask=4 * rng.standard_normal((MASK, MASK)) if kind & 4 else None,
      )
    )
  return prompts


@pytest.mark.slow
def test_equals_meta_from_image_and_pixels(model, embedding):
  """A click, then a box with a click off the object and the first click's mask."""
  first = model.decode_visual(embedding, golden_prompt("point"), 0)
  assert first.mask_logits.shape == (1, 3, MASK, MASK)
  low = np.clip(first.mask_logits[0], -32, 32)
  assert difference(low, GOLDEN["point.low_res"]) < 3.1e-5  # measured 3.1e-6
  assert difference(first.iou[0], GOLDEN["point.iou"]) < 2.1e-6  # measured 2.1e-7
  assert difference(first.object_logit, GOLDEN["point.obj"][0]) < 1.3e-6  # measured 1.3e-7

  used = [difference(x, GOLDEN["box_point_mask.mask_input"][0]) < 1e-4 for x in low]
  assert sum(used) == 1
  mask = first.mask_logits[0, used.index(True)]
  prompts = [golden_prompt("box_point_mask", mask), golden_prompt("points_single")]
  then = model.decode_visual(embedding, [*prompts, golden_prompt("box")], 0, multimask=False)
  assert then.mask_logits.shape == (3, 1, MASK, MASK)
  for row, kind in enumerate(["box_point_mask", "points_single", "box"]):
    low = np.clip(then.mask_logits[row], -32, 32)
    assert difference(low, GOLDEN[f"{kind}.low_res"]) < 2.4e-5  # measured 2.4e-6
    assert difference(then.iou[row], GOLDEN[f"{kind}.iou"]) < 3e-6  # measured 3.0e-7


@pytest.mark.slow
def test_visual_encoding_does_not_change_concepts(model, images, embedding):
  """The first neck's maps and the detections are bit-equal, from the same program."""
  plain = model.encode(images[1])
  assert plain.visual is None
  both = embedding[1:]
  for name in ("fine", "middle", "coarse", "sizes"):
    np.testing.assert_array_equal(getattr(plain, name), getattr(both, name))
  want = model.decode(plain, "ear")
  programs = model.compilations
  got = model.decode(both, "ear")
  assert model.compilations == programs
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_one_call_equals_one_by_one(model, embedding):
  prompts = random_prompts(1, 21)
  prompts[5] = VisualPrompt(points=[[n, n] for n in range(5)])  # more slots for its batch
  images = np.array([1] * 17 + [0, 1, 0, 1])  # a full batch of one image, one over both, and one
  together = jax.device_get(model.decode_visual(embedding, prompts, images))
  assert together.image_index.tolist() == images.tolist()
  for i in (0, 3, 6, 16, 18, 20):
    alone = jax.device_get(model.decode_visual(embedding, prompts[i], int(images[i])))
    for name in ("mask_logits", "iou", "object_logit"):
      got, want = getattr(together, name)[i : i + 1], getattr(alone, name)
      assert_close(got, want, rel=CLOSE, what=f"prompt {i}, {name}")
    np.testing.assert_array_equal(together.sizes[i : i + 1], alone.sizes)


@pytest.mark.slow
def test_a_thousand_points(model, embedding):
  """Equal to one by one, in batches of 16 and 4."""
  points = np.random.default_rng(6).random((1000, 2)) * [60, 40]
  prompts = [VisualPrompt(points=[point]) for point in points]
  together = model.decode_visual(embedding, prompts, 1)
  for i in (0, 15, 16, 500, 991, 999):
    alone = model.decode_visual(embedding, prompts[i], 1)
    assert_close(together[i : i + 1], alone, rel=CLOSE)


def test_order_of_points_and_prompts_does_not_matter(model, embedding):
  prompts, images = random_prompts(3, 4), [0, 1, 1, 0]
  turned = [
    dataclasses.replace(p, points=p.points[::-1], point_labels=p.point_labels[::-1])
    for p in prompts[::-1]
  ]
  want = model.decode_visual(embedding, prompts, images)
  got = model.decode_visual(embedding, turned, images[::-1])[np.arange(4)[::-1]]
  assert_close(got, want, rel=CLOSE)


def test_masks_of_the_source_image(model, embedding):
  found = model.decode_visual(embedding, random_prompts(4, 4), [0, 1, 1, 0])
  masks = found.masks()
  assert [(len(one), one.size) for one in masks] == [
    (3, (SIDE, SIDE)), (3, (40, 60)), (3, (40, 60)), (3, (SIDE, SIDE))
  ]  # fmt: skip
  assert masks[1][2].shape == (40, 60)
  best = found.best()
  assert best.mask_logits.shape == (4, 1, MASK, MASK)
  np.testing.assert_array_equal(best.iou[:, 0], found.iou.max(axis=1))


@pytest.mark.slow
def test_few_compilations(model, embedding, monkeypatch):
  """Any prompts: batches of 16, 4 and 1 of one image, of 16 and 4 of several. The program computes
  nothing, as only shapes matter."""

  def nothing(params, embedding, prompts, multimask):
    rows, kept = len(prompts.image), 3 if multimask else 1
    scores = jnp.zeros((rows, kept))
    return jnp.zeros((*scores.shape, MASK, MASK)), scores, jnp.zeros(rows)

  decode = jax.jit(nothing, static_argnames="multimask")
  monkeypatch.setattr(model.programs, "decode_visual", decode)
  rng = np.random.default_rng(5)
  for count in (1, 2, 5, 17):
    prompts = [VisualPrompt(points=rng.random((n % 3 + 1, 2)) * 40) for n in range(count)]
    model.decode_visual(embedding, prompts, rng.integers(0, 2, count))
  programs = model.visual_compilations
  for count in (3, 4, 6, 18, 33):
    prompts = [VisualPrompt(points=rng.random((n % 3 + 1, 2)) * 40) for n in range(count)]
    model.decode_visual(embedding, prompts, rng.integers(0, 2, count))
  assert model.visual_compilations - programs <= 2
  most = (len(VISUAL_BATCHES) + len(VISUAL_BATCHES) - 1) * len(POINT_SIZES) * 2 * 2
  assert model.visual_compilations <= most


@pytest.mark.slow
def test_save_and_load(model, tmp_path):
  model.save(tmp_path / "bundle")
  again = Sam3.from_checkpoint(tmp_path / "bundle", verify=True)
  assert_close(jax.device_get(again.params), jax.device_get(model.params), rel=0)


def test_checkpoint_without_the_head(model, images, embedding, tokenizer_path):
  bare = Sam3(
    golden_model.CONFIG, golden_model.parameters(), Tokenizer(tokenizer_path), dtype="float32"
  )
  for call in (
    lambda: bare.encode(images[1], visual=True),
    lambda: bare.decode_visual(embedding, VisualPrompt(points=[[3, 4]]), 1),
  ):
    with pytest.raises(ValueError, match=r"no head for visual prompts.*sam3-jax convert") as caught:
      call()
    assert "\n" not in str(caught.value)


POINT = VisualPrompt(points=[[3, 4]])


@pytest.mark.parametrize(
  ("prompts", "index", "message"),
  [
    ([], 1, "no prompt given; pass a VisualPrompt or a list"),
    (VisualPrompt(points=[[3, 41]]), 1, r"point \[3, 41\] is outside the 60 x 40 image"),
    (VisualPrompt(points=[[-0.1, 4]]), 1, r"point \[-0.1, 4\] is outside"),
    (VisualPrompt(box=[70, 0, 80, 5]), 1, "completely outside the 60 x 40 image"),
    (
      VisualPrompt(mask=np.zeros((40, 60))),
      1,
      r"\[48, 48\] logits of an earlier.*shape \[40, 60\]",
    ),
    (POINT, None, "the embedding has 2 images: give the image of each prompt"),
    (POINT, 2, "image_index 2 is not in the embedding"),
    ([POINT] * 3, [0, 1], "for each of 3 prompts"),
    ([POINT] * 2, [[0], [0, 1]], r"for each of 2 prompts; got \[\[0\], \[0, 1\]\]"),
  ],
)
def test_errors_are_one_line(model, embedding, prompts, index, message):
  with pytest.raises(ValueError, match=message) as caught:
    model.decode_visual(embedding, prompts, index)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("setting", "value", "message"),
  [
    ("multimask", [1], r"multimask must be True or False; got \[1\]"),
    ("multimask", 3, "multimask must be True or False; got 3"),
    ("multimask", None, "multimask must be True or False; got None"),
    ("memory_budget", np.nan, "memory_budget must be a number of bytes; got nan"),
    ("memory_budget", -1, "memory_budget must be a number of bytes; got -1"),
    ("memory_budget", "a", "memory_budget must be a number of bytes; got 'a'"),
  ],
)
def test_invalid_settings(model, embedding, setting, value, message):
  with pytest.raises(ValueError, match=message) as caught:
    model.decode_visual(embedding, POINT, 1, **{setting: value})
  assert "\n" not in str(caught.value)


def test_wrong_types(model, embedding):
  with pytest.raises(TypeError, match=r"pass a VisualPrompt or a list of them; got 'cat'"):
    model.decode_visual(embedding, ["cat"], 1)
  with pytest.raises(TypeError, match=r"got Prompt\(text='cat'.* are for decode"):
    model.decode_visual(embedding, Prompt("cat"), 1)
  with pytest.raises(TypeError, match=r"decode_visual takes what encode.*got \[\]"):
    model.decode_visual([], [POINT] * 1000)
  with pytest.raises(ValueError, match=r"the embedding has no images"):
    model.decode_visual(embedding[:0], [POINT] * 1000)
  with pytest.raises(ValueError, match=r"encode\(images, visual=True\)"):
    model.decode_visual(embedding.replace(visual=None), POINT, 1)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({}, "a visual prompt needs points, a box or a mask"),
    ({"points": []}, "a visual prompt needs points, a box or a mask"),
    ({"points": [3, 4]}, "point 0 must be two numbers x, y in pixels; got 3"),
    ({"points": 3}, "point 0 must be two numbers x, y in pixels; got 3"),
    ({"points": [[3, 4], [5, 6, 7]]}, r"point 1 must be two numbers.*got \[5, 6, 7\]"),
    ({"points": [["a", 4]]}, "point 0 must be two numbers"),
    ({"points": [[np.nan, 4]]}, r"point 0 must be finite; got \[nan, 4.0\]"),
    ({"points": [[3, np.inf]]}, r"point 0 must be finite; got \[3.0, inf\]"),
    ({"points": [[1, 2]] * 63}, "at most 62 points; got 63"),
    ({"points": [[1, 2]], "point_labels": [3]}, r"labels are 1 \(on the object\) or 0.*got 3"),
    ({"points": [[1, 2]], "point_labels": [0.5]}, "or 0 .*got 0.5"),
    ({"points": [[1, 2]], "point_labels": [np.nan]}, "or 0 .*got nan"),
    ({"points": [[1, 2]], "point_labels": [1, 0]}, r"one label for each point: 1; got \[1, 0\]"),
    ({"points": [[1, 2]], "point_labels": 1}, "one label for each point: 1; got 1"),
    ({"box": [1, 2, 3, 4], "point_labels": [1]}, r"one label for each point: 0; got \[1\]"),
    ({"box": [1, 2, 3]}, "the box must be four numbers x0, y0, x1, y1"),
    ({"box": [[1, 2, 3, 4]]}, "the box must be four numbers"),
    ({"box": [5, 2, 3, 4]}, "the box has a negative extent"),
    ({"box": [np.nan, 2, 3, 4]}, "the box must be finite"),
    ({"mask": np.zeros((1, 48, 48))}, r"mask must be \[Hm, Wm\] logits.*shape \[1, 48, 48\]"),
    ({"mask": np.zeros((48, 48), bool)}, r"got bool of shape \[48, 48\]"),
    (
      {"box": [5, 5, 5, 9]},
      r"the box \[5.0, 5.0, 5.0, 9.0\] has no area.* for a click use points=",
    ),
    ({"mask": [[1.0, 2.0], [1.0]]}, r"mask must be \[Hm, Wm\] logits"),
    ({"mask": "mask"}, r"mask must be \[Hm, Wm\] logits"),
    ({"mask": np.full((48, 48), np.nan)}, "mask has values that are not finite"),
  ],
)
def test_invalid_prompts(fields, message):
  with pytest.raises(ValueError, match=message) as caught:
    VisualPrompt(**fields)
  assert "\n" not in str(caught.value)


def test_edges_of_the_image_are_inside(model, embedding):
  box = [-10, -10, 70, 50]
  corners = [VisualPrompt(points=[point], box=box) for point in ([0, 0], [60, 40])]
  assert np.isfinite(model.decode_visual(embedding, corners, 1).iou).all()


def test_packing():
  prompts = [
    VisualPrompt(points=[[30, 10]], point_labels=[0]),
    VisualPrompt(points=[[15, 20]], box=[0, 0, 60, 40]),
    VisualPrompt(mask=np.full((4, 4), 100.0)),
  ]
  packed = pack_visual(prompts, np.array([[40, 60]] * 3), np.int32([0, 0, 0]))
  assert packed.labels.tolist() == [[0, -1, -1], [2, 3, 1], [-1, -1, -1]]
  np.testing.assert_allclose(packed.xy[0, 0], [0.5, 0.25])
  np.testing.assert_allclose(packed.xy[1], [[0, 0], [1, 1], [0.25, 0.5]])
  assert packed.has_mask.tolist() == [False, False, True]
  assert packed.mask.min(axis=(1, 2)).tolist() == [0, 0, 32]
  alone = pack_visual(prompts[:2], np.array([[40, 60]] * 2), np.int32([0, 0]))
  assert alone.mask is None
  assert alone.has_mask is None


@pytest.mark.parametrize(("points", "slots"), [(1, 3), (3, 3), (4, 16), (16, 16), (62, 64)])
def test_points_are_padded_to_few_sizes(points, slots):
  prompt = VisualPrompt(points=[[1, 1]] * points)
  packed = pack_visual([prompt], np.array([[2, 2]]), np.int32([0]))
  assert packed.xy.shape == (1, slots, 2)
  assert (packed.labels >= 0).sum() == points


def test_one_or_several_prompts():
  assert as_visual_prompts(POINT) == [POINT]
  assert as_visual_prompts(one for one in (POINT, POINT)) == [POINT, POINT]
  assert POINT.point_labels == (1,)
