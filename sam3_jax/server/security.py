"""Checks every request before any other code sees it, and adds headers to every response.

Checked are the headers Host (against DNS rebinding) and Origin (against requests from other sites),
also on loopback; the token; and the size and the speed of the body. Every request is logged and
counted.
"""

import asyncio
import base64
import hmac
import ipaddress
import re
import socket
import time
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from sam3_jax.server.errors import ApiError, as_api_error, busy, encoded
from sam3_jax.server.metrics import Metrics
from sam3_jax.server.settings import Settings, is_loopback

LABEL_TOOLS = ("/label-studio/", "/anylabeling/")
PROTECTED = ("/v1", "/label-studio", "/anylabeling", "/metrics")  # paths that need the token
STATIC = "/static/"
VIDEOS = "/v1/videos"  # where videos are uploaded
CSP = (
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
  "connect-src 'self' blob:; media-src 'self' blob:; font-src 'self'; worker-src 'self'; "
  "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
  "Content-Security-Policy": CSP,
  "X-Content-Type-Options": "nosniff",
  "X-Frame-Options": "DENY",
  "Referrer-Policy": "no-referrer",
  "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Resource-Policy": "same-origin",
}
_CORS_METHODS, _CORS_HEADERS = "GET, POST, DELETE", "Authorization, Content-Type"
_SECRET = re.compile(r"[A-Za-z0-9_-]{43,}")  # ids of images, which must not be logged
_BODY_METHODS = ("POST", "PUT", "PATCH")


class Guard:
  """ASGI middleware around the whole application."""

  def __init__(
    self,
    app: Any,
    *,
    settings: Settings,
    metrics: Metrics,
    log: Callable[..., None],
    log_error: Callable[[BaseException], None],
  ):
    """
    Args:
      app: the application.
      settings: of the server.
      metrics: counts requests.
      log: is called with method, path, route, status, seconds, bytes and client of a request.
      log_error: is called with unexpected exceptions.
    """
    self._app, self._settings, self._metrics = app, settings, metrics
    self._log, self._log_error = log, log_error
    self._hosts = _own_names(settings)
    self._token = (settings.token or "").encode()
    self._active = 0

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "websocket":
      await send({"type": "websocket.close", "code": 1000})
      return
    if scope["type"] != "http":
      await self._app(scope, receive, send)
      return
    exchange = _Exchange(scope, receive, send, self._settings)
    start = time.perf_counter()
    self._active += 1
    try:
      self._check(scope, exchange.headers)
      if (origin := self._allowed_origin(exchange.headers)) is not None:
        exchange.cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        exchange.cors["Cross-Origin-Resource-Policy"] = "cross-origin"
        if scope["method"] == "OPTIONS":
          await exchange.preflight()
          return
      await self._app(scope, exchange.receive, exchange.send)
    except asyncio.CancelledError:
      raise
    except Exception as error:
      if isinstance(error, ClientDisconnect):
        pass
      elif isinstance(error, HTTPException):
        await exchange.refuse(as_api_error(error))
      else:
        self._log_error(error)
        await exchange.refuse(ApiError("internal", "the server failed; its log has the reason."))
    finally:
      self._active -= 1
      seconds = time.perf_counter() - start
      route = _route(scope)
      self._metrics.request(scope["method"], route, exchange.status, seconds)
      client = scope.get("client")
      path = {"path": _SECRET.sub("{id}", scope["path"])} if route == "none" else {}
      self._log(
        method=scope["method"], route=route, **path, status=exchange.status,
        seconds=seconds, received=exchange.received, sent=exchange.sent,
        client=client[0] if client else "",
      )  # fmt: skip

  def _check(self, scope: Any, headers: Headers) -> None:
    """Raises ApiError for a request that is not served."""
    self._check_host(headers)
    self._check_origin(scope, headers)
    path = scope["path"]
    if self._token and any(path == one or path.startswith(f"{one}/") for one in PROTECTED):
      given = _given_token(headers.get("authorization", ""))
      if path.startswith("/anylabeling/"):  # whose client sends this header only
        given = given or headers.get("token", "").encode()
      preflight = scope["method"] == "OPTIONS" and self._allowed_origin(headers) is not None
      if not hmac.compare_digest(given, self._token) and not preflight:
        raise ApiError(
          "unauthorized",
          "this server needs a token: send the header Authorization: Bearer TOKEN.",
          {"WWW-Authenticate": "Bearer"},
        )
    if self._active > self._settings.max_requests and path != "/healthz":
      raise busy(1, f"{self._active - 1} requests are being served")
    length = headers.get("content-length", "")
    if length and not (length.isascii() and length.isdigit()):
      raise ApiError("bad_request", "the header Content-Length is not a number.")
    if length and int(length[:20]) > _body_limit(path, headers, self._settings):
      raise _too_large(path, headers, self._settings)

  def _check_host(self, headers: Headers) -> None:
    given = headers.getlist("host")
    name = _host_name(given[0]) if len(given) == 1 else ""
    if name in self._hosts or (name and self._is_own_address(name)):
      return
    raise ApiError(
      "forbidden_host",
      f"the header Host is {', '.join(given)!r:.100}, which is not a name of this server; "
      "--allow-host NAME accepts another name.",
    )

  def _is_own_address(self, name: str) -> bool:
    """Whether a host is an IP address, which no DNS server can rebind; of loopback, if only that
    is served."""
    try:
      ipaddress.ip_address(name)
    except ValueError:
      return False
    return is_loopback(name) or not is_loopback(self._settings.host)

  def _check_origin(self, scope: Any, headers: Headers) -> None:
    for origin in headers.getlist("origin"):
      scheme, _, authority = origin.partition("://")
      own = scheme in ("http", "https") and authority.lower() == headers.get("host", "").lower()
      if not own and origin not in self._settings.allow_origins:
        raise ApiError(
          "forbidden_origin",
          f"pages of {origin!r:.100} may not use this server; --allow-origin ORIGIN lets them.",
        )
    site = headers.get("sec-fetch-site", "none")
    if site in ("none", "same-origin") or "origin" in headers:
      return
    opened = headers.get("sec-fetch-mode") == "navigate" and scope["method"] == "GET"
    if not (opened and scope["path"] == "/"):  # a link to the page is harmless
      raise ApiError("forbidden_origin", "pages of other sites may not use this server.")

  def _allowed_origin(self, headers: Headers) -> str | None:
    origin = headers.get("origin")
    return origin if origin in self._settings.allow_origins else None


class _Exchange:
  """One request and its response.

  Attributes:
    headers: of the request.
    status: of the response; 499 as long as there is none, as if the client had disconnected.
    received, sent: bytes of the bodies.
    cors: headers for a page of another site that is allowed.
  """

  def __init__(self, scope: Any, receive: Any, send: Any, settings: Settings):
    self.headers = Headers(scope=scope)
    self.status, self.received, self.sent = 499, 0, 0
    self.cors: dict[str, str] = {}
    self._scope, self._receive, self._send, self._settings = scope, receive, send, settings
    self._limit = _body_limit(scope["path"], self.headers, settings)
    self._complete = False
    self._start = time.monotonic()

  async def receive(self) -> Any:
    """The next part of the body, if it is in time and within the limit."""
    if self._complete:
      return await self._receive()
    seconds = self._settings.body_seconds + self.received / self._settings.body_rate
    left = self._start + seconds - time.monotonic()
    try:
      message = await asyncio.wait_for(self._receive(), max(0.0, left))
    except TimeoutError:
      raise ApiError(
        "timeout",
        f"only {self.received} bytes of the body arrived within {seconds:.0f} s; send it faster.",
        {"Connection": "close"},
      ) from None
    if message["type"] == "http.request":
      self.received += len(message.get("body", b""))
      self._complete = not message.get("more_body", False)
      if self.received > self._limit:
        raise _too_large(self._scope["path"], self.headers, self._settings)
    return message

  async def send(self, message: Any) -> None:
    if message["type"] == "http.response.start":
      self.status = message["status"]
      headers = MutableHeaders(raw=message.setdefault("headers", []))
      for name, value in (HEADERS | self.cors).items():
        headers[name] = value
      static = self._scope["path"].startswith(STATIC)
      headers.setdefault("Cache-Control", "no-cache" if static else "no-store")
      if not self._complete and self._scope["method"] in _BODY_METHODS and self.status >= 400:
        headers["Connection"] = "close"  # the rest of the body is not read
    else:
      self.sent += len(message.get("body", b""))
    await self._send(message)

  async def refuse(self, error: ApiError) -> None:
    """Sends an error, unless a response was begun."""
    if self.status == 499:
      await self._respond(error.status_code, encoded(error.code, error.detail), error.headers)

  async def preflight(self) -> None:
    allow = {
      "Access-Control-Allow-Methods": _CORS_METHODS,
      "Access-Control-Allow-Headers": _CORS_HEADERS,
      "Access-Control-Max-Age": "600",
    }
    await self._respond(204, b"", allow)

  async def _respond(self, status: int, body: bytes, headers: Any) -> None:
    fields = {"content-type": "application/json"} if body else {}
    fields |= {name.lower(): value for name, value in (headers or {}).items()}
    if status != 204:
      fields["content-length"] = str(len(body))
    raw = [(name.encode(), value.encode("latin-1")) for name, value in fields.items()]
    await self.send({"type": "http.response.start", "status": status, "headers": raw})
    await self.send({"type": "http.response.body", "body": body})


def _route(scope: Any) -> str:
  """The template of a request's path, of which there are few."""
  if scope["path"].startswith(STATIC):
    return STATIC
  return getattr(scope.get("route"), "path", "") or "none"


def _own_names(settings: Settings) -> set[str]:
  names = {"localhost", *(name.lower() for name in settings.allow_hosts)}
  if not is_loopback(settings.host):
    names |= {settings.host.lower(), socket.gethostname().lower(), socket.getfqdn().lower()}
  return names


def _host_name(host: str) -> str:
  """The name in a header Host, without its port; "" if it is malformed."""
  if host.startswith("["):
    name, bracket, port = host[1:].partition("]")
    if not bracket or (port and not port.startswith(":")):
      return ""
    port = port[1:]
  else:
    name, _, port = host.partition(":")
  if port and not (port.isascii() and port.isdigit()):
    return ""
  return name.lower().rstrip(".")


def _given_token(authorization: str) -> bytes:
  """The token of a header Authorization, as Bearer, or as the password of Basic."""
  scheme, _, value = authorization.partition(" ")
  if scheme.lower() == "basic":
    try:
      return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
    except ValueError:
      return b""
  return value.strip().encode() if scheme.lower() == "bearer" else b""


def _body_limit(path: str, headers: Headers, settings: Settings) -> int:
  """Bytes that a body may have: only images and videos may be large, and JSON of label tools with
  images."""
  kind = headers.get("content-type", "").partition(";")[0].strip().lower()
  if kind != "application/json":
    return settings.max_video_bytes if path == VIDEOS else settings.max_bytes
  in_base64 = settings.max_bytes * 4 // 3 + 2**20
  return in_base64 if path.startswith(LABEL_TOOLS) else settings.max_json_bytes


def _too_large(path: str, headers: Headers, settings: Settings) -> ApiError:
  limit = _body_limit(path, headers, settings)
  return ApiError("too_large", f"the body is larger than {limit:,} bytes.", {"Connection": "close"})
