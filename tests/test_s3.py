"""S3 against moto, an independent implementation of its API; faults as in object_servers.py."""

import filecmp
import importlib.util
import shutil

import object_servers
import pytest
from batches import load_images, write_images

from sam3_jax.batch.inputs import list_inputs
from sam3_jax.cli.main import main
from sam3_jax.registry import find_checkpoint
from sam3_jax.storage import retries, store
from sam3_jax.storage.faults import ChangedError, StoreError
from sam3_jax.storage.find import find_objects
from sam3_jax.storage.objects import ObjectPath
from sam3_jax.storage.s3 import S3
from sam3_jax.storage.store import ABSENT

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("moto", "s3fs"))), reason="needs moto and the extra s3"
  ),
]


@pytest.fixture(scope="module")
def moto():
  with object_servers.moto() as port:
    yield port


@pytest.fixture
def s3(moto, monkeypatch):
  """An empty bucket called `bucket`, behind a server that makes faults."""
  values = {"AWS_ACCESS_KEY_ID": "AKIAKEY", "AWS_SECRET_ACCESS_KEY": "verysecret"}
  for name, value in (values | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
    monkeypatch.setenv(name, value)
  faults = object_servers.Faults()
  faults.upstream = moto
  monkeypatch.setattr(retries, "POLICY", object_servers.QUICK)
  with object_servers.serving(faults):
    monkeypatch.setenv("AWS_ENDPOINT_URL", faults.address)
    store._open.cache_clear()
    yield faults
    for found in list(find_objects("s3://bucket/*").objects):
      ObjectPath(found.where.url).unlink()
    store._open.cache_clear()


def test_objects(s3, tmp_path, monkeypatch):
  path = ObjectPath("s3://bucket/a") / "b c+d?.jsonl"
  assert not path.exists()
  version = path.create(b"one\ntwo\n")
  with pytest.raises(ChangedError):
    path.create(b"other")
  assert path.entry()[:3] == (path.location.name, 8, version)
  assert 0 <= path.entry().age + 1 < 30
  assert [*path.open()] == [b"one\n", b"two\n"]
  later = path.write(b"three", version)
  for stale in (version, ABSENT):
    with pytest.raises(ChangedError):
      path.write(b"four", stale)
  assert path.read_versioned() == (b"three", later)
  monkeypatch.setattr("sam3_jax.storage.s3._PIECE", 5 * 2**20)
  (tmp_path / "large").write_bytes(bytes(range(256)) * 40_000)
  path.with_suffix(".bin").upload(tmp_path / "large")
  assert path.with_suffix(".bin").read_bytes() == (tmp_path / "large").read_bytes()
  assert [str(found) for found in path.parent.glob("*.bin")] == [str(path.with_suffix(".bin"))]
  path.unlink()
  path.unlink()
  assert not path.exists()


@pytest.mark.parametrize("kind", object_servers.KINDS)
def test_transient_faults_are_repeated(s3, kind):
  path = ObjectPath("s3://bucket/a")
  before = retries.counted()
  s3.requests = 0
  s3.plan.extend([kind] * 2)
  version = path.create(b"content" * 100)
  s3.plan.extend([kind] * 2)
  assert path.read_versioned() == (b"content" * 100, version)
  assert retries.counted()[0] - before[0] == s3.requests  # no request of s3fs or botocore besides
  assert max(s3.seen.values()) <= retries.POLICY.attempts


def test_attempts_end(s3):
  s3.plan.extend(["503"] * 99)
  s3.requests = 0
  with pytest.raises(StoreError, match=r"limits the rate of requests \(HTTP 503\).*5 attempts"):
    ObjectPath("s3://bucket/a").read_bytes()
  s3.plan.clear()
  assert s3.requests == 5


def test_inputs(s3, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for path in write_images(tmp_path / "images", 5).iterdir():
    ObjectPath(f"s3://bucket/images/{path.name}").write(path.read_bytes())
  monkeypatch.setattr("sam3_jax.storage.s3.PAGE", 2)
  wanted, found = list_inputs("images", "cat"), list_inputs("s3://bucket/images", "cat")
  assert [one.name for one in found] == [one.name for one in wanted]
  for one, other in zip(load_images(found), load_images(wanted), strict=True):
    assert (one.pixels == other.pixels).all()
    assert one.requests == (1, 0)


def test_checkpoints(s3, tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  local = find_checkpoint("sam3-tiny")
  for path in local.rglob("*"):
    if path.is_file():
      ObjectPath(f"s3://bucket/checkpoints/tiny/{path.relative_to(local)}").upload(path)
  s3.plan.extend([None, None, "503", "cut"])
  copy = find_checkpoint("s3://bucket/checkpoints/tiny")
  assert filecmp.dircmp(local, copy).diff_files == []
  assert main(["inspect", "s3://bucket/checkpoints/tiny"]) == 0
  assert "sam3-tiny" in capsys.readouterr().out


def test_convert(s3, tmp_path, monkeypatch, capsys):
  """The checkpoint is converted on this machine, and then uploaded."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  local = find_checkpoint("sam3-tiny")
  monkeypatch.setattr(
    "sam3_jax.cli.convert._convert",
    lambda source, out, *_, **__: shutil.copytree(local, out) and "",
  )
  assert main(["convert", "source", "s3://bucket/new/tiny"]) == 0
  assert capsys.readouterr().out.startswith("s3://bucket/new/tiny: ")
  copy = find_checkpoint("s3://bucket/new/tiny")
  assert filecmp.dircmp(local, copy).diff_files == []
  assert main(["convert", "source", "s3://bucket/new/tiny"]) == 2
  assert "s3://bucket/new/tiny exists already; give another" in capsys.readouterr().err
  assert main(["convert", "source", "s3://other/tiny"]) == 2
  assert "s3://other/tiny: there is no bucket other; check its name" in capsys.readouterr().err


def test_faulty_buckets(s3, monkeypatch):
  with pytest.raises(StoreError, match="s3://other/a: there is no bucket other; check its name"):
    ObjectPath("s3://other/a").read_bytes()
  with pytest.raises(FileNotFoundError, match="there is no object or prefix s3://bucket/none"):
    find_objects("s3://bucket/none")
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.delenv(name)
  monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
  monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "none")
  store._open.cache_clear()
  with pytest.raises(StoreError, match="s3://bucket/a: there are no credentials; set AWS_PROFILE"):
    ObjectPath("s3://bucket/a").read_bytes()
  for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
    monkeypatch.setenv(name, "x")
  store._open.cache_clear()


def test_the_store_is_open_once():
  assert isinstance(store._open("s3"), S3)
  assert store._open("s3") is store._open("s3")
