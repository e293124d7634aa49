"""The server on a socket: slow and broken clients, large headers, disconnects, cookies, CORS."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest
import uvicorn
from server_app import error_of, png, served, small_model, upload

from sam3_jax.server import protocol
from sam3_jax.server.app import create_app
from sam3_jax.server.settings import Settings

pytestmark = pytest.mark.slow  # its clients wait

CAT = {"concepts": [{"phrase": "cat"}]}


@contextlib.contextmanager
def listening(**settings: Any) -> Iterator[tuple[int, Any]]:
  """A server on a free port, and its service."""
  app = create_app(small_model(), Settings(**({"readers": 0} | settings)), compiled=False)
  options = {"http": protocol.Protocol, "ws": "none", "lifespan": "on", "log_config": None}
  limit = {"h11_max_incomplete_event_size": protocol.MAX_HEADERS}
  server = uvicorn.Server(uvicorn.Config(app, **options, **limit))
  sock = socket.create_server(("127.0.0.1", 0))
  thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
  thread.start()
  try:
    while not server.started:
      time.sleep(0.01)
    assert app.state.service.engine.wait_ready(10)
    yield sock.getsockname()[1], app.state.service
  finally:
    server.should_exit = True
    thread.join(20)


def call(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
  connection = HTTPConnection("127.0.0.1", port, timeout=20)
  connection.request(method, path, body or None, headers)
  response = connection.getresponse()
  data = response.read()
  connection.close()
  return response.status, json.loads(data) if data else None


def raw(port: int, *parts: bytes, pause: float = 0.0) -> bytes:
  """Sends parts of a request; returns all that the server sends until it closes."""
  with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
    with contextlib.suppress(OSError):  # the server may close before it has read everything
      for part in parts:
        connection.sendall(part)
        time.sleep(pause)
    received = b""
    with contextlib.suppress(ConnectionResetError):
      while data := connection.recv(65536):
        received += data
    return received


def parsed(answer: bytes) -> tuple[int, str]:
  head, _, body = answer.partition(b"\r\n\r\n")
  assert b"content-security-policy" in head.lower()
  return int(head.split()[1]), json.loads(body)["error"]["code"]


def head(port: int, length: int) -> bytes:
  return (
    f"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {length}\r\n\r\n"
  ).encode()


def is_alive(port: int) -> bool:
  return call(port, "POST", "/v1/images", png())[0] == 201


def test_a_slow_body_is_cut_and_harms_nobody():
  with listening(body_seconds=0.5, body_rate=1e6) as (port, _):
    start = time.monotonic()
    answers = []
    slow = threading.Thread(
      target=lambda: answers.append(raw(port, head(port, 100), *[b"x"] * 20, pause=0.2))
    )
    slow.start()
    assert is_alive(port)
    slow.join()
    assert parsed(answers[0]) == (408, "timeout")
    assert time.monotonic() - start < 15


def test_half_a_body_leaves_nothing():
  with listening(body_seconds=5.0) as (port, service):
    with socket.create_connection(("127.0.0.1", port)) as connection:
      connection.sendall(head(port, 1000) + b"x" * 500)
      while not list(service.store.uploads.iterdir()):
        time.sleep(0.01)
    for _ in range(500):
      if not list(service.store.uploads.iterdir()):
        break
      time.sleep(0.01)
    assert list(service.store.uploads.iterdir()) == []
    assert is_alive(port)


def test_broken_and_large_headers(monkeypatch):
  monkeypatch.setattr(protocol, "HEADER_SECONDS", 0.5)
  with listening() as (port, _):
    large = b"GET /healthz HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000
    assert parsed(raw(port, large)) == (431, "headers_too_large")
    many = b"GET /healthz HTTP/1.1\r\n" + b"A: b\r\n" * 20_000
    assert parsed(raw(port, many)) == (431, "headers_too_large")
    for broken in (
      b"hello\r\n\r\n",
      b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
      b"GET / HTTP/9\r\n\r\n",
    ):
      assert parsed(raw(port, broken)) == (400, "bad_request")
    both = (
      b"POST /v1/images HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\n"
      b"Content-Length: 6\r\n\r\nhello"
    )
    assert parsed(raw(port, both)) == (400, "bad_request")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as idle:
      idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
      assert idle.recv(65536).startswith(b"HTTP/1.1 200")
      time.sleep(0.8)  # longer than the time for headers
      idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
      assert idle.recv(65536).startswith(b"HTTP/1.1 200")
    with socket.create_connection(("127.0.0.1", port), timeout=20) as silent:
      assert silent.recv(65536) == b""  # closed
    slow = [bytes([byte]) for byte in b"GET / HTTP/1.1\r\n"]
    assert parsed(raw(port, *slow, pause=0.1)) == (408, "timeout")
    two_hosts = b"GET /v1/model HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil\r\n\r\n"
    assert parsed(raw(port, two_hosts))[0] in (400, 403)
    assert is_alive(port)


def test_a_client_that_does_not_read_is_cut(monkeypatch):
  monkeypatch.setattr(protocol, "READ_SECONDS", 0.5)
  with listening(max_requests=2) as (port, _):
    request = f"GET /static/lion.jpg HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
      for _ in range(2):
        silent = stack.enter_context(socket.socket())
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        silent.connect(("127.0.0.1", port))
        silent.sendall(request * 100)
      statuses = [call(port, "GET", "/v1/model")[0]]
      end = time.monotonic() + 15
      while statuses[-1] != 200 and time.monotonic() < end:
        assert call(port, "GET", "/healthz")[0] == 200  # else a probe would restart the server
        time.sleep(0.1)
        statuses.append(call(port, "GET", "/v1/model")[0])
      assert statuses[0] == 429
      assert statuses[-1] == 200


def test_work_of_a_client_that_disconnects_is_dropped():
  with listening() as (port, service):
    image = call(port, "POST", "/v1/images", png())[1]["id"]
    began, gate = threading.Event(), threading.Event()
    compute = service.engine._work.compute

    def wait(units):
      began.set()
      assert gate.wait(20)
      return compute(units)

    service.engine._work.compute = wait
    path, body = f"/v1/images/{image}/prompts", json.dumps({"concepts": [{"phrase": "a"}] * 9})
    connections = []
    for _ in range(2):  # the first one is being computed when it disconnects, the second waits
      connection = HTTPConnection("127.0.0.1", port)
      connection.request("POST", path, body, {"Content-Type": "application/json"})
      connections.append(connection)
    assert began.wait(10)
    while service.engine.waiting("prompts") < 17:
      time.sleep(0.01)
    for connection in connections:
      connection.close()
    time.sleep(0.2)
    gate.set()
    while service.engine.waiting("prompts"):
      time.sleep(0.01)
    status, _ = call(
      port, "POST", path, json.dumps(CAT).encode(), **{"Content-Type": "application/json"}
    )
    assert status == 200
    assert b"sam3_dropped_total 2.0" in service.metrics.text()


def test_beyond_the_bound_clients_are_told_to_retry():
  with listening(max_images=2) as (port, service):
    started, gate = threading.Event(), threading.Event()
    compute = service.engine._work.compute

    def wait_and_compute(units):
      started.set()
      return gate.wait(20) and compute(units)

    service.engine._work.compute = wait_and_compute
    statuses = []
    threads = [
      threading.Thread(target=lambda: statuses.append(call(port, "POST", "/v1/images", png())))
      for _ in range(6)
    ]
    threads[0].start()
    assert started.wait(20)
    for thread in threads[1:]:
      thread.start()
    while len(statuses) < 3:  # one is computed, two wait
      time.sleep(0.01)
    gate.set()
    for thread in threads:
      thread.join()
    assert sorted(status for status, _ in statuses) == [201] * 3 + [429] * 3
    assert {value["error"]["code"] for status, value in statuses if status == 429} == {"busy"}


@pytest.mark.slow
def test_hostile_images_end_only_their_reader(tmp_path):
  """With real processes: a reader that dies, and one that takes too long, are replaced."""
  with listening(readers=1) as (port, service):
    assert is_alive(port)
    process = service.readers._processes.get()
    process.kill()
    service.readers._processes.put(process)
    status, value = call(port, "POST", "/v1/images", png())
    assert (status, value["error"]["code"]) == (415, "unsupported_image")
    assert "ended the process" in value["error"]["message"]
    assert is_alive(port)
    service.readers._seconds = -1.0
    read = type(process).read
    try:
      type(process).read = lambda self, file, check: (check(), read(self, file, check=check))[1]
      status, value = call(port, "POST", "/v1/images", png())
    finally:
      type(process).read = read
    assert (status, value["error"]["code"]) == (415, "unsupported_image")
    service.readers._seconds = 20.0
    assert is_alive(port)


def test_cookie_of_the_page(tmp_path, monkeypatch):
  (tmp_path / "index.html").write_text("<!doctype html>")
  monkeypatch.setattr("sam3_jax.server.app.STATIC", tmp_path)
  with served(small_model()) as client:
    response = client.get("/")
    cookie = response.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert len(client.cookies["sam3_session"]) == 43
    assert "set-cookie" not in client.get("/").headers  # it is kept
    image = upload(client)
    client.cookies.clear()
    assert error_of(client.get(f"/v1/images/{image}")) == (404, "unknown_image")
    other = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert client.get("/", headers=other).status_code == 200  # a link to the page


def test_pages_of_another_site_only_if_allowed():
  origin = "https://tool.example"
  with served(small_model(), allow_origins=(origin,), token="a-token-of-tests") as client:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    preflight = client.options("/v1/images", headers=asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    bearer = {"Authorization": "Bearer a-token-of-tests"}
    got = client.get("/v1/model", headers={"Origin": origin} | bearer)
    assert got.headers["access-control-allow-origin"] == origin
    assert got.headers["vary"] == "Origin"
    assert error_of(client.get("/v1/model", headers={"Origin": origin})) == (401, "unauthorized")
    refused = client.options("/v1/images", headers=asked | {"Origin": "https://other.example"})
    assert error_of(refused) == (403, "forbidden_origin")
    plain = client.get("/v1/model", headers=bearer)
    assert "access-control-allow-origin" not in plain.headers
    basic = client.get("/v1/model", auth=("label-studio", "a-token-of-tests"))
    assert basic.status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "example.org"])
def test_other_hosts_need_a_token(host):
  with pytest.raises(ValueError, match="needs a token"):
    Settings(host=host)
  assert Settings(host=host, token="a-token-of-tests").token


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "[::1]", "127.1.2.3"])
def test_loopback_needs_no_token(host):
  assert Settings(host=host).token is None


def test_hosts_of_a_server_for_others():
  settings = {"host": "0.0.0.0", "token": "a-token-of-tests", "allow_hosts": ("sam.example",)}
  with served(small_model(), **settings) as client:
    for host in (
      "192.0.2.1:8000",
      "[2001:db8::1]:80",
      "sam.example",
      "localhost",
      socket.gethostname(),
    ):
      assert client.get("/healthz", headers={"Host": host}).status_code == 200
    assert error_of(client.get("/healthz", headers={"Host": "evil.example"}))[0] == 403


@pytest.mark.parametrize("token", ["short", "with a space in it", "ümlaut-ümlaut"])
def test_weak_tokens(token):
  with pytest.raises(ValueError, match="token must have"):
    Settings(token=token)
