"""Tracking over a socket: frames arrive as they leave; stopped, left or deleted in the middle."""

import contextlib
import json
import socket
import threading
import time
from http.client import HTTPConnection
from typing import Any

import pytest
import uvicorn
from clips import write_clip
from small_video import SIZE, moving_frames, small_model

from sam3_jax.server import protocol
from sam3_jax.server.app import create_app
from sam3_jax.server.settings import Settings
from sam3_jax.server.video.track import Run

pytestmark = pytest.mark.slow  # its programs are compiled

FRAMES = 60
SLOW = 0.03  # seconds that a frame takes at least


@pytest.fixture(scope="module")
def address():
  app = create_app(small_model(), Settings(readers=0), compiled=False)
  options = {"http": protocol.Protocol, "ws": "none", "lifespan": "on", "log_config": None}
  server = uvicorn.Server(uvicorn.Config(app, **options))
  sock = socket.create_server(("127.0.0.1", 0))
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
  thread.start()
  while not server.started:
    time.sleep(0.01)
  assert app.state.service.engine.wait_ready(10)
  yield sock.getsockname()[1], app.state.videos
  server.should_exit = True
  thread.join(20)
  assert not thread.is_alive()


@pytest.fixture(autouse=True)
def slow(monkeypatch):
  following = Run.next

  def wait(self):
    time.sleep(SLOW)
    return following(self)

  monkeypatch.setattr(Run, "next", wait)


def send(port, method, path, body=None):
  connection = HTTPConnection("127.0.0.1", port, timeout=60)
  data = json.dumps(body).encode() if isinstance(body, dict) else body
  headers = {"Content-Type": "application/json"} if isinstance(body, dict) else {}
  connection.request(method, path, data, headers)
  return connection


def call(port, method, path, body=None) -> tuple[int, Any]:
  with contextlib.closing(send(port, method, path, body)) as connection:
    response = connection.getresponse()
    data = response.read()
    return response.status, json.loads(data) if data else None


@pytest.fixture
def video(address, tmp_path):
  """The port, the path of a video with an object, and what the server knows of it."""
  port, videos = address
  frames = moving_frames(FRAMES)
  clip = write_clip(tmp_path / "clip.mp4", FRAMES, SIZE, image=lambda number, *_: frames[number])
  status, opened = call(port, "POST", "/v1/videos", clip.read_bytes())
  assert status == 201
  path = f"/v1/videos/{opened['id']}"
  assert call(port, "POST", f"{path}/prompts", {"frame": 0, "points": [[20, 12]]})[0] == 200
  [stored] = videos.store._videos.values()
  yield port, path, stored
  call(port, "DELETE", path)


@contextlib.contextmanager
def tracking(port, path):
  """A response whose first two lines have arrived; its connection is closed at the end."""
  with contextlib.closing(send(port, "POST", f"{path}/track", {})) as connection:
    response = connection.getresponse()
    assert json.loads(response.readline()) == {"start": {"frames": FRAMES}}
    assert json.loads(response.readline())["frame"] == 0
    yield response
    response.close()


def wait(condition, seconds=10.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)


def test_frames_arrive_as_they_leave_and_others_are_served(video):
  port, path, stored = video
  with tracking(port, path) as response:
    assert len(stored.results) < FRAMES
    assert call(port, "GET", path)[1]["running"]
    assert call(port, "POST", f"{path}/track", {})[1]["error"]["code"] == "conflict"
    status, found = call(port, "POST", f"{path}/prompts", {"frame": 40, "points": [[8, 8]]})
    assert (status, found["objects"]) == (200, [2])
    lines = [json.loads(line) for line in response]
  assert [line["frame"] for line in lines[:-1]] == list(range(1, FRAMES))
  assert lines[-1]["end"]["frames"] == FRAMES
  wait(lambda: stored.running is None)


def test_stop_keeps_the_results(video):
  port, path, stored = video
  with tracking(port, path) as response:
    assert call(port, "DELETE", f"{path}/track")[0] == 204
    lines = [json.loads(line) for line in response]
  end = lines[-1]["end"]
  assert end["stopped"]
  assert end["frames"] == len(lines) == len(stored.results) < FRAMES
  wait(lambda: stored.running is None)
  with tracking(port, path):  # again
    pass


def test_a_client_that_leaves_stops_the_tracking(video):
  port, path, stored = video
  with tracking(port, path):
    assert stored.running is not None
  wait(lambda: stored.running is None)
  tracked = len(stored.results)
  time.sleep(10 * SLOW)
  assert len(stored.results) == tracked < FRAMES


def test_a_video_that_is_deleted_ends_its_stream(video):
  port, path, stored = video
  with tracking(port, path) as response:
    assert call(port, "DELETE", path)[0] == 204
    lines = [json.loads(line) for line in response]
  assert lines[-1]["error"]["code"] == "unknown_video"
  wait(lambda: not stored.directory.exists())
