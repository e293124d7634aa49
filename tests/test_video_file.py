"""Video files of many kinds, made with PyAV: sizes, times, numbers, seeking, damage, faults."""

import random
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest
from clips import frame_image, mux_silence, number_of, set_matrix, write_audio, write_clip
from PIL import Image
from test_video_inputs import indices, threads

from sam3_jax.inputs import video_file
from sam3_jax.inputs.video import open_video

VARIABLE = [i * i * 10 for i in range(40)]  # milliseconds
NO_LAG = {"auto-alt-ref": "0", "lag-in-frames": "0"}  # each packet of VP9 is one frame
KINDS = {
  "h264.mp4": {},
  "h264.mkv": {},
  "h264.ts": {},  # starts at 0.08 seconds
  "sound.mp4": {"audio": True},
  "vp9.webm": {"codec": "libvpx-vp9"},
  "vp8.webm": {"codec": "libvpx", "options": {"auto-alt-ref": "1", "lag-in-frames": "16"}},
  "10bit.mp4": {"codec": "libx265", "pixels": "yuv420p10le"},
  "10bit.mkv": {"pixels": "yuv420p10le"},
  "odd.mp4": {"size": (63, 95), "pixels": "yuv444p"},
  "mpeg4.avi": {"codec": "mpeg4"},
  "opengop.ts": {"options": {"x264-params": "open-gop=1"}},
  "refresh.mp4": {"options": {"x264-params": "intra-refresh=1"}},  # few frames decode alone
  "alpha.mov": {"codec": "prores_ks", "pixels": "yuva444p10le"},
  "animation.gif": {"codec": "gif", "pixels": "rgb8"},
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds(tmp_path, name):
  """Every frame has its content, number and time: forwards, backwards, and by itself."""
  size = KINDS[name].get("size", (64, 96))
  with open_video(write_clip(tmp_path / name, **KINDS[name])) as video:
    assert (video.size, video.fps, video.length) == (size, 25, 40)
    frames = list(video)
    assert indices(frames) == list(range(40))
    assert np.abs([frame.time - frame.index / 25 for frame in frames]).max() < 1e-9
    assert all(frame.image.shape == (*size, 3) for frame in frames)
    assert all(frame.image.dtype == np.uint8 for frame in frames)
    off = np.abs([number_of(frame.image) - frame.index for frame in frames])
    # Compression: the numbers differ by 5 levels of red. Measured 2 for MPEG-4 and VP8, else at
    # most 1.
    assert off.max() <= (2 if name in ("vp8.webm", "mpeg4.avi") else 1)
    backwards = list(video.frames(reverse=True))
    assert indices(backwards) == list(range(40))[::-1]
    for frame, same in zip(frames, reversed(backwards), strict=True):
      assert (frame.image == same.image).all()
    for i in (0, 9, 10, 11, 25, 39):
      assert (video.read(i).image == frames[i].image).all()
    later = list(video.frames("0.75s", 36, 4))
    assert indices(later) == [19, 23, 27, 31, 35]
    assert all((frame.image == frames[frame.index].image).all() for frame in later)
  assert threads() == 0


@pytest.mark.parametrize("name", ["rate.mp4", "rate.mkv"])
def test_variable_rate(tmp_path, name):
  clip = write_clip(tmp_path / name, ticks=[500 + t for t in VARIABLE], unit=Fraction(1, 1000))
  video = open_video(clip)
  assert video.length == 40
  assert video.fps == pytest.approx(39 / 15.21)
  assert [frame.time for frame in video] == pytest.approx(np.array(VARIABLE) / 1000, abs=1e-9)
  assert video.frame_number("4s") == 20
  assert video.frame_number("4.01s") == 21
  assert indices(video.frames("1s", "4s", "1s")) == [10, 15, 18]


def test_fractional_rate(tmp_path):
  video = open_video(write_clip(tmp_path / "clip.mp4", rate=Fraction(30000, 1001)))
  assert video.fps == 30000 / 1001
  assert [frame.time for frame in video] == pytest.approx(np.arange(40) * 1001 / 30000, abs=1e-9)
  # Matroska rounds times to milliseconds, but names the rate.
  assert open_video(write_clip(tmp_path / "a.mkv", rate=Fraction(30000, 1001))).fps == 30000 / 1001


def test_no_time_stamps(tmp_path):
  """A raw stream: frames are counted, and the length is not known."""
  video = open_video(write_clip(tmp_path / "clip.h264"))
  assert (video.length, video.fps, video.random_access) == (None, 25, False)
  frames = list(video.frames(3, every="0.2s"))
  assert [(f.index, number_of(f.image)) for f in frames] == [(i, i) for i in range(3, 40, 5)]
  assert number_of(video.read(17).image) == 17
  with pytest.raises(ValueError, match=r"clip.h264 can only be read forwards: convert it to MP4"):
    video.frames(reverse=True)
  with pytest.raises(ValueError, match=r"frame 40 of .*clip.h264 cannot be decoded"):
    video.read(40)


@pytest.mark.parametrize(
  ("matrix", "change"),
  [
    ((1, 0, 0, 1), lambda image: image),
    ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # a phone held upright
    ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
    ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    ((-1, 0, 0, 1), lambda image: image[:, ::-1]),
    ((1, 0, 0, -1), lambda image: image[::-1]),
    ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
  ],
)
def test_rotation(tmp_path, matrix, change):
  """Applied as the display matrix says: x' = a x + c y, y' = b x + d y."""
  clip = write_clip(tmp_path / "clip.mp4", 3)
  plain = [frame.image for frame in open_video(clip)]
  set_matrix(clip, *matrix)
  video = open_video(clip)
  frames = list(video)
  assert video.size == change(plain[0]).shape[:2] == frames[0].image.shape[:2]
  for frame, image in zip(frames, plain, strict=True):
    assert (frame.image == change(image)).all()
    assert frame.image.flags.c_contiguous


def test_colors(tmp_path):
  """The matrix that a file names is used."""
  image = frame_image(20)
  for name, matrix in (("601", "smpte170m"), ("709", "bt709")):
    options = {"crf": "0", "colorspace": matrix}
    clip = write_clip(tmp_path / f"{name}.mp4", 21, pixels="yuv444p", options=options)
    video = open_video(clip)
    off = np.abs(video.read(20).image.astype(int) - image).max()
    # clips.py converts to BT.601, whatever it names.
    assert off <= 2 if name == "601" else off > 10  # measured 1 and 25


def test_long_group_backwards(tmp_path, monkeypatch):
  """One key frame for all frames: few frames are kept at a time."""
  clip = write_clip(tmp_path / "clip.mp4", 60, group=250)
  monkeypatch.setattr(video_file, "REVERSE_BYTES", 7 * 64 * 96 * 3)
  frames = list(open_video(clip).frames(reverse=True, every=2))
  assert indices(frames) == list(range(58, -1, -2))
  assert all(number_of(frame.image) == frame.index % 40 for frame in frames)


def cut(clip, at):
  clip.write_bytes(clip.read_bytes()[:at])


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "vp9.webm", "mpeg4.avi"])
def test_truncated(tmp_path, name):
  """Cut at any byte: the frames before it are read, or one line says that nothing can be."""
  # With its index at the beginning, an MP4 file can be read until it ends.
  clip = write_clip(tmp_path / name, container={"movflags": "faststart"}, **KINDS[name])
  whole = clip.read_bytes()
  original = list(open_video(clip))
  cuts = random.Random(0).sample(range(len(whole)), 12)
  lengths, faults = [], []
  for at in sorted(cuts):
    clip.write_bytes(whole[:at])
    notes = []
    try:
      video = open_video(clip, note=notes.append)
      frames = list(video)
    except ValueError as error:
      faults.append(str(error))
      frames = []
    else:
      assert len(frames) <= video.length
      for frame in frames[:-4]:
        assert (frame.image == original[frame.index].image).all()
      # The other formats do not tell their lengths; Matroska's may be off by the last frames.
      if len(frames) < 37 and name in ("h264.mp4", "vp9.webm", "h264.mkv"):
        assert f"{name} is cut off after" in notes[0]
    lengths.append(len(frames))
  assert all(name in fault and "\n" not in fault for fault in faults)
  assert lengths == sorted(lengths)
  assert lengths[-1] > 20
  assert threads() == 0


def test_note_of_a_truncated_file(tmp_path):
  clip = write_clip(tmp_path / "clip.mp4", container={"movflags": "faststart"})
  cut(clip, clip.stat().st_size - 300)
  with pytest.warns(
    UserWarning, match=r"clip.mp4 is cut off after \d\d of its 40 frames: the rest"
  ):
    open_video(clip)
  clip = write_clip(tmp_path / "plain.mp4")  # its index is at the end
  cut(clip, clip.stat().st_size - 300)
  with pytest.raises(
    ValueError, match=r"plain.mp4 is a video that is cut off or damaged, and noth"
  ):
    open_video(clip)


@pytest.mark.parametrize("name", ["h264.mp4", "h264.mkv", "h264.ts", "vp9.webm"])
def test_damaged(tmp_path, name):
  """Flipped bytes: frames keep their numbers and times, and nothing but one line is raised."""
  clip = write_clip(tmp_path / name, **KINDS[name])
  whole, faults = clip.read_bytes(), []
  for seed in range(8):
    data, dice = bytearray(whole), random.Random(seed)
    for _ in range(6):
      data[dice.randrange(len(data) // 4, len(data))] ^= 255
    clip.write_bytes(data)
    try:
      video = open_video(clip, note=lambda line: None)
      frames = list(video)
    except ValueError as error:
      faults.append(str(error))
    else:
      assert indices(frames) == list(range(len(frames)))
      assert np.diff([frame.time for frame in frames]).min(initial=1) > 0
      if video.random_access:  # damaged time stamps may be useless
        assert indices(video.frames(reverse=True)) == indices(frames)[::-1]
  assert all(name in fault and "\n" not in fault for fault in faults)
  assert threads() == 0


def test_lost_packets_of_a_transport_stream(tmp_path):
  """Frames after a loss are read; FFmpeg marks them."""
  clip = write_clip(tmp_path / "clip.ts")
  data = clip.read_bytes()
  middle = len(data) // 188 // 2 * 188
  clip.write_bytes(data[:middle] + data[middle + 188 :])  # a packet of 188 bytes is lost
  video = open_video(clip, note=lambda line: None)
  frames = list(video)
  assert len(frames) == video.length >= 38
  assert number_of(frames[-1].image) == 39


def test_damaged_frames_repeat(tmp_path):
  clip = write_clip(tmp_path / "clip.webm", codec="libvpx-vp9", options=NO_LAG)
  original = [frame.image for frame in open_video(clip)]
  data = clip.read_bytes()
  # The packets of frames 13 and 14, by their times in SimpleBlocks.
  for frame in (13, 14):
    at = data.index(b"\x81" + (frame * 40).to_bytes(2, "big") + b"\x00") + 4
    data = data[:at] + b"\xff" * 4 + data[at + 4 :]
  clip.write_bytes(data)
  notes = []
  video = open_video(clip, note=notes.append)
  frames = list(video)
  assert indices(frames) == list(range(40))
  assert all((frames[i].image == original[i]).all() for i in (*range(13), *range(20, 40)))
  assert (frames[13].image == original[12]).all()
  assert (video.read(13).image == original[12]).all()
  assert len(notes) == 1
  assert "damaged frames repeat the frame before them" in notes[0]


def test_size_changes(tmp_path):
  """A stream whose size changes is refused at that frame, with its number."""
  one = write_clip(tmp_path / "one.ts", 5).read_bytes()
  two = write_clip(tmp_path / "two.ts", 5, (48, 64), ticks=range(5, 10)).read_bytes()
  clip = tmp_path / "clip.ts"
  clip.write_bytes(one + two)
  with pytest.raises(ValueError, match=r"frame \d of .*clip.ts is 64 x 48, but the first frame is"):
    list(open_video(clip, note=lambda line: None))


def test_not_videos(tmp_path):
  Image.fromarray(frame_image(0)).save(tmp_path / "image.png")
  Image.fromarray(frame_image(0)).save(tmp_path / "image.jpg")
  (tmp_path / "empty.mp4").write_bytes(b"")
  (tmp_path / "notes.txt").write_text("notes\n" * 100)
  (tmp_path / "notes.mp4").write_text("notes\n" * 100)
  (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4\n" * 100)
  (tmp_path / "list.m3u8").write_text(
    "#EXTM3U\n#EXTINF:1,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST"
  )
  write_clip(tmp_path / "other.mp4", 2)
  (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile other.mp4\n")
  write_audio(tmp_path / "sound.m4a")
  write_audio(tmp_path / "sound.flac")
  faults = {
    "image.png": "is an image, not a video",
    "image.jpg": "is an image, not a video",
    "empty.mp4": r"is empty \(0 bytes\): get the file again",
    "notes.txt": "is (a text file, )?not a video",
    "notes.mp4": "is not a video",
    "paper.pdf": "is a PDF document, not a video",
    "list.m3u8": "list.m3u8",
    "list.txt": "is a playlist, which names other files: give one of those",
    "sound.m4a": r"has no video stream \(it is an audio file\)",
    "sound.flac": r"has no video stream \(it is an audio file\)",
  }
  for name, match in faults.items():
    with pytest.raises(ValueError, match=match) as error:
      open_video(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "\n" not in str(error.value)
  for name, match in (
    ("/dev/null", "is not a regular file"),
    ("rtsp://camera/1", "is an address, not a local file: download it first"),
    ("a\0b", "cannot be read"),
  ):
    with pytest.raises(ValueError, match=match):
      open_video(name)
  with pytest.raises(ValueError, match="the video has its own times: leave fps out"):
    open_video(tmp_path / "image.png", fps=5)


def test_cover_is_no_video(tmp_path):
  """Music files may hold an image of their cover as a video stream."""
  path = tmp_path / "song.m4a"
  with av.open(str(path), "w", format="mp4") as file:
    sound = file.add_stream("aac", rate=48000)
    cover = file.add_stream("mjpeg", rate=1)
    cover.height, cover.width, cover.pix_fmt = 64, 96, "yuvj420p"
    cover.disposition = av.stream.Disposition.attached_pic
    frame = av.VideoFrame.from_ndarray(frame_image(0), format="rgb24")
    frame.pts = 0
    file.mux(cover.encode(frame))
    file.mux(cover.encode(None))
    mux_silence(file, sound)
  with pytest.raises(ValueError, match="has no video stream"):
    open_video(path)


def test_thread_ends_with_its_iterator(tmp_path):
  video = open_video(write_clip(tmp_path / "clip.mp4", 100))
  for reverse in (False, True):
    frames = video.frames(reverse=reverse)
    next(frames)
    assert threads() == 1
    del frames
    assert threads() == 0


def test_missing_package(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "av", None)
  with pytest.raises(ImportError, match=r"videos need PyAV: pip install 'sam3-jax\[video\]'"):
    open_video(tmp_path / "clip.mp4")


@pytest.mark.slow
def test_imported_when_used():
  code = (
    "import sys, sam3_jax.inputs.video, sam3_jax.outputs.video_overlay; print('av' in sys.modules)"
  )
  assert subprocess.check_output([sys.executable, "-c", code]) == b"False\n"
