"""Reads files of Label Studio, and of no other host, with bounds on size and time.

A task names its image by a path of Label Studio or by a URL. Only the path and the query of it are
used: connections always go to the configured origin. So neither a task nor a redirect can make the
server reach another host.
"""

import contextlib
import http.client
import json
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote, urljoin, urlsplit

from sam3_jax.server.data_uri import too_large
from sam3_jax.server.errors import ApiError
from sam3_jax.utils.json_text import shown

MAX_REDIRECTS = 3  # all within the origin, such as to a path with a slash at its end
MAX_URL = 4_000  # characters
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_KEPT = "/%:@!$&'()*+,;=~-._?"  # characters that are not quoted in a path and a query
_JWT = re.compile(r"[\w-]+\.[\w-]+\.[\w-]+")
_ACCESS_SECONDS = 240  # access tokens of Label Studio are valid for 5 minutes
_ACCESS_BYTES = 100_000


class Origin(NamedTuple):
  """Where Label Studio is.

  Attributes:
    scheme: http or https.
    host: in lower case.
    port: also if it is the scheme's own.
    path: of Label Studio's root, without a slash at its end.
  """

  scheme: str
  host: str
  port: int
  path: str

  def __str__(self) -> str:
    return self.url("")

  def url(self, target: str) -> str:
    """The URL of a path and query of this host."""
    host = f"[{self.host}]" if ":" in self.host else self.host
    port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
    return f"{self.scheme}://{host}{port}{target}"


def parse_origin(url: str) -> Origin:
  """Parses `--label-studio-url`.

  Raises:
    ValueError: it is not an http or https URL with a host, or has a user, a query or a fragment.
  """
  try:
    parts = urlsplit(url)
    port = parts.port
  except ValueError:
    parts, port = urlsplit(""), None
  fits = parts.scheme in _PORTS and parts.hostname and url.isascii() and not _UNSAFE.search(url)
  if not fits or parts.query or parts.fragment or "@" in parts.netloc or " " in url:
    raise ValueError(
      f"--label-studio-url must be like http://localhost:8080; got {shown(url)}. A key is given "
      "with --label-studio-key."
    )
  host = (parts.hostname or "").lower()
  return Origin(parts.scheme, host, port or _PORTS[parts.scheme], parts.path.rstrip("/"))


class OriginClient:
  """Reads files of one Label Studio; may be used by several threads.

  Args:
    origin: of Label Studio.
    key: an access token, personal (a JWT) or legacy; None for none.
    max_bytes: of a file.
    seconds: for a file, from connecting to its last byte, with all redirects.
  """

  def __init__(self, origin: Origin, key: str | None, *, max_bytes: int, seconds: float = 20.0):
    self._origin, self._key = origin, key
    self._max_bytes, self._seconds = max_bytes, seconds
    self._access: tuple[str, float] | None = None  # an access token, and when to replace it
    self._lock = threading.Lock()

  def read(self, source: str) -> bytes:
    """The bytes of a file; blocks for at most `seconds`.

    Args:
      source: a path of Label Studio, or a URL of the origin.

    Raises:
      ApiError: the source is of another origin, too large or too slow, or Label Studio does not
        send it.
    """
    target = self._target(source)
    end = time.monotonic() + self._seconds
    for _ in range(MAX_REDIRECTS + 1):
      headers = {"Authorization": self._authorization(end)} if self._key else {}
      status, location, body = self._request("GET", target, headers, end, self._max_bytes)
      if status == 200:
        return body
      if status not in _REDIRECTS:
        raise _bad(f"Label Studio answered {status} for {shown(source)}; check --label-studio-key.")
      target = self._target(urljoin(self._origin.url(target), location))
    raise _bad(f"Label Studio redirects {shown(source)} more than {MAX_REDIRECTS} times.")

  def _target(self, source: str) -> str:
    """Path and query of a source, which must be in the origin."""
    fault = _bad(f"the image {shown(source)} is not in {self._origin}, the only origin to read.")
    if not source or len(source) > MAX_URL or _UNSAFE.search(source):
      raise fault
    try:
      parts = urlsplit(urljoin(self._origin.url("/"), source))
      other = (parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme))
    except ValueError:
      raise fault from None
    if other != self._origin[:3] or "@" in parts.netloc:
      raise fault
    path, prefix = parts.path or "/", self._origin.path
    if not path.startswith(f"{prefix}/"):
      if not source.startswith("/"):
        raise fault
      path = prefix + path  # Label Studio writes paths of uploaded files without its own
    return quote(path + (f"?{parts.query}" if parts.query else ""), safe=_KEPT)

  def _authorization(self, end: float) -> str:
    """The header's value; a personal access token is exchanged for one of a few minutes."""
    key = self._key or ""
    if not _JWT.fullmatch(key):
      return f"Token {key}"
    with self._lock:
      if self._access is None or time.monotonic() > self._access[1]:
        target = f"{self._origin.path}/api/token/refresh/"
        headers = {"Content-Type": "application/json"}
        sent = json.dumps({"refresh": key}).encode()
        status, _, body = self._request("POST", target, headers, end, _ACCESS_BYTES, sent)
        access = _access_token(body) if status == 200 else None
        if access is None:
          raise _bad(f"Label Studio answered {status} to --label-studio-key; make a new key.")
        self._access = access, time.monotonic() + _ACCESS_SECONDS
      return f"Bearer {self._access[0]}"

  def _request(
    self,
    method: str,
    target: str,
    headers: dict[str, str],
    end: float,
    max_bytes: int,
    body: bytes | None = None,
  ) -> tuple[int, str, bytes]:
    """Status, Location and body of a response; only a body of status 200 is read."""
    late = _bad(f"Label Studio took longer than {self._seconds:g} s to send an image.")
    try:
      with _connection(self._origin, end) as connection:
        connection.request(method, target, body, {"Accept-Encoding": "identity", **headers})
        response = connection.getresponse()
        data = _read(response, max_bytes) if response.status == 200 else b""
        result = response.status, response.getheader("Location") or "", data
    except (OSError, http.client.HTTPException, ValueError) as error:
      if time.monotonic() >= end:
        raise late from None
      kind = type(error).__name__
      raise _bad(f"Label Studio at {self._origin} cannot be read ({kind}).") from None
    if time.monotonic() >= end:  # a body without a length may have been cut
      raise late
    return result


@contextlib.contextmanager
def _connection(origin: Origin, end: float) -> Iterator[http.client.HTTPConnection]:
  """A connection that is cut at `end`, whatever it waits for."""
  left = max(0.001, end - time.monotonic())
  if origin.scheme == "https":
    context = ssl.create_default_context()
    connection = http.client.HTTPSConnection(
      origin.host, origin.port, timeout=left, context=context
    )
  else:
    connection = http.client.HTTPConnection(origin.host, origin.port, timeout=left)
  try:
    connection.connect()
    # Later, `connection.sock` may be None: a response without a length takes the socket over.
    timer = threading.Timer(max(0.0, end - time.monotonic()), _cut, (connection.sock,))
    timer.daemon = True
    timer.start()
    try:
      yield connection
    finally:
      timer.cancel()
  finally:
    connection.close()


def _cut(connected: socket.socket) -> None:
  with contextlib.suppress(OSError):
    connected.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, max_bytes: int) -> bytes:
  data = bytearray()
  while chunk := response.read1(_CHUNK):
    data += chunk
    if len(data) > max_bytes:
      raise too_large(max_bytes)
  if response.length:  # bytes that were announced and have not come
    raise http.client.IncompleteRead(b"", response.length)
  return bytes(data)


def _access_token(body: bytes) -> str | None:
  try:
    access = json.loads(body)["access"]
  except (ValueError, KeyError, TypeError, RecursionError):
    return None
  return access if isinstance(access, str) and _JWT.fullmatch(access) else None


def _bad(message: str) -> ApiError:
  return ApiError("bad_request", message)
