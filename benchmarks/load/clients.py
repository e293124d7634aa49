"""Clients of the load test: they upload images, prompt them, and compare every answer."""

import http.client
import json
import random
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from load import digest

TOLERANCE = 1e-5  # of scores and boxes, if the batch shapes differ
TIMEOUT = 60.0
UPLOAD, PROMPT, DELETE = "upload", "prompt", "delete"
_IMAGE = {"Content-Type": "image/jpeg"}
_JSON = {"Content-Type": "application/json"}


class Call(NamedTuple):
  """An answered request: when it was sent, its seconds, and its number of prompts."""

  kind: str
  sent: float
  seconds: float
  prompts: int


class Material(NamedTuple):
  """Images with the bodies of their requests, and the answers by digest."""

  images: list[tuple[bytes, list[bytes]]]
  answers: dict[str, Any]


def read_material(work: Path) -> Material:
  content = json.loads((work / "answers.json").read_text())
  images = [
    ((work / "images" / image["file"]).read_bytes(), [body.encode() for body in image["requests"]])
    for image in content["images"]
  ]
  return Material(images, content["answers"])


class Pace:
  """Lets all clients together send at most `rate` requests a second."""

  def __init__(self, rate: float | None):
    self._interval = 1 / rate if rate else 0.0
    self._next, self._lock = time.monotonic(), threading.Lock()

  def wait(self) -> None:
    with self._lock:
      self._next = max(self._next + self._interval, time.monotonic() - 1)
      delay = self._next - time.monotonic()
    if self._interval and delay > 0:
      time.sleep(delay)


class Client(threading.Thread):
  """One client with one connection.

  Attributes:
    calls: answered requests.
    busy: answers 429, each of which is tried again.
    faults: other errors, and wrong answers.
    exact, close: answers equal to those of `Sam3` to the bit, and within `TOLERANCE`.
  """

  def __init__(self, port: int, material: Material, seed: int, stop: threading.Event, pace: Pace):
    super().__init__(daemon=True)
    self._port, self._material, self._stop_event, self._pace = port, material, stop, pace
    self._rng = random.Random(seed)
    self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)
    self.calls: list[Call] = []
    self.faults: list[str] = []
    self.busy = self.exact = self.close = 0

  def run(self) -> None:
    while not self._stop_event.is_set():
      try:
        self.cycle(*self._rng.choice(self._material.images))
      except (OSError, http.client.HTTPException, ValueError, KeyError) as error:
        self.faults.append(f"{type(error).__name__}: {error}")
        self._connection.close()
        time.sleep(0.1)

  def cycle(self, image: bytes, requests: list[bytes]) -> None:
    """Uploads an image, sends all its requests in a random order, and mostly deletes it."""
    uploaded = self._call(UPLOAD, "POST", "/v1/images", image, _IMAGE, 0)
    if uploaded is None:
      return
    wanted = self._material.answers[digest(image)]
    if any(uploaded[name] != wanted[name] for name in ("width", "height")):
      self.faults.append(f"wrong size: {uploaded}")
    path = f"/v1/images/{uploaded['id']}"
    for body in self._rng.sample(requests, len(requests)):
      wanted = self._material.answers[digest(body)]
      count = len(wanted["concepts"]) + len(wanted["visual"])
      got = self._call(PROMPT, "POST", f"{path}/prompts", body, _JSON, count)
      if got is not None:
        self._compare(got, wanted)
    if self._rng.random() < 0.75:
      self._call(DELETE, "DELETE", path, None, {}, 0)

  def _call(
    self, kind: str, method: str, path: str, body: bytes | None, headers: dict, prompts: int
  ) -> Any:
    """The answer to a request; tries again after 429. None if the run ended."""
    while not self._stop_event.is_set():
      self._pace.wait()
      sent = time.monotonic()
      self._connection.request(method, path, body, headers)
      response = self._connection.getresponse()
      data = response.read()
      seconds = time.monotonic() - sent
      if response.status == 429:
        self.busy += 1
        time.sleep(float(response.getheader("Retry-After", "1")) * self._rng.uniform(0.5, 1.5))
        continue
      if response.status not in (200, 201, 204):
        self.faults.append(f"{method}: {response.status} {data[:200].decode(errors='replace')}")
        return None
      self.calls.append(Call(kind, sent, seconds, prompts))
      return json.loads(data) if data else {}
    return None

  def _compare(self, got: Any, wanted: Any) -> None:
    difference = compare(got, wanted)
    if difference == 0:
      self.exact += 1
    elif difference <= TOLERANCE:
      self.close += 1
    else:
      self.faults.append(f"a wrong answer: {json.dumps(got)[:300]}")


def compare(got: Any, wanted: Any) -> float:
  """The largest difference of scores, and of boxes as shares of the image.

  Infinite if masks or numbers of instances differ.
  """
  pairs = [("concepts", "instances"), ("visual", "masks")]
  worst = 0.0
  for kind, rows in pairs:
    if len(got[kind]) != len(wanted[kind]):
      return float("inf")
    for one, expected in zip(got[kind], wanted[kind], strict=True):
      if len(one[rows]) != len(expected[rows]):
        return float("inf")
      for row, right in zip(one[rows], expected[rows], strict=True):
        if row["mask"] != right["mask"]:
          return float("inf")
        corners = zip(row["box"], right["box"], strict=True)
        sides = max(right["mask"]["size"])
        worst = max(worst, abs(row["score"] - right["score"]))
        worst = max(worst, *(abs(a - b) / sides for a, b in corners))
  return worst
