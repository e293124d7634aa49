"""Sequences of batches: deterministic, sharded, resumable; and sources of images."""

import json
import pathlib
import subprocess
import sys
import textwrap
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from sam3_jax.datasets import annotations
from sam3_jax.datasets.annotations import Object, Pair
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.training.data import Batches
from sam3_jax.training.examples import DataConfig, TrainingImage
from sam3_jax.training.sources import PairSource, SceneConfig, SceneSource

ROOT = pathlib.Path(__file__).parents[1]
TOKENIZER = Tokenizer(ROOT / "tests" / "goldens" / "tokenizer.model")
CONFIG = DataConfig(
  batch_size=4,
  image_size=32,
  mask_size=8,
  prompts_per_image=3,
  present_prompts=2,
  max_objects=2,
  max_exemplars=2,
  box_only_probability=0.3,
)


class Images(list):
  """A source in memory."""

  def name(self, index: int) -> str:
    return f"{index}.png"


def images(count: int) -> Images:
  """Each image has a present and an absent phrase."""
  rng = np.random.default_rng(0)
  made = Images()
  for i in range(count):
    image = rng.integers(0, 256, (18, 24, 3), dtype=np.uint8)
    mask = np.zeros((18, 24), np.uint8, order="F")
    mask[3:12, 5 : 8 + i % 9] = 1
    thing = Object(coco.encode(mask), (5, 3, 3 + i % 9, 9))
    common = {"file_name": f"{i}.png", "width": 24, "height": 18}
    present = Pair(id=0, phrase=f"thing {i}", objects=(thing,), **common)
    made.append(TrainingImage(image, [present, Pair(id=1, phrase="nothing", **common)]))
  return made


def batches(count: int = 10, *, process: int = 0, processes: int = 1, **options) -> Batches:
  config = DataConfig(**(vars(CONFIG) | options))
  return Batches(images(count), TOKENIZER, config, process=process, processes=processes)


def take(stream: Batches, count: int) -> list:
  return [next(stream) for _ in range(count)]


def ids(stream: Batches, count: int) -> list[int]:
  return [int(i) for batch in take(stream, count) for i in batch.ids]


def assert_same(got: list, want: list):
  assert len(got) == len(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_static_shapes():
  stream = batches()
  shapes = [
    [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)] for batch in take(stream, 8)
  ]
  assert all(one == shapes[0] for one in shapes)
  batch = next(stream)
  assert batch.images.shape == (4, 32, 32, 3)
  assert batch.tokens.shape == (4, 3, 32)
  assert batch.boxes.shape == (4, 3, 2, 4)
  assert batch.targets.masks.shape == (4, 3, 2, 8, 8)
  assert type(batch.images) is np.ndarray


def test_tokens_are_from_the_tokenizer():
  for batch in take(batches(box_only_probability=0.0, text_and_box_probability=0.0), 3):
    for image, rows, valid in zip(batch.ids, batch.tokens, batch.prompt_valid, strict=True):
      np.testing.assert_array_equal(rows, TOKENIZER([f"thing {image}", "nothing", ""]))
      assert valid.tolist() == [True, True, False]


def test_each_epoch_shuffles_all_images():
  """Also if the batch size does not divide the epoch: the next epoch starts in the same batch."""
  sequence = ids(batches(10), 10)
  epochs = [sequence[i : i + 10] for i in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_without_shuffling_images_keep_their_order():
  assert ids(batches(10, shuffle=False), 5) == [*range(10)] * 2


@pytest.mark.parametrize("count", [1, 2, 5])
def test_sources_smaller_than_a_batch(count):
  sequence = ids(batches(count), 5)
  assert sorted(sequence) == sorted(i % count for i in range(20))


def test_augmentation_differs_between_epochs():
  """Random numbers depend on the epoch and the image."""
  seen = take(batches(1, batch_size=1), 6)
  assert len({batch.images.tobytes() for batch in seen}) == 6


def test_batches_depend_on_the_seed_only():
  assert_same(take(batches(), 6), take(batches(), 6))
  assert ids(batches(), 6) != ids(batches(seed=1), 6)
  first, other = take(batches(1, batch_size=1), 1), take(batches(1, batch_size=1, seed=1), 1)
  assert (first[0].images != other[0].images).any()


def test_batches_do_not_depend_on_prefetch():
  want = take(batches(prefetch=0), 5)
  for ahead in (1, 3):
    assert_same(take(batches(prefetch=ahead), 5), want)


@pytest.mark.parametrize("done", [0, 1, 4])
def test_resumed_batches_equal_uninterrupted_ones(done):
  """With the state in JSON, another iterator, and more prefetched batches than consumed ones."""
  stream = batches()
  take(stream, done)
  state = json.loads(json.dumps(stream.get_state()))
  want = take(stream, 4)
  other = batches()
  take(other, 2)
  other.set_state(state)
  assert_same(take(other, 4), want)
  stream.set_state(state)  # the same iterator
  assert_same(take(stream, 4), want)
  assert stream.get_state() == other.get_state()


@pytest.mark.parametrize(
  ("options", "key"),
  [
    ({"seed": 3}, "seed 0, but seed is now 3"),
    ({"batch_size": 2}, "batch_size 4, but batch_size is now 2"),
    ({"shuffle": False}, "shuffle 1, but shuffle is now 0"),
    ({"count": 9}, "images 10, but images is now 9"),
  ],
)
def test_states_of_other_sequences_are_refused(options, key):
  with pytest.raises(ValueError, match=key):
    batches(**options).set_state(batches().get_state())


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_each_batch_is_divided_among_processes(processes):
  """Together the processes have the same examples as one process."""
  want = take(batches(), 5)
  shares = [take(batches(process=p, processes=processes), 5) for p in range(processes)]
  for step, whole in enumerate(want):
    rows = [jax.tree.map(lambda leaf: leaf[0], whole)] * 4
    for p, share in enumerate(shares):
      for i in range(4 // processes):
        rows[p + i * processes] = jax.tree.map(lambda leaf, i=i: leaf[i], share[step])
    assert_same([jax.tree.map(lambda *leaves: np.stack(leaves), *rows)], [whole])


def test_state_works_with_another_number_of_processes():
  stream = batches()
  take(stream, 3)
  state, want = stream.get_state(), ids(stream, 2)
  shares = [batches(process=p, processes=2) for p in (0, 1)]
  for share in shares:
    share.set_state(state)
  got = [i for pair in zip(*(ids(share, 2) for share in shares), strict=True) for i in pair]
  assert got == want


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"count": 0}, "the source has no images"),
    ({"image_size": 0}, "image_size 0 and mask_size 8: give DataConfig the model's"),
    ({"mask_size": 0}, "image_size 32 and mask_size 0: give DataConfig the model's"),
    ({"processes": 3}, "data.batch_size 4 must be a multiple of the 3 processes"),
    ({"process": 2, "processes": 2}, "process must be in 0 .. 1; got 2"),
    ({"process": -1}, "process must be in 0 .. 0; got -1"),
  ],
)
def test_invalid_arguments_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    batches(**options)


def test_errors_of_a_source_are_raised():
  class Broken(Images):
    def __getitem__(self, index):
      raise ValueError(f"image {index} is damaged: get it again.")

  stream = Batches(Broken(images(3)), TOKENIZER, CONFIG)
  with pytest.raises(ValueError, match="is damaged"):
    next(stream)
  stream.close()


def test_closed_batches_can_continue():
  stream = batches()
  want = ids(batches(), 4)
  stream.close()
  got = ids(stream, 2)
  stream.close()
  stream.close()
  assert got + ids(stream, 2) == want


@pytest.mark.slow
def test_batches_do_not_depend_on_workers(tmp_path):
  """In a separate program, as users run it. It ends without output, closed or not."""
  program = tmp_path / "program.py"
  program.write_text(
    textwrap.dedent(f"""
      import sys
      import numpy as np
      sys.path.insert(0, {str(ROOT / "tests")!r})
      import jax
      import test_data as t

      if __name__ == "__main__":
        want = t.take(t.batches(), 5)
        stream = t.batches(workers=2)
        t.assert_same(t.take(stream, 3), want[:3])
        assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(next(stream)))
        other = t.batches()
        other.set_state(stream.get_state())
        t.assert_same(t.take(other, 1), want[4:])
        print("done")
    """)
  )
  command = [sys.executable, "-W", "error::UserWarning", str(program)]
  run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
  assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")


@pytest.mark.slow
def test_worker_processes_end_with_a_killed_program(tmp_path):
  """Otherwise they would keep its output open."""
  program = tmp_path / "program.py"
  program.write_text(
    textwrap.dedent(f"""
      import os, sys
      sys.path.insert(0, {str(ROOT / "tests")!r})
      import test_data as t

      if __name__ == "__main__":
        next(t.batches(workers=1))
        os.kill(os.getpid(), 9)
    """)
  )
  command = [sys.executable, str(program)]
  run = subprocess.run(command, capture_output=True, cwd=ROOT, timeout=120)
  assert run.returncode == -9


@pytest.fixture
def directory(tmp_path):
  for name in ("a", "b", "c"):
    noise = np.random.default_rng(ord(name)).integers(0, 256, (18, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / f"{name}.png")
  return tmp_path


def pair(number: int, name: str, *, crowd: bool = False, exhaustive: bool = True) -> Pair:
  mask = coco.encode(np.ones((18, 24), np.uint8, order="F"))
  objects = (Object(mask, (0, 0, 24, 18), crowd),) if crowd else ()
  return Pair(number, f"{name}.png", 24, 18, f"thing {number}", exhaustive, objects)


def test_pairs_are_grouped_by_image(directory):
  """In any order; unusable pairs are left out and counted."""
  pairs = [
    pair(0, "b"),
    pair(1, "a"),
    pair(2, "c", crowd=True),
    pair(3, "b"),
    pair(4, "a", exhaustive=False),
  ]
  source = PairSource(pairs, directory)
  assert len(source) == 2
  assert source.left_out == 2
  assert [source.name(i) for i in range(2)] == ["b.png", "a.png"]
  assert [[one.id for one in source[i].pairs] for i in range(2)] == [[0, 3], [1]]
  np.testing.assert_array_equal(source[1].image, np.asarray(Image.open(directory / "a.png")))


def test_sources_without_usable_pairs_are_refused(directory):
  pairs = [pair(0, "a", crowd=True), pair(1, "b", exhaustive=False)]
  with pytest.raises(ValueError, match="none of the 2 pairs can be used for training"):
    PairSource(pairs, directory)


def test_image_names(directory):
  stream = Batches(PairSource([pair(0, "b"), pair(1, "a")], directory), TOKENIZER, CONFIG)
  assert [stream.name(i) for i in range(2)] == ["b.png", "a.png"]
  assert batches().name(3) == "3.png"


def test_batches_of_annotated_scenes():
  """From a file in SA-Co's layout to targets with the annotated areas."""
  directory = ROOT / "tests" / "scenes" / "known"
  pairs = annotations.read_checked(directory / "annotations.json", directory, TOKENIZER)
  source = PairSource(pairs, directory)
  assert (len(pairs), len(source), source.left_out) == (600, 90, 0)
  plain: dict[str, Any] = {
    "min_scale": 1.0,
    "flip_probability": 0.0,
    "box_only_probability": 0.0,
    "text_and_box_probability": 0.0,
  }
  config = DataConfig(
    batch_size=6, image_size=64, mask_size=64, max_objects=12, shuffle=False, **plain
  )
  stream = Batches(source, TOKENIZER, config)
  for batch in take(stream, 2):
    for i, image in enumerate(batch.ids):
      phrases = {tuple(TOKENIZER([one.phrase])[0]): one for one in source[int(image)].pairs}
      for r in np.flatnonzero(batch.prompt_valid[i]):
        one = phrases[tuple(batch.tokens[i, r])]
        valid = batch.targets.valid[i, r]
        assert valid.sum() == len(one.objects)
        areas = batch.targets.masks[i, r][valid].sum(axis=(1, 2), dtype=float) / 255 / 64**2
        want = [coco.area(thing.rle) / one.width / one.height for thing in one.objects]
        np.testing.assert_allclose(areas, want, atol=3e-5)  # rounding to 1/255: measured 1.3e-5


def test_scene_source():
  source = SceneSource(SceneConfig(count=5, seed=3, size=(64, 80), augment=0.5))
  assert len(source) == 5
  for i in (0, 4):
    scene = source[i]
    assert scene.image.shape == (64, 80, 3)
    present = [one for one in scene.pairs if one.objects]
    assert 1 <= len(present) <= len(scene.pairs) - 1
    for one in scene.pairs:
      assert (one.width, one.height, one.exhaustive) == (80, 64, True)
      for thing in one.objects:
        assert coco.toBbox(thing.rle).tolist() == list(thing.box)
        assert coco.area(thing.rle) > 0
    assert annotations.check(scene.pairs, None, TOKENIZER) == []
    again = source[i]
    np.testing.assert_array_equal(again.image, scene.image)
    assert [one.phrase for one in again.pairs] == [one.phrase for one in scene.pairs]
  assert (source[0].image != source[1].image).any()
  other = SceneSource(SceneConfig(count=5, seed=4, size=(64, 80), augment=0.5))
  assert (source[0].image != other[0].image).any()
  assert source.name(2) == "scene 2 of seed 3"


def test_zero_scenes_are_refused():
  with pytest.raises(ValueError, match=r"scenes\.count must be 1 or more; got 0"):
    SceneSource(SceneConfig(count=0))


def test_batches_of_composed_scenes():
  batch = next(Batches(SceneSource(SceneConfig(count=9, size=(64, 64))), TOKENIZER, CONFIG))
  assert batch.prompt_valid[:, :2].all()
  assert batch.targets.valid.any(axis=(1, 2)).all()
