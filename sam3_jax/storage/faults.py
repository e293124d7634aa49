"""Errors of stores: one line that says what is wrong and what to do, without secrets."""

import errno
import re
from collections.abc import Mapping

from sam3_jax.storage.urls import Location

TRANSIENT = frozenset({408, 429, 500, 502, 503, 504, 509, 529})
_THROTTLED = frozenset({429, 503})
_LONGEST = 150  # characters of a server's own message that are shown
_SECRET = re.compile(
  r"(?i)\b(bearer\s+|[\w-]*(?:signature|token|credential|secret|key)[\w-]*[=:]\s*)[^\s&,;]+"
)
_LOGIN = {
  "gs": "log in with `gcloud auth application-default login`, or give the pod a service account",
  "s3": "set AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the pod a role",
  "hf": "log in with `hf auth login`, or set HF_TOKEN",
}
_GRANT = {
  "gs": "grant roles/storage.objectUser on the bucket, or objectViewer to read only",
  "s3": "allow s3:GetObject, PutObject, DeleteObject and ListBucket on the bucket",
  "hf": "check the access to the dataset on its page",
}


# Errors of aiohttp, botocore and google.auth.
_MISSING = {"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"}
_EXPIRED = {"RefreshError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
_TIMEOUT = {"TimeoutError", "ConnectTimeoutError", "ReadTimeoutError"}
_CUT = {"ClientPayloadError", "IncompleteReadError", "ResponseStreamingError", "CutOffError"}
_CERTIFICATE = {"ClientConnectorCertificateError", "ClientSSLError", "SSLError"}
_CONNECTION = {"OSError", "ClientError", "HTTPClientError", "TransportError"}


# Codes of S3.
_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REGION_CODES = {
  "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException",
}  # fmt: skip


class StoreError(OSError):
  """An object cannot be read or written; `strerror` is one line with the remedy.

  Attributes:
    transient: whether another attempt may succeed.
    retry_after: seconds that the server asks to wait; 0 if it does not say.
  """

  def __init__(
    self,
    where: Location,
    what: str,
    number: int = errno.EIO,
    *,
    transient: bool = False,
    retry_after: float = 0.0,
  ):
    super().__init__(number, what, str(where))
    self.transient, self.retry_after = transient, retry_after

  def __reduce__(self):
    return OSError, (self.errno, self.strerror, self.filename)

  def __str__(self) -> str:
    return f"{self.filename}: {self.strerror}"


class ChangedError(StoreError):
  """The object has another version than expected, or exists although it should not."""

  def __init__(self, where: Location):
    super().__init__(where, "it has changed since it was listed", errno.ESTALE)


class CutOffError(OSError):
  """An answer has fewer bytes than announced."""


class StatusError(Exception):
  """A response of a server that is not a success.

  Attributes:
    status: of HTTP.
    code: of S3, such as "NoSuchBucket"; empty for others.
    message: of the server.
    headers: of the response, with names in lower case.
  """

  def __init__(
    self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None
  ):
    super().__init__(status, code)
    self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def is_transient(error: BaseException | None) -> bool:
  """Whether an error was caused by a `StoreError` that another attempt may not meet."""
  while error is not None:
    if isinstance(error, StoreError):
      return error.transient
    error = error.__cause__
  return False


def translate(error: BaseException, where: Location) -> OSError:
  """The error that callers see, for any error of a request."""
  if isinstance(error, StoreError | FileNotFoundError):
    return error
  if isinstance(error, StatusError):
    return _from_status(error, where)
  # The packages need not be installed, so their errors are known by name.
  names = {kind.__name__ for kind in type(error).__mro__}
  if names & _MISSING:
    login = _LOGIN.get(where.scheme, "")
    return StoreError(where, f"there are no credentials; {login}", errno.EACCES)
  if names & _EXPIRED:
    return _expired(where)
  if names & _TIMEOUT:
    return StoreError(
      where, "the server does not answer in time; check the network", errno.ETIMEDOUT,
      transient=True,
    )  # fmt: skip
  if names & _CUT:
    return StoreError(where, "the answer was cut off; check the network", transient=True)
  if names & _CERTIFICATE:
    return StoreError(where, "the certificate of the server is not valid; check the address")
  if names & _CONNECTION:
    why = error.strerror if isinstance(error, OSError) and error.strerror else ""
    return StoreError(
      where, f"the connection to the server failed ({_shown(why) or type(error).__name__}); check "
      "the network and the address", errno.ENETUNREACH, transient=True,
    )  # fmt: skip
  return StoreError(where, f"{type(error).__name__}: {_shown(str(error))}")


def _from_status(error: StatusError, where: Location) -> OSError:
  status, code = error.status, error.code
  if code in _EXPIRED_CODES:
    return _expired(where)
  if code in _REGION_CODES or status == 301:
    region = error.headers.get("x-amz-bucket-region", "")
    remedy = f"set AWS_REGION={region}" if region else "set AWS_REGION to the bucket's region"
    return StoreError(where, f"the bucket is in another region; {remedy}", errno.EINVAL)
  if code == "NoSuchBucket":
    return StoreError(where, f"there is no bucket {where.bucket}; check its name", errno.ENOENT)
  if status in (404, 410):
    return FileNotFoundError(errno.ENOENT, "there is no such object", str(where))
  if status == 412:
    return ChangedError(where)
  if status == 409:  # in S3, another conditional write is in progress
    return StoreError(where, "another process is writing it", errno.EAGAIN, transient=True)
  if status == 401 or code in ("InvalidAccessKeyId", "SignatureDoesNotMatch"):
    return StoreError(
      where, f"the credentials are not valid or have expired (HTTP {status}); "
      f"{_LOGIN.get(where.scheme, 'check the address and its signature')}", errno.EACCES,
    )  # fmt: skip
  if status == 403:
    remedy = _GRANT.get(where.scheme, "check the address and whether its signature has expired")
    return StoreError(where, f"permission is denied (HTTP 403); {remedy}", errno.EACCES)
  if status in TRANSIENT:
    what = "the server limits the rate of requests" if status in _THROTTLED else "the server failed"
    return StoreError(
      where, f"{what} (HTTP {status}); try again later, with fewer processes", errno.EAGAIN,
      transient=True, retry_after=_retry_after(error.headers),
    )  # fmt: skip
  why = _shown(code or error.message)
  return StoreError(where, f"HTTP {status}{f' ({why})' if why else ''}; check the address")


def _expired(where: Location) -> StoreError:
  login = _LOGIN.get(where.scheme, "get a new address")
  return StoreError(where, f"the credentials have expired; {login}", errno.EACCES)


def _retry_after(headers: Mapping[str, str]) -> float:
  value = headers.get("retry-after", "")
  return float(value) if value.isdigit() else 0.0


def _shown(text: str) -> str:
  """The start of a server's message on one line, without secrets and web addresses."""
  line = " ".join(re.sub(r"https?://\S+", "", text).split())
  return _SECRET.sub(r"\1...", line)[:_LONGEST].rstrip(" .")
