"""Clients that misbehave: they disconnect, send half a body, or send a byte a second."""

import abc
import collections
import contextlib
import random
import socket
import threading
import time

TIMEOUT = 60.0
PAUSE = 2.0  # seconds between two connections: each may cost the server an encoded image


class BadClient(threading.Thread, abc.ABC):
  """Repeats `misbehave` until the run ends.

  Attributes:
    ends: how the connections ended, with their number.
  """

  name_of_kind = ""

  def __init__(self, port: int, image: bytes, stop: threading.Event):
    super().__init__(daemon=True)
    self._port, self._image, self._stop_event = port, image, stop
    self._rng = random.Random(self.name_of_kind)
    self.ends: collections.Counter[str] = collections.Counter()

  def run(self) -> None:
    while not self._stop_event.is_set():
      try:
        with socket.create_connection(("127.0.0.1", self._port), TIMEOUT) as connection:
          self.ends[self.misbehave(connection)] += 1
      except OSError as error:
        self.ends[type(error).__name__] += 1
      self._stop_event.wait(PAUSE)

  @abc.abstractmethod
  def misbehave(self, connection: socket.socket) -> str:
    """Uses a connection; returns how it ended."""

  def _head(self, length: int | None = None) -> bytes:
    lines = [
      "POST /v1/images HTTP/1.1",
      f"Host: 127.0.0.1:{self._port}",
      "Content-Type: image/jpeg",
      f"Content-Length: {len(self._image) if length is None else length}",
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class Disconnecting(BadClient):
  """Sends an upload and leaves at a random moment before the answer."""

  name_of_kind = "disconnects"

  def misbehave(self, connection: socket.socket) -> str:
    connection.sendall(self._head() + self._image)
    self._stop_event.wait(self._rng.uniform(0, 0.2))
    return "left"


class HalfBody(BadClient):
  """Announces a body, sends half of it and leaves."""

  name_of_kind = "half a body"

  def misbehave(self, connection: socket.socket) -> str:
    connection.sendall(self._head() + self._image[: len(self._image) // 2])
    self._stop_event.wait(self._rng.uniform(0, 0.5))
    return "left"


class Slow(BadClient):
  """Sends its headers or its body at one byte a second, until the server ends the connection."""

  name_of_kind = "a byte a second"

  def misbehave(self, connection: socket.socket) -> str:
    data = self._head() + self._image
    if self._rng.random() < 0.5:
      connection.sendall(self._head())
      data = self._image
    connection.settimeout(0.01)
    for i in range(len(data)):
      with contextlib.suppress(TimeoutError):
        answer = connection.recv(200)
        return answer.partition(b"\r\n")[0].decode("latin-1")[9:12] or "closed"
      if self._stop_event.wait(1):
        return "run ended"
      connection.sendall(data[i : i + 1])
    return "sent all"


def start_all(port: int, image: bytes, stop: threading.Event) -> list[BadClient]:
  """One of each kind."""
  clients = [kind(port, image, stop) for kind in (Disconnecting, HalfBody, Slow)]
  for client in clients:
    client.start()
  return clients


def report(clients: list[BadClient]) -> dict[str, dict[str, int]]:
  """How their connections ended."""
  return {client.name_of_kind: dict(client.ends) for client in clients}


def wait(clients: list[BadClient]) -> None:
  end = time.monotonic() + TIMEOUT
  for client in clients:
    client.join(max(0.0, end - time.monotonic()))
