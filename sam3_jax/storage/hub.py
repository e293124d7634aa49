"""Datasets of the Hugging Face hub, read only, by its API (https://huggingface.co/docs/hub/api).

The revision is resolved to a commit once, so that all processes of a job read the same files.
"""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlencode

from sam3_jax.storage.faults import StatusError
from sam3_jax.storage.store import Entry
from sam3_jax.storage.urls import Location
from sam3_jax.storage.web import Web

_COMMIT = re.compile(r"[0-9a-f]{40}")
_NEXT = re.compile(r'<[^>]*[?&]cursor=([^&>]+)[^>]*>;\s*rel="next"')


class Hub(Web):
  """Files of datasets; the version of a file is the hash of its content."""

  def __init__(self):
    super().__init__()
    self._commits: dict[str, str] = {}

  def pin(self, where: Location) -> Location:
    repository, _, revision = where.bucket.partition("@")
    if _COMMIT.fullmatch(revision):
      return where
    if where.bucket not in self._commits:
      found = self._attempt(where, lambda _: self._api(where, f"revision/{quote(revision, '')}"))
      self._commits[where.bucket] = json.loads(found[1])["sha"]
    return where._replace(bucket=f"{repository}@{self._commits[where.bucket]}")

  async def _stat(self, where: Location) -> Entry:
    revision = quote(where.bucket.partition("@")[2], "")
    _, body = await self._api(
      where, f"paths-info/{revision}", method="POST", json={"paths": [where.name]}
    )
    for item in json.loads(body):
      if item["type"] == "file":
        return _entry(item)
    raise StatusError(404)

  async def _read(
    self, where: Location, start: int, stop: int | None, version: str
  ) -> tuple[bytes, str]:
    repository, _, revision = where.bucket.partition("@")
    url = f"{_endpoint()}/datasets/{repository}/resolve/{quote(revision, '')}/{quote(where.name)}"
    # The ETag of the server that stores the content may be another one.
    return (await self._fetch(where, url, start, stop))[0], version

  async def _page(self, where: Location, token: str) -> tuple[list[Entry], str | None]:
    revision = quote(where.bucket.partition("@")[2], "")
    folder = quote(where.name.rpartition("/")[0])
    query = {"recursive": "true"} | ({"cursor": token} if token else {})
    path = f"tree/{revision}/{folder}".rstrip("/") + f"?{urlencode(query)}"
    headers, body = await self._api(where, path)
    items = [item for item in json.loads(body) if item["type"] == "file"]
    entries = [_entry(item) for item in items if item["path"].startswith(where.name)]
    more = _NEXT.search(headers.get("link", ""))
    return entries, _unquoted(more[1]) if more else None

  async def _api(
    self, where: Location, path: str, **options: Any
  ) -> tuple[Mapping[str, str], bytes]:
    url = f"{_endpoint()}/api/datasets/{where.bucket.partition('@')[0]}/{path}"
    _, headers, body = await self._request(where, url, {}, **options)
    return headers, body

  async def _request(
    self, where: Location, url: str, headers: Mapping[str, str], **options: Any
  ) -> tuple[int, Mapping[str, str], bytes]:
    from huggingface_hub import get_token

    # Not `build_hf_headers`, which sends a request of its own. aiohttp does not send the token to
    # the other host of a redirection.
    token = get_token()
    login = {"Authorization": f"Bearer {token}"} if token else {}
    return await super()._request(where, url, {**login, **headers}, **options)


def _endpoint() -> str:
  from huggingface_hub.constants import ENDPOINT

  return ENDPOINT.rstrip("/")


def _entry(item: Mapping[str, Any]) -> Entry:
  return Entry(item["path"], int(item["size"]), (item.get("lfs") or item)["oid"])


def _unquoted(text: str) -> str:
  from urllib.parse import unquote

  return unquote(text)
