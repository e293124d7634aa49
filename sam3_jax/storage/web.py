"""Files on web servers, read only. fsspec keeps the connections."""

from collections.abc import Mapping
from typing import Any

from sam3_jax.storage.faults import StatusError, StoreError
from sam3_jax.storage.retries import POLICY
from sam3_jax.storage.store import Entry, Store, only_once
from sam3_jax.storage.urls import Location

_PLAIN = {"Accept-Encoding": "identity"}  # compression would change sizes and ranges


class Web(Store):
  """Files by address; the version is the ETag, or else the time of modification."""

  ordered = False

  def __init__(self):
    import aiohttp
    from fsspec.implementations.http import HTTPFileSystem

    self._fs: Any = HTTPFileSystem(skip_instance_cache=True, client_kwargs={"trust_env": True})
    self._timeout = aiohttp.ClientTimeout(
      total=None, sock_connect=POLICY.connect_timeout, sock_read=POLICY.read_timeout
    )

  async def _stat(self, where: Location) -> Entry:
    # Addresses that are signed for GET refuse HEAD.
    status, headers, _ = await self._request(where, where.url, {"Range": "bytes=0-0"}, body=False)
    size = headers.get("content-range", "").rpartition("/")[2] if status == 206 else ""
    size = size or headers.get("content-length", "")
    if not size.isdigit():
      raise StoreError(where, "the server does not tell the size; copy the file to a bucket")
    return Entry(where.name, int(size), _version(headers))

  async def _read(
    self, where: Location, start: int, stop: int | None, version: str
  ) -> tuple[bytes, str]:
    return await self._fetch(where, where.url, start, stop)

  async def _fetch(
    self, where: Location, url: str, start: int, stop: int | None
  ) -> tuple[bytes, str]:
    ranged = bool(start) or stop is not None
    header = {"Range": f"bytes={start}-{'' if stop is None else stop - 1}"} if ranged else {}
    status, headers, body = await self._request(where, url, header)
    if ranged and status != 206:
      raise StoreError(where, "the server does not read parts of a file; copy it to a bucket")
    return body, _version(headers)

  async def _request(
    self,
    where: Location,
    url: str,
    headers: Mapping[str, str],
    *,
    body: bool = True,
    method: str = "GET",
    **options: Any,
  ) -> tuple[int, Mapping[str, str], bytes]:
    session = await self._fs.set_session()
    only_once(session)
    async with session.request(
      method, url, headers={**_PLAIN, **headers}, timeout=self._timeout, **options
    ) as response:
      found = {name.lower(): value for name, value in response.headers.items()}
      if response.url.scheme == "http" and where.scheme == "https":
        raise StoreError(where, "it redirects to an address that is not encrypted")
      if response.status == 416:  # of an empty file
        return 206, found | {"content-range": "bytes */0"}, b""
      if response.status >= 400:
        raise StatusError(response.status, headers=found)
      return response.status, found, await response.read() if body else b""


def _version(headers: Mapping[str, str]) -> str:
  tag = headers.get("etag", "").removeprefix("W/").strip('"')
  return tag or headers.get("last-modified", "")
