"""The examples of the guide to the server run against one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "serve.md"
BLOCKS = re.findall(r"^<!-- serve -->\n```(python|sh)\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
COMMAND = [sys.executable, "-c", "from sam3_jax.cli.main import entry; entry()", "serve", "--quiet"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def port(tmp_path_factory):
  """Of a running server, which must end in order."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    number = probe.getsockname()[1]
  settings = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  process = subprocess.Popen(
    [*COMMAND, "--port", str(number)],
    cwd=tmp_path_factory.mktemp("server"), env=os.environ | settings,
  )  # fmt: skip
  try:
    for _ in range(1200):
      time.sleep(0.25)
      try:
        urllib.request.urlopen(f"http://127.0.0.1:{number}/readyz", timeout=30).close()
        break
      except urllib.error.HTTPError as error:
        error.close()
      except OSError:
        assert process.poll() is None
    yield number
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
  finally:
    process.kill()
    process.wait()


def test_there_are_examples():
  assert [language for language, _ in BLOCKS] == ["sh", "python"]


@pytest.mark.parametrize(("language", "code"), BLOCKS, ids=[language for language, _ in BLOCKS])
def test_example(port, language, code):
  code = code.replace("127.0.0.1:8000", f"127.0.0.1:{port}")
  command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
  binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  settings = {"PYTHONPATH": str(ROOT), "PATH": binaries}
  done = subprocess.run(
    command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=120
  )
  assert done.returncode == 0, done.stderr
  if language == "python":
    score, *_ = done.stdout.split()
    assert float(score) > 0.5
  else:
    assert '"phrase":"lion","instances":[{"score":' in done.stdout
