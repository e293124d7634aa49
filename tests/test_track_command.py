"""`sam3-jax track`: prompts, results, formats, resuming."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import av
import numpy as np
import pytest
import tracking_jobs
from PIL import Image
from small_video import SIZE, moving_frames, small_model
from tracking_jobs import POINTS, mask_of, results, write_video

from sam3_jax import Rules, VisualPrompt
from sam3_jax.cli import track_video
from sam3_jax.cli.main import main
from sam3_jax.cli.track_prompts import objects_of, parse_prompts
from sam3_jax.inference.video.clip import Pass
from sam3_jax.inference.video.held_frames import HeldFrame, HeldFrames
from sam3_jax.outputs.track_lines import TrackReader, line_of

FRAMES = 40


@pytest.fixture(scope="module")
def model():
  return small_model()


@pytest.fixture
def folder(tmp_path, monkeypatch, model):
  """Where the command runs: clip.mp4, mask.png, and the small model in place of the checkpoint."""
  monkeypatch.chdir(tmp_path)
  write_video(tmp_path / "clip.mp4", FRAMES)
  Image.fromarray(mask_of(0, 0)).save("mask.png")
  monkeypatch.setattr(track_video.Sam3, "from_checkpoint", lambda *_, **__: model)
  return tmp_path


def track(*typed, out="out", status=0):
  assert main(["track", "clip.mp4", *typed, "--out", out]) == status


def lines(path="out/clip.tracks.jsonl"):
  with open(path) as file:
    return [json.loads(line) for line in file]


class TestObjects:
  @pytest.mark.parametrize(
    ("points", "boxes", "masks", "want"),
    [
      (["1,2", "3,4"], [], [], {1: ["1,2"], 2: ["3,4"]}),
      (["1,2", "3,4,0"], [], [], {1: ["1,2", "3,4,0"]}),
      (["2@1,2", "3,4", "2@5:7,8,0"], [], [], {1: ["3,4"], 2: ["2@1,2", "2@5:7,8,0"]}),
      (["1,2,0"], ["0,0,9,9"], [], {1: ["0,0,9,9", "1,2,0"]}),
      (["1,2"], ["0,0,9,9"], ["m.png"], {1: ["1,2"], 2: ["0,0,9,9"], 3: ["m.png"]}),
      ([], ["7@0,0,9,9"], ["1@m.png"], {1: ["1@m.png"], 7: ["7@0,0,9,9"]}),
    ],
  )
  def test_ids(self, points, boxes, masks, want):
    found = objects_of(parse_prompts(points, boxes, masks))
    assert {identity: [one.text for one in typed] for identity, typed in found.items()} == want
    assert list(found) == sorted(found)

  def test_parts_of_a_prompt(self):
    point, box, mask = parse_prompts(
      ["3@12.5s:1.5,2,0"], ["7:1,2,3,4"], ["2@.5s:a directory/b:c@d.png"]
    )
    assert (point.identity, point.frame, point.numbers) == (3, "12.5s", (1.5, 2, 0))
    assert (box.identity, box.frame, box.numbers) == (None, "7", (1, 2, 3, 4))
    assert (mask.identity, mask.frame, mask.file) == (2, ".5s", "a directory/b:c@d.png")
    assert parse_prompts([], [], ["./12:mask.png"])[0].file == "./12:mask.png"


class TestResults:
  def test_files_and_lines(self, folder, model, capsys):
    track("--point", "5,5", "--point", "30,12", "--to", "mot", "--to", "davis-png")
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].startswith("40 frames, 2 objects, ")
    assert out.splitlines()[1:] == [
      "out/clip.tracks.jsonl", "out/clip.sam3.mp4", "out/clip.mot.txt", "out/clip.davis"
    ]  # fmt: skip
    assert sorted(os.listdir("out")) == [
      "clip.davis", "clip.mot.txt", "clip.sam3.mp4", "clip.track.json", "clip.tracks.jsonl"
    ]  # fmt: skip
    prompts = [VisualPrompt(points=[[5, 5]]), VisualPrompt(points=[[30, 12]])]
    want = b"".join(line_of(frame) for frame in model.track("clip.mp4", prompts))
    assert (folder / "out" / "clip.tracks.jsonl").read_bytes() == want
    assert [row["frame"] for row in lines()] == list(range(FRAMES))
    assert [row["time"] for row in lines()[:3]] == [0, 0.04, 0.08]
    with av.open("out/clip.sam3.mp4") as file:
      frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == FRAMES
    assert frames[0].shape == (*SIZE, 3)
    assert len(os.listdir("out/clip.davis")) == FRAMES

  def test_phrases(self, folder, model, capsys):
    track("--text", "dog", "--text", "red ball", "--point", "5,5", "--stop", "4", "--no-overlay")
    prompts = [VisualPrompt(points=[[5, 5]]), "dog", "red ball"]
    want = b"".join(line_of(frame) for frame in model.track("clip.mp4", prompts, stop=4))
    assert (folder / "out" / "clip.tracks.jsonl").read_bytes() == want
    capsys.readouterr()
    track("--text", "dog", "--point", "5,5", "--stop", "4", "--no-overlay", status=2)
    assert "--text was ['dog', 'red ball'] and is ['dog']" in capsys.readouterr().err
    track("--text", "dog", "--text", "dog", status=2)
    assert "--text 'dog' is given twice" in capsys.readouterr().err
    track("--text", "dog", "--text", "Dog ", status=2)
    assert "phrase 'Dog ' is given twice: give each phrase once." in capsys.readouterr().err
    track("--text", " ", out="other", status=2)
    assert "the phrase is empty" in capsys.readouterr().err

  @pytest.mark.parametrize(
    ("count", "passes", "direction", "want"),
    [
      (20, [Pass(False, 0, None, False)], "forward", "20 frames, 2 objects, 2.0 frames per second"),
      (6, [Pass(True, 5, None, False)], "backward", "6 frames, 2 objects, 2.0 frames per second"),
      (20, [Pass(False, 0, None, False), Pass(True, 3, None, False)], "both",
       "24 frames in both directions, 2 objects, 2.0 frames per second"),
    ],
  )  # fmt: skip
  def test_the_speed_is_that_of_tracking(self, monkeypatch, count, passes, direction, want):
    """Each frame takes half a second, and leaves when 14 others are tracked."""
    clock, shares = 0.0, []
    monkeypatch.setattr(track_video.time, "perf_counter", lambda: clock)
    held = HeldFrames(SIZE, Rules())
    session = SimpleNamespace(
      clip=SimpleNamespace(length=count), passes=passes, held=held, objects=[1, 2]
    )
    meter = track_video._Meter(lambda _, share: shares.append(share), session, 0)
    for one in passes:
      for index in range(one.start, -1, -1) if one.backward else range(one.start, count):
        clock += 0.5
        meter.count(list(held.add(HeldFrame(index, index / 25), 15)))
      for frame in held.rest():
        meter.count([frame])
    assert meter.summary(direction) == want
    assert shares == sorted(shares)
    assert shares[-1] == 1

  @pytest.mark.slow
  def test_box_mask_and_correction(self, folder, model):
    track("--box", "4@0.4s:10,5,22,18", "--mask", "2@mask.png", "--point", "2@20:20,10",
          "--no-overlay")  # fmt: skip
    with model.video("clip.mp4", history=False) as session:
      session.add(mask=mask_of(0, 0) > 0, frame=0, identity=2)
      session.add(VisualPrompt(box=[10, 5, 22, 18]), 10, identity=4)
      session.correct(2, 20, points=[[20, 10]])
      want = b"".join(line_of(frame) for frame in session.run())
    assert (folder / "out" / "clip.tracks.jsonl").read_bytes() == want
    assert not (folder / "out" / "clip.sam3.mp4").exists()

  @pytest.mark.parametrize("direction", ["backward", "both"])
  @pytest.mark.slow
  def test_directions(self, folder, direction):
    track("--point", "10:20,12", "--direction", direction)
    backward = list(range(10, -1, -1))
    want = [*range(10, FRAMES), *backward] if direction == "both" else backward
    assert [row["frame"] for row in lines()] == want
    reader = TrackReader("out/clip.tracks.jsonl")
    with av.open("out/clip.sam3.mp4") as file:
      assert sum(1 for _ in file.decode(video=0)) == len(reader) == len(set(want))

  def test_backward_prompts_are_on_the_last_frame(self, folder):
    track("--point", "5,5", "--stop", "6", "--direction", "backward", "--no-overlay")
    assert [row["frame"] for row in lines()] == [5, 4, 3, 2, 1, 0]

  def test_clip(self, folder):
    track("--point", "5,5", "--start", "0.4s", "--stop", "30", "--every", "5", "--to", "ytvis")
    assert [row["frame"] for row in lines()] == [10, 15, 20, 25]
    assert json.loads((folder / "out" / "clip.ytvis.json").read_text())["videos"][0]["length"] == 4

  def test_directory_of_images(self, folder):
    os.mkdir("frames")
    for i, frame in enumerate(moving_frames(6)):
      Image.fromarray(frame).save(f"frames/{i}.png")
    assert main(["track", "frames/", "--point", "5,5", "--out", "out", "--quiet"]) == 0
    assert len(lines("out/frames.tracks.jsonl")) == 6

  @pytest.mark.parametrize(
    "values", [[0, 255], [0, 1], [0, 100, 255], [0, 40]], ids=["white", "one", "soft", "dark"]
  )
  def test_masks_may_have_any_brightness(self, folder, values):
    mask = np.zeros(SIZE, np.uint8)
    mask[:10, :10] = values[-1]
    mask[10, :10] = values[1] if len(values) > 2 else 0  # an edge below half the brightness
    Image.fromarray(mask).save("other.png")
    track("--mask", "mask.png", "--no-overlay", "--stop", "3")
    track("--mask", "other.png", "--no-overlay", "--stop", "3", out="other")
    assert lines() == lines("other/clip.tracks.jsonl")


class TestResume:
  def test_a_finished_job_writes_further_formats(self, folder, model, capsys, monkeypatch):
    track("--point", "5,5", "--stop", "9")
    before = results(folder / "out")
    monkeypatch.setattr(track_video.VideoSession, "steps", None)
    track("--point", "5,5", "--stop", "9", "--to", "coco-vid")
    after = results(folder / "out")
    assert after.pop("clip.coco-vid.json")
    assert after == before

  @pytest.mark.parametrize("direction", ["forward", "backward", "both"])
  @pytest.mark.slow
  def test_stopped_at_every_frame(self, folder, monkeypatch, direction):
    """The session is saved and loaded after each frame; the bytes are those of one run."""
    typed = [*POINTS, "--stop", "14", "--direction", direction]
    track(*typed, out="whole")
    stops = 0
    monkeypatch.setattr("sam3_jax.utils.signals.Termination.__call__", lambda _: True)
    while main(["track", "clip.mp4", *typed, "--out", "out"]) == 75:
      stops += 1
      (saved,) = os.listdir("out/clip.resume")
      assert saved == f"{stops:09d}.npz"
    assert stops == len(lines("whole/clip.tracks.jsonl"))
    assert results(folder / "out") == results(folder / "whole")

  def test_lines_after_the_saved_session_are_cut_off(self, folder, monkeypatch):
    track(*POINTS, out="whole")
    monkeypatch.setattr(track_video, "SAVED_FRAMES", 7)
    write = track_video.TrackWriter.write
    counter = itertools.count()

    def failing(tracks, frame):
      if next(counter) == 25:
        tracks._file.write(b'{"frame": 25, "ti')
        raise OSError(28, "No space left on device", str(tracks.path))
      write(tracks, frame)

    with monkeypatch.context() as patch:
      patch.setattr(track_video.TrackWriter, "write", failing)
      track(*POINTS, status=2)
    assert os.listdir("out/clip.resume") == ["000000021.npz"]
    track(*POINTS)
    assert results(folder / "out") == results(folder / "whole")

  @pytest.mark.slow
  def test_kills(self, folder):
    """Twice here; thirty times in `benchmarks/track_faults.py`."""
    typed = [*POINTS, "--to", "mot"]
    track(*typed, out="whole")
    rng = random.Random(0)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", tracking_jobs.SAVED: "5"}
    command = [sys.executable, tracking_jobs.__file__, "track", "clip.mp4", *typed, "--out", "out"]
    for _ in range(2):
      process = subprocess.Popen(command, env=environment | {tracking_jobs.PAUSE: "0.1"})
      while not (folder / "out" / "clip.tracks.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
      time.sleep(rng.uniform(0, 4))
      process.send_signal(signal.SIGKILL)
      process.wait()
    subprocess.run(command, env=environment, check=True)
    found, wanted = results(folder / "out"), results(folder / "whole")
    # Where a run was killed, the video has an additional key frame.
    assert found.pop("clip.sam3.mp4")
    assert wanted.pop("clip.sam3.mp4")
    assert found == wanted
    assert tracking_jobs.frame_times(folder / "out/clip.sam3.mp4") == tracking_jobs.frame_times(
      folder / "whole/clip.sam3.mp4"
    )


class TestErrors:
  @pytest.fixture
  def fails(self, folder, capsys):
    """Runs a command that must fail in one line and write nothing."""

    def run(*typed, video="clip.mp4"):
      before = sorted(folder.rglob("*"))
      assert main(["track", video, *typed, "--out", "out"]) == 2
      out, err = capsys.readouterr()
      assert out == ""
      assert err.startswith("sam3-jax: error: ")
      assert err.count("\n") == 1
      assert sorted(folder.rglob("*")) == before
      return err

    return run

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      ([], "there is no object to track: give --text"),
      (["--point", "1"], "--point '1' must be X,Y in pixels"),
      (["--point", "1,2,3"], "must be X,Y in pixels"),
      (["--point", "-1:1,2"], "must be X,Y in pixels"),
      (["--point", "nan,2"], "--point 'nan,2': point 0 must be finite"),
      (["--point", "0@1,2"], "ids of objects are whole numbers from 1"),
      (["--box", "1,2,3"], "--box '1,2,3' must be X0,Y0,X1,Y1 in pixels"),
      (["--box", "1,2,1,9"], "has no area"),
      (["--box", "9,2,1,9"], "has a negative extent"),
      (["--point", "500,2"], "--point '500,2': point [500, 2] is outside the 40 x 24 image"),
      (["--box", "50,2,60,9"], "--box '50,2,60,9': box [50.0, 2.0, 60.0, 9.0] is completely"),
      (["--point", "0.2,0.7"], "--point '0.2,0.7': points [[0.2, 0.7]] are within the first pixel"),
      (["--point", "40:1,2"], "--point '40:1,2': frame 40 is after the end of clip.mp4"),
      (["--point", "9s:1,2"], "--point '9s:1,2': time 9s is after the end of clip.mp4"),
      (["--point", "1,2", "--start", "5", "--point", "3:1,2"], "frame 3 is not in the clip"),
      (["--point", "1,2", "--start", "50"], "frame 50 is after the end of clip.mp4"),
      (["--point", "1,2", "--every", "0"], "every is 0: give 1 or more frames"),
      (["--point", "1,2", "--every", "x"], "every is 'x': give 1 or more frames"),
      (["--point", "1,2", "--every", "2", "--point", "3:1,2"], "with every=2; give frame 2."),
      (["--point", "1,2", "--start", "0.1s", "--stop", "1"], "from start='0.1s' to stop=1: "),
      (["--point", "1,2", "--to", "x"], "Invalid value for '--to': 'x' is not one of 'ytvis'"),
      (["--point", "1,2", "--stop", "x"], "stop is 'x': give a frame number"),
      (["--point", "1,2,0"], "a point off an object, but there are 0 objects"),
      (["--point", "1,2", "--point", "3,4", "--point", "5,6,0"], "but there are 2 objects. Name"),
      (["--point", "2@1,2,0"], "a point off an object that has no point on it"),
      (["--box", "1@1,2,9,9", "--box", "1@3,3,8,8"], "object 1 has two boxes on frame 0"),
      (["--mask", "1@mask.png", "--point", "1@1,2"], "object 1 has a mask and other prompts"),
      (["--mask", "none.png"], "none.png"),
      (["--mask", "big.png"], "--mask 'big.png': the mask is 50 x 30, but the frames are 40 x 24"),
      (["--mask", "black.png"], "the mask is empty"),
      (["--mask", "palette.png"], "the mask has 2 colors, one for each object"),
      (["--mask", "numbers.png"], "the mask has 2 colors, one for each object"),
      (["--mask", ""], "must name an image"),
    ],
  )  # fmt: skip
  def test_prompts(self, folder, fails, typed, message):
    Image.fromarray(np.full((30, 50), 255, np.uint8)).save("big.png")
    Image.fromarray(np.zeros(SIZE, np.uint8)).save("black.png")
    numbers = np.zeros(SIZE, np.uint8)
    numbers[:9, :9], numbers[12:, 12:] = 1, 2
    Image.fromarray(numbers).save("numbers.png")
    palette = Image.fromarray(numbers)
    palette.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0])
    palette.save("palette.png")
    assert message in fails(*typed)

  @pytest.mark.parametrize(
    ("video", "message"),
    [
      ("none.mp4", "none.mp4"),
      ("sound.m4a", "sound.m4a"),
      ("mask.png", "mask.png"),
      ("empty.mp4", "empty.mp4"),
      ("folder", "folder has no images"),
    ],
  )
  def test_videos(self, folder, fails, video, message):
    from clips import write_audio

    write_audio(folder / "sound.m4a")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder").mkdir()
    assert message in fails("--point", "1,2", video=video)

  def test_checkpoint_without_tracker(self, folder, fails, monkeypatch):
    other = small_model()
    other.params = {name: tree for name, tree in other.params.items() if name != "video"}
    monkeypatch.setattr(track_video.Sam3, "from_checkpoint", lambda *_, **__: other)
    assert "small cannot track objects: it has no tracker; convert" in fails("--point", "1,2")

  def test_other_arguments_are_named(self, folder, capsys):
    track("--point", "5,5", "--stop", "4", "--no-overlay")
    before = results(folder / "out")
    for typed, message in [
      (["--point", "6,5", "--stop", "4"], "prompt was changed (object 1 on frame 0)"),
      (["--point", "5,5", "--point", "9,9", "--stop", "4"], "was added (object 2 on frame 0)"),
      (["--point", "2@5,5", "--stop", "4"], "(object 2 on frame 0); 1 prompt was removed"),
      (["--point", "5,5"], "--stop was 4 and is not given"),
      (["--point", "5,5", "--stop", "4", "--direction", "both"],
       "--direction was forward and is both"),
    ]:  # fmt: skip
      capsys.readouterr()
      track(*typed, status=2)
      assert message in capsys.readouterr().err
    write_video(folder / "clip.mp4", 50)
    track("--point", "5,5", "--stop", "4", status=2)
    err = capsys.readouterr().err
    assert "the video has 1 file modified (clip.mp4)" in err
    assert err.count("\n") == 1
    assert results(folder / "out") == before

  def test_results_without_their_record(self, folder, fails):
    (folder / "out").mkdir()
    (folder / "out" / "clip.tracks.jsonl").write_text("mine")
    assert "exists, but not the record of its job" in fails("--point", "5,5")

  def test_another_process_works_on_it(self, folder, capsys):
    from sam3_jax.utils.lease import Lease

    with Lease(folder / "out" / "clip.lease"):
      track("--point", "5,5", status=2)
    assert "is working on it" in capsys.readouterr().err
