"""S3 and services with its API, such as MinIO (https://docs.aws.amazon.com/AmazonS3/latest/API).

s3fs finds the credentials and keeps the connections; the requests are made by its client.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam3_jax.storage import retries
from sam3_jax.storage.faults import CutOffError, StatusError
from sam3_jax.storage.store import PAGE, Entry, Store, only_once
from sam3_jax.storage.urls import Location

_CONNECTIONS = 64
_PIECE = 2**26  # bytes of a piece of a large upload; S3 allows 10,000 pieces


class S3(Store):
  """Buckets of S3; the version of an object is its ETag."""

  def __init__(self):
    from aiobotocore.httpsession import AIOHTTPSession
    from s3fs import S3FileSystem

    class Session(AIOHTTPSession):
      async def _get_session(self, proxy_url: Any) -> Any:
        session = await super()._get_session(proxy_url)
        only_once(session)
        return session

    self._fs: Any = S3FileSystem(
      skip_instance_cache=True,
      config_kwargs={
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": retries.POLICY.connect_timeout,
        "read_timeout": retries.POLICY.read_timeout,
        "max_pool_connections": _CONNECTIONS,
        "http_session_cls": Session,
      },
    )

  async def _stat(self, where: Location) -> Entry:
    try:
      found = await self._call("head_object", where)
    except StatusError as error:
      if error.status in (400, 403):  # an answer to HEAD has no body, which would say why
        retries.count(1)
        await self._read(where, 0, 1, "")
      raise
    now, written = _date(found), found.get("LastModified")
    age = (now - written).total_seconds() if now and written else None
    return Entry(where.name, int(found["ContentLength"]), found["ETag"].strip('"'), age)

  async def _read(
    self, where: Location, start: int, stop: int | None, version: str
  ) -> tuple[bytes, str]:
    options = {"IfMatch": f'"{version}"'} if version else {}
    if start or stop is not None:
      options["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    found = await self._call("get_object", where, **options)
    async with found["Body"] as body:
      data = await body.read()
    if len(data) != found["ContentLength"]:
      raise CutOffError
    return data, found["ETag"].strip('"')

  async def _page(self, where: Location, token: str) -> tuple[list[Entry], str | None]:
    client = await self._client(where)
    options = {"ContinuationToken": token} if token else {}
    found = await _translated(
      client.list_objects_v2(Bucket=where.bucket, Prefix=where.name, MaxKeys=PAGE, **options)
    )
    entries = [
      Entry(item["Key"], int(item["Size"]), item["ETag"].strip('"'))
      for item in found.get("Contents", [])
    ]
    return entries, found.get("NextContinuationToken")

  async def _write(self, where: Location, data: bytes, expected: str | None) -> str:
    options = {}
    if expected is not None:
      options = {"IfMatch": f'"{expected}"'} if expected else {"IfNoneMatch": "*"}
    return (await self._call("put_object", where, Body=data, **options))["ETag"].strip('"')

  async def _upload(self, where: Location, path: Path) -> None:
    if path.stat().st_size <= _PIECE:
      await self._write(where, path.read_bytes(), None)
      return
    upload = {"UploadId": (await self._call("create_multipart_upload", where))["UploadId"]}
    try:
      parts = []
      with path.open("rb") as file:
        while data := file.read(_PIECE):
          number = len(parts) + 1
          found = await self._call("upload_part", where, PartNumber=number, Body=data, **upload)
          parts.append({"PartNumber": number, "ETag": found["ETag"]})
      pieces = {"Parts": parts}
      await self._call("complete_multipart_upload", where, MultipartUpload=pieces, **upload)
    except BaseException:
      await self._call("abort_multipart_upload", where, **upload)
      raise

  async def _delete(self, where: Location, version: str) -> None:
    await self._call("delete_object", where, **({"IfMatch": f'"{version}"'} if version else {}))

  async def _client(self, where: Location) -> Any:
    await self._fs.set_session()
    return await self._fs.get_s3(where.bucket)

  async def _call(self, method: str, where: Location, **options: Any) -> dict[str, Any]:
    client = await self._client(where)
    return await _translated(
      getattr(client, method)(Bucket=where.bucket, Key=where.name, **options)
    )


async def _translated(request: Any) -> dict[str, Any]:
  """The answer to a request; raises StatusError for a response that is not a success."""
  from botocore.exceptions import ClientError

  try:
    return await request
  except ClientError as error:
    about = error.response.get("ResponseMetadata", {})
    values = error.response.get("Error", {})
    status = int(about.get("HTTPStatusCode", 0))
    raise StatusError(
      status, str(values.get("Code", "")), str(values.get("Message", "")), about.get("HTTPHeaders")
    ) from error


def _date(found: Mapping[str, Any]) -> Any:
  from email.utils import parsedate_to_datetime

  try:
    return parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
  except (KeyError, ValueError):
    return None
