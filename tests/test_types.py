"""The pytrees between the parts of the model: slicing, saving, and transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from sam3_jax.types import (
  Detections,
  DetectorOutput,
  ImageEmbedding,
  ImageMaps,
  Points,
  Prompts,
  TextEmbedding,
  VisualEmbedding,
  VisualMasks,
  VisualPrompts,
)


def make(cls, rows, dtype=jnp.float32):
  """A pytree of this class with random leaves."""
  numbers = np.random.default_rng(0)

  def real(*shape):
    return jnp.asarray(numbers.standard_normal((rows, *shape)), dtype)

  def whole(*shape):
    return jnp.asarray(numbers.integers(0, 99, (rows, *shape)), jnp.int32)

  def truth(*shape):
    return jnp.asarray(numbers.random((rows, *shape)) < 0.5)

  fields = {
    ImageMaps: lambda: (real(8, 8, 3), real(4, 4, 3), real(2, 2, 3), whole(2)),
    ImageEmbedding: lambda: (
      real(8, 8, 3), real(4, 4, 3), real(2, 2, 3), real(2, 2, 3), whole(2)
    ),
    VisualEmbedding: lambda: (real(8, 8, 1), real(4, 4, 2), real(2, 2, 3)),
    TextEmbedding: lambda: (real(5, 3), truth(5)),
    Points: lambda: (real(2, 2), truth(2), truth(2)),
    Prompts: lambda: (whole(), whole(), make(TextEmbedding, rows), real(2, 4), truth(2), truth(2)),
    Detections: lambda: (
      real(6), real(6, 4), real(6, 8, 8), real(), real(8, 8), whole(), whole(2), whole(6)
    ),
    VisualPrompts: lambda: (whole(), real(2, 2), whole(2), real(8, 8), truth()),
    VisualMasks: lambda: (real(3, 8, 8), real(3), real(), whole(), whole(2)),
  }  # fmt: skip
  return cls(*fields[cls]())


def assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(one, other)


SAVED = (ImageEmbedding, TextEmbedding, Detections, VisualEmbedding, VisualMasks)
ALL = (*SAVED, ImageMaps, Points, Prompts, VisualPrompts)


@pytest.mark.slow
@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_slices_keep_the_first_axis(cls, rows):
  whole = make(cls, rows)
  assert len(whole) == rows
  assert_same(whole[:], whole)
  assert len(whole[1:3]) == len(range(rows)[1:3])
  if rows == 4:
    assert_same(jax.tree.map(lambda *x: jnp.concatenate(x), whole[:1], whole[1:]), whole)
    order = np.array([2, 0, 3])
    assert_same(whole[order], jax.tree.map(lambda x: x[order], whole))
    assert_same(whole[jnp.array([True, False, False, True])], whole[np.array([0, 3])])


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("index", [2, np.int64(2), jnp.int32(2)])
def test_integer_index_is_rejected(cls, index):
  with pytest.raises(TypeError, match=r"^use \[2:3\] rather than \[2\]: the first axis must stay"):
    make(cls, 4)[index]


@pytest.mark.slow
@pytest.mark.parametrize("cls", SAVED)
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_saved_and_loaded_bit_for_bit(cls, rows, dtype, tmp_path):
  whole = make(cls, rows, dtype)
  whole.save(tmp_path / "whole.safetensors")
  assert_same(cls.load(tmp_path / "whole.safetensors"), whole)
  whole.save(str(tmp_path / "text path"))
  assert_same(cls.load(str(tmp_path / "text path")), whole)


def both_necks(rows, dtype=jnp.float32):
  embedding = make(ImageEmbedding, rows, dtype)
  return embedding.replace(visual=make(VisualEmbedding, rows, dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_with_visual_part_is_saved(dtype, tmp_path):
  whole = both_necks(2, dtype)
  whole.save(tmp_path / "both")
  assert_same(ImageEmbedding.load(tmp_path / "both"), whole)
  assert_same(whole[1:].visual, make(VisualEmbedding, 2, dtype)[1:])
  with pytest.raises(ValueError, match=r"'coarse', .*'visual.coarse', .*but VisualEmbedding has"):
    VisualEmbedding.load(tmp_path / "both")


def test_incomplete_visual_part_cannot_be_loaded(tmp_path):
  whole = both_necks(1)
  half = {"visual.fine": whole.visual.fine, "visual.middle": whole.visual.middle}
  first = {name: x for name, x in vars(whole).items() if isinstance(x, jax.Array)}
  save_file({name: np.asarray(x) for name, x in (first | half).items()}, tmp_path / "half")
  with pytest.raises(ValueError, match=r"'visual.fine', 'visual.middle'\], but ImageEmbedding has"):
    ImageEmbedding.load(tmp_path / "half")


def test_best_mask_of_each_prompt():
  found = make(VisualMasks, 3)
  found = found.replace(iou=jnp.float32([[0.2, 0.9, 0.1], [0.5, 0.5, 0.4], [0, 0, 1]]))
  best = found.best()
  assert best.iou[:, 0].tolist() == pytest.approx([0.9, 0.5, 1])
  for row, choice in enumerate([1, 0, 2]):
    np.testing.assert_array_equal(best.mask_logits[row, 0], found.mask_logits[row, choice])
  np.testing.assert_array_equal(best.object_logit, found.object_logit)


@pytest.mark.parametrize("version", ["1", "2"])
def test_old_detections_load_with_the_new_field_name(version, tmp_path):
  """Before version 3, `presence_logit` was called `presence`; version 1 has no header."""
  whole = make(Detections, 2)
  arrays = {name: np.asarray(x) for name, x in vars(whole).items() if x is not None}
  arrays["presence"] = arrays.pop("presence_logit")
  header = {"class": "Detections", "format_version": version} if version == "2" else None
  save_file(arrays, tmp_path / "old", header)
  assert_same(Detections.load(tmp_path / "old"), whole)


def test_saved_slices_load(tmp_path):
  """A slice may be a view of a larger buffer."""
  whole = make(ImageEmbedding, 4)
  whole[2:3].save(tmp_path / "slice")
  assert_same(ImageEmbedding.load(tmp_path / "slice"), whole[2:3])


def test_invalid_files_cannot_be_loaded(tmp_path):
  path = tmp_path / "file"
  with pytest.raises(FileNotFoundError):
    TextEmbedding.load(path)
  path.write_bytes(b"no such format")
  with pytest.raises(ValueError, match=r"file is not a file that TextEmbedding.save wrote: "):
    TextEmbedding.load(path)
  path.write_bytes(b"")
  with pytest.raises(ValueError, match=r"file is not a file that TextEmbedding.save wrote: "):
    TextEmbedding.load(path)
  make(ImageEmbedding, 1).save(path)
  with pytest.raises(ValueError, match=r"file holds \['attended', .*but TextEmbedding has \['feat"):
    TextEmbedding.load(path)
  save_file({"features": np.zeros((1, 2, 3), np.float32)}, path)
  with pytest.raises(ValueError, match=r"file holds \['features'\], but TextEmbedding has .*valid"):
    TextEmbedding.load(path)


@pytest.mark.parametrize("cls", ALL)
def test_transformations_accept_the_pytrees(cls):
  whole = make(cls, 3)
  assert_same(jax.jit(lambda x: x)(whole), whole)
  assert_same(jax.vmap(lambda x: x)(whole), whole)
  shapes = jax.eval_shape(lambda: make(cls, 3))
  assert jax.tree.structure(shapes) == jax.tree.structure(whole)
  assert all(jax.tree.leaves(jax.tree.map(lambda a, b: a.shape == b.shape, shapes, whole)))


def test_prompts_without_and_with_points():
  prompts = make(Prompts, 2)
  assert prompts.points is None
  assert prompts[:1].points is None
  with_points = prompts.replace(points=make(Points, 2))
  assert_same(with_points[1:].points, with_points.points[1:])


def test_detector_output_cannot_be_sliced_or_saved():
  assert not hasattr(DetectorOutput, "save")
  assert not hasattr(DetectorOutput, "__getitem__")
