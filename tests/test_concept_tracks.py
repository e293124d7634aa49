"""Files of predicted tracks of concepts, and annotation files with pairs: reading and faults."""

import json

import pytest
from concept_videos import SIZE, concepts, content, moving, rles, track

from sam3_jax.datasets import video_annotations
from sam3_jax.datasets.video_annotations import VideoPair
from sam3_jax.evaluation import concept_tracks
from sam3_jax.outputs.rle import bounds, encode
from sam3_jax.utils.notes import Notes

A = moving(2, 2)
B = [*moving(2, 25)[:3], None, None, None]
PAIRS = [(1, 1), (1, 3)]


@pytest.fixture
def videos(tmp_path):
  return concepts(tmp_path, [(1, 1, A)], PAIRS).videos


@pytest.fixture
def read(tmp_path, videos):
  def read_values(values, **options):
    path = tmp_path / "predictions.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return concept_tracks.read(path, videos, **options)

  return read_values


def result(masks=None, **values):
  base = {"video_id": 1, "category_id": 1, "score": 0.9, "segmentations": list(rles(masks or A))}
  return base | values


def boxes(masks):
  return [[0.0] * 4 if rle is None else list(bounds(rle)) for rle in rles(masks)]


class TestAnnotations:
  def test_pairs_and_categories(self, tmp_path):
    data = concepts(tmp_path, [(1, 1, A), (1, 2, B)], PAIRS, videos=[{"occluded": True}])
    assert data.categories == {1: "box", 2: "red box", 3: "cloud"}
    [video] = data.videos
    assert video.occluded is True
    assert video.pairs == (VideoPair(1, "box"), VideoPair(3, "cloud"))
    assert video.phrases == ("box", "cloud")
    assert [pair.category for pair in concept_tracks.all_pairs(video)] == [1, 3, 2]
    first, second = video.objects
    assert (first.category, second.category) == (1, 2)
    assert second.boxes == (*map(bounds, rles(B[:3])), None, None, None)

  def test_boxes_of_the_file(self, tmp_path):
    values = content([(1, 1, B)], PAIRS)
    values["annotations"][0]["bboxes"] = [[1, 2, 3, 4.5]] * 3 + [None, [0.0] * 4, None]
    (tmp_path / "a.json").write_text(json.dumps(values))
    [video] = video_annotations.read_concepts(tmp_path / "a.json").videos
    assert video.objects[0].boxes == ((1.0, 2.0, 3.0, 4.5),) * 3 + (None,) * 3
    [video] = video_annotations.read(tmp_path / "a.json")
    assert video.objects[0].boxes == ()

  def test_without_pairs(self, tmp_path):
    [video] = concepts(tmp_path, [(1, 1, A)], video_np_pairs=[]).videos
    assert video.pairs == ()
    assert video.occluded is None

  def test_pair_without_category_id_has_that_of_its_name(self, tmp_path):
    pairs = [{"video_id": 1, "noun_phrase": "cloud"}]
    assert concepts(tmp_path, video_np_pairs=pairs).videos[0].pairs == (VideoPair(3, "cloud"),)

  def test_secret_annotations_are_noted(self, tmp_path):
    notes = Notes()
    pairs = [{"video_id": 1, "category_id": 1, "noun_phrase": "box", "num_masklets": 4}]
    concepts(tmp_path, [(1, 1, A)], video_np_pairs=pairs, notes=notes)
    assert notes.lines() == [
      "note: pairs with another number of objects than their num_masklets: 1 "
      "('box' of video 1 (v1) has 1, not 4)"
    ]

  @pytest.mark.parametrize(
    ("values", "message"),
    [
      ({"video_np_pairs": {}}, "video_np_pairs must be a list; got {}"),
      (
        {"video_np_pairs": [{"video_id": 1, "noun_phrase": "owl"}]},
        r"the pair of video 1 \(v1\) and 'owl' has no category_id",
      ),
      (
        {"video_np_pairs": [{"video_id": 1, "category_id": "1", "noun_phrase": "owl"}]},
        "pair number 1 of video_np_pairs: category_id is the string '1'; write the number 1",
      ),
      ({"videos": [{"occluded": "no"}]}, "video 1: occluded is the string 'no'; write the number"),
    ],
  )
  def test_faults(self, tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
      concepts(tmp_path, [(1, 1, A)], **values)

  @pytest.mark.parametrize(
    ("values", "message"),
    [
      ({"category_id": None}, r"annotation 1 of video 1 \(v1\) has no category_id"),
      ({"bboxes": [None] * 6}, r"annotation 1 of video 1 \(v1\), frame 0: it has a mask, but its"),
      ({"bboxes": [[1, 2, 3]] * 6}, "frame 0: a box must be x, y, width, height in pixels"),
      ({"bboxes": [[1, 2, -3, 4]] * 6}, r"none of the sides negative; got \[1, 2, -3, 4\]"),
      ({"bboxes": 7}, "bboxes must be a list with a box or null for each of 6 frames; got 7"),
    ],
  )
  def test_faults_of_objects(self, tmp_path, values, message):
    found = content([(1, 1, A)], PAIRS)
    found["annotations"][0] |= values
    (tmp_path / "a.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=message):
      video_annotations.read_concepts(tmp_path / "a.json")


class TestPredictions:
  def test_round_trip(self, read):
    tracks = [track(A, 3, 0.25), track(B, 1)]
    results = concept_tracks.to_results(1, tracks)
    assert results[1]["areas"] == [100] * 3 + [0] * 3
    assert results[1]["bboxes"] == boxes(B)
    assert read(results) == read({"annotations": results}) == {1: tracks}

  def test_minimal(self, read):
    """Boxes and areas may be left out."""
    assert read([result(B)]) == {1: [track(B)]}
    assert read([]) == {}

  def test_empty_masks_are_absence(self, read):
    empty = encode(A[0] & False)
    values = result(B)
    values["segmentations"][3] = empty
    values["bboxes"] = [[1, 2, 3, 4]] * 4 + [None, None]
    [found] = read([values])[1]
    assert found.rles == rles(B)
    assert found.boxes[2:4] == ((1.0, 2.0, 3.0, 4.0), None)

  def test_tracks_of_other_phrases_are_left_out(self, read):
    notes = Notes()
    assert read([result(category_id=2), result()], notes=notes) == {1: [track(A)]}
    assert notes.lines() == ["note: tracks without a pair of their video and phrase, left out: 1"]
    with pytest.warns(UserWarning, match="tracks without a pair"):
      read([result(category_id=2)])

  @pytest.mark.parametrize(
    ("values", "message"),
    [
      ({"video_id": 7}, "prediction number 1: there is no video 7"),
      ({"category_id": None}, "category_id must be a whole number; got None"),
      (
        {"score": 1.5},
        r"prediction number 1 of video 1 \(v1\): score must be a number in \[0, 1\]",
      ),
      ({"score": None}, "got None"),
      ({"segmentations": None}, "segmentations must be a list with a mask or null for each of 6"),
      ({"segmentations": [{"size": [4, 4], "counts": "0"}] + [None] * 5}, "its mask's size is"),
      ({"bboxes": [[1, 2, 3, 4]] * 5}, "a box or null for each of 6 frames; got 5"),
    ],
  )
  def test_faults(self, read, values, message):
    with pytest.raises(ValueError, match=message):
      read([result(**values)])

  def test_box_without_a_mask(self, read):
    with pytest.raises(ValueError, match=r"frame 3: it has the box \[1, 2, 3, 4\], but no mask"):
      read([result(B, bboxes=[[1, 2, 3, 4]] * 6)])

  def test_other_files(self, read, tmp_path, videos):
    with pytest.raises(
      ValueError, match="has no predictions; give a list of results with video_id"
    ):
      read({"images": []})
    with pytest.raises(FileNotFoundError, match=r"there is no file of predictions .*none\.json"):
      concept_tracks.read(tmp_path / "none.json", videos)


class TestLines:
  def write(self, path, rows):
    lines = [
      {"frame": t, "time": 0, "size": list(SIZE), "objects": row} for t, row in enumerate(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

  def row(self, masks, t, identity=1, **values):
    base = {"id": identity, "score": 0.75, "segmentation": rles(masks)[t], "phrase": "box"}
    return base | values

  def test_files_of_the_track_command(self, tmp_path, videos):
    (folder := tmp_path / "out").mkdir()
    rows = [[self.row(A, t)] + [self.row(B, t, 2, phrase="cloud")] * (t < 3) for t in range(6)]
    self.write(folder / "v1.tracks.jsonl", rows)
    expected = {1: [track(A, 1, 0.75), track(B, 3, 0.75)]}
    assert concept_tracks.read(folder, videos) == expected
    assert concept_tracks.read(folder / "v1.tracks.jsonl", videos) == expected

  def test_the_last_line_of_a_frame_counts(self, tmp_path, videos):
    """Object 2 is only in the first lines of frames 0 and 1, and there with its best score."""
    path = tmp_path / "v1.tracks.jsonl"
    first = [[self.row(A, t), self.row(B, t, 2, score=0.75 + (t < 2) / 8)] for t in range(3)]
    self.write(path, first)
    lines = path.read_text()
    self.write(path, [[self.row(A, t)] for t in range(2)])
    path.write_text(lines + path.read_text())
    kept = [*A[:3], None, None, None], [None, None, B[2], None, None, None]
    expected = [track(masks, 1, 0.75) for masks in kept]
    assert concept_tracks.read(path, videos) == {1: expected}

  def test_faults(self, tmp_path, videos):
    path = tmp_path / "v1.tracks.jsonl"
    self.write(path, [[self.row(A, 0, phrase=None)]])
    with pytest.raises(
      ValueError, match=r"line 1 of .*: object 1 has no phrase; give the tracks of"
    ):
      concept_tracks.read(path, videos)
    self.write(path, [[self.row(A, 0, score="x")]])
    with pytest.raises(ValueError, match="score must be a number"):
      concept_tracks.read(path, videos)
    self.write(path, [[]] * 7)
    with pytest.raises(ValueError, match=r"there is no frame 6; video 1 \(v1\) has 6 frames"):
      concept_tracks.read(path, videos)
    self.write(tmp_path / "v2.tracks.jsonl", [])
    with pytest.raises(ValueError, match="there is no video 'v2' in the annotation file"):
      concept_tracks.read(tmp_path / "v2.tracks.jsonl", videos)
    with pytest.raises(FileNotFoundError, match="there is no file of tracks"):
      concept_tracks.read(tmp_path / "v3.tracks.jsonl", videos)

  def test_other_phrases_are_left_out(self, tmp_path, videos):
    path, notes = tmp_path / "v1.tracks.jsonl", Notes()
    self.write(path, [[self.row(A, t, phrase="owl")] for t in range(6)])
    assert concept_tracks.read(path, videos, notes) == {1: []}
    assert "left out: 1" in notes.lines()[0]
