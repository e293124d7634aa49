"""Evaluation of tracks: clicks, scored frames, files of predictions, and the command."""

import json
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from sam3_jax.cli.main import main
from sam3_jax.datasets import video_annotations
from sam3_jax.evaluation import run_video, track_predictions
from sam3_jax.evaluation.region_contour import contour, region
from sam3_jax.evaluation.session_tracker import session_tracker
from sam3_jax.evaluation.tracking import (
  PROMPTS,
  ObjectPrompt,
  evaluate_tracking,
  next_click,
  scorable,
  scored_frames,
  simulate_clicks,
)
from sam3_jax.outputs.rle import encode

SIZE, FRAMES = (40, 60), 6


def rectangle(x0, y0, x1, y1):
  mask = np.zeros(SIZE, bool)
  mask[y0:y1, x0:x1] = True
  return mask


# Two objects move to the right; the second appears in frame 2 and is hidden in frame 4.
FIRST = [rectangle(5 + 2 * t, 5, 25 + 2 * t, 15) for t in range(FRAMES)]
SECOND = [
  rectangle(20 + 3 * t, 20, 32 + 3 * t, 36) if t in (2, 3, 5) else None for t in range(FRAMES)
]
TRUTH = {1: FIRST, 2: SECOND}


def tracks(masks):
  return [None if mask is None else encode(mask) for mask in masks]


def annotation(number, masks, **values):
  base = {"id": number, "video_id": 1, "category_id": 1, "segmentations": tracks(masks)}
  return base | {"noun_phrase": "box", "iscrowd": 0} | values


@pytest.fixture
def data(tmp_path):
  """A video with two objects and a crowd."""
  names = [f"v/{t:05d}.png" for t in range(FRAMES)]
  (tmp_path / "JPEGImages" / "v").mkdir(parents=True)
  for t, name in enumerate(names):
    image = np.full((*SIZE, 3), t, np.uint8)  # tells the tracker which frame it is
    Image.fromarray(image).save(tmp_path / "JPEGImages" / name)
  content = {
    "videos": [{"id": 1, "video_name": "v", "file_names": names, "height": 40, "width": 60}],
    "annotations": [
      annotation(1, FIRST),
      annotation(2, SECOND),
      annotation(3, [rectangle(0, 30, 9, 40)] * FRAMES, iscrowd=1),
    ],
    "categories": [{"id": 1, "name": "box"}],
  }
  (tmp_path / "data.json").write_text(json.dumps(content))
  return video_annotations.read(tmp_path / "data.json"), tmp_path


class FakeTracker:
  """Knows the objects. Clicks give the part left of the rightmost click, other prompts everything;
  each frame after the prompt's is shifted by one more pixel."""

  def __init__(self):
    self.calls = []

  def __call__(self, frames, prompts):
    self.calls.append((len(frames), prompts))
    first = min(prompts)
    known: dict = {}
    for t in range(first, len(frames)):
      number = int(frames[t][0, 0, 0])
      known |= {key: (number, prompt) for key, prompt in prompts.get(t, {}).items()}
      yield {key: self._mask(key, number, *start) for key, start in known.items()}

  def _mask(self, key, number, start, prompt):
    mask = TRUTH[key][number]
    if mask is None:
      return np.zeros(SIZE, bool)
    if prompt.points:
      x = max(x for x, _ in prompt.points) + 3 * (number - start)
      mask = mask & (np.arange(SIZE[1]) < x)
    return np.roll(mask, number - start, axis=1)


def test_perfect_tracks_score_100(data):
  videos, folder = data

  def perfect(frames, prompts):
    for t in range(min(prompts), len(frames)):
      yield {key: masks[t] for key, masks in TRUTH.items() if masks[t] is not None}

  found = evaluate_tracking(perfect, videos, folder / "JPEGImages", ["mask", "box"])
  assert found["videos"] == 1
  assert found["objects"] == 2  # not the crowd
  assert found["mask"]["jf"] == found["box"]["jf"] == 100


def test_prompts_and_scores(data):
  videos, folder = data
  track, steps = FakeTracker(), []
  found = evaluate_tracking(
    track, videos, folder / "JPEGImages", progress=lambda *args: steps.append(args)
  )
  assert steps == [("v", k / 5) for k in range(5)]
  assert set(found) == {"videos", "objects", *PROMPTS}
  by_kind = [prompts for number, prompts in track.calls if number == FRAMES]
  mask, box, *clicks = by_kind
  assert mask.keys() == {0, 2}
  assert np.array_equal(mask[0][1].mask, FIRST[0])
  assert np.array_equal(mask[2][2].mask, SECOND[2])
  assert box[0][1].box == (5, 5, 25, 15)
  assert [len(prompts[2][2].points) for prompts in clicks] == [1, 3, 5]
  for prompts in clicks:
    assert prompts[0][1].points == clicks[-1][0][1].points[: len(prompts[0][1].points)]
  # Frames 1 to 4 of the first object, 3 and 4 of the second one.
  shifted = [(np.roll(FIRST[t], t, axis=1), FIRST[t]) for t in range(1, 5)]
  j = [region(*pair) for pair in shifted], [region(np.roll(SECOND[3], 1, axis=1), SECOND[3]), 1]
  f = [contour(*pair) for pair in shifted], [contour(np.roll(SECOND[3], 1, axis=1), SECOND[3]), 1]
  for kind in ("mask", "box"):
    assert found[kind]["j"] == pytest.approx(100 * np.mean([np.mean(one) for one in j]))
    assert found[kind]["f"] == pytest.approx(100 * np.mean([np.mean(one) for one in f]))
  assert found["click_1"]["j"] < found["click_3"]["j"]


def test_clicks_correct_the_largest_error():
  truth = rectangle(5, 5, 25, 15)
  assert (
    next_click(truth & False, truth) == ((10.5, 10.5), 1) or next_click(truth & False, truth)[1]
  )
  (x, y), label = next_click(truth | rectangle(30, 0, 50, 30), truth)
  assert (x, y, label) == (40.5, 10.5, 0) or (label == 0 and 30 < x < 50)
  seen = []

  def track(frames, prompts):
    seen.append(prompts[0][7])
    yield {7: truth & (np.arange(SIZE[1]) < 15)} if len(seen) < 2 else {}

  found = simulate_clicks(track, np.zeros((*SIZE, 3), np.uint8), {7: truth}, (1, 3))
  assert [len(prompt.points) for prompt in seen] == [1, 2]
  assert list(found) == [1, 3]
  first, third = found[1][7], found[3][7]
  assert first.points == third.points[:1]
  assert third.labels == (1, 1, 1)
  assert 15 < third.points[1][0] < 25  # what is missing
  assert third.points[2] == third.points[0]  # all is missing again
  assert (first.box, first.mask) == (None, None)


def test_only_the_first_frame_is_computed_for_clicks(data):
  """The tracker gets the frame of the prompt alone, with one prompt per object."""
  videos, folder = data
  track = FakeTracker()
  evaluate_tracking(track, videos, folder / "JPEGImages", ["click_3"])
  assert [number for number, _ in track.calls] == [1, 1, 1, 1, FRAMES]
  assert all(list(prompts) == [0] for number, prompts in track.calls if number == 1)


def test_scored_frames(data):
  [video], _ = data
  first, second, _ = video.objects
  assert [*scored_frames(video, first)] == [1, 2, 3, 4]
  assert [*scored_frames(video, second)] == [3, 4]
  assert [*scored_frames(video, second, exclude_ends=False)] == [2, 3, 4, 5]
  assert scorable(video) == [first, second]


def test_trackers_must_yield_every_frame(data):
  videos, folder = data
  with pytest.raises(ValueError, match=r"yields 3 frames; it must yield the 6 frames from the"):
    evaluate_tracking(lambda *_: iter([{}] * 3), videos, folder / "JPEGImages", ["mask"])
  with pytest.raises(ValueError, match="none of the 0 videos has an object to score"):
    evaluate_tracking(lambda *_: iter(()), [], folder)


def test_prompts_are_compared_by_identity():
  assert ObjectPrompt() != ObjectPrompt()


def prediction(number, masks, **values):
  base = {"video_id": 1, "category_id": 1, "score": 0.5, "segmentations": tracks(masks)}
  return base | ({} if number is None else {"id": number}) | values


@pytest.fixture
def write(data):
  def to_file(*entries, wrap=False):
    path = data[1] / "predictions.json"
    path.write_text(json.dumps({"annotations": entries} if wrap else entries))
    return path

  return to_file


class TestPredictions:
  @pytest.mark.parametrize("wrap", [False, True])
  def test_by_id(self, data, write, wrap):
    videos, _ = data
    shifted = [np.roll(mask, 2, axis=1) for mask in FIRST]
    path = write(prediction(2, SECOND), prediction(1, shifted), wrap=wrap)
    found = track_predictions.score(videos, track_predictions.read(path, videos))
    j = np.mean([region(shifted[t], FIRST[t]) for t in range(1, 5)])
    assert found["predictions"]["j"] == pytest.approx(100 * (j + 1) / 2)
    assert (found["videos"], found["objects"], found["tracks"]) == (1, 2, 2)

  def test_objects_without_a_track(self, data, write):
    videos, _ = data
    found = track_predictions.score(
      videos, track_predictions.read(write(prediction(1, FIRST)), videos)
    )
    # The second object is visible in one of its two frames.
    assert found["predictions"]["j"] == pytest.approx(100 * (1 + 0.5) / 2)

  def test_best_assignment(self, data, write):
    videos, _ = data
    entries = prediction(None, SECOND), prediction(None, [None] * 6), prediction(None, FIRST)
    tracks = track_predictions.read(write(*entries), videos)
    assert list(tracks[1]) == [1, 2, 3]
    assert track_predictions.score(videos, tracks, "best")["predictions"]["jf"] == 100
    assert track_predictions.score(videos, tracks, "id")["predictions"]["jf"] < 50
    empty = track_predictions.score(videos, {}, "best")
    assert empty["predictions"]["j"] == pytest.approx(100 * (0 + 0.5) / 2)

  def test_unknown_ids(self, data, write):
    videos, _ = data
    tracks = track_predictions.read(write(prediction(9, FIRST)), videos)
    with pytest.raises(ValueError, match=r"track 9 of video 1 \(v\) is the id of none of its 3"):
      track_predictions.score(videos, tracks)

  @pytest.mark.parametrize(
    ("entries", "message"),
    [
      ([prediction(1, FIRST[:2])], r"track 1 of video 1 \(v\): segmentations must be a list"),
      ([prediction(1, FIRST, video_id=8)], "prediction number 1: there is no video 8"),
      ([prediction(1, FIRST), prediction(1, FIRST)], "this id occurs twice"),
      ([prediction("x", FIRST)], "prediction number 1: id is the string 'x'"),
      ([3], "has no predictions; give YouTube-VIS results"),
    ],
  )
  def test_faults(self, data, write, entries, message):
    with pytest.raises(ValueError, match=message) as error:
      track_predictions.read(write(*entries), data[0])
    assert "\n" not in str(error.value)
    assert "predictions.json" in str(error.value)

  def test_lines_of_the_track_command(self, data, write):
    videos, folder = data
    lines = [
      {
        "frame": t, "time": t / 10, "size": list(SIZE),
        "objects": [
          {"id": key, "score": 0.9, "segmentation": encode(masks[t])}
          for key, masks in TRUTH.items() if masks[t] is not None
        ],
      }
      for t in range(FRAMES)
    ]  # fmt: skip
    path = folder / "out" / "v.tracks.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for given in (path, path.parent):
      tracks = track_predictions.read(given, videos)
      assert track_predictions.score(videos, tracks)["predictions"]["jf"] == 100
    # The last line of a frame counts, also for objects that are absent there.
    both = [*lines, lines[0] | {"objects": []}]
    path.write_text("".join(json.dumps(line) + "\n" for line in both))
    found = track_predictions.read(path, videos)[1]
    assert found == {key: (None, *rles[1:]) for key, rles in tracks[1].items()}
    path.write_text(json.dumps(lines[0] | {"frame": 6}))
    with pytest.raises(ValueError, match=r"line 1 of .*: there is no frame 6; video 1 \(v\) has 6"):
      track_predictions.read(path, videos)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"line 1 of .* must be an object with frame and objects"):
      track_predictions.read(path, videos)
    path.rename(path.with_name("other.tracks.jsonl"))
    with pytest.raises(ValueError, match="there is no video 'other' in the annotation file"):
      track_predictions.read(path.parent, videos)
    with pytest.raises(FileNotFoundError, match=r"no file of tracks .*v.tracks.jsonl"):
      track_predictions.read(path, videos)


class FakeModel:
  """Records the prompts; each object is found on every frame from its prompt on."""

  info: ClassVar[dict] = {}

  def video(self, frames):
    self.frames, self.calls = frames, []
    return self

  def add(self, prompt=None, frame=0, *, mask=None, identity):
    self.calls.append(("add", identity, frame, prompt, mask))

  def correct(self, identity, frame, *, points, point_labels):
    self.calls.append(("correct", identity, frame, points, point_labels))

  def run(self):
    ids = [identity for kind, identity, *_ in self.calls if kind == "add"]
    for _ in self.frames[min(frame for _, _, frame, *_ in self.calls) :]:
      yield SimpleNamespace(
        instances=SimpleNamespace(ids=np.array(ids), masks=[FIRST[0]] * len(ids))
      )


def test_sessions_get_clicks_one_after_another():
  model = FakeModel()
  track = session_tracker(model)
  clicks = ObjectPrompt(((3.5, 4.5), (1.5, 2.5), (0.5, 0.5)), (1, 0, 1))
  prompts = {2: {7: clicks}, 1: {5: ObjectPrompt(box=(1, 2, 3, 4)), 6: ObjectPrompt(mask=FIRST[0])}}
  found = list(track([np.zeros((*SIZE, 3), np.uint8)] * 4, prompts))
  assert [sorted(row) for row in found] == [[5, 6, 7]] * 3
  assert np.array_equal(found[0][5], FIRST[0])
  box, mask, first, second, third = model.calls
  assert (box[:3], box[3].box, box[3].points) == (("add", 5, 1), (1, 2, 3, 4), ())
  assert mask[:4] == ("add", 6, 1, None)
  assert mask[4] is FIRST[0]
  assert (first[:3], first[3].points, first[3].box) == (("add", 7, 2), ((3.5, 4.5),), None)
  assert second == ("correct", 7, 2, clicks.points[:2], (1, 0))
  assert third == ("correct", 7, 2, clicks.points, (1, 0, 1))


class TestCommand:
  def test_a_model(self, data, monkeypatch, capsys):
    """The work of the command with a fake model; its figures are those of `evaluate_tracking`."""
    videos, folder = data
    model = FakeModel()
    monkeypatch.setattr(run_video.Sam3, "from_checkpoint", lambda *_, **__: model)
    out = folder / "metrics.json"
    typed = ["evaluate", "--video", "--data", str(folder / "data.json"), "--out", str(out)]
    assert main(typed) == 0
    found = json.loads(out.read_text())
    assert set(found) == {"videos", "objects", *PROMPTS}
    assert found == evaluate_tracking(session_tracker(model), videos, folder / "JPEGImages")
    printed = capsys.readouterr()
    assert "click_3" in printed.out
    (folder / "JPEGImages" / "v" / "00003.png").unlink()
    assert main(typed) == 2
    assert "v/00003.png: there is no such frame of video 1" in capsys.readouterr().err

  def test_predictions(self, data, write, capsys):
    _, folder = data
    write(prediction(1, FIRST), prediction(2, SECOND))
    out = folder / "metrics.json"
    typed = ["evaluate", "--video", "--data", str(folder / "data.json"), "--out", str(out)]
    typed += ["--predictions", str(folder / "predictions.json")]
    assert main(typed) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "1 videos, 2 objects" in " ".join(printed.out.split())
    assert json.loads(out.read_text())["predictions"]["jf"] == 100
    assert main([*typed, "--assign", "best", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--video", "--assign", "best"], "--assign best needs --predictions"),
      (["--assign", "best"], "--assign best needs --video"),
      (["--video", "--prompt", "box"], "--video needs one --data, and --prompt text or click"),
      (["--video", "--predictions", "none.json"], "there is no file of predictions none.json"),
      (["--video", "--predictions", "data.json", "--out", "data.json"], "would be overwritten"),
    ],
  )
  def test_errors_are_one_line(self, data, monkeypatch, capsys, typed, message):
    monkeypatch.chdir(data[1])
    assert main(["evaluate", "--data", "data.json", *typed]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert message in printed.err
