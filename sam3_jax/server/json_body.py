"""Reads a request's JSON: no NaN or infinity, no deep nesting, no parsing in the event loop."""

import asyncio
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from sam3_jax.server.errors import ApiError
from sam3_jax.utils import json_text

MAX_DEPTH = 16  # the deepest request, a point of a visual prompt, has 6
_LARGE = 64 * 2**10  # bytes; larger bodies are parsed in a thread


def parse(data: bytes) -> Any:
  """Parses JSON.

  Raises:
    ApiError: as `json_text.parse`, or it is nested too deeply.
  """
  try:
    value = json_text.parse(data, "the body")
  except ValueError as error:
    raise ApiError("bad_request", f"{error}.") from None
  level = [value]
  for _ in range(MAX_DEPTH):
    level = [
      child
      for one in level
      if isinstance(one, dict | list)
      for child in (one.values() if isinstance(one, dict) else one)
      if isinstance(child, dict | list)
    ]
    if not level:
      return value
  raise ApiError("bad_request", f"the JSON is nested more than {MAX_DEPTH} levels deep.")


class JsonRequest(Request):
  """A request whose `json` is `parse`."""

  async def json(self) -> Any:
    if not hasattr(self, "_parsed"):
      data = await self.body()
      few = len(data) <= _LARGE
      self._parsed = parse(data) if few else await asyncio.to_thread(parse, data)
    return self._parsed


class JsonRoute(APIRoute):
  """A route whose body is JSON of that kind, with that media type."""

  def get_route_handler(self):
    handle = super().get_route_handler()

    async def checked(request: Request) -> Any:
      if request.method == "POST" and self.body_field is not None:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
          raise ApiError(
            "unsupported_media_type",
            f"send JSON, Content-Type: application/json; got {kind!r:.60}.",
          )
      return await handle(JsonRequest(request.scope, request.receive))

    return checked
