"""The only policy of retries for requests to stores, and the count of requests."""

import dataclasses
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sam3_jax.storage.faults import StoreError, translate
from sam3_jax.storage.urls import Location

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class RetryPolicy:
  """Exponential backoff with jitter, as Cloud Storage and S3 recommend.

  With the time limits of a request, all attempts together take less than the time after which
  `prefetch` abandons a read.

  Attributes:
    attempts: including the first one.
    first: seconds before the second attempt; doubled after each attempt.
    longest: seconds at most before another attempt, also if the server asks for more.
    connect_timeout, read_timeout: seconds until a connection stands, and between two pieces of an
      answer.
  """

  attempts: int = 5
  first: float = 0.5
  longest: float = 16.0
  connect_timeout: float = 10.0
  read_timeout: float = 30.0

  def wait(self, attempt: int, retry_after: float = 0.0) -> float:
    """Seconds to wait after a failed attempt, counted from 0."""
    backoff = min(self.first * 2**attempt, self.longest) * random.uniform(0.5, 1.0)
    return min(max(backoff, retry_after), self.longest)


POLICY = RetryPolicy()


class _Counter(threading.local):
  """Requests and repeated requests of a thread."""

  requests = 0
  repeated = 0


_counter, _lock, _totals = _Counter(), threading.Lock(), [0, 0]


def counted() -> tuple[int, int]:
  """The numbers of requests, and of repeated ones, of the calling thread so far."""
  return _counter.requests, _counter.repeated


def totals() -> tuple[int, int]:
  """The numbers of requests, and of repeated ones, of this process so far."""
  return _totals[0], _totals[1]


def count(requests: int, repeated: int = 0) -> None:
  """Adds requests of the calling thread."""
  _counter.requests += requests
  _counter.repeated += repeated
  with _lock:
    _totals[0] += requests
    _totals[1] += repeated


def attempt(
  where: Location,
  request: Callable[[bool], Result],
  policy: RetryPolicy | None = None,
) -> Result:
  """Makes a request, again after transient errors.

  Args:
    where: named in errors.
    request: makes one request; the argument says whether it is a repetition, so that an earlier
      attempt may have succeeded although its answer was lost.
    policy: `POLICY` if None.

  Raises:
    FileNotFoundError: there is no such object.
    StoreError: another error, or the last attempt failed.
  """
  policy = policy or POLICY
  for number in range(policy.attempts):
    count(1, int(number > 0))
    try:
      return request(bool(number))
    except Exception as error:
      fault = translate(error, where)
      if not (isinstance(fault, StoreError) and fault.transient):
        raise fault from None
      if number + 1 == policy.attempts:
        raise StoreError(
          where, f"{fault.strerror} ({policy.attempts} attempts)", fault.errno or 0, transient=True
        ) from None
      time.sleep(policy.wait(number, fault.retry_after))
  raise RuntimeError("a policy needs at least one attempt")
