"""Images are read from Label Studio's origin only, within bounds of size and time."""

import http.server
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from sam3_jax.server.data_uri import read_base64, read_data_uri
from sam3_jax.server.errors import ApiError
from sam3_jax.server.origin_client import Origin, OriginClient, parse_origin

IMAGE = bytes(range(256)) * 40
SECONDS = 0.6
ACCESS = "aaa.bbb.ccc"


class Site(http.server.BaseHTTPRequestHandler):
  """A Label Studio that behaves as its paths say. `seen` has the paths and the authorizations."""

  protocol_version = "HTTP/1.1"
  seen: list[tuple[str, str | None]]

  def do_GET(self):
    self.seen.append((self.path, self.headers["Authorization"]))
    name = self.path.rsplit("/", 1)[-1].partition("?")[0]
    getattr(self, f"send_{name}", self.send_missing)()

  def do_POST(self):
    body = self.rfile.read(int(self.headers["Content-Length"]))
    self.seen.append((self.path, body.decode()))
    self.respond(200, b'{"access": "%s"}' % ACCESS.encode())

  def respond(self, status: int, body: bytes = b"", length: int | None = None, **headers):
    self.send_response(status)
    self.send_header("Content-Length", str(len(body) if length is None else length))
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(body)

  def send_image(self):
    self.respond(200, IMAGE)

  def send_missing(self):
    self.respond(404, b"no")

  def send_inside(self):
    self.respond(302, Location="/data/image")

  def send_around(self):
    self.respond(302, Location="around")

  def send_outside(self):
    self.respond(302, Location=f"http://127.0.0.1:{self.server.other_port}/image")

  def send_file(self):
    self.respond(302, Location="file:///etc/passwd")

  def send_short(self):
    self.respond(200, IMAGE, len(IMAGE) + 5)
    self.close_connection = True

  def send_large(self):
    self.respond(200, IMAGE * 50)

  def send_garbage(self):
    self.wfile.write(b"\x00\x01\x02 no HTTP\r\n\r\n")
    self.close_connection = True

  def send_slow(self):
    self.respond(200, b"", 1000)
    self.drip()

  def send_endless(self):
    self.send_response(200)
    self.end_headers()  # without a length: the body lasts until the connection ends
    self.close_connection = True
    self.drip()

  def send_silent(self):
    time.sleep(3 * SECONDS)
    self.close_connection = True

  def send_headers(self):
    self.wfile.write(b"HTTP/1.1 200 OK\r\n")
    self.drip(b"X: y\r\n")

  def drip(self, part: bytes = b"x"):
    end = time.monotonic() + 4 * SECONDS
    try:
      while time.monotonic() < end:
        self.wfile.write(part)
        time.sleep(0.05)
    except OSError:
      pass
    self.close_connection = True

  def log_message(self, format, *args):
    pass


class Server(http.server.ThreadingHTTPServer):
  other_port: int

  def handle_error(self, request, client_address):
    pass  # the client has closed the connection


@pytest.fixture(scope="module")
def site() -> Iterator[Server]:
  """A Label Studio at `server_port`, and a host that must not be reached at `other_port`."""
  server, other = Server(("127.0.0.1", 0), Site), Server(("127.0.0.1", 0), OtherHost)
  server.other_port, OtherHost.reached = other.server_port, []
  threads = [threading.Thread(target=one.serve_forever, args=(0.01,)) for one in (server, other)]
  for thread in threads:
    thread.start()
  yield server
  for one in (server, other):
    one.shutdown()
    one.server_close()
  assert OtherHost.reached == []


class OtherHost(Site):
  reached: list[str]

  def do_GET(self):
    self.reached.append(self.path)
    self.respond(200, IMAGE)


@pytest.fixture
def read(site):
  """Reads with a client of the site; `read.seen` has what the site saw."""

  def call(source, *, key="secret", path="", max_bytes=100_000):
    origin = Origin("http", "127.0.0.1", site.server_port, path)
    return OriginClient(origin, key, max_bytes=max_bytes, seconds=SECONDS).read(source)

  Site.seen = call.seen = []
  return call


class TestOrigin:
  @pytest.mark.parametrize(
    ("url", "expected"),
    [
      ("http://localhost:8080", ("http", "localhost", 8080, "")),
      ("HTTP://LocalHost/", ("http", "localhost", 80, "")),
      ("https://label.example.org/studio/", ("https", "label.example.org", 443, "/studio")),
      ("http://[::1]:8080", ("http", "::1", 8080, "")),
    ],
  )
  def test_valid(self, url, expected):
    assert parse_origin(url) == expected
    assert str(parse_origin("http://[::1]:8080/")) == "http://[::1]:8080"

  @pytest.mark.parametrize(
    "url",
    ["", "localhost:8080", "ftp://a", "file:///etc", "http://", "http://u:p@a", "http://a?b",
     "http://a#b", "http://a b", "http://a:99999", "http://a\\b", "http://ä", "//a", "http://[::1"],
  )  # fmt: skip
  def test_invalid(self, url):
    with pytest.raises(ValueError, match="--label-studio-url must be like http://localhost:8080"):
      parse_origin(url)


class TestAllowed:
  def test_a_path(self, read):
    assert read("/data/upload/1/image?a=b") == IMAGE
    assert read.seen == [("/data/upload/1/image?a=b", "Token secret")]

  def test_a_url(self, read, site):
    assert read(f"http://127.0.0.1:{site.server_port}/image") == IMAGE
    assert read(f"HTTP://127.0.0.1:{site.server_port}/image#fragment") == IMAGE

  def test_without_a_key(self, read):
    assert read("/image", key=None) == IMAGE
    assert read.seen == [("/image", None)]

  def test_spaces_and_other_alphabets_are_quoted(self, read):
    assert read("/data/ä b/image?d=日本") == IMAGE
    assert read.seen[0][0] == "/data/%C3%A4%20b/image?d=%E6%97%A5%E6%9C%AC"
    assert read("/data/%C3%A4/image") == IMAGE
    assert read.seen[1][0] == "/data/%C3%A4/image"

  def test_below_a_path(self, read, site):
    assert read("/data/image", path="/studio") == IMAGE
    assert read("/studio/data/image", path="/studio") == IMAGE
    assert {path for path, _ in read.seen} == {"/studio/data/image"}
    with pytest.raises(ApiError, match="is not in http"):
      read(f"http://127.0.0.1:{site.server_port}/other/image", path="/studio")

  def test_redirects_within_the_origin(self, read):
    assert read("/inside") == IMAGE

  def test_personal_access_tokens(self, site, read):
    origin = Origin("http", "127.0.0.1", site.server_port, "")
    client = OriginClient(origin, "xxx.yyy.zzz", max_bytes=100_000, seconds=SECONDS)
    assert client.read("/image") == client.read("/image") == IMAGE
    refresh, *images = read.seen
    assert refresh == ("/api/token/refresh/", '{"refresh": "xxx.yyy.zzz"}')
    assert images == [("/image", f"Bearer {ACCESS}")] * 2  # one token for both


class TestRefused:
  @pytest.mark.parametrize(
    "source",
    [
      "http://example.org/image",
      "https://127.0.0.1:{port}/image",
      "http://127.0.0.1/image",
      "http://127.0.0.1:{other}/image",
      "http://localhost:{port}/image",
      "http://127.0.0.1:{port}@127.0.0.1:{other}/image",
      "http://user:secret@127.0.0.1:{port}/image",
      "http://127.0.0.1:{port}.example.org/image",
      "http://127.0.0.1.example.org:{port}/image",
      "http://127.0.0.1:{port}\\@127.0.0.1:{other}/image",
      "http://2130706433:{port}/image",
      "http://0x7f.1:{port}/image",
      "http://0177.0.0.1:{port}/image",
      "http://127.1:{port}/image",
      "http://[::1]:{port}/image",
      "http://[::ffff:127.0.0.1]:{port}/image",
      "http://[fe80::1%25lo]:{port}/image",
      "http://[::1/image",
      "//127.0.0.1:{other}/image",
      "///127.0.0.1:{other}/image@",
      "/\\127.0.0.1:{other}/image",
      "file:///etc/passwd",
      "file://127.0.0.1:{port}/etc/passwd",
      "ftp://127.0.0.1:{port}/image",
      "gopher://127.0.0.1:{port}/image",
      "s3://bucket/image",
      "/image\r\nX-Evil: 1",
      "/ima\x00ge",
      "http://127.0.0.1:99999/image",
      "http://127.0.0.1:{port}x/image",
      "",
      "/" + "x" * 4000,
    ],
  )
  def test_other_origins(self, read, site, source):
    source = source.format(port=site.server_port, other=site.other_port)
    with pytest.raises(ApiError, match=r"is not in http://127.0.0.1|answered 404"):
      read(source)
    assert all("evil" not in path.lower() for path, _ in read.seen)

  def test_redirects_elsewhere(self, read):
    for path in ("/outside", "/file"):
      with pytest.raises(ApiError, match="the only origin to read"):
        read(path)

  def test_endless_redirects(self, read):
    with pytest.raises(ApiError, match="redirects '/around' more than 3 times"):
      read("/around")

  def test_a_missing_file(self, read):
    with pytest.raises(ApiError, match="Label Studio answered 404"):
      read("/nothing")

  def test_a_truncated_file(self, read):
    with pytest.raises(ApiError, match=r"cannot be read \(IncompleteRead\)"):
      read("/short")

  def test_a_large_file(self, read):
    with pytest.raises(ApiError, match="more than 100000 bytes"):
      read("/large")

  def test_garbage(self, read):
    with pytest.raises(ApiError, match=r"cannot be read \(BadStatusLine\)"):
      read("/garbage")

  @pytest.mark.parametrize("path", ["/slow", "/endless", "/silent", "/headers"])
  def test_slow_responses(self, read, path):
    start = time.monotonic()
    with pytest.raises(ApiError, match=r"took longer than 0\.6 s"):
      read(path)
    assert time.monotonic() - start < 3 * SECONDS

  def test_nobody_listens(self):
    with socket.socket() as closed:
      closed.bind(("127.0.0.1", 0))
      origin = Origin("http", "127.0.0.1", closed.getsockname()[1], "")
      with pytest.raises(ApiError, match=r"cannot be read \(ConnectionRefusedError\)"):
        OriginClient(origin, None, max_bytes=10, seconds=SECONDS).read("/image")

  def test_tls_to_a_site_without_it(self, site):
    origin = Origin("https", "127.0.0.1", site.server_port, "")
    with pytest.raises(ApiError, match=r"cannot be read|took longer"):
      OriginClient(origin, None, max_bytes=10, seconds=SECONDS).read("/image")

  def test_a_refused_personal_access_token(self, site):
    origin = Origin("http", "127.0.0.1", site.server_port, "/large")
    client = OriginClient(origin, "a.b.c", max_bytes=100_000, seconds=SECONDS)
    Site.seen = []
    site.RequestHandlerClass.do_POST, before = Site.send_missing, Site.do_POST
    try:
      with pytest.raises(ApiError, match="answered 404 to --label-studio-key"):
        client.read("/image")
    finally:
      site.RequestHandlerClass.do_POST = before


class TestDataUri:
  @pytest.mark.parametrize(
    ("uri", "expected"),
    [
      ("data:image/png;base64,AAEC", b"\0\1\2"),
      ("DATA:;base64,", b""),
      ("data:,a%20b", b"a b"),
      ("data:image/png;charset=x;base64,AA==", b"\0"),
    ],
  )
  def test_valid(self, uri, expected):
    assert read_data_uri(uri, 100) == expected

  @pytest.mark.parametrize(
    ("uri", "match"),
    [
      ("data:image/png;base64", "not a data URI"),
      ("http://a,b", "not a data URI"),
      (f"data:{'x' * 201},a", "not a data URI"),
      ("data:;base64,AAE", "not valid base64"),
      ("data:;base64,A A E C", "not valid base64"),
      ("data:;base64,äöü", "not valid base64"),
      ("data:;base64," + "AAAA" * 40, "more than 100 bytes"),
      ("data:," + "a" * 101, "more than 100 bytes"),
      ("data:," + "a" * 301, "more than 100 bytes"),
    ],
  )
  def test_invalid(self, uri, match):
    with pytest.raises(ApiError, match=match):
      read_data_uri(uri, 100)

  def test_base64_of_the_largest_size(self):
    assert read_base64("AAAA" * 33 + "AA==", 100) == bytes(100)
