"""Videos on the page of `sam3-jax serve`: from a file to tracks, by mouse and by keyboard."""

import json
from pathlib import Path
from urllib.request import Request, urlopen

import browser_page
import numpy as np
import pytest
from browser_page import user
from clips import write_clip
from PIL import Image

from sam3_jax.inputs.video import open_video
from sam3_jax.outputs import rle

pytestmark = pytest.mark.browser
server, browser = browser_page.server, browser_page.browser

STATIC = Path(__file__).parents[1] / "sam3_jax" / "server" / "static"
FRAMES, HEIGHT, WIDTH = 6, 360, 480
MOVE = 8  # pixels that the camera moves to the right in a frame
LION, HOT_DOG = (365, 320), (340, 150)  # pixels of frame 0


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
  """A camera that moves over an example image."""
  image = np.asarray(Image.open(STATIC / "lion.jpg").convert("RGB"))

  def frame(number: int, height: int, width: int) -> np.ndarray:
    return np.ascontiguousarray(image[:height, MOVE * number :][:, :width])

  path = tmp_path_factory.mktemp("clip") / "a clip.mp4"
  return write_clip(path, FRAMES, (HEIGHT, WIDTH), image=frame, options={"crf": "15"})


@pytest.fixture(scope="module", autouse=True)
def compiled(server, clip):
  """Compiles what these tests need, which may take longer than they wait for the page."""

  def send(path, body, method="POST"):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "video/mp4" if isinstance(body, bytes) else "application/json"
    request = Request(f"{server.url}/v1/videos{path}", data, {"Content-Type": kind}, method=method)
    with urlopen(request, timeout=600) as response:
      return response.read()

  path = f"/{json.loads(send('', clip.read_bytes()))['id']}"
  for point in (HOT_DOG, LION):
    send(f"{path}/prompts", {"frame": 0, "points": [point]})
    send(f"{path}/track", {})
  send(f"{path}/objects/1/corrections", {"frame": 3, "points": [HOT_DOG]})
  for phrase in ("lion", "hot dog"):
    send(f"{path}/prompts", {"frame": 0, "phrase": phrase})
  send(f"{path}/track", {"direction": "both"})
  send(path, {}, "DELETE")


def ready(one, clip):
  """Opens the clip."""
  one.size = (WIDTH, HEIGHT)
  one.get("#file-input").set_input_files(clip)
  one.expect(one.get("#status")).to_have_text("The video is ready.")
  label = f"Video: a clip.mp4, frame 0 of {FRAMES - 1}, {WIDTH} by {HEIGHT} pixels"
  one.expect(one.get("#canvas")).to_have_attribute("aria-label", label)


def track(one):
  one.get("#video-track").click()
  one.expect(one.get("#status")).to_contain_text("Tracked")
  one.expect(one.get("#video-track")).to_have_text("Track")


def go(one, frame):
  one.get("#video-frame").fill(str(frame))
  one.expect(one.get("#canvas")).to_have_attribute(
    "aria-label", f"Video: a clip.mp4, frame {frame} of {FRAMES - 1}, {WIDTH} by {HEIGHT} pixels"
  )


def rows(one):
  return one.get("#timeline .text")


def presence(one, number=0):
  return one.get("#timeline .strip").nth(number).get_attribute("aria-label")


def test_click_track_correct_and_export(server, browser, clip, tmp_path):
  with user(browser, server) as one:
    ready(one, clip)
    assert one.get("#instances-title").is_hidden()
    before = one.color(*HOT_DOG)
    one.click(*HOT_DOG)
    one.expect(one.get("#status")).to_contain_text("Added object 1 on frame 0.")
    assert one.color(*HOT_DOG) != before
    assert presence(one) == "object 1 is on frames 0. Go to its next appearance"
    one.get("#new-object").click()
    one.click(*LION)
    one.expect(rows(one)).to_have_text(["object 1", "object 2"])

    track(one)
    one.expect(one.get("#status")).to_have_text(f"Tracked {FRAMES} frames.")
    last = FRAMES - 1
    one.expect(one.get("#video-time")).to_contain_text(f"{last} / {last}")  # followed
    assert presence(one) == f"object 1 is on frames 0 to {last}. Go to its next appearance"

    go(one, 3)
    one.get("#timeline .name").first.click()  # select
    one.expect(one.get("#object-text")).to_contain_text("object 1 is selected")
    one.click(HOT_DOG[0] - 3 * MOVE, HOT_DOG[1])
    text = "Corrected object 1 on frame 3. Track again to update the other frames."
    one.expect(one.get("#status")).to_have_text(text)
    one.click(HOT_DOG[0] - 3 * MOVE, HOT_DOG[1] + 8, button="right")  # negative
    one.expect(one.get("#status")).to_contain_text("frame 3")
    sent = [url for url in one.requests if url.endswith("/corrections")]
    assert len(sent) == 2

    one.get("#timeline .strip").nth(1).click(position={"x": 2, "y": 8})
    one.expect(one.get("#video-time")).to_contain_text("0 / ")

    path = one.download("[data-export=tracks]", tmp_path)
    assert path.name == "a clip.tracks.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["frame"] for line in lines] == list(range(FRAMES))
    masks = [one["segmentation"] for one in lines[4]["objects"] if one["id"] == 1]
    assert rle.decode(masks[0])[HOT_DOG[1], HOT_DOG[0] - 4 * MOVE] == 1
    path = one.download("[data-export=ytvis]", tmp_path)
    assert [entry["id"] for entry in json.loads(path.read_text())["annotations"]] == [1, 2]
    with open_video(one.download("[data-export=overlay]", tmp_path)) as video:
      assert video.length == FRAMES

    one.get("#timeline [data-remove]").first.click()
    one.expect(one.get("#status")).to_have_text("Removed object 1.")
    one.expect(rows(one)).to_have_text(["object 2"])
    one.expect(one.get("#alert")).to_be_hidden()


def test_phrases_find_objects_on_every_frame(server, browser, clip):
  with user(browser, server) as one:
    ready(one, clip)
    one.ask("lion")
    one.expect(one.get("#status")).to_contain_text("lion: 1 object on frame 0.")
    one.expect(rows(one)).to_have_text(["lion 1"])
    one.ask("hot dog")
    track(one)
    one.expect(rows(one)).to_have_text(["lion 1", "hot dog 2"])
    assert f"0 to {FRAMES - 1}" in presence(one, 0)
    one.get("#video-phrases button").first.click()
    one.expect(one.get("#status")).to_have_text("Removed lion.")
    one.expect(rows(one)).to_have_text(["hot dog 2"])
    assert one.get("#video-phrases li").all_inner_texts() == ["hot dog"]


def test_a_video_by_keyboard(server, browser, clip):
  with user(browser, server) as one:
    ready(one, clip)
    press = one.page.keyboard.press
    time = one.get("#video-time")
    one.get("#canvas").focus()
    press(".")
    one.expect(time).to_contain_text("1 / ")
    press(",")
    one.expect(time).to_contain_text("0 / ")
    press("b")  # a box around the hot dog
    press("Enter")  # shows the cursor, in the middle
    press("Enter")
    for _ in range(5):
      press("Shift+ArrowUp")
    for _ in range(5):
      press("Shift+ArrowRight")
    press("Enter")
    one.idle()
    one.expect(rows(one)).to_have_text(["object 1"])
    press("t")
    one.expect(one.get("#status")).to_have_text(f"Tracked {FRAMES} frames.")
    one.get("#video-frame").focus()
    press("Home")
    one.expect(time).to_contain_text("0 / ")
    press("ArrowRight")
    one.expect(time).to_contain_text("1 / ")
    press("k")
    one.expect(time).to_contain_text(f"{FRAMES - 1} / ")
    one.expect(one.get("#video-play")).to_have_attribute("aria-label", "Play")
    press("Escape")
    one.expect(one.get("#object-remove")).to_be_disabled()
    press("]")
    one.expect(one.get("#timeline .selected .text")).to_have_text("object 1")
    press("Delete")
    one.expect(one.get("#status")).to_have_text("Removed object 1.")
    one.expect(rows(one)).to_have_text([])


def test_tracking_is_stopped(server, browser, clip):
  with user(browser, server) as one:
    ready(one, clip)
    one.click(*LION)
    one.get("#video-direction").select_option("both")
    one.get("#video-track").click()
    one.expect(one.get("#video-track")).to_have_text("Stop")
    one.get("#video-track").click()
    one.expect(one.get("#video-track")).to_have_text("Track")
    one.expect(one.get("#status")).to_contain_text("frame")
    one.expect(one.get("#alert")).to_be_hidden()


def test_files_that_are_no_videos_and_images_after_videos(server, browser, clip, tmp_path):
  with user(browser, server) as one:
    text = tmp_path / "notes.mp4"
    text.write_text("notes\n" * 100)
    one.get("#file-input").set_input_files(text)
    one.expect(one.get("#alert")).to_contain_text("notes.mp4: the uploaded video is not a video")
    one.expect(one.get("#welcome")).to_be_visible()
    ready(one, clip)
    one.click(*LION)
    one.size = (640, 480)
    one.get("#file-input").set_input_files(STATIC / "lion.jpg")
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    one.expect(one.get("#video")).to_be_hidden()
    assert any(url.startswith(f"{server.url}/v1/videos/") for url in one.requests)
    one.ask("lion")
    assert one.instances() == ["lion"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_fault_in_a_video(server, browser, clip, scheme):
  from axe_playwright_python.sync_playwright import Axe

  with user(browser, server, color_scheme=scheme) as one:
    ready(one, clip)
    one.click(*LION)
    one.get("#timeline .name").first.focus()
    found = Axe().run(one.page)
    assert found.violations_count == 0, found.generate_report()
