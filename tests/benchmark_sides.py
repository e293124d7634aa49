"""A fake side of a benchmark, which runs in a process of its own."""

import sys
from pathlib import Path

import pytest
from speed.client import Side

ROOT = Path(__file__).parents[1]
FAKE = """
import os, sys, time
from speed.server import Unable, serve

class Fake:
  def __init__(self, settings):
    print("noise on standard output")
    if settings["dtype"] == "float16":
      raise Unable("no such dtype")
    self.log = open(settings["log"], "a", buffering=1)
    self.name = settings["name"]
    self.cores = len(os.sched_getaffinity(0))
    self.facts = {
      "import": 0.1, "load": 0.2, "versions": {"fake": "1"}, "device": "none", "cores": self.cores
    }

  def decode(self, count):
    block = bytearray(count * 10**6)
    def call():
      print("more noise")
      print(self.name, count, file=self.log)
      block[:] = bytes(len(block))
    return call

  def encode(self, count):
    if count > 1:
      raise ValueError("two lines:\\nof reasons")
    return lambda: sys.exit("the end of the world")

serve(Fake)
"""


@pytest.fixture
def opened(tmp_path):
  """Starts a fake side; ends all of them."""
  script, sides = tmp_path / "fake.py", []
  script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r}){FAKE}")

  def start(name: str = "fake float32", **settings) -> Side:
    given = {"dtype": "float32", "threads": None, "name": name, "log": str(tmp_path / "log")}
    sides.append(Side(name, [sys.executable, str(script)], given | settings))
    return sides[-1]

  yield start
  for side in sides:
    side.__exit__()
