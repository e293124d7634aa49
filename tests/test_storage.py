"""Reading and writing objects: the same results despite faults, or one line that says why.

The servers are local, see object_servers.py.
"""

import io
import re

import object_servers
import pytest

from sam3_jax.storage import faults as faults_of_stores
from sam3_jax.storage import retries, store
from sam3_jax.storage.faults import ChangedError, StatusError, StoreError, translate
from sam3_jax.storage.find import find_objects
from sam3_jax.storage.objects import ObjectPath, open_binary, resolve
from sam3_jax.storage.store import ABSENT, locate
from sam3_jax.storage.urls import Location, is_url, join, parent, parse, redact

bucket, faults, web = object_servers.bucket, object_servers.faults, object_servers.web
SIGNED = "https://user:password@host/a.jpg?X-Amz-Signature=abc&X-Amz-Credential=def#g"


def names(url):
  return [found.name for found in find_objects(url).objects]


def test_urls():
  assert parse("gs:/b/c/d") == parse("gs://b/c/d") == Location("gs", "b", "c/d")
  assert parse("hf://datasets/o/n/a/b.jpg") == Location("hf", "o/n@main", "a/b.jpg")
  assert parse("hf://datasets/o/n@v1") == Location("hf", "o/n@v1", "")
  assert str(parse(SIGNED)) == redact(SIGNED) == "https://host/a.jpg"
  assert parse(SIGNED).url == SIGNED
  assert redact("/a?b") == "/a?b"
  assert not is_url("a/b")
  assert not is_url("C:/a")
  assert join("gs://b/c", "d/../e.jpg") == "gs://b/c/e.jpg"
  assert join("gs://b/c", "../e.jpg?f=//g") == "gs://b/e.jpg?f=//g"
  assert join("gs://b/c", "s3://d/e.jpg") == "s3://d/e.jpg"
  assert join("/a", "b/c") == "/a/b/c"
  assert join("/a", "/b") == "/b"
  assert parent("gs://b/c/d.jsonl") == "gs://b/c"


@pytest.mark.parametrize(
  ("url", "message"),
  [
    ("az://b/c", "az://b/c has an unsupported scheme; give a local path, gs://, s3://"),
    ("gs://", "names no bucket; expected gs://BUCKET/NAME"),
    ("hf://org/name", "does not name a dataset; expected hf://datasets/ORG/NAME"),
    ("http://host/a.jpg?key=b", "http://host/a.jpg is not encrypted; use https://"),
  ],
)
def test_faulty_urls(url, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    parse(url)


def test_lists_in_buckets_do_not_name_local_files():
  with pytest.raises(ValueError, match="/etc/a is a local path, but the list is in gs://b/c"):
    join("gs://b/c", "/etc/a")


def test_objects(bucket, tmp_path):
  path = ObjectPath("gs://bucket/a") / "b c+d?.jsonl"
  assert not path.exists()
  version = path.create(b"one\ntwo\n")
  with pytest.raises(ChangedError):
    path.create(b"other")
  assert path.entry()[:3] == ("a/b c+d?.jsonl", 8, version)
  assert [*path.open()] == [b"one\n", b"two\n"]
  with open_binary(str(path)) as file:
    assert file.seek(-4, io.SEEK_END) == 4
    assert file.read() == b"two\n"
  later = path.write(b"three", version)
  for stale in (version, ABSENT):
    with pytest.raises(ChangedError):
      path.write(b"four", stale)
  path.unlink(version=version)  # another version: stays
  assert path.read_versioned() == (b"three", later)
  (tmp_path / "large").write_bytes(bytes(3 * 2**20))
  path.with_suffix(".bin").upload(tmp_path / "large")
  assert [str(found) for found in path.parent.glob("*.bin")] == [str(path.with_suffix(".bin"))]
  path.unlink()
  path.unlink()
  assert not path.exists()
  assert resolve(tmp_path) == tmp_path


def test_versions(bucket):
  at, where = locate("gs://bucket/a")
  version = at.write(where, b"0123456789")
  assert at.read(where, 2, 5, version) == (b"234", version)
  assert at.read(where, 7) == (b"789", version)
  assert at.read(where, 5, 5) == (b"", "")
  at.write(where, b"new")
  with pytest.raises(ChangedError, match="gs://bucket/a: it has changed since it was listed"):
    at.read(where, 0, 2, version)


@pytest.mark.parametrize("kind", object_servers.KINDS)
def test_transient_faults_are_repeated(faults, kind):
  at, where = locate("gs://bucket/a")
  before = retries.counted()
  faults.plan.extend([kind] * 2)
  version = at.write(where, b"content" * 100, ABSENT)  # also if it took effect the first time
  faults.plan.extend([kind] * 2)
  assert at.read(where) == (b"content" * 100, version)
  assert retries.counted()[0] - before[0] == faults.requests
  faults.plan.extend([kind] * 2)
  at.delete(where, version)
  assert at.stat(where) is None
  assert max(faults.seen.values()) <= retries.POLICY.attempts


def test_attempts_end(faults):
  at, where = locate("gs://bucket/a")
  faults.plan.extend(["503"] * 99)
  with pytest.raises(StoreError, match=r"limits the rate of requests \(HTTP 503\).*5 attempts"):
    at.read(where)
  assert faults.requests == 5
  assert len(faults.plan) == 94


def test_waits_grow_and_are_limited():
  policy = retries.RetryPolicy(first=1.0, longest=10.0)
  for attempt, most in enumerate([1, 2, 4, 8, 10, 10]):
    assert most / 2 <= policy.wait(attempt) <= most
  assert policy.wait(0, retry_after=7) == 7
  assert policy.wait(0, retry_after=700) == 10


@pytest.mark.parametrize(
  ("error", "message"),
  [
    (StatusError(403), "permission is denied (HTTP 403); allow s3:GetObject"),
    (StatusError(404, "NoSuchBucket"), "there is no bucket b; check its name"),
    (StatusError(400, "ExpiredToken"), "the credentials have expired; set AWS_PROFILE"),
    (StatusError(401), "the credentials are not valid or have expired (HTTP 401); set AWS"),
    (
      StatusError(301, "PermanentRedirect", headers={"x-amz-bucket-region": "eu-west-1"}),
      "the bucket is in another region; set AWS_REGION=eu-west-1",
    ),
    (StatusError(429), "the server limits the rate of requests (HTTP 429); try again later"),
    (StatusError(418, message="token=abc a https://h/?sig=1 b"), "HTTP 418 (token=... a b)"),
    (TimeoutError(), "the server does not answer in time; check the network"),
    (ConnectionRefusedError(111, "Connection refused"), "failed (Connection refused); check the"),
    (type("NoCredentialsError", (Exception,), {})(), "there are no credentials; set AWS_PROFILE"),
    (type("RefreshError", (Exception,), {})("token"), "the credentials have expired"),
  ],
)  # fmt: skip
def test_messages(error, message):
  fault = translate(error, Location("s3", "b", "c"))
  assert message in str(fault)
  assert str(fault).startswith("s3://b/c: ")
  assert "\n" not in str(fault)


def test_permissions_and_buckets(bucket):
  bucket.put("secret/a", b"a", {})
  bucket.denied = ("secret/",)
  for use in (ObjectPath.read_bytes, lambda path: path.write(b"")):
    with pytest.raises(StoreError, match=r"gs://bucket/secret/a: permission is denied") as error:
      use(ObjectPath("gs://bucket/secret/a"))
    assert "abc" not in str(error.value)
  with pytest.raises(StoreError, match="gs://other/a: there is no bucket other; check its name"):
    ObjectPath("gs://other/a").read_bytes()


def test_a_server_that_is_not_there(monkeypatch):
  server = object_servers.Files()
  server.server_close()
  with object_servers.cloud_storage(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    with pytest.raises(StoreError, match=r"gs://bucket/a: the connection to the server failed"):
      ObjectPath("gs://bucket/a").read_bytes()


def test_missing_packages_are_named(monkeypatch):
  monkeypatch.setattr(store.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"needs the package s3fs: pip install 'sam3-jax\[s3\]'"):
    ObjectPath("s3://bucket/a")


def test_find(bucket):
  for name in ("d/b.jpg", "d/a/c.png", "d/a.jpg", "d/", "d/a/.h/x.jpg", "e.jpg", "d2/z.jpg"):
    bucket.put(name, b"x", {})
  assert names("gs://bucket/d") == names("gs://bucket/d/") == [
    "a.jpg", "a/.h/x.jpg", "a/c.png", "b.jpg",
  ]  # fmt: skip
  assert names("gs://bucket/e.jpg") == ["gs://bucket/e.jpg"]
  assert names("gs://bucket/d*/*.jpg") == [f"gs://bucket/{n}.jpg" for n in ("d/a", "d/b", "d2/z")]
  assert names("gs://bucket/**/[!a]*.jpg") == [
    f"gs://bucket/{name}.jpg" for name in ("d/b", "d2/z", "e")
  ]
  assert names("gs://bucket/none*") == []
  assert len(names("gs://bucket")) == 6
  with pytest.raises(FileNotFoundError, match="there is no object or prefix gs://bucket/none"):
    find_objects("gs://bucket/none")


def test_listings_are_read_in_pages(faults):
  for i in range(2500):
    faults.server.put(f"many/{i:04}.jpg", b"", {})
  found = find_objects("gs://bucket/many")
  assert faults.requests == 2  # whether it is an object, and the first page
  assert [one.name for one in found.objects] == [f"{i:04}.jpg" for i in range(2500)]
  assert faults.requests == 4


def test_web(web):
  web.files["/a b.jpg"] = b"0123456789"
  url = f"{web.address}/a b.jpg?sig=abc"
  (found,) = find_objects(url).objects
  assert "abc" not in found.name
  assert found.entry.size == 10
  at, where = locate(url)
  assert at.read(where, 2, 4) == (b"23", found.entry.version)
  web.files["/a b.jpg"] = b"other"
  with pytest.raises(ChangedError):
    at.read(where, version=found.entry.version)
  with pytest.raises(StoreError, match=r"a b.jpg: it is read only; write to gs:// or s3://"):
    at.write(where, b"")
  with pytest.raises(FileNotFoundError, match=r"there is no file http://localhost.*/none"):
    find_objects(f"{web.address}/none?sig=abc")


def test_hub(web):
  web.page = 2
  web.files |= {f"/data/d/{i}.jpg": bytes([i]) * 9 for i in range(5)} | {"/data/README.md": b"#"}
  found = list(find_objects("hf://datasets/org/data/d").objects)
  assert [one.name for one in found] == [f"{i}.jpg" for i in range(5)]
  assert found[3].where.bucket == f"org/data@{web.commit}"
  at, where = locate(found[3].where.url)
  assert at.read(where, 1, 4)[0] == b"\3\3\3"
  assert at.stat(where)[:2] == ("d/3.jpg", 9)
  assert names("hf://datasets/org/data@main/d/*.jpg")[0].startswith("hf://datasets/org/data@0123")
  with pytest.raises(FileNotFoundError):
    find_objects("hf://datasets/org/data/none")
  with pytest.raises(StoreError, match="it is read only"):
    ObjectPath("hf://datasets/org/data/x").write(b"")


def test_secrets_are_removed_from_messages():
  text = "Bearer ya29.abc x-goog-signature=def, AWSAccessKeyId: ghi refresh_token=jkl"
  assert not re.search("abc|def|ghi|jkl", faults_of_stores._shown(text))
