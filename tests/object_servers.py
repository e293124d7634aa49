"""Local servers for objects: buckets, the Hugging Face hub, a web server, and one with faults.

`Faults` stands between a client and any of these servers. It answers some requests with errors,
cuts answers off, or drops connections, and counts the requests.
"""

import collections
import contextlib
import hashlib
import http.client
import http.server
import json
import logging
import random
import threading
import urllib.parse

import buckets
import fsspec
import pytest

from sam3_jax.storage import retries, store

KINDS = ("500", "503", "429", "cut", "drop", "lost")
QUICK = retries.RetryPolicy(attempts=5, first=0.001, longest=0.01, read_timeout=5.0)


@contextlib.contextmanager
def serving(server):
  """Runs a server in a thread."""
  thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def quick_stores(monkeypatch):
  """New connections to stores, whose requests are repeated without waiting."""
  monkeypatch.setattr(retries, "POLICY", QUICK)
  store._open.cache_clear()
  try:
    yield
  finally:
    store._open.cache_clear()


@contextlib.contextmanager
def cloud_storage(monkeypatch, *, faults=None):
  """A server of buckets, which the variables of the environment name; behind `faults`, if given."""
  with serving(buckets.Server()) as server, contextlib.ExitStack() as stack:
    address = server.address
    if faults is not None:
      faults.upstream = server.server_port
      address = stack.enter_context(serving(faults)).address
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
    with quick_stores(monkeypatch):
      yield server


@contextlib.contextmanager
def moto():
  """A server of S3 with an empty bucket called `bucket`; yields its port."""
  import boto3
  from moto.moto_server.threaded_moto_server import ThreadedMotoServer

  logging.getLogger("werkzeug").setLevel(logging.ERROR)
  server = ThreadedMotoServer(port=0)
  server.start()
  port = server.get_host_and_port()[1]
  keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "region_name": "us-east-1"}
  boto3.client("s3", endpoint_url=f"http://localhost:{port}", **keys).create_bucket(Bucket="bucket")
  try:
    yield port
  finally:
    server.stop()


class Files(http.server.ThreadingHTTPServer):
  """A web server with files by path; it also answers the requests of the hub's API for datasets.

  The dataset is org/data, and its files are those below `/data/`. `seen` has the path and the
  Authorization header of each request.
  """

  daemon_threads = True
  commit = "0123456789abcdef0123456789abcdef01234567"

  def __init__(self, page=1000):
    super().__init__(("localhost", 0), _FileHandler)
    self.seen = []
    self.files, self.page, self.address = {}, page, f"http://localhost:{self.server_port}"

  def handle_error(self, *_):
    """A client that hangs up."""

  def describe(self, name):
    data = self.files["/data/" + name]
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


class _FileHandler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Files

  def do_GET(self):
    self.server.seen.append((self.path, self.headers.get("Authorization")))
    path, _, text = self.path.partition("?")
    path, query = urllib.parse.unquote(path), dict(urllib.parse.parse_qsl(text))
    api = "/api/datasets/org/data/"
    if path == f"{api}revision/main":
      return self.answer(json.dumps({"sha": self.server.commit}).encode())
    if path.startswith(f"{api}tree/{self.server.commit}"):
      folder = path.removeprefix(f"{api}tree/{self.server.commit}").strip("/")
      return self.tree(folder, int(query.get("cursor", 0)))
    path = path.replace(f"/datasets/org/data/resolve/{self.server.commit}/", "/data/")
    if path not in self.server.files:
      return self.answer(b"", 404)
    data = self.server.files[path]
    headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
    wanted = self.headers.get("Range", "").removeprefix("bytes=")
    if not wanted:
      return self.answer(data, 200, headers)
    begin, _, end = wanted.partition("-")
    end = min(int(end or len(data)), len(data) - 1)
    if int(begin) >= len(data):
      return self.answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
    return self.answer(data[int(begin) : end + 1], 206, headers)

  def tree(self, folder, start):
    prefix = f"/data/{folder}/".replace("//", "/")
    names = [name[len("/data/") :] for name in self.server.files if name.startswith(prefix)]
    if not names:
      return self.answer(b"", 404)
    page = names[start : start + self.server.page]
    headers = {}
    if start + len(page) < len(names):
      headers["Link"] = f'<{self.server.address}/x?cursor={start + len(page)}>; rel="next"'
    return self.answer(json.dumps(list(map(self.server.describe, page))).encode(), 200, headers)

  def do_POST(self):
    self.server.seen.append((self.path, self.headers.get("Authorization")))
    names = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["paths"]
    found = [self.server.describe(name) for name in names if "/data/" + name in self.server.files]
    self.answer(json.dumps(found).encode())

  def answer(self, data, status=200, headers=None):
    self.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)

  def log_message(self, *_):
    pass


class Faults(http.server.ThreadingHTTPServer):
  """Forwards requests to a server on this machine, and makes faults.

  The kinds of faults: a status; `cut`, the answer ends early; `drop`, the connection is closed
  before the request is forwarded; `lost`, it is closed after the request has taken effect.

  Attributes:
    plan: kinds of faults of the next requests; None for no fault. Then faults are random.
    rate: fraction of the requests that fail at random.
    seen: how often each request was made, by method, path and range.
    paths: a fault is made only in requests whose path contains it.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self, rate=0.0, seed=0, kinds=KINDS):
    super().__init__(("localhost", 0), _FaultHandler)
    self.rate, self.kinds, self.random = rate, kinds, random.Random(seed)
    self.plan, self.seen, self.upstream = collections.deque(), collections.Counter(), 0
    self.requests = self.faults = 0
    self.paths, self.lock = "", threading.Lock()
    self.address = f"http://localhost:{self.server_port}"

  def handle_error(self, *_):
    """A client that hangs up."""

  def fault(self, path):
    with self.lock:
      self.requests += 1
      if self.paths not in path:
        return None
      chosen = self.plan.popleft() if self.plan else None
      if chosen is None and self.random.random() < self.rate:
        chosen = self.random.choice(self.kinds)
      self.faults += chosen is not None
      return chosen


class _FaultHandler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Faults

  def forward(self):
    body = buckets.Handler.body(self)
    fault = self.server.fault(self.path)
    with self.server.lock:
      self.server.seen[self.command, self.path, self.headers.get("Range")] += 1
    if fault and fault.isdigit():
      self.send_response(int(fault))
      self.send_header("Content-Length", "0")
      self.end_headers()
      return
    if fault == "drop":
      self.close_connection = True
      return
    upstream = http.client.HTTPConnection("localhost", self.server.upstream)
    headers = {k: v for k, v in self.headers.items() if k != "Transfer-Encoding"}
    upstream.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
    answer = upstream.getresponse()
    data = answer.read()
    upstream.close()
    if fault == "lost":
      self.close_connection = True
      return
    self.send_response(answer.status)
    for name, value in answer.getheaders():
      if name not in ("Transfer-Encoding", "Content-Length", "Server", "Date"):
        self.send_header(name, value)
    length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
    if answer.status not in (204, 304):
      self.send_header("Content-Length", str(length or 0))
    self.end_headers()
    if fault == "cut" and len(data) > 1:
      data, self.close_connection = data[: len(data) // 2], True
    self.wfile.write(data)

  do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

  def log_message(self, *_):
    pass


@pytest.fixture
def bucket(monkeypatch):
  with cloud_storage(monkeypatch) as server:
    yield server


@pytest.fixture
def faults(monkeypatch):
  """A server of buckets behind one that makes the faults of `plan`."""
  proxy = Faults()
  with cloud_storage(monkeypatch, faults=proxy) as server:
    proxy.server = server
    yield proxy


@pytest.fixture
def web(monkeypatch):
  """A web server that is also the hub."""
  with serving(Files()) as server:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
    with quick_stores(monkeypatch):
      yield server
