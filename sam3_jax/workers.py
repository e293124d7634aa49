"""What Grain's worker processes and iterators need around them."""

from typing import Any


def parse_flags() -> None:
  """Grain's workers are told absl's flags, and a program without absl has not parsed them."""
  from absl import flags

  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def end(running: list[Any]) -> None:
  """Closes iterators and takes them out of the list, so that it can be done twice."""
  while running:
    running.pop().close()
