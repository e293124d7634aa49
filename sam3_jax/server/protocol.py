"""uvicorn's HTTP/1.1 protocol with errors in JSON, and time limits for headers and responses."""

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from sam3_jax.server.errors import STATUS, encoded
from sam3_jax.server.security import HEADERS

HEADER_SECONDS = 20.0  # in which a connection must send the headers of a request
READ_SECONDS = 30.0  # in which a client must read the 64 kB of a response that wait to be sent
MAX_HEADERS = 32 * 2**10  # bytes of a request's line and headers
_REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Request Header Fields Too Large"}


class Protocol(H11Protocol):
  """A connection."""

  _timer: asyncio.TimerHandle | None = None
  _reading: asyncio.TimerHandle | None = None

  def connection_made(self, transport: Any) -> None:
    super().connection_made(transport)
    self._await_headers()

  def data_received(self, data: bytes) -> None:
    if self._timer is None and (self.cycle is None or self.cycle.response_complete):
      self._await_headers()  # the next request on this connection has begun to arrive
    super().data_received(data)

  def connection_lost(self, exc: Exception | None) -> None:
    self._stop_timer()
    self._stop_reading()
    super().connection_lost(exc)

  def pause_writing(self) -> None:
    """Cuts the connection of a client that does not read, whose request would never end."""
    super().pause_writing()
    loop = asyncio.get_running_loop()
    self._reading = loop.call_later(READ_SECONDS, self.transport.abort)

  def resume_writing(self) -> None:
    self._stop_reading()
    super().resume_writing()

  def handle_events(self) -> None:
    super().handle_events()
    if self.cycle is not None and not self.cycle.response_complete:
      self._stop_timer()

  def send_400_response(self, msg: str) -> None:
    """Refuses what h11 cannot parse, and closes the connection."""
    if len(self.conn.trailing_data[0]) >= MAX_HEADERS:
      self._refuse("headers_too_large", f"the headers are larger than {MAX_HEADERS:,} bytes.")
    else:
      self._refuse("bad_request", "this is not an HTTP/1.1 request.")

  def _refuse(self, code: str, message: str) -> None:
    if self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete:
      self.transport.close()  # in the middle of a response
      return
    body, status = encoded(code, message), STATUS[code]
    fields = HEADERS | {
      "Content-Type": "application/json",
      "Content-Length": str(len(body)),
      "Connection": "close",
      "Cache-Control": "no-store",
    }
    lines = [f"HTTP/1.1 {status} {_REASONS[status]}", *(f"{k}: {v}" for k, v in fields.items())]
    self.transport.write(("\r\n".join(lines) + "\r\n\r\n").encode("ascii") + body)
    self.transport.close()

  def _await_headers(self) -> None:
    self._timer = asyncio.get_running_loop().call_later(HEADER_SECONDS, self._expire)

  def _stop_timer(self) -> None:
    if self._timer is not None:
      self._timer.cancel()
      self._timer = None

  def _stop_reading(self) -> None:
    if self._reading is not None:
      self._reading.cancel()
      self._reading = None

  def _expire(self) -> None:
    if self.transport.is_closing():
      return
    if not self.conn.trailing_data[0]:  # nothing arrived: an idle client expects no response
      self.transport.close()
    else:
      self._refuse("timeout", f"no request arrived within {HEADER_SECONDS:.0f} s.")
