"""`evaluate --video` of concepts: the model's part with a fake, files, table, and the page."""

import json

import numpy as np
import pytest
from concept_videos import FRAMES, SIZE, concepts, content, moving, rectangle, rles, track
from PIL import Image

from sam3_jax.cli.main import main
from sam3_jax.datasets.video_annotations import VideoPair
from sam3_jax.evaluation import concept_gallery, concept_tracks, run_video
from sam3_jax.evaluation.score_concepts import ConceptScorer
from sam3_jax.evaluation.track_concepts import track_pairs, track_videos
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import RleMasks
from sam3_jax.outputs.rle import encode
from sam3_jax.outputs.tracked_frame import TrackedFrame

A, B = moving(2, 2), [None, *moving(4, 25)[1:]]
OBJECTS = [(1, 1, A), (1, 1, B), (2, 2, A)]
PAIRS = [(1, 1), (1, 3), (2, 2), (2, 1)]


class FakeModel:
  """Finds the objects of "box" in the first video, and a wrong one of "cloud"; ids are unique over
  all calls, and frames leave in another order. Another prompt's objects must be ignored."""

  def __init__(self):
    self.info, self.calls = {}, []

  def track(self, frames, prompts):
    self.calls.append((frames[0].parent.name, prompts))
    base, video = 10 * len(self.calls), frames[0].parent.name
    masks = {("v1", "box"): [A, B], ("v1", "cloud"): [moving(30, 2)], ("v2", "red box"): [A]}
    for t in [*range(1, len(frames)), 0]:
      own, phrases, scores = [], [], []
      for phrase in prompts:
        found = [one[t] for one in masks.get((video, phrase), [])]
        own += found
        phrases += [phrase] * len(found)
        scores += np.linspace(0.9, 0.6, len(found) + 1)[: len(found)].tolist()
      yield tracked(t, base, [*own, rectangle(0, 0, 9, 9)], [*phrases, None], [*scores, 0.6])


def tracked(t, base, masks, phrases, scores=None):
  masks = [rectangle(0, 0, 0, 0) if mask is None else mask for mask in masks]
  found = RleMasks([encode(mask) for mask in masks], SIZE)
  scores = np.linspace(0.9, 0.6, len(masks)) if scores is None else scores
  boxes = np.zeros((len(masks), 4), np.float32)
  ids = np.arange(base, base + len(masks))
  instances = Instances(ids, np.array(scores, np.float32), boxes, found)
  return TrackedFrame(t, t / 25, SIZE, instances, tuple(phrases))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Two videos with frames; the working directory."""
  (tmp_path / "data.json").write_text(json.dumps(content(OBJECTS, PAIRS, videos=2)))
  for name in ("v1", "v2"):
    (tmp_path / "JPEGImages" / name).mkdir(parents=True)
    for t in range(FRAMES):
      image = Image.fromarray(np.full((*SIZE, 3), 90 + t, np.uint8))
      image.save(tmp_path / "JPEGImages" / name / f"{t:05d}.png")
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.fixture
def model(monkeypatch):
  one = FakeModel()
  monkeypatch.setattr(run_video.Sam3, "from_checkpoint", lambda *_, **__: one)
  return one


class TestTracking:
  def test_the_phrases_of_a_video_together(self, tmp_path):
    data, model, steps = concepts(tmp_path, OBJECTS, PAIRS, videos=2), FakeModel(), []
    found = track_videos(model.track, data.videos, tmp_path, lambda *args: steps.append(args))
    (first, tracks), (second, others) = found
    assert model.calls == [("v1", ["box", "cloud"]), ("v2", ["red box", "box"])]
    assert [video.id for video in (first, second)] == [1, 2]
    expected = [track(A, 1), track(B, 1), track(moving(30, 2), 3)]
    assert [(one.category, one.rles, one.boxes) for one in tracks] == [
      (one.category, one.rles, one.boxes) for one in expected
    ]
    assert [one.score for one in tracks] == [0.9, 0.75, 0.9]
    assert len(others) == 1
    assert steps[1] == ("pair 3 of 4: red box in v2", 0.5)

  def test_equal_phrases_are_tracked_once(self, tmp_path):
    data, asked = concepts(tmp_path, OBJECTS[:2], [(1, 1), (1, 3)]), []
    [video] = data.videos
    pairs = [VideoPair(1, "box"), VideoPair(3, " Box")]

    def tracker(frames, prompts):
      asked.append(prompts)
      for t in range(len(frames)):
        yield tracked(t, 1, [A[t]], prompts)

    tracks = track_pairs(tracker, video, pairs, tmp_path)
    assert [len(one) for one in asked] == [1]
    assert [one.category for one in tracks] == [1, 3]

  def test_score_of_the_first_frame(self, tmp_path):
    """Detection scores may change; that of the first visible frame counts."""
    data = concepts(tmp_path, OBJECTS[:2], [(1, 1)])

    def tracker(frames, prompts):
      for t in range(len(frames)):
        frame = tracked(t, 1, [None if t < 2 else A[t]], prompts)
        frame.instances.scores[:] = t / 10
        yield frame

    [(_, [found])] = track_videos(tracker, data.videos, tmp_path)
    assert found.score == 0.2
    assert found.rles == rles([None, None, *A[2:]])

  @pytest.mark.parametrize(
    ("rows", "message"),
    [
      (range(FRAMES - 1), r"the tracker yields 5 of the 6 frames of video 1 \(v1\)"),
      ([*range(FRAMES), FRAMES], "the tracker yields frame 6 of 60 x 40, but video 1"),
    ],
  )
  def test_wrong_frames(self, tmp_path, rows, message):
    data = concepts(tmp_path, OBJECTS[:2], [(1, 1)])
    frames = (tracked(t, 1, [], []) for t in rows)
    with pytest.raises(ValueError, match=message):
      list(track_videos(lambda *_: frames, data.videos, tmp_path))


class TestCommand:
  typed = ("evaluate", "--video", "--data", "data.json", "--out", "out/metrics.json")

  def test_a_model(self, folder, model, capsys):
    assert main([*self.typed, "--worst", "3"]) == 0
    printed = capsys.readouterr()
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert (metrics["videos"], metrics["pairs"], metrics["positive_pairs"]) == (2, 4, 2)
    assert metrics["pmf1_75"] == pytest.approx(100, abs=0.02)
    assert metrics["il_mcc"] == pytest.approx(2 / np.sqrt(3 * 2 * 2), abs=1e-5)
    assert metrics["identity_switches"] == 0
    rows = metrics.pop("by_pair")
    assert [(row["video_id"], row["category_id"]) for row in rows] == PAIRS
    assert [row["noun_phrase"] for row in rows] == ["box", "cloud", "red box", "box"]
    assert [row.get("hota") for row in rows] == pytest.approx([100, 0, 100, None])
    for text in ("2 videos, 4 pairs, 2 with objects", "pHOTA", "TETA", "0 identity switches of 3"):
      assert text in " ".join(printed.out.split())
    assert printed.out.splitlines()[-3:] == [
      "out/metrics.json", "out/predictions.json", "out/worst/index.html",
    ]  # fmt: skip
    self.check_page(folder / "out" / "worst")
    # The predictions that are written score as the model did.
    again = ["--predictions", "out/predictions.json", "--out", "again.json"]
    assert main([*self.typed[:4], *again, "--quiet"]) == 0
    second = json.loads((folder / "again.json").read_text())
    assert second.pop("by_pair") == rows
    assert second == metrics
    assert capsys.readouterr() == ("", "")
    assert not (folder / "predictions.json").exists()

  def test_teta_needs_categories(self, folder, model, capsys):
    values = json.loads((folder / "data.json").read_text())
    assert main([*self.typed]) == 0
    assert "TETA" not in capsys.readouterr().err
    phrases = {one["id"]: one["name"] for one in values.pop("categories")}
    for one in values["annotations"]:
      one["noun_phrase"] = phrases[one["category_id"]]
    (folder / "data.json").write_text(json.dumps(values))
    assert main([*self.typed]) == 0
    assert (
      "note: objects left out of TETA, which needs their category in `categories` of the file: 3"
      in capsys.readouterr().err.splitlines()
    )
    assert json.loads((folder / "out" / "metrics.json").read_text())["teta"] is None

  def check_page(self, page):
    text = (page / "index.html").read_text()
    assert text.index("1. cloud") < text.index("2. ")
    assert "HOTA 0 %: 1 tracks, 0 objects, 0 matches at IoU 0.50" in text
    assert sorted(path.name for path in page.iterdir()) == [
      "001.webp", "002.webp", "003.webp", "index.html",
    ]  # fmt: skip
    with Image.open(page / "001.webp") as film:
      assert (film.n_frames, film.size) == (FRAMES, (2 * SIZE[1] + 8, SIZE[0]))

  def test_a_directory_of_lines(self, folder, capsys):
    (folder / "tracks").mkdir()
    for name, masks, phrase in (("v1", A, "box"), ("v2", A, "red box")):
      rows = [
        {"id": 4, "score": 0.9, "phrase": phrase, "segmentation": encode(mask)} for mask in masks
      ]
      lines = [json.dumps({"frame": t, "objects": [row]}) for t, row in enumerate(rows)]
      (folder / "tracks" / f"{name}.tracks.jsonl").write_text("\n".join(lines))
    assert main([*self.typed, "--predictions", "tracks"]) == 0
    metrics = json.loads((folder / "out" / "metrics.json").read_text())
    assert metrics["il_mcc"] == pytest.approx(1, abs=1e-5)
    assert metrics["detre"] == pytest.approx(100 * 12 / 17)
    assert capsys.readouterr().err == ""

  def test_files_without_pairs_and_click_prompts_are_j_and_f(self, folder, capsys):
    """`--prompt click` chooses J&F, `--assign` too, and the default is J&F without pairs."""
    results = [
      {"id": one["id"], "video_id": one["video_id"], "segmentations": one["segmentations"]}
      for one in content(OBJECTS, PAIRS, videos=2)["annotations"]
    ]
    (folder / "tracks.json").write_text(json.dumps(results))
    without = content(OBJECTS, PAIRS, videos=2)
    del without["video_np_pairs"]
    (folder / "without.json").write_text(json.dumps(without))
    for typed in (
      [*self.typed, "--prompt", "click"],
      [*self.typed, "--assign", "best"],
      [*self.typed[:3], "without.json", *self.typed[4:]],
    ):
      assert main([*typed, "--predictions", "tracks.json", "--quiet"]) == 0
      metrics = json.loads((folder / "out" / "metrics.json").read_text())
      assert metrics["predictions"]["jf"] == 100

  def test_missing_frame(self, folder, model, capsys):
    (folder / "JPEGImages" / "v2" / "00003.png").unlink()
    assert main([*self.typed]) == 2
    assert "v2/00003.png: there is no such frame of video 2" in capsys.readouterr().err

  def test_untrained_and_left_out_are_noted(self, folder, model, capsys):
    model.info["trained"] = False
    assert main([*self.typed]) == 0
    assert "is untrained, its parameters are random" in capsys.readouterr().err
    results = concept_tracks.to_results(2, [track(A, 3)])
    (folder / "few.json").write_text(json.dumps(results))
    assert main([*self.typed, "--predictions", "few.json"]) == 0
    assert "tracks without a pair of their video and phrase, left out: 1" in capsys.readouterr().err

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (
        ["--prompt", "box"],
        "--video needs one --data, and --prompt text or click; got 1 files and",
      ),
      (["--data", "data.json"], "got 2 files"),
      (["--prompt", "click", "--worst", "3"], "--worst 3 needs a file with `video_np_pairs`"),
      (["--predictions", "none.json"], "there is no file of predictions none.json"),
      (["--predictions", "data.json", "--out", "data.json"], "would be overwritten"),
      (["--out", "predictions.json", "--predictions", "predictions.json"], "would be overwritten"),
    ],
  )
  def test_errors_are_one_line(self, folder, model, capsys, typed, message):
    assert main([*self.typed, *typed]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert message in printed


class TestGallery:
  def score(self, folder, objects, tracks):
    data = concepts(folder, objects, PAIRS, videos=2)
    scorer = ConceptScorer(data)
    return data, [pair for video in data.videos for pair in scorer.add(video, tracks[video.id])]

  def test_sort_key(self, tmp_path):
    """Missed objects and false positives first, then bad tracks; perfect pairs last."""
    half = track(A[:3] + [None] * 3, 2)
    _, scores = self.score(tmp_path, OBJECTS, {1: [track(A, 3)], 2: [half]})
    ordered = sorted(scores, key=concept_gallery.sort_key)
    assert [(one.video, one.pair.category) for one in ordered] == [(1, 1), (1, 3), (2, 2), (2, 1)]

  def test_colors_follow_objects(self, tmp_path, folder):
    """A track has the color of its object, whatever their order."""
    data, _ = self.score(tmp_path, OBJECTS, {1: [], 2: []})
    video, tracks = data.videos[0], [track(B), track(A)]
    truths = [one.rles for one in video.objects]
    frames = list(concept_gallery.film(video, truths, tracks, folder / "JPEGImages"))
    assert len(frames) == FRAMES
    for t, frame in enumerate(frames):
      left, right = frame[:, : SIZE[1]].astype(int), frame[:, SIZE[1] + 8 :].astype(int)
      for masks in (A, B):
        if masks[t] is not None:
          colors = [np.median(side[masks[t]], axis=0) for side in (left, right)]
          assert np.abs(colors[0] - colors[1]).max() < 40
          assert np.abs(colors[0] - left[-1, -1]).max() > 40
    first, second = (np.median(left[masks[5]], axis=0) for masks in (A, B))
    assert np.abs(first - second).max() > 40

  def test_long_and_large_videos(self, tmp_path, monkeypatch, folder):
    monkeypatch.setattr(concept_gallery, "FRAMES", 4)
    monkeypatch.setattr(concept_gallery, "SIDE", 30)
    data, _ = self.score(tmp_path, OBJECTS, {1: [], 2: []})
    frames = list(concept_gallery.film(data.videos[1], [], [], folder / "JPEGImages"))
    assert [frame.shape for frame in frames] == [(20, 68, 3)] * 4
    assert [int(frame[0, 0, 0]) for frame in frames] == [90, 92, 93, 95]

  def test_names_are_escaped(self, tmp_path):
    _, scores = self.score(tmp_path, OBJECTS, {1: [], 2: []})
    data = concepts(tmp_path, OBJECTS, PAIRS, videos=[{"video_name": "<b>"}, {}])
    files = concept_gallery.page(scores[:1], data.videos, {}, tmp_path, tmp_path / "p", 0.5, 1)
    with (tmp_path / "index.html").open("wb") as file:
      files[tmp_path / "p" / "index.html"](file)
    assert "video 1 (&lt;b&gt;)" in (tmp_path / "index.html").read_text()
