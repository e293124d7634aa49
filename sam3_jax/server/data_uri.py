"""Reads images that are part of a request: data URIs and base64."""

import base64
import binascii
from urllib.parse import unquote_to_bytes

from sam3_jax.server.errors import ApiError

MAX_HEADER = 200  # characters of the media type


def is_data_uri(source: str) -> bool:
  return source[:5].lower() == "data:"


def read_data_uri(uri: str, max_bytes: int) -> bytes:
  """The bytes of a data URI, of any media type.

  Raises:
    ApiError: it is not one, or holds more than `max_bytes`.
  """
  header, comma, data = uri[5:].partition(",")
  if not is_data_uri(uri) or not comma or len(header) > MAX_HEADER:
    raise ApiError("bad_request", "the image is not a data URI like data:image/png;base64,...")
  if header.lower().endswith(";base64"):
    return read_base64(data, max_bytes)
  if len(data) > 3 * max_bytes:  # %xx
    raise too_large(max_bytes)
  body = unquote_to_bytes(data)
  if len(body) > max_bytes:
    raise too_large(max_bytes)
  return body


def read_base64(data: str, max_bytes: int) -> bytes:
  """Decodes base64.

  Raises:
    ApiError: it is not base64, or holds more than `max_bytes`.
  """
  if len(data) > max_bytes // 3 * 4 + 4:
    raise too_large(max_bytes)
  try:
    body = base64.b64decode(data, validate=True)
  except (binascii.Error, ValueError):
    raise ApiError("bad_request", "the image is not valid base64.") from None
  if len(body) > max_bytes:
    raise too_large(max_bytes)
  return body


def too_large(max_bytes: int) -> ApiError:
  return ApiError("too_large", f"the image has more than {max_bytes} bytes; send a smaller one.")
