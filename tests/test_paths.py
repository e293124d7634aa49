"""Local paths and buckets: bundles in a bucket, and one-line errors for unsupported paths.

The bucket is on a local server, see buckets.py.
"""

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path

import buckets
import pytest
from golden_model import CONFIG, parameters

from sam3_jax import registry
from sam3_jax.checkpoint import bundle
from sam3_jax.checkpoint.writer import NewFolder, Writer
from sam3_jax.cli.main import main
from sam3_jax.utils import paths

ROOT = Path(__file__).parents[1]
NO_CREDENTIALS = {"NO_GCE_CHECK": "true", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
IN_A_BUCKET = """
import sys
sys.path[:0] = {paths!r}
import test_paths
test_paths.work("gs://bucket/some/tiny")
"""


def test_paths(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  assert paths.resolve_path("a/b") == paths.resolve_path(Path("a/b")) == tmp_path / "a/b"
  assert paths.scheme_of("a:b/c") is paths.scheme_of("/a://b") is paths.scheme_of("C:/a") is None
  assert paths.scheme_of("gs://a/b") == paths.scheme_of(Path("gs://a/b")) == "gs"
  assert paths.file_sizes(tmp_path / "none") == {}
  (tmp_path / "d").mkdir()
  (tmp_path / "d" / "e").write_text("123")
  assert paths.file_sizes(tmp_path) == {"d/e": 3}


@pytest.mark.parametrize("url", ["az://bucket/x", "https://host/x", "memory://x"])
def test_unsupported_schemes_are_rejected_first(url, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  message = f"^{url} has an unsupported scheme; give a local directory, or gs://.$"
  for use in (bundle.load, bundle.inspect, registry.find_checkpoint, Writer):
    with pytest.raises(ValueError, match=message):
      use(url)
  for typed in (["inspect", url], ["convert", "nowhere", url]):
    assert main(typed) == 2
    assert url in capsys.readouterr().err
  assert not any(tmp_path.iterdir())


def test_other_outputs_must_be_local(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"gs://bucket/x: the output must be in a local directory"):
    NewFolder("gs://bucket/x")
  assert main(["convert", "sam3-tiny", "gs://bucket/x", "--to", "meta"]) == 2
  assert "gs://bucket/x: what --to writes must be in a local directory" in capsys.readouterr().err
  (tmp_path / "a.jpg").write_bytes(b"")
  assert main(["segment", "a.jpg", "--text", "a", "--out", "gs://bucket/x"]) == 2
  assert "gs://bucket/x: --out must be in a local directory" in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ["a.jpg"]


def test_buckets_without_gcsfs(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[gcs\]'"):
    bundle.load("gs://bucket/x")


def work(url):
  """Runs in a subprocess: saves a bundle to a bucket and loads it from there."""
  from bundle_files import assert_params
  from layouts import TOKENIZER

  from sam3_jax import Sam3

  save = lambda **more: bundle.save(url, parameters(), CONFIG, TOKENIZER.read_bytes(), **more)  # noqa: E731
  save(info={"name": "tiny"}, unread={"x": parameters()["text"]["position"]})
  found = registry.find_checkpoint(url)
  steps = []
  loaded = bundle.load(found, verify=True, progress=lambda *step: steps.append(step))
  assert_params(loaded.params, parameters())
  assert steps[0] == ("checksums", 0)
  assert bundle.load_unread(url).keys() == {"x"}
  summary = bundle.inspect(Path(url), verify=True)  # pathlib turns // into /
  assert (summary.path, summary.config, summary.info) == (url, CONFIG, {"name": "tiny"})
  assert Sam3.from_checkpoint(found).encode_text("a").features.shape[0] == 1
  assert main(["inspect", url]) == 0
  assert main(["convert", url, "back", "--to", "meta", "--quiet"]) == 0
  assert Path("back/sam3.pt").is_file()
  with pytest.raises(ValueError, match="exists already"):
    save()
  files = paths.file_sizes(found)
  with Writer(url + "-2") as writer:
    writer._save("rest", {"text": parameters()["text"]})
    assert paths.exists(paths.resolve_path(url + "-2"))
  assert not paths.exists(paths.resolve_path(url + "-2"))
  assert paths.file_sizes(found) == files
  largest = max((name for name in files if "/d/" in name), key=files.__getitem__)
  data = (found / largest).read_bytes()
  (found / largest).write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
  with pytest.raises(ValueError, match="differs from its checksum"):
    bundle.verify(url)
  with pytest.raises(FileNotFoundError, match="there is no checkpoint at gs://bucket/none"):
    registry.find_checkpoint("gs://bucket/none")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gcsfs") is None, reason="needs the extra gcs")
def test_bundle_in_a_bucket(tmp_path):
  server = buckets.Server()
  threading.Thread(target=server.serve_forever, daemon=True).start()
  addresses = dict.fromkeys(("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"), server.address)
  search = [str(ROOT / name) for name in ("tests", "benchmarks", ".")]
  try:
    done = subprocess.run(
      [sys.executable, "-c", IN_A_BUCKET.format(paths=search)],
      env=os.environ | addresses | NO_CREDENTIALS | {"JAX_PLATFORMS": "cpu"},
      cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
  finally:
    server.shutdown()
    server.server_close()
  assert done.returncode == 0, done.stderr
  assert [path.name for path in tmp_path.iterdir()] == ["back"]
  assert all(name.startswith("some/tiny/") for name in server.objects)
