"""`sam3-jax serve`: errors before any work, and a whole run of the process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from sam3_jax import Sam3
from sam3_jax.cli.main import main
from sam3_jax.cli.serve_model import listen, page_url
from sam3_jax.server.settings import Settings

SCENE = Path(__file__).parents[1] / "docs" / "scene.jpg"
COMMAND = "import sys; from sam3_jax.cli.main import entry; entry()"


def fails(capsys, *arguments: str) -> str:
  assert main(["serve", *arguments]) == 2
  error = capsys.readouterr().err
  assert error.count("\n") == 1
  return error


def test_refuses_other_hosts_without_a_token(capsys, monkeypatch):
  monkeypatch.delenv("SAM3_JAX_TOKEN", raising=False)
  error = fails(capsys, "--host", "0.0.0.0")
  assert "--host 0.0.0.0 lets other machines in" in error
  assert "SAM3_JAX_TOKEN" in error


def test_takes_the_token_from_the_environment(capsys, monkeypatch):
  monkeypatch.setenv("SAM3_JAX_TOKEN", "short")
  assert "a token must have at least 8" in fails(capsys, "--host", "0.0.0.0")


def test_refuses_a_port_that_is_taken(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    error = fails(capsys, "--port", str(taken.getsockname()[1]))
  assert "choose another --port" in error


def test_refuses_bad_values(capsys):
  assert "--allow-origin must be" in fails(capsys, "--allow-origin", "example.org")
  assert "--store" in fails(capsys, "--store", "/proc/none")
  assert "no-such" in fails(capsys, "--checkpoint", "no-such", "--port", "0")


def test_page_url():
  assert page_url(Settings(), 8000) == "http://127.0.0.1:8000/"
  token = "a-token-of-tests"
  assert page_url(Settings(host="0.0.0.0", token=token), 80) == "http://127.0.0.1:80/"
  assert page_url(Settings(host="::1"), 80) == "http://[::1]:80/"


def test_listens_on_a_free_port():
  with listen("localhost", 0) as listening:
    assert listening.getsockname()[1] > 0


def call(url: str, data: bytes | None = None, kind: str = "image/jpeg"):
  request = urllib.request.Request(url, data, {"Content-Type": kind})
  with urllib.request.urlopen(request, timeout=60) as response:
    return json.loads(response.read())


@pytest.mark.slow
def test_a_run(tmp_path):
  """Starts, gets ready, segments an image as the library does, and ends on SIGTERM."""
  temporary = tmp_path / "tmp"
  temporary.mkdir()
  environment = os.environ | {"TMPDIR": str(temporary), "XLA_FLAGS": ""}
  process = subprocess.Popen(
    [sys.executable, "-c", COMMAND, "serve", "--port", "0", "--checkpoint", "sam3-tiny"],
    cwd=SCENE.parents[1],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  lines = []
  try:
    for line in process.stderr:
      lines.append(line)
      if line.startswith("ready"):
        break
    url = re.search(r"http://127\.0\.0\.1:\d+", lines[-1])[0]
    assert call(f"{url}/readyz") == {"status": "ok"}
    assert list(temporary.glob("sam3-jax-serve-*"))
    image = call(f"{url}/v1/images", SCENE.read_bytes())
    assert (image["width"], image["height"]) == (640, 480)
    asked = json.dumps({"concepts": [{"phrase": "lion"}]}).encode()
    found = call(f"{url}/v1/images/{image['id']}/prompts", asked, "application/json")
    [instance] = found["concepts"][0]["instances"]
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(60) == 0
  finally:
    process.kill()
    process.wait()
    process.stderr.close()
  assert rest.splitlines()[-1] == "stopped"
  logged = [json.loads(line) for line in rest.splitlines() if line.startswith("{")]
  assert [one["status"] for one in logged] == [200, 201, 200]
  assert list(temporary.iterdir()) == []
  model = Sam3.from_checkpoint("sam3-tiny")
  [want] = model.decode(model.encode(SCENE), "lion").instances()
  assert instance["mask"] == want.masks.rle(0)
  assert instance["score"] == pytest.approx(float(want.scores[0]), abs=1e-5)


@pytest.mark.slow
def test_ends_while_it_compiles(tmp_path):
  """SIGTERM does not wait for the programs, which take longer than this limit without a cache."""
  temporary, environment = tmp_path / "tmp", {"XDG_CACHE_HOME": str(tmp_path), "XLA_FLAGS": ""}
  temporary.mkdir()
  process = subprocess.Popen(
    [sys.executable, "-c", COMMAND, "serve", "--port", "0"],
    cwd=SCENE.parents[1],
    env=os.environ | environment | {"TMPDIR": str(temporary)},
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    assert process.stderr.readline().startswith("compiling")
    process.send_signal(signal.SIGTERM)
    rest = process.stderr.read()
    assert process.wait(10) == 0
  finally:
    process.kill()
    process.wait()
    process.stderr.close()
  assert rest == "stopped\n"
  assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_killed_and_restarted(tmp_path):
  """After kill -9 nothing is left running, and the next server keeps the images of --store."""
  store = tmp_path / "store"
  arguments = ["serve", "--port", "0", "--store", str(store), "--quiet"]

  def start() -> tuple[subprocess.Popen, str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
      port = free.getsockname()[1]
    arguments[2] = str(port)
    environment = os.environ | {"XLA_FLAGS": "", "TMPDIR": tempfile.gettempdir()}
    process = subprocess.Popen(
      [sys.executable, "-c", COMMAND, *arguments], cwd=SCENE.parents[1], env=environment
    )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
      try:
        call(f"{url}/readyz")
        return process, url
      except (urllib.error.URLError, ConnectionError):
        assert process.poll() is None
        time.sleep(0.5)
    raise TimeoutError(url)

  process, url = start()
  image = call(f"{url}/v1/images", SCENE.read_bytes())["id"]
  process.kill()
  process.wait()
  process, url = start()
  try:
    assert call(f"{url}/v1/images/{image}")["width"] == 640
  finally:
    process.terminate()
    assert process.wait(60) == 0
