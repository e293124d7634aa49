"""Errors of the API: each is a status and `{"error": {"code": ..., "message": ...}}`."""

import json
from typing import Any

from fastapi import HTTPException as FastApiException
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
  "method_not_allowed": 405,
  "timeout": 408,
  "too_large": 413,
  "too_many_pixels": 413,
  "unsupported_image": 415,
  "unsupported_media_type": 415,
  "busy": 429,
  "headers_too_large": 431,
  "internal": 500,
  "not_ready": 503,
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
