"""The cookie of the page, by which uploads belong to a session."""

import re
from typing import Annotated

from fastapi import Depends, Request

COOKIE = "sam3_session"
_SESSION = re.compile(r"[A-Za-z0-9_-]{43}")


def session_of(request: Request) -> str | None:
  """The session of a request's cookie; None without one."""
  value = request.cookies.get(COOKIE, "")
  return value if _SESSION.fullmatch(value) else None


Session = Annotated[str | None, Depends(session_of)]
