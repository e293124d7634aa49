"""Errors of the API: each is a status and `{"error": {"code": ..., "message": ...}}`."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import HTTPException as FastApiException
from pydantic import ValidationError
from starlette.exceptions import HTTPException

STATUS = {
  "bad_request": 400,
  "invalid_prompt": 400,
  "too_many_prompts": 400,
  "unauthorized": 401,
  "forbidden_host": 403,
  "forbidden_origin": 403,
  "not_found": 404,
  "unknown_image": 404,
  "unknown_video": 404,
  "method_not_allowed": 405,
  "timeout": 408,
  "conflict": 409,
  "too_large": 413,
  "too_many_frames": 413,
  "too_many_pixels": 413,
  "unsupported_image": 415,
  "unsupported_media_type": 415,
  "unsupported_video": 415,
  "busy": 429,
  "headers_too_large": 431,
  "internal": 500,
  "not_ready": 503,
  "no_space": 507,
}
# Codes of errors that Starlette and FastAPI raise themselves.
_CODES = {400: "bad_request", 404: "not_found", 405: "method_not_allowed", 413: "too_large"}
_LONGEST = 500  # characters of a message, which may repeat a value of the client


class ApiError(FastApiException):
  """An error for the client.

  Args:
    code: one of `STATUS`.
    message: one line that names the value and the remedy.
    headers: more headers, such as Retry-After.
  """

  def __init__(self, code: str, message: str, headers: dict[str, str] | None = None):
    super().__init__(STATUS[code], message, headers)
    self.code = code


def body(code: str, message: str) -> dict[str, Any]:
  """The JSON value of an error."""
  line = " ".join(message.split())
  if len(line) > _LONGEST:
    line = line[: _LONGEST - 3] + "..."
  return {"error": {"code": code, "message": line}}


def encoded(code: str, message: str) -> bytes:
  """The body of an error's response, in ASCII."""
  return json.dumps(body(code, message)).encode()


def as_api_error(error: HTTPException) -> ApiError:
  """An error of Starlette as one of ours, with its own headers (such as Allow)."""
  if isinstance(error, ApiError):
    return error
  code = _CODES.get(error.status_code, "bad_request")
  messages = {
    "not_found": "there is nothing at this path; /openapi.json lists the paths.",
    "method_not_allowed": "this path does not take this method; /openapi.json lists the methods.",
  }
  headers = dict(error.headers) if error.headers else None
  return ApiError(code, messages.get(code, str(error.detail)), headers)


def busy(seconds: float, what: str) -> ApiError:
  """The error for a full queue, with the time after which a retry is worthwhile."""
  wait = str(max(1, min(60, round(seconds))))
  return ApiError("busy", f"{what}; retry after {wait} s.", {"Retry-After": wait})


def first_fault(faults: Sequence[Any]) -> tuple[str, str]:
  """The code and one readable line for the first of pydantic's faults of a request."""
  fault = faults[0]
  where = [str(part) for part in fault["loc"] if part != "body"]
  path = ".".join(where) or "the body"
  if fault["type"] == "too_long" and len(where) == 1:
    return "too_many_prompts", f"{path}: {fault['msg']}."
  code = "invalid_prompt" if where and where[0] in ("concepts", "visual") else "bad_request"
  return code, f"{path}: {fault['msg']}."


@contextlib.contextmanager
def refusing_prompts() -> Iterator[None]:
  """For prompts that an adapter makes of a request: what they do not allow is the client's fault.

  Raises:
    ApiError: instead of pydantic's `ValidationError`.
  """
  try:
    yield
  except ValidationError as error:
    raise ApiError("invalid_prompt", first_fault(error.errors())[1]) from None
