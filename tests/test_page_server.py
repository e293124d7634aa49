"""How the page of `sam3-jax serve` deals with images from elsewhere and with other answers."""

import base64
import io
import json
from pathlib import Path

import browser_page
import pytest
from browser_page import user
from PIL import Image

pytestmark = pytest.mark.browser
server, browser = browser_page.server, browser_page.browser

MODEL = {
  "name": "sam3", "licence": "SAM License", "trained": True, "description": "A converted release.",
  "concepts": None, "visual": False, "image_size": 1008, "version": "0.1.0",
  "limits": {"bytes": 200},
}  # fmt: skip


def jpeg(size, orientation=1) -> bytes:
  buffer, exif = io.BytesIO(), Image.Exif()
  exif[0x0112] = orientation
  Image.new("RGB", size, (200, 30, 90)).save(buffer, "JPEG", exif=exif)
  return buffer.getvalue()


def bring(one, how: str, content: bytes) -> None:
  """Drops or pastes a JPEG file."""
  one.page.evaluate(
    """([how, text]) => {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], "brought.jpg", { type: "image/jpeg" }));
      const options = { bubbles: true, cancelable: true };
      const event = how === "drop"
        ? new DragEvent("drop", { ...options, dataTransfer: data })
        : new ClipboardEvent("paste", { ...options, clipboardData: data });
      document.querySelector("#canvas").dispatchEvent(event);
    }""",
    [how, base64.b64encode(content).decode()],
  )


@pytest.mark.parametrize("how", ["drop", "paste"])
def test_dropped_and_pasted_images(server, browser, how):
  with user(browser, server) as one:
    bring(one, how, jpeg((90, 60)))
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    label = "Image: brought.jpg, 90 by 60 pixels"
    one.expect(one.get("#canvas")).to_have_attribute("aria-label", label)


def test_a_rotated_photograph_has_the_coordinates_of_its_display(server, browser):
  with user(browser, server) as one:
    bring(one, "drop", jpeg((90, 60), orientation=6))
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    label = "Image: brought.jpg, 60 by 90 pixels"
    one.expect(one.get("#canvas")).to_have_attribute("aria-label", label)


def test_a_photograph_by_the_camera(server, browser):
  with user(browser, server) as one:
    one.get("#camera-button").click()
    one.expect(one.get("#camera")).to_be_visible()
    one.get("#camera-take").click()
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    assert "photograph.jpg" in one.get("#canvas").get_attribute("aria-label")


def test_the_token_leaves_the_address_bar_and_is_sent(server, browser):
  headers = []

  def prepare(page):
    page.on("request", lambda request: headers.append((request.url, request.headers)))

  with user(browser, server, prepare) as one:
    one.page.goto("about:blank")
    headers.clear()
    one.page.goto(f"{server.url}/#token=secret")
    one.expect(one.get("#model-button")).to_contain_text("sam3-tiny")
    assert one.page.url == f"{server.url}/"
    sent = {url: value.get("authorization") for url, value in headers if "/v1/" in url}
    assert sent == {f"{server.url}/v1/model": "Bearer secret"}


def test_a_converted_release_shows_its_license_and_limits(server, browser):
  def prepare(page):
    page.route("**/v1/model", lambda route: route.fulfill(json=MODEL))

  with user(browser, server, prepare) as one:
    one.expect(one.get("#model-button")).to_have_text("sam3 · SAM License")
    one.expect(one.get("#tools [value=click]")).to_be_disabled()
    one.get("#examples button").first.click()
    message = "lion.jpg has 97,765 bytes; the server takes 200 bytes at most."
    one.expect(one.get("#alert")).to_contain_text(message)


def test_a_small_model_lists_what_it_knows(server, browser):
  with user(browser, server) as one:
    one.expect(one.get("#model-button")).to_have_text("sam3-tiny · knows 78 objects")
    one.example()
    one.get("#model-button").click()
    buttons = one.get("#model .concepts button")
    assert buttons.count() == 78
    buttons.get_by_text("lion", exact=True).click()
    one.idle()
    assert one.instances() == ["lion"]


def test_a_busy_server_is_asked_again(server, browser):
  answers = []

  def refuse(route):
    answers.append(route.request.url)
    if len(answers) > 2:
      return route.fallback()
    error = {"error": {"code": "busy", "message": "The queue is full."}}
    return route.fulfill(status=429, json=error, headers={"Retry-After": "1"})

  with user(browser, server, lambda page: page.route("**/prompts", refuse)) as one:
    one.example()
    one.ask("lion")
    assert one.instances() == ["lion"]
    assert len(answers) == 3


def test_an_image_waits_for_a_server_that_still_compiles(server, browser):
  answers = []

  def refuse(route):
    answers.append(route.request.url)
    error = {"error": {"code": "not_ready", "message": "the server is compiling its programs."}}
    return route.fulfill(status=503, json=error) if len(answers) < 2 else route.fallback()

  def wait(route):
    answers.append(route.request.url)
    status = 503 if len(answers) < 4 else 200
    return route.fulfill(status=status, json={"status": "compiling"})

  def prepare(page):
    page.route("**/v1/images", refuse)
    page.route("**/readyz", wait)

  with user(browser, server, prepare) as one:
    one.example()
    one.ask("lion")
    assert one.instances() == ["lion"]
    one.expect(one.get("#alert")).to_be_hidden()
    assert [url.rpartition("/")[2] for url in answers] == ["images", *["readyz"] * 3, "images"]


def test_only_the_prompt_at_fault_fails(server, browser):
  with user(browser, server) as one:
    one.example()
    one.ask("lion, " + "x" * 150)
    one.expect(one.get("#alert")).to_contain_text("at most 30 are read. Use a short noun phrase.")
    assert "concepts[1]" not in one.get("#alert").inner_text()
    one.expect(one.get("#prompts .count")).to_have_text(["1", "failed"])
    assert one.instances() == ["lion"]


def test_a_phrase_that_failed_is_tried_on_the_next_image(server, browser):
  answers = []

  def refuse(route):
    answers.append(route.request.url)
    error = {"error": {"code": "internal", "message": "the server failed."}}
    return route.fulfill(status=500, json=error) if len(answers) < 2 else route.fallback()

  with user(browser, server, lambda page: page.route("**/prompts", refuse)) as one:
    one.example()
    one.ask("lion")
    one.expect(one.get("#alert")).to_contain_text("lion: the server failed.")
    bring(one, "drop", (Path(__file__).parents[1] / "docs" / "scene.jpg").read_bytes())
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    one.ask("lion")
    assert one.instances() == ["lion"]


def test_an_image_of_a_single_row(server, browser):
  with user(browser, server) as one:
    bring(one, "drop", jpeg((20_000, 1)))
    one.expect(one.get("#status")).to_have_text("The image is ready.")
    one.ask("zebra")
    message = "zebra: 0 instances (the model may not know it)"
    one.expect(one.get("#status")).to_have_text(message)


def test_a_refused_prompt_is_reported_once(server, browser):
  error = {"error": {"code": "invalid_prompt", "message": "The phrase is not supported."}}
  answers = []

  def refuse(route):
    answers.append(json.loads(route.request.post_data))
    if len(answers) > 2:
      return route.fallback()
    return route.fulfill(status=422, json=error)

  with user(browser, server, lambda page: page.route("**/prompts", refuse)) as one:
    one.example()
    one.ask("lion")
    one.expect(one.get("#alert")).to_contain_text("lion: The phrase is not supported.")
    assert len(answers) == 1
    one.ask("cat")
    one.expect(one.get("#alert")).to_contain_text("cat: The phrase is not supported.")
    assert [[entry["phrase"] for entry in one["concepts"]] for one in answers] == [
      ["lion"],
      ["cat"],
    ]
    one.get("#alert-retry").click()
    one.idle()
    assert one.instances() == ["lion", "cat"]
