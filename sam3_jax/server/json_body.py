"""Reads a request's JSON: no NaN or infinity, no deep nesting, no parsing in the event loop."""

import asyncio
import json
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from sam3_jax.server.errors import ApiError

MAX_DEPTH = 16  # the deepest request, a point of a visual prompt, has 6
_LARGE = 64 * 2**10  # bytes; larger bodies are parsed in a thread


def parse(data: bytes) -> Any:
  """Parses JSON.

  Raises:
    ApiError: it is not JSON in UTF-8, has NaN or infinite numbers, or is nested too deeply.
  """
  try:
    value = json.loads(data.decode("utf-8"), parse_constant=_refuse, parse_float=_finite)
  except UnicodeDecodeError:
    raise ApiError("bad_request", "the body is not UTF-8.") from None
  except RecursionError:
    raise _too_deep() from None
  except json.JSONDecodeError as error:
    where = f"line {error.lineno}, column {error.colno}"
    raise ApiError("bad_request", f"the body is not JSON: {error.msg} at {where}.") from None
  except ValueError as error:  # an integer of thousands of digits
    raise ApiError("bad_request", f"the body has an invalid number: {error}.") from None
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
  raise _too_deep()


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


def _refuse(name: str) -> Any:
  raise ApiError("bad_request", f"{name} is not JSON; numbers must be finite.")


def _finite(text: str) -> float:
  value = float(text)
  if value in (float("inf"), float("-inf")):
    raise ApiError("bad_request", f"the number {text:.30} is too large; numbers must be finite.")
  return value


def _too_deep() -> ApiError:
  return ApiError("bad_request", f"the JSON is nested more than {MAX_DEPTH} levels deep.")
