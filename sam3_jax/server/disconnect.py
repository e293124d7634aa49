"""Waits for the result of a request's work, and drops the work if the client disconnects."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TypeVar

from fastapi import Request

T = TypeVar("T")


class Disconnected(Exception):
  """The client has closed the connection; there is nobody to respond to."""


async def result(request: Request, future: "Future[T]") -> T:
  """The result of a future, which is cancelled if the client disconnects.

  Args:
    request: its body must have been read.
    future: of a thread.

  Raises:
    Disconnected: the client did.
  """
  waiting = asyncio.wrap_future(future)
  gone = asyncio.ensure_future(_gone(request))
  try:
    await asyncio.wait({waiting, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not waiting.done():
      raise Disconnected
    return waiting.result()
  finally:
    gone.cancel()
    if not waiting.done():
      waiting.cancel()  # cancels the future of the thread, too


async def in_pool(request: Request, pool: Executor, function: Callable[..., T], *args) -> T:
  """Calls a function in a pool of threads; as `result`."""
  return await result(request, pool.submit(function, *args))


async def _gone(request: Request) -> None:
  while (await request.receive())["type"] != "http.disconnect":
    pass
