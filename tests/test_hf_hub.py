"""The hub's client against a local server that speaks the hub's endpoints, its cache, and bundles
made of what came."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
import types

import pytest
from layouts import TOKENIZER, layout, write_folder
from sam3_jax.converters.writers.vocabulary import write_huggingface

from sam3_jax.checkpoint import hf_hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
  "org/both": {
    "model.safetensors": b"weights",
    "sam3.pt": b"the same weights",
    "config.json": b"{}",
    "merges.txt": b"#version",
    "README.md": b"no",
  },
  "org/preset": {
    "config.json": b"{}",
    "model.weights.h5": b"weights",
    "assets/tokenizer/merges.txt": b"a b",
    "assets/tokenizer/vocabulary.json": b"{}",
  },
  "org/torch": {"sam3.1.pt": b"weights", "notes.md": b"no"},
  "org/broken": {"model.safetensors": b"weights", "config.json": b"{}"},
  "org/cut": {"model.safetensors": bytes(range(256)) * 40960 * 2, "config.json": b"{}"},
}


class Hub(http.server.BaseHTTPRequestHandler):
  """As much of the hub as snapshot_download asks for."""

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = self.path.partition("?")[0].strip("/")
    self.server.requests.append(path)
    repository = "/".join(path.removeprefix("api/models/").split("/")[:2])
    if repository == "org/gated":
      return self.answer(403, headers={"X-Error-Code": "GatedRepo"})
    if repository == "org/forbidden":
      return self.answer(403)
    if repository == "org/down":
      return self.answer(500)
    if repository not in FILES:
      return self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
    files = FILES[repository]
    if "/revision/" in path and not path.endswith(("/main", COMMIT)):
      return self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
    if "/tree/" in path:
      return self.answer(200, [self.entry(name, data) for name, data in files.items()])
    if path.startswith("api/models/"):
      return self.answer(200, {"id": repository, "sha": COMMIT, "siblings": []})
    name = path.partition(f"/resolve/{COMMIT}/")[2]
    if repository == "org/broken" and name == "model.safetensors" and self.command == "GET":
      return self.answer(500)
    headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{oid(files[name])}"'}
    cut = repository == "org/cut" and name == "model.safetensors" and self.command == "GET"
    return (
      self.answer_range(files[name], headers) if cut else self.answer(200, files[name], headers)
    )

  def answer_range(self, data, headers):
    """Sends three quarters of the body and closes the connection; sends the rest on request."""
    start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
    self.server.ranges.append(start)
    if start:
      headers |= {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
      return self.answer(206, data[start:], headers)
    self.send_response(200)
    for key, value in (headers | {"Content-Length": str(len(data))}).items():
      self.send_header(key, value)
    self.end_headers()
    self.wfile.write(data[: 3 * len(data) // 4])
    self.wfile.flush()
    self.close_connection = True
    return None

  def entry(self, name, data):
    return {"type": "file", "path": name, "size": len(data), "oid": oid(data)}

  def answer(self, status, content=b"", headers=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in (headers or {}).items():
      self.send_header(name, value)
    self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if self.command == "GET":
      self.wfile.write(data)

  def log_message(self, *_):
    pass


def oid(data):
  return hashlib.sha1(data).hexdigest()


@pytest.fixture(scope="module")
def server():
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
  server.requests, server.ranges = [], []
  threading.Thread(target=server.serve_forever, daemon=True).start()
  yield server
  server.shutdown()
  server.server_close()


DOWNLOAD = """
import sys
from sam3_jax.checkpoint.hf_hub import download
try:
  print(download(sys.argv[1]))
except Exception as error:
  print(type(error).__name__, error)
"""


@pytest.fixture
def run(server, tmp_path):
  """Runs `download` in a subprocess, as the client reads its settings when it is imported; returns
  the result or the error."""

  def run(name, code=DOWNLOAD, **settings):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {
      "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
      "HF_HOME": str(tmp_path / "cache"),
      "HF_HUB_DISABLE_PROGRESS_BARS": "1",
      "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    done = subprocess.run(
      [sys.executable, "-c", code, name],
      env=environment | settings,
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout.strip()

  return run


def names(folder):
  walk = os.walk(folder)
  return {
    os.path.relpath(os.path.join(at, file), folder) for at, _, files in walk for file in files
  }


@pytest.mark.slow
def test_downloads_only_files_that_a_conversion_reads_and_once(run, server):
  folder = run("hf://org/both")
  assert names(folder) == {"model.safetensors", "config.json", "merges.txt"}
  assert folder.endswith(COMMIT)
  assert names(run("hf://org/preset")) == FILES["org/preset"].keys()
  assert names(run("hf://org/torch@main")) == {"sam3.1.pt"}
  server.requests.clear()
  assert run("hf://org/both", HF_HUB_OFFLINE="1") == folder
  assert run(f"hf://org/both@{COMMIT}", HF_HUB_OFFLINE="1") == folder
  assert server.requests == []


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("org/gated", {}, "PermissionError org/gated is gated: accept its licence at https://hugging"),
    ("org/forbidden", {}, "PermissionError the hub refuses org/forbidden (status 403): the token"),
    ("org/none", {}, "FileNotFoundError there is no org/none on the hub, or it is private"),
    ("org/both@v9", {}, "FileNotFoundError org/both has no revision v9"),
    ("org/down", {}, "FileNotFoundError the hub failed for org/down (status 500)"),
    ("org/both", {"HF_HUB_OFFLINE": "1"}, "FileNotFoundError org/both cannot be"),
    ("org/both", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "FileNotFoundError org/both cannot"),
    ("org/broken", {}, "FileNotFoundError the hub failed for org/broken (status 500)"),
  ],
)  # fmt: skip
def test_errors_are_one_line_with_a_remedy(run, name, settings, message):
  said = run(f"hf://{name}", **settings)
  assert said.startswith(message)
  assert "\n" not in said


@pytest.mark.slow
def test_incomplete_download_is_an_error(run):
  assert "status 500" in run("hf://org/broken")
  said = run("hf://org/broken", HF_HUB_OFFLINE="1")
  assert said.startswith("FileNotFoundError org/broken cannot be reached, and the hub's cache is")


@pytest.mark.slow
def test_truncated_file_is_resumed(run, server):
  """From the client's last complete block of 10 MB."""
  whole = FILES["org/cut"]["model.safetensors"]
  with open(os.path.join(run("hf://org/cut"), "model.safetensors"), "rb") as file:
    assert file.read() == whole
  assert server.ranges == [0, 10 * 2**20]


@pytest.mark.parametrize("module", ["httpx", "httpx2.transports", "requests", "builtins"])
def test_connection_errors(monkeypatch, module):
  kind = OSError if module == "builtins" else type("Broken", (Exception,), {"__module__": module})

  def snapshot_download(*_, **__):
    raise kind("peer closed connection\nand more")

  monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
  with pytest.raises(FileNotFoundError, match=r"org/x failed \(peer closed") as caught:
    hf_hub.download("hf://org/x")
  assert "\n" not in str(caught.value)


def test_other_errors_are_not_caught(monkeypatch):
  monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: {}["x"])
  with pytest.raises(KeyError):
    hf_hub.download("hf://org/x")


LOAD = """
import sys
from sam3_jax import Sam3
from sam3_jax.registry import find_checkpoint
model = Sam3.from_checkpoint(find_checkpoint(sys.argv[1]), dtype="float32")
print(model.params["trunk"]["norm_pre"]["scale"].sum())
"""


@pytest.mark.slow
def test_load_from_the_hub_and_then_offline(run, server, tmp_path):
  """Converts a checkpoint once, then loads it without a server."""
  source = write_folder(tmp_path / "source", layout("detector"))
  write_huggingface(TOKENIZER.read_bytes(), source, 32)
  FILES["org/whole"] = {path.name: path.read_bytes() for path in source.iterdir()}
  cache = {"XDG_CACHE_HOME": str(tmp_path / "bundles"), "JAX_PLATFORMS": "cpu"}
  first = run("hf://org/whole", code=LOAD, **cache)
  want = layout("detector")["vision_encoder.backbone.layer_norm.weight"].sum()
  assert float(first) == pytest.approx(float(want), rel=1e-5)
  server.requests.clear()
  nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "empty")}
  assert run("hf://org/whole", code=LOAD, **cache, **nowhere) == first
  assert server.requests == []


@pytest.mark.parametrize(
  "name", ["", "sam3", "a/b/c", "../x", "a/..", "a/b@", "a b/c", "a/b@../x", "org/name@x y"]
)
def test_invalid_names(name):
  with pytest.raises(ValueError, match=r"does not name a repository; expected hf://org/name"):
    hf_hub.check_name(f"hf://{name}")


def test_names():
  assert hf_hub.check_name("hf://facebook/sam3") == ("facebook/sam3", None)
  assert hf_hub.check_name("keras/sam3_pcs@v1.0") == ("keras/sam3_pcs", "v1.0")


def test_resolve_revision(monkeypatch, tmp_path):
  calls = []

  def model_info(self, repository, *, revision, timeout):
    calls.append((repository, revision))
    if revision == "none":
      raise OSError("no route to host.\nand more")
    return types.SimpleNamespace(sha=None if revision == "odd" else COMMIT)

  monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
  assert hf_hub.resolve("org/x", None) == (COMMIT, "")
  assert hf_hub.resolve("org/x", "none") == (None, "no route to host")
  assert hf_hub.resolve("org/x", "odd") == (None, "it names no commit")
  assert calls == [("org/x", None), ("org/x", "none"), ("org/x", "odd")]
  assert hf_hub.resolve("org/x", COMMIT) == (COMMIT, "")  # without asking
  assert len(calls) == 3
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  assert hf_hub.resolve("org/x", None) == (None, "the package huggingface_hub is missing")
  assert hf_hub.commit_of(tmp_path / "snapshots" / COMMIT) == COMMIT
  assert hf_hub.commit_of(tmp_path) is None
