"""Videos of the server: upload, frames, prompts, tracking in a stream, corrections, export."""

import dataclasses
import io
import json
import time

import numpy as np
import pytest
import server_app
from clips import frame_image, write_clip
from PIL import Image
from server_app import error_of, served
from small_video import SIZE, SMALL, moving_frames, small_model

from sam3_jax import Rules, VisualPrompt
from sam3_jax.inputs.video import open_video
from sam3_jax.outputs.rle import decode
from sam3_jax.outputs.track_lines import line_of
from sam3_jax.server import warm_up
from sam3_jax.server.video import results

FRAMES = 8
POINT = [20.0, 12.0]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  frames = moving_frames(FRAMES)
  path = tmp_path_factory.mktemp("clip") / "clip.mp4"
  return write_clip(path, FRAMES, SIZE, image=lambda number, *_: frames[number])


@pytest.fixture(scope="module")
def client():
  with served(small_model(), max_videos=2, max_video_bytes=100_000) as client:
    yield client


def opened(client, clip):
  response = client.post("/v1/videos", content=clip.read_bytes())
  assert response.status_code == 201, response.text
  return response.json()


@pytest.fixture
def url(client, clip):
  """Of a video, which is deleted afterwards."""
  url = f"/v1/videos/{opened(client, clip)['id']}"
  yield url
  client.delete(url)


def lines_of(response):
  assert response.status_code == 200, response.text
  assert response.headers["content-type"] == "application/x-ndjson"
  return [json.loads(line) for line in response.text.splitlines()]


def test_upload_describes_the_video(client, clip):
  video = opened(client, clip)
  url = f"/v1/videos/{video['id']}"
  assert (video["height"], video["width"]) == SIZE
  assert (video["frames"], video["fps"]) == (FRAMES, 25)
  state = client.get(url).json()
  assert state["objects"] == []
  assert (state["tracked"], state["running"]) == (0, False)
  directory = next(iter(client.app.state.videos.store._videos.values())).directory
  assert (directory / "video").read_bytes() == clip.read_bytes()
  assert client.delete(url).status_code == 204
  assert error_of(client.get(url)) == (404, "unknown_video")
  for _ in range(100):
    if not directory.exists():
      break
    time.sleep(0.05)
  assert not directory.exists()


def test_frames_are_jpeg(client, url):
  image = Image.open(io.BytesIO(client.get(f"{url}/frames/3").content))
  assert image.size == (SIZE[1], SIZE[0])
  assert np.abs(np.asarray(image).astype(int) - moving_frames(4)[3]).mean() < 12
  small = Image.open(io.BytesIO(client.get(f"{url}/frames/3?side=20").content))
  assert small.size == (20, 12)
  assert error_of(client.get(f"{url}/frames/{FRAMES}")) == (404, "not_found")
  assert error_of(client.get(f"{url}/frames/0?side=1")) == (400, "bad_request")


def test_a_click_is_tracked_as_in_a_session(client, clip, url):
  found = client.post(f"{url}/prompts", json={"frame": 0, "points": [POINT]}).json()
  assert found["objects"] == [1]
  [one] = found["result"]["objects"]
  assert one["id"] == 1
  assert decode(one["mask"]).sum() == one["area"] > 0

  start, *frames, end = lines_of(client.post(f"{url}/track", json={}))
  assert start == {"start": {"frames": FRAMES}}
  assert end["end"]["frames"] == FRAMES
  assert not end["end"]["stopped"]
  with small_model().video(clip) as session:
    session.add(VisualPrompt(points=[POINT]), 0)
    for value, frame in zip(frames, session.run(), strict=True):
      assert (value["frame"], value["time"]) == (frame.index, pytest.approx(frame.time))
      assert [one["id"] for one in value["objects"]] == frame.instances.ids.tolist()
      for i, one in enumerate(value["objects"]):
        assert one["mask"] == frame.instances.masks.rle(i)
        assert one["score"] == pytest.approx(float(frame.instances.scores[i]), abs=1e-6)
  assert client.get(f"{url}/frames/5/objects").json() == frames[5]
  state = client.get(url).json()
  assert (state["objects"], state["tracked"], state["running"]) == ([1], FRAMES, False)


def test_a_pass_keeps_what_it_does_not_track(client, url):
  """Backward from frame 5, an object of frame 0 is not tracked."""
  for frame in (0, 5):
    client.post(f"{url}/prompts", json={"frame": frame, "points": [POINT]})
  frames = lines_of(client.post(f"{url}/track", json={"direction": "both"}))[1:-1]
  assert [line["frame"] for line in frames] == [*range(8), 5, 4, 3, 2, 1, 0]
  ids = [
    {one["id"] for one in client.get(f"{url}/frames/{i}/objects").json()["objects"]}
    for i in range(8)
  ]
  assert ids == [{1, 2}] * 8
  first = [one for one in frames[3]["objects"] if one["id"] == 1]
  last = next(line for line in frames[8:] if line["frame"] == 3)["objects"]
  assert first == [one for one in last if one["id"] == 1]


def test_correct_remove_and_track_both_ways(client, url):
  first = client.post(f"{url}/prompts", json={"frame": 4, "points": [POINT]}).json()
  second = client.post(f"{url}/prompts", json={"frame": 4, "box": [2, 2, 16, 14]}).json()
  assert [first["objects"], second["objects"]] == [[1], [2]]
  assert [one["id"] for one in second["result"]["objects"]] == [1, 2]
  lines = lines_of(client.post(f"{url}/track", json={"direction": "both"}))
  order = [line["frame"] for line in lines[1:-1]]
  assert order == [4, 5, 6, 7, 4, 3, 2, 1, 0]
  assert lines[0]["start"]["frames"] == len(order)

  points = {"frame": 6, "points": [POINT, [2, 2]], "point_labels": [1, 0]}
  corrected = client.post(f"{url}/objects/2/corrections", json=points).json()
  assert corrected["objects"] == [2]
  assert corrected["result"]["frame"] == 6
  kept = client.get(f"{url}/frames/6/objects").json()
  assert kept == corrected["result"]
  stretch = {"direction": "forward", "start": 6, "stop": 8}
  lines = lines_of(client.post(f"{url}/track", json=stretch))
  assert [line["frame"] for line in lines[1:-1]] == [6, 7]

  assert client.delete(f"{url}/objects/1").status_code == 204
  assert client.get(url).json()["objects"] == [2]
  for frame in range(FRAMES):
    objects = client.get(f"{url}/frames/{frame}/objects").json()["objects"]
    assert 1 not in [one["id"] for one in objects]
  assert error_of(client.delete(f"{url}/objects/1")) == (400, "invalid_prompt")


@pytest.mark.slow  # its programs are compiled for other thresholds
def test_phrases_find_objects(clip):
  """With thresholds that a random model passes."""
  rules = Rules(score_threshold_detection=0.0, new_det_thresh=0.0, hotstart_unmatch_thresh=100)
  video = dataclasses.replace(SMALL.video, rules=rules)
  with served(small_model(config=dataclasses.replace(SMALL, video=video))) as client:
    url = f"/v1/videos/{opened(client, clip)['id']}"
    found = client.post(f"{url}/prompts", json={"frame": 2, "phrase": " cat "}).json()
    ids = found["objects"]
    assert len(ids) >= 1
    assert {one["id"] for one in found["result"]["objects"]} <= set(ids)
    assert {one["phrase"] for one in found["result"]["objects"]} <= {"cat"}
    clicked = client.post(f"{url}/prompts", json={"frame": 2, "points": [POINT]}).json()["objects"]
    lines = lines_of(client.post(f"{url}/track", json={}))
    assert [line["frame"] for line in lines[1:-1]] == list(range(2, FRAMES))
    phrases = {one["id"]: one["phrase"] for line in lines[1:-1] for one in line["objects"]}
    assert phrases[clicked[0]] is None
    assert "cat" in phrases.values()
    assert client.get(url).json()["phrases"] == ["cat"]
    ytvis = client.get(f"{url}/export/ytvis").json()
    assert len(ytvis["annotations"]) == len(phrases)

    again = client.post(f"{url}/prompts", json={"frame": 0, "phrase": "cat"})
    assert error_of(again) == (400, "invalid_prompt")
    both = {"frame": 0, "phrase": "dog", "points": [POINT]}
    assert error_of(client.post(f"{url}/prompts", json=both)) == (400, "invalid_prompt")
    assert client.delete(f"{url}/phrases?phrase=cat").status_code == 204
    assert error_of(client.delete(f"{url}/phrases?phrase=cat")) == (400, "invalid_prompt")
    state = client.get(url).json()
    assert (state["phrases"], state["objects"]) == ([], clicked)
    left = client.get(f"{url}/frames/4/objects").json()["objects"]
    assert {one["id"] for one in left} <= set(clicked)


def test_exports(client, url, tmp_path):
  empty = client.get(f"{url}/export/tracks")
  assert error_of(empty) == (409, "conflict")
  client.post(f"{url}/prompts", json={"frame": 0, "points": [POINT]})
  client.post(f"{url}/track", json={})
  tracks = client.get(f"{url}/export/tracks?name=a clip.mp4")
  assert "a%20clip.tracks.jsonl" in tracks.headers["content-disposition"]
  rows = [json.loads(line) for line in tracks.text.splitlines()]
  assert [row["frame"] for row in rows] == list(range(FRAMES))
  ytvis = client.get(f"{url}/export/ytvis").json()
  assert ytvis["videos"][0]["length"] == FRAMES
  assert ytvis["annotations"][0]["id"] == 1
  assert client.get(f"{url}/export/coco-vid").json()["images"]
  assert client.get(f"{url}/export/mot").text.startswith("1,1,")
  overlay = client.get(f"{url}/export/overlay")
  assert overlay.headers["content-type"] == "video/mp4"
  (tmp_path / "overlay.mp4").write_bytes(overlay.content)
  with open_video(tmp_path / "overlay.mp4") as video:
    assert (video.length, video.size) == (FRAMES, SIZE)
  assert error_of(client.get(f"{url}/export/gif")) == (400, "bad_request")
  directory = next(iter(client.app.state.videos.store._videos.values())).directory
  assert sorted(path.name for path in directory.iterdir()) == ["results.jsonl", "video"]


@pytest.mark.parametrize(
  ("path", "asked", "message"),
  [
    ("prompts", {"frame": 0}, "points"),
    ("prompts", {"frame": 99, "points": [POINT]}, "after the end"),
    ("prompts", {"frame": 0, "points": [[500, 2]]}, "500"),
    ("objects/7/corrections", {"frame": 0, "points": [POINT]}, "there is no object 7"),
    ("track", {}, "add one first"),
  ],
)
def test_bad_prompts(client, url, path, asked, message):
  response = client.post(f"{url}/{path}", json=asked)
  assert error_of(response) == (400, "invalid_prompt")
  assert message in response.json()["error"]["message"]


def test_uploads_that_are_no_videos(client, clip, tmp_path):
  text = client.post("/v1/videos", content=b"notes\n" * 100)
  assert error_of(text) == (415, "unsupported_video")
  message = text.json()["error"]["message"]
  assert message.startswith("the uploaded video is not a video")
  assert "/" not in message
  playlist = f"ffconcat version 1.0\nfile {clip.name}\n".encode()
  assert error_of(client.post("/v1/videos", content=playlist)) == (415, "unsupported_video")
  assert error_of(client.post("/v1/videos", json={})) == (415, "unsupported_media_type")
  assert error_of(client.post("/v1/videos", content=b"x" * 200_000)) == (413, "too_large")
  assert list((client.app.state.service.store.directory / "videos").iterdir()) == []


def test_limits(client, clip, tmp_path):
  urls = [f"/v1/videos/{opened(client, clip)['id']}" for _ in range(2)]
  refused = client.post("/v1/videos", content=clip.read_bytes())
  assert error_of(refused) == (429, "busy")
  store = client.app.state.videos.store
  for stored in store._videos.values():
    stored.used -= 3000  # not used for long: gives way
  last = opened(client, clip)["id"]
  assert len(store) == 2
  for url in [*urls, f"/v1/videos/{last}"]:
    client.delete(url)
  assert len(store) == 0


def test_frames_and_pixels_are_limited(clip):
  options = {"max_video_frames": FRAMES - 1}
  with served(small_model(), **options) as client:
    refused = client.post("/v1/videos", content=clip.read_bytes())
    assert error_of(refused) == (413, "too_many_frames")
  with served(small_model(), max_video_pixels=100) as client:
    refused = client.post("/v1/videos", content=clip.read_bytes())
    assert error_of(refused) == (413, "too_many_pixels")


def test_videos_belong_to_their_session(client, clip):
  client.cookies.set("sam3_session", "a" * 43)
  url = f"/v1/videos/{opened(client, clip)['id']}"
  assert client.get(url).status_code == 200
  client.cookies.clear()
  assert error_of(client.get(url)) == (404, "unknown_video")
  client.cookies.set("sam3_session", "a" * 43)
  assert client.delete(url).status_code == 204
  client.cookies.clear()


def test_the_model_says_whether_it_takes_videos(client):
  model = client.get("/v1/model").json()
  assert model["video"]
  assert model["limits"]["video_bytes"] == 100_000


def test_a_model_without_a_tracker_takes_no_videos(clip):
  with served(server_app.small_model()) as client:
    assert not client.get("/v1/model").json()["video"]
    refused = client.post("/v1/videos", content=clip.read_bytes())
    assert error_of(refused) == (415, "unsupported_video")
    assert "has no tracker" in refused.json()["error"]["message"]


def test_objects_are_limited(clip):
  with served(small_model(), max_video_objects=1) as client:
    url = f"/v1/videos/{opened(client, clip)['id']}"
    asked = {"frame": 0, "points": [POINT]}
    assert client.post(f"{url}/prompts", json=asked).status_code == 200
    refused = client.post(f"{url}/prompts", json=asked)
    assert error_of(refused) == (400, "invalid_prompt")
    assert "a video takes 1 objects" in refused.json()["error"]["message"]


def test_results_are_rewritten_when_most_are_replaced(tmp_path, monkeypatch):
  monkeypatch.setattr(results, "_SPARE", 1000)
  kept = results.FrameResults(tmp_path / "results.jsonl")
  with small_model().video(moving_frames(3)) as session:
    session.add(VisualPrompt(points=[POINT]), 0)
    frames = list(session.run())
  for _ in range(30):
    values = [kept.put(frame, [1]) for frame in frames]
  assert [kept.get(frame.index) for frame in frames] == values
  size = sum(len(line_of(frame)) for frame in frames)
  kept.export(tmp_path / "tracks.jsonl")
  kept.close()
  assert (tmp_path / "tracks.jsonl").stat().st_size == size
  assert (tmp_path / "results.jsonl").stat().st_size < 2 * size + 2000


@pytest.mark.slow
def test_idle_servers_compile_the_programs_of_videos(clip):
  model = small_model()
  for step in warm_up._video_steps(model):
    step()
  before = model.video_programs.compilations
  with served(model) as client:
    url = f"/v1/videos/{opened(client, clip)['id']}"
    for _ in range(2):
      client.post(f"{url}/prompts", json={"frame": 0, "points": [POINT]})
      client.post(f"{url}/track", json={})
    client.post(f"{url}/objects/1/corrections", json={"frame": 2, "points": [POINT]})
    client.post(f"{url}/track", json={"direction": "both"})
  assert model.video_programs.compilations == before


def test_unused_videos_are_deleted(clip):
  with served(small_model(), video_expire_seconds=0.2) as client:
    url = f"/v1/videos/{opened(client, clip)['id']}"
    for _ in range(100):
      time.sleep(0.05)
      if not len(client.app.state.videos.store):
        break
    assert error_of(client.get(url)) == (404, "unknown_video")


@pytest.mark.slow
def test_another_process_decodes(tmp_path):
  clip = write_clip(tmp_path / "clip.mp4", 30, SIZE, image=frame_image)
  with served(small_model(), readers=1) as client:
    url = f"/v1/videos/{opened(client, clip)['id']}"
    stored = next(iter(client.app.state.videos.store._videos.values()))
    client.post(f"{url}/prompts", json={"frame": 0, "points": [POINT]})
    lines = lines_of(client.post(f"{url}/track", json={"direction": "both"}))
    assert [line["frame"] for line in lines[1:-1]] == [*range(30), 0]
    stored.source._reader._process.kill()
    response = client.get(f"{url}/frames/20")
    assert error_of(response) == (415, "unsupported_video")
    assert "ended the process" in response.json()["error"]["message"]
    assert client.get("/v1/model").status_code == 200
