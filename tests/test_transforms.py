"""Augmentation: pixels, boxes and masks are transformed alike."""

import numpy as np
import pytest
from PIL import Image

from sam3_jax.inputs.resize import resize
from sam3_jax.training.transforms import Frame, random_frame

SIZE = 48


def whole_image(height: int, width: int, size: int) -> Frame:
  """The frame of inference: the whole image over the whole square."""
  return Frame(left=0, top=0, right=width, bottom=height, size=size, side=size)


FRAMES = {
  "whole": whole_image(30, 40, SIZE),
  "padded": Frame(left=0, top=0, right=40, bottom=30, size=SIZE, side=31, x=5, y=12),
  "flipped": Frame(left=0, top=0, right=40, bottom=30, size=SIZE, side=31, x=5, y=12, flip=True),
  "cropped": Frame(left=7, top=3, right=29, bottom=25, size=SIZE, side=40, x=8, y=1, flip=True),
  "one pixel": Frame(left=39, top=29, right=40, bottom=30, size=SIZE, side=1, x=47, y=0),
}


@pytest.fixture(params=FRAMES)
def frame(request) -> Frame:
  return FRAMES[request.param]


def image(seed: int = 0) -> np.ndarray:
  return np.random.default_rng(seed).integers(1, 256, (30, 40, 3), dtype=np.uint8)


def test_whole_image_equals_inference():
  assert (whole_image(30, 40, SIZE).image(image()) == resize(image(), SIZE)).all()


def test_pixels(frame):
  """The resized crop at its position, and black elsewhere."""
  square = frame.image(image())
  assert square.shape == (SIZE, SIZE, 3)
  assert square.flags.c_contiguous
  crop = image()[frame.top : frame.bottom, frame.left : frame.right]
  part = resize(crop, frame.side)
  want = np.zeros((SIZE, SIZE, 3), np.uint8)
  want[frame.y :, frame.x :][: frame.side, : frame.side] = part[:, ::-1] if frame.flip else part
  assert (square == want).all()


def test_boxes_follow_the_pixels(frame):
  """The box of a white rectangle on black is where the square is bright."""
  x0, y0, x1, y1 = frame.left, frame.top, frame.right, frame.bottom
  if x1 - x0 > 10:
    x0, x1, y0, y1 = x0 + 3, x1 - 6, y0 + 5, y1 - 2
  image = np.zeros((30, 40, 3), np.uint8)
  image[y0:y1, x0:x1] = 255
  bright = frame.image(image)[..., 0] > 127
  rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
  found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
  box = frame.boxes(np.array([[x0, y0, x1, y1]], float))[0] * SIZE
  np.testing.assert_allclose(box, found, atol=0.51)  # half a pixel: the threshold's rounding


def test_boxes_are_clipped_to_the_crop():
  frame = FRAMES["cropped"]
  boxes = frame.boxes(np.array([[-10.0, -10, 50, 50], [0, 0, 8, 4]]))
  np.testing.assert_allclose(boxes[0] * SIZE, [8, 1, 48, 41])
  # 1 of 22 pixels remain on each axis; flipped, so at the right.
  np.testing.assert_allclose(boxes[1] * SIZE, [8 + 40 * 21 / 22, 1, 48, 1 + 40 / 22])


def test_no_boxes(frame):
  assert frame.boxes(np.zeros((0, 4))).shape == (0, 4)


def test_to_image_inverts_to_square(frame):
  values = np.linspace(-3, 45, 20)
  for axis in (0, 1):
    back = frame.to_image(frame.to_square(values, axis), axis)
    np.testing.assert_allclose(back, values, atol=7e-14)  # measured 7.1e-15


def oracle(frame: Frame, mask: np.ndarray, cells: int, fine: int = 30) -> np.ndarray:
  """Coverage from many points in each cell, and the image pixels that they are in."""
  centers = (np.arange(cells * fine) + 0.5) / fine * frame.size / cells
  inside = np.zeros((cells * fine,) * 2, bool)
  x = np.floor(frame.to_image(centers, 0)).astype(int)
  y = np.floor(frame.to_image(centers, 1)).astype(int)
  columns = np.flatnonzero((x >= frame.left) & (x < frame.right))
  rows = np.flatnonzero((y >= frame.top) & (y < frame.bottom))
  inside[np.ix_(rows, columns)] = mask[np.ix_(y[rows], x[columns])]
  return inside.reshape(cells, fine, cells, fine).mean(axis=(1, 3)) * 255


@pytest.mark.parametrize("cells", [1, 7, 12, 48, 64])
def test_coverage(frame, cells):
  """A random mask, on grids coarser and finer than the image."""
  mask = (np.random.default_rng(1).random((30, 40)) < 0.6).astype(np.uint8)
  part = mask[frame.top : frame.bottom, frame.left : frame.right]
  got = frame.coverage(part, (frame.left, frame.top), cells)
  assert got.dtype == np.uint8
  # The oracle has 30 x 30 points a cell, which miss up to a row of a cut pixel: measured 6.5.
  np.testing.assert_allclose(got, oracle(frame, mask, cells), atol=8)


def test_coverage_keeps_the_area():
  """Exact at an integer scale: cells are averages of their pixels."""
  mask = (np.random.default_rng(2).random((32, 64)) < 0.5).astype(np.uint8)
  got = whole_image(32, 64, 16).coverage(mask, (0, 0), 16)
  want = np.rint(mask.reshape(16, 2, 16, 4).mean(axis=(1, 3)) * 255)
  assert (got == want).all()
  flipped = Frame(left=0, top=0, right=64, bottom=32, size=16, side=16, flip=True)
  assert (flipped.coverage(mask, (0, 0), 16) == want[:, ::-1]).all()


def test_coverage_of_a_part_of_a_mask(frame):
  """Parts of the mask that are 0 may be left out."""
  mask = np.zeros((30, 40), np.uint8)
  y, x = (frame.top + frame.bottom) // 2, (frame.left + frame.right) // 2
  mask[y : y + 1, x : x + 1] = 1
  part = mask[frame.top : frame.bottom, frame.left : frame.right]
  want = frame.coverage(part, (frame.left, frame.top), 12)
  assert (frame.coverage(mask[y : y + 1, x : x + 1], (x, y), 12) == want).all()


def test_coverage_equals_pillows_box_filter():
  """An independent implementation for whole images."""
  y, x = np.mgrid[:90, :120]
  mask = ((x - 50) ** 2 + (y - 40) ** 2 < 30**2).astype(np.uint8)
  want = np.asarray(Image.fromarray(mask * 255).resize((16, 16), Image.Resampling.BOX), int)
  got = whole_image(90, 120, 64).coverage(mask, (0, 0), 16).astype(int)
  # Pillow gives pixels that a cell's edge cuts to one of the two cells: measured 19, and 1.2 in
  # the mean.
  assert np.abs(got - want).max() <= 25
  assert np.abs(got - want).mean() <= 2


def test_random_frames_are_within_bounds():
  rng = np.random.default_rng(0)
  options = {"min_side": 20, "flip": 0.3, "crop": 0.5, "min_crop_size": 0.4}
  frames = [random_frame(rng, 30, 40, SIZE, **options) for _ in range(600)]
  for one in frames:
    assert 20 <= one.side <= SIZE
    assert min(one.x, one.y) >= 0
    assert max(one.x, one.y) + one.side <= SIZE
    assert 0 <= one.left < one.right <= 40
    assert 0 <= one.top < one.bottom <= 30
    assert one.right - one.left >= 16
    assert one.bottom - one.top >= 12
  assert {one.side for one in frames} == set(range(20, SIZE + 1))
  assert 0.2 < np.mean([one.flip for one in frames]) < 0.4
  cropped = [(one.left, one.top, one.right, one.bottom) != (0, 0, 40, 30) for one in frames]
  assert 0.4 < np.mean(cropped) < 0.6


def test_random_frame_without_augmentation_is_the_whole_image():
  rng = np.random.default_rng(0)
  for height, width in ((1, 1), (30, 40)):
    assert random_frame(rng, height, width, SIZE, min_side=SIZE) == whole_image(height, width, SIZE)


def test_smallest_image_can_be_cropped():
  frame = random_frame(np.random.default_rng(0), 1, 1, SIZE, min_side=1, crop=1.0)
  assert (frame.left, frame.top, frame.right, frame.bottom) == (0, 0, 1, 1)
