"""The page of `sam3-jax serve` in headless Chromium: a server, a browser, and what a user does.

The browser is Debian's Chromium if it is on PATH, else the one that `playwright install chromium`
has installed.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TINY = Path(__file__).parents[1] / "checkpoints" / "sam3-tiny"
SECONDS = 60_000  # milliseconds that a server on a busy machine may take for an answer
MARGIN = 16  # pixels around a fitted image; see transform.js

_SERVE = "from sam3_jax.cli.main import entry; entry()"


class Server:
  """A server in a process of its own, on a port that stays the same after a restart."""

  def __init__(self, log: Path):
    self.log = log
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.port = free.getsockname()[1]
    self.url = f"http://127.0.0.1:{self.port}"
    self.process: subprocess.Popen[bytes] | None = None

  def start(self) -> None:
    command = [sys.executable, "-c", _SERVE, "serve", "--port", str(self.port)]
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with self.log.open("ab") as log:
      self.process = subprocess.Popen(
        [*command, "--checkpoint", str(TINY), "--no-access-log"], stderr=log, stdout=log, env=env
      )

  def wait(self, seconds: float = 300) -> None:
    """Waits until the server is ready."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
      assert self.process is not None
      assert self.process.poll() is None, self.log.read_text()
      with contextlib.suppress(urllib.error.URLError, OSError):
        urllib.request.urlopen(f"{self.url}/readyz", timeout=5).close()
        return
      time.sleep(0.2)
    raise AssertionError(f"the server was not ready after {seconds} s: {self.log.read_text()}")

  def kill(self) -> None:
    if self.process is not None:
      self.process.send_signal(signal.SIGKILL)
      self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
  one = Server(tmp_path_factory.mktemp("server") / "log.txt")
  one.start()
  try:
    one.wait()
    yield one
  finally:
    one.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
  sync_api = pytest.importorskip("playwright.sync_api")
  with sync_api.sync_playwright() as playwright:
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    options: dict[str, Any] = {"args": ["--no-sandbox", *camera]}
    if chromium := shutil.which("chromium"):
      options["executable_path"] = chromium
    one = playwright.chromium.launch(**options)
    yield one
    one.close()


class User:
  """A user of the page, who fails the test if the page has an error or asks another host.

  `prepare(page)` is called before the page is loaded; `options` are those of a browser context.
  """

  def __init__(self, browser: Any, server: Server, prepare: Any = None, **options: Any):
    from playwright.sync_api import expect

    expect.set_options(timeout=SECONDS)
    self.expect = expect
    options.setdefault("viewport", {"width": 1280, "height": 800})
    self.context = browser.new_context(accept_downloads=True, **options)
    self.page = self.context.new_page()
    self.errors: list[str] = []
    self.requests: list[str] = []
    self.page.on("pageerror", lambda error: self.errors.append(str(error)))
    self.page.on("request", lambda request: self.requests.append(request.url))
    self.url = server.url
    self.size = (640, 480)  # of the open image
    if prepare:
      prepare(self.page)
    self.page.goto(server.url)
    expect(self.page.locator("#model-button")).not_to_have_text("…")

  def close(self) -> None:
    """Closes the page; raises if it had an error or a request went elsewhere."""
    self.context.close()
    assert self.errors == []
    elsewhere = [url for url in self.requests if not url.startswith((self.url, "blob:"))]
    assert elsewhere == []

  def get(self, selector: str) -> Any:
    return self.page.locator(selector)

  def example(self, number: int = 0) -> None:
    """Opens an example image and waits until it is encoded."""
    self.get("#examples button").nth(number).click()
    self.expect(self.get("#status")).to_have_text("The image is ready.")

  def ask(self, phrase: str) -> None:
    """Types a phrase, presses Enter and waits for the answer."""
    self.get("#phrase").fill(phrase)
    self.get("#phrase").press("Enter")
    self.idle()

  def idle(self) -> None:
    """Waits until every prompt has an answer."""
    self.expect(self.get("body[data-busy]")).to_have_count(0)

  def tool(self, mode: str) -> None:
    self.get(f"#tools label:has([value={mode}])").click()

  def negative(self) -> None:
    self.get("#sign label:has([value='0'])").click()

  def screen(self, x: float, y: float) -> tuple[float, float]:
    """The place on the screen of a pixel of the fitted image."""
    size = self.size
    box = self.get("#canvas").bounding_box()
    scale = min((box["width"] - 2 * MARGIN) / size[0], (box["height"] - 2 * MARGIN) / size[1], 4)
    left = box["x"] + (box["width"] - size[0] * scale) / 2
    top = box["y"] + (box["height"] - size[1] * scale) / 2
    return left + x * scale, top + y * scale

  def click(self, x: float, y: float, **options: Any) -> None:
    """Clicks on a pixel of the image."""
    self.page.mouse.click(*self.screen(x, y), **options)
    self.idle()

  def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
    """Drags from a pixel of the image to another."""
    self.page.mouse.move(*self.screen(x0, y0))
    self.page.mouse.down()
    self.page.mouse.move(*self.screen(x1, y1), steps=5)
    self.page.mouse.up()
    self.idle()

  def color(self, x: float, y: float) -> list[int]:
    """Red, green and blue of the canvas at a pixel of the image."""
    left, top = self.screen(x, y)
    box = self.get("#canvas").bounding_box()
    return self.page.evaluate(
      """([x, y]) => new Promise((resolve) => requestAnimationFrame(() => {
        const canvas = document.querySelector("#canvas");
        const at = [x, y].map((value) => Math.round(value * devicePixelRatio));
        resolve([...canvas.getContext("2d").getImageData(...at, 1, 1).data].slice(0, 3));
      }))""",
      [left - box["x"], top - box["y"]],
    )

  def prompts(self) -> list[str]:
    return self.get("#prompts .text").all_inner_texts()

  def instances(self) -> list[str]:
    return self.get("#instances .text").all_inner_texts()

  def download(self, button: str, to: Path) -> Path:
    with self.page.expect_download() as download:
      self.get(button).click()
    path = to / download.value.suggested_filename
    download.value.save_as(path)
    return path

  def asked(self) -> int:
    """The number of prompts requests so far."""
    return sum(url.endswith(("/prompts", "/everything")) for url in self.requests)


@contextlib.contextmanager
def user(browser: Any, server: Server, prepare: Any = None, **options: Any) -> Iterator[User]:
  one = User(browser, server, prepare, **options)
  yield one
  one.close()
