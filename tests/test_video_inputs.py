"""Videos that are not files: directories, arrays, lists and iterators; ranges of frames."""

import gc
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from clips import frame_image, number_of
from PIL import Image

from sam3_jax.inputs.frame_list import natural_order
from sam3_jax.inputs.frame_range import FrameRange
from sam3_jax.inputs.video import Seconds, open_video, parse_position
from sam3_jax.utils.read_ahead import THREAD_NAME, read_ahead

ARRAY = np.stack([frame_image(i) for i in range(20)])


def indices(frames) -> list[int]:
  return [frame.index for frame in frames]


def threads() -> int:
  """Threads that read ahead."""
  gc.collect()
  return sum(thread.name == THREAD_NAME for thread in threading.enumerate())


def write_images(folder, names, size=(64, 96)):
  folder.mkdir(exist_ok=True)
  for number, name in enumerate(names):
    Image.fromarray(frame_image(number, *size)).save(folder / name)
  return folder


def test_directory(tmp_path):
  names = [f"frame{i}.png" for i in range(12)]  # frame10 follows frame9
  folder = write_images(tmp_path / "clip", names)
  (folder / "notes.txt").write_text("notes")
  (folder / ".hidden.png").write_bytes(b"")
  notes = []
  video = open_video(folder, note=notes.append)
  assert (video.name, video.size, video.fps, video.length) == (str(folder), (64, 96), None, 12)
  assert notes == [f"{folder}: skipped 2 files: 1 .txt, 1 hidden."]
  frames = list(video)
  assert [number_of(frame.image) for frame in frames] == list(range(12)) == indices(frames)
  assert [frame.time for frame in frames] == pytest.approx(np.arange(12) / 25)
  assert (frames[7].image == frame_image(7)).all()
  assert number_of(video.read(11).image) == 11
  assert indices(video.frames(2, 9, 3)) == [2, 5, 8]
  assert indices(video.frames(2, 9, 3, reverse=True)) == [8, 5, 2]
  with pytest.raises(ValueError, match=r"clip has no frame rate: give frame numbers, or fps="):
    video.frames("0.1s")
  rated = open_video(folder, fps=10, note=notes.append)
  assert indices(rated.frames("0.25s", "0.75s", "0.2s")) == [3, 5, 7]
  assert rated.read("0.5s").time == 0.5


def test_natural_order():
  names = ["b1", "a10", "a9", "A2", "a", "a02b", "10", "9", "a-10", "a-9"]
  order = ["9", "10", "a", "A2", "a02b", "a9", "a10", "a-9", "a-10", "b1"]
  assert sorted(names, key=natural_order) == order


def test_bad_directories(tmp_path):
  (tmp_path / "empty").mkdir()
  with pytest.raises(ValueError, match=r"empty has no images: give another directory, or a video"):
    open_video(tmp_path / "empty")
  with pytest.raises(ValueError, match=r"has no images: give a directory in it, such as empty, or"):
    open_video(tmp_path)
  with pytest.raises(FileNotFoundError, match=r"there is no video .*/none: check the path"):
    open_video(tmp_path / "none")
  folder = write_images(tmp_path / "clip", ["0.png", "1.png"])
  Image.fromarray(frame_image(0, 32, 48)).save(folder / "2.png")
  frames = open_video(folder).frames()
  assert [next(frames).index, next(frames).index] == [0, 1]
  with pytest.raises(ValueError, match=r"2.png is 48 x 32, but the first frame is 96 x 64: all"):
    next(frames)
  (folder / "2.png").write_bytes(b"no image")
  with pytest.raises(ValueError, match=r"2.png is not an image"):
    list(open_video(folder))
  assert threads() == 0


def test_array():
  video = open_video(ARRAY, fps=10)
  assert (video.size, video.fps, video.length) == ((64, 96), 10, 20)
  frames = list(video.frames(5, every=6))
  assert [(frame.index, frame.time) for frame in frames] == [(5, 0.5), (11, 1.1), (17, 1.7)]
  assert all((frame.image == ARRAY[frame.index]).all() for frame in frames)
  assert open_video(video) is video
  for bad, match in (
    (ARRAY[0], r"must be uint8 \[T, h, w, 3\], not \[64, 96, 3\]"),
    (ARRAY[:0], "the video array has no frames"),
    (ARRAY // 128, "has values 0 to 1 only, of 0..255"),
  ):
    with pytest.raises(ValueError, match=match):
      open_video(bad)
  with pytest.raises(TypeError, match=r"must be uint8, 0..255, not float64"):
    open_video(ARRAY / 255)


def test_dark_frames_are_accepted():
  """A fade to black has frames with values of 0 and 1 only."""
  dark = (np.indices((64, 96)).sum(0) % 2)[..., None].repeat(3, 2).astype(np.uint8)
  frames = [frame_image(0), dark]
  for source in (frames, iter(frames), np.stack(frames)):
    assert (list(open_video(source))[1].image == dark).all()


def test_list_of_images(tmp_path):
  folder = write_images(tmp_path / "clip", ["0.png", "1.png", "2.png"])
  sources = [folder / "2.png", Image.fromarray(frame_image(0)), frame_image(1)]
  assert [number_of(frame.image) for frame in open_video(sources)] == [2, 0, 1]


def test_iterator():
  taken = []

  def camera():
    for i in range(10**9):
      taken.append(i)
      yield frame_image(i)

  video = open_video(camera(), fps=20)
  assert (video.size, video.length, video.random_access) == ((64, 96), None, False)
  frames = video.frames("0.1s", every=3)
  assert [next(frames).index for _ in range(3)] == [2, 5, 8]
  assert len(taken) == 9  # nothing is taken ahead of its use
  frames.close()
  with pytest.raises(ValueError, match=r"frames up to 8 were taken .* give start=9 or more"):
    next(video.frames())
  assert indices(video.frames(9, 12)) == [9, 10, 11]
  assert number_of(video.read(15).image) == 15
  with pytest.raises(ValueError, match="can only be read forwards"):
    video.frames(reverse=True)
  with pytest.raises(ValueError, match="no times that are known in advance: give a frame number"):
    video.frame_number("1s")
  assert threads() == 0


def test_bad_iterators():
  with pytest.raises(ValueError, match="the iterator of frames has no frames"):
    open_video(iter([]))
  with pytest.raises(ValueError, match="frame 1 is 48 x 32, but the first frame is 96 x 64"):
    list(open_video(iter([frame_image(0), frame_image(1, 32, 48)])))
  with pytest.raises(TypeError, match=r"not int: iter\(...\) makes an iterator"):
    open_video(3)


def test_fps():
  with pytest.raises(ValueError, match="fps"):
    open_video(ARRAY, fps=0)
  with pytest.raises(ValueError, match="fps"):
    open_video(ARRAY, fps=float("nan"))


def test_positions():
  assert parse_position(" 12 ") == 12
  assert parse_position("12.5s") == Seconds(12.5)
  assert parse_position(".5s") == Seconds(0.5)
  for bad in (-1, "-1", "1.5", 1.5, True, "s", "1m", None, "1e3s", "٣"):
    with pytest.raises(ValueError, match=r"give a frame number from 0, or a time such as '12.5s'"):
      parse_position(bad)


def test_ranges():
  times = np.arange(100) / 10

  def chosen(*values):
    found = FrameRange(*values)
    taken = []
    for index, at in enumerate(times.tolist()):
      if found.is_over(index, at):
        break
      if found.takes(index, at):
        taken.append(index)
    return taken

  assert chosen() == list(range(100))
  assert chosen(3, 10, 2) == [3, 5, 7, 9]
  assert chosen("0.31s", "1s") == [4, 5, 6, 7, 8, 9]
  assert chosen(2, "0.7s", "0.25s") == [2, 5]
  assert chosen("1s", 40, "0.75s") == [10, 18, 25, 33]
  assert chosen(0, None, "0.01s") == list(range(100))
  assert chosen(98, 1000) == [98, 99]
  for bad in ((5, 5), ("2s", "1s"), (0, None, 0), (0, None, "0s")):
    with pytest.raises(ValueError, match=r"must be after start|give 1 or more frames"):
      FrameRange(*bad)
  with pytest.raises(ValueError, match=r"every is 'x': give 1 or more frames, or a time such as"):
    FrameRange(0, None, "x")


def test_positions_outside():
  video = open_video(ARRAY, fps=10)
  match = r"frame 20 is after the end of the video array: its 20 frames are 0 to 19, at 0 to 1.9 s"
  for call in (video.read, video.frame_number, video.frames):
    with pytest.raises(ValueError, match=match):
      call(20)
  with pytest.raises(ValueError, match=r"time 1.95s is after the end"):
    video.frames("1.95s")
  with pytest.raises(ValueError, match="no frame from start=15 to stop='1s': its 20 frames"):
    video.frames(15, "1s")
  assert video.frame_number("1.9s") == 19
  assert len(list(video.frames(15, 1000))) == 5


def test_read_ahead_is_bounded():
  alive, most, made = set(), 0, 0

  class Item:
    def __init__(self):
      nonlocal most, made
      alive.add(id(self))
      most, made = max(most, len(alive)), made + 1

    def __del__(self):
      alive.discard(id(self))

  items = read_ahead((Item() for _ in range(100)), 8)
  next(items)
  while made < 9:
    time.sleep(0.01)
  time.sleep(0.05)
  assert made == 9  # the one in use, and 8 ahead
  assert sum(1 for _ in items) == 99
  assert most <= 10
  assert not alive
  assert threads() == 0


@pytest.mark.slow
def test_read_ahead_ends():
  closed = []

  def endless():
    try:
      while True:
        yield 0
    finally:
      closed.append(threading.current_thread().name)

  items = read_ahead(endless())
  next(items)
  assert threads() == 1
  items.close()
  assert threads() == 0
  items = read_ahead(endless())
  next(items)
  del items  # garbage
  assert threads() == 0
  assert closed == [THREAD_NAME] * 2
  read_ahead(endless())  # never started
  assert threads() == 0


def test_read_ahead_raises():
  def broken():
    yield 1
    yield 2
    raise ValueError("broken")

  items = read_ahead(broken())
  assert [next(items), next(items)] == [1, 2]
  with pytest.raises(ValueError, match="broken"):
    next(items)
  assert list(items) == []
  assert threads() == 0


def test_read_ahead_that_is_open_at_exit_prints_nothing():
  code = (
    "import itertools; from sam3_jax.utils.read_ahead import read_ahead; "
    "items = read_ahead(i for i in itertools.count()); next(items)"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
  )
  assert (done.returncode, done.stderr) == (0, "")


def test_memory_of_a_directory_is_bounded(tmp_path):
  """100 frames of 0.9 MB would need 92 MB."""
  folder = write_images(tmp_path / "clip", [f"{i}.jpg" for i in range(4)], (480, 640))
  for i in range(4, 100):
    (folder / f"{i}.jpg").hardlink_to(folder / f"{i % 4}.jpg")
  tracemalloc.start()
  try:
    count = sum(1 for _ in open_video(folder))
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert count == 100
  assert peak < 15e6  # measured 5 MB; at most 10 frames and a copy
