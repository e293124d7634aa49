"""The parts of serve_load.py and serve_latency.py."""

import hashlib


def digest(body: bytes) -> str:
  """The name of a request's body in answers.json."""
  return hashlib.sha256(body).hexdigest()
