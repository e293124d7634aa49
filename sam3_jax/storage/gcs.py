"""Cloud Storage, by its JSON API (https://cloud.google.com/storage/docs/json_api/v1).

gcsfs finds the credentials, renews them, and keeps the connections.
"""

import email.utils
import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from sam3_jax.storage.faults import StatusError
from sam3_jax.storage.retries import POLICY
from sam3_jax.storage.store import PAGE, Entry, Store, only_once, pieces
from sam3_jax.storage.urls import Location

_FIELDS = "name,size,generation"


class CloudStorage(Store):
  """Buckets of Cloud Storage; the version of an object is its generation."""

  def __init__(self):
    import aiohttp
    from gcsfs.core import GCSFileSystem

    self._fs: Any = GCSFileSystem(skip_instance_cache=True)
    self._host = self._fs.base.removesuffix("/storage/v1/")
    self._timeout = aiohttp.ClientTimeout(
      total=None, sock_connect=POLICY.connect_timeout, sock_read=POLICY.read_timeout
    )

  async def _stat(self, where: Location) -> Entry:
    headers, body = await self._request("GET", _object(where), {"fields": f"{_FIELDS},updated"})
    values = json.loads(body)
    return _entry(values)._replace(age=_age(headers, values))

  async def _read(
    self, where: Location, start: int, stop: int | None, version: str
  ) -> tuple[bytes, str]:
    query = {"alt": "media"} | ({"ifGenerationMatch": version} if version else {})
    headers = {}
    if start or stop is not None:
      headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    found, body = await self._request("GET", _object(where), query, headers=headers)
    return body, found.get("x-goog-generation", version)

  async def _page(self, where: Location, token: str) -> tuple[list[Entry], str | None]:
    fields = f"nextPageToken,items({_FIELDS})"
    query = {"prefix": where.name, "maxResults": str(PAGE), "fields": fields}
    if token:
      query["pageToken"] = token
    _, body = await self._request("GET", f"/storage/v1/b/{where.bucket}/o", query)
    values = json.loads(body)
    return [_entry(item) for item in values.get("items", [])], values.get("nextPageToken")

  async def _write(self, where: Location, data: bytes, expected: str | None) -> str:
    query = {} if expected is None else {"ifGenerationMatch": expected or "0"}
    return (await self._send(where, query, data))["generation"]

  async def _upload(self, where: Location, path: Path) -> None:
    await self._send(where, {}, pieces(path), path.stat().st_size)

  async def _delete(self, where: Location, version: str) -> None:
    await self._request("DELETE", _object(where), {"ifGenerationMatch": version} if version else {})

  async def _send(
    self, where: Location, query: Mapping[str, str], data: Any, size: int | None = None
  ) -> dict[str, Any]:
    path = f"/upload/storage/v1/b/{where.bucket}/o"
    query = {"uploadType": "media", "name": where.name, **query}
    headers = {"Content-Type": "application/octet-stream"}
    if size is not None:
      headers["Content-Length"] = str(size)
    return json.loads((await self._request("POST", path, query, headers=headers, data=data))[1])

  async def _request(
    self,
    method: str,
    path: str,
    query: Mapping[str, str],
    *,
    headers: Mapping[str, str] | None = None,
    data: Any = None,
  ) -> tuple[Mapping[str, str], bytes]:
    import yarl

    await self._fs._set_session()
    only_once(self._fs.session)
    url = yarl.URL(f"{self._host}{path}{'?' if query else ''}{urlencode(query)}", encoded=True)
    async with self._fs.session.request(
      method, url, headers=self._fs._get_headers(dict(headers or {})), data=data,
      timeout=self._timeout,
    ) as response:  # fmt: skip
      body = await response.read()
      found = {name.lower(): value for name, value in response.headers.items()}
      if response.status >= 400:
        raise StatusError(response.status, _code(body), _message(body), found)
      return found, body


def _object(where: Location) -> str:
  return f"/storage/v1/b/{where.bucket}/o/{quote(where.name, safe='')}"


def _entry(values: Mapping[str, Any]) -> Entry:
  return Entry(values["name"], int(values["size"]), str(values["generation"]))


def _age(headers: Mapping[str, str], values: Mapping[str, Any]) -> float | None:
  try:
    now = email.utils.parsedate_to_datetime(headers["date"])
    return (now - datetime.fromisoformat(values["updated"])).total_seconds()
  except (KeyError, ValueError):
    return None


def _message(body: bytes) -> str:
  try:
    error = json.loads(body)["error"]
    return str(error.get("message", "")) if isinstance(error, dict) else str(error)
  except (ValueError, KeyError, TypeError):
    return ""


def _code(body: bytes) -> str:
  return "NoSuchBucket" if "bucket does not exist" in _message(body) else ""
