"""What servers answer if credentials, permissions or the region are wrong, by the real clients.

The error is one line with the remedy and without secrets, and no request is repeated.
"""

import http.server
from typing import Any

import object_servers
import pytest

from sam3_jax.batch.inputs import list_inputs
from sam3_jax.storage.faults import StoreError
from sam3_jax.storage.objects import ObjectPath

SECRET = "s3cr3t-s3cr3t"


class Refusing(http.server.ThreadingHTTPServer):
  """Answers every request in the same way."""

  daemon_threads = True

  def __init__(self, status, body, headers):
    super().__init__(("localhost", 0), _Handler)
    self.answer, self.requests = (status, body.encode(), headers), 0
    self.address = f"http://localhost:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Refusing
  protocol_version = "HTTP/1.1"

  def refuse(self):
    self.rfile.read(int(self.headers.get("Content-Length", 0)))
    self.server.requests += 1
    status, body, headers = self.server.answer
    self.send_response(status)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(body)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = refuse

  def log_message(self, *_):
    pass


@pytest.fixture
def refusing(monkeypatch):
  """A function that starts a server; the variables of the environment name it."""
  servers: list[Any] = []

  def start(scheme, status, body, headers=None):
    server = Refusing(status, body, {"Content-Type": "application/json", **(headers or {})})
    context = object_servers.serving(server)
    servers.append(context)
    context.__enter__()
    if scheme == "s3":
      pytest.importorskip("s3fs", reason="needs the extra s3")
      monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)
      monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA" + "0" * 16)
      monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
      monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
      monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    else:
      pytest.importorskip("gcsfs", reason="needs the extra gcs")
      monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
      monkeypatch.setitem(object_servers.fsspec.config.conf, "gs", {"token": "anon"})
    return server

  with object_servers.quick_stores(monkeypatch):
    yield start
  for context in servers:
    context.__exit__(None, None, None)


def xml(code, more=""):
  return f"<Error><Code>{code}</Code><Message>{SECRET}</Message>{more}</Error>"


EXPIRED = "the credentials have expired; set AWS_PROFILE, AWS_ACCESS_KEY_ID"
REGION = "the bucket is in another region; set AWS_REGION"
DENIED = "permission is denied (HTTP 403); "
IN_FRANKFURT = {"x-amz-bucket-region": "eu-central-1"}
ANSWERS = [
  ("s3", 400, xml("ExpiredToken"), {}, EXPIRED),
  ("s3", 403, xml("ExpiredToken"), {}, EXPIRED),
  ("s3", 301, xml("PermanentRedirect"), IN_FRANKFURT, f"{REGION}=eu-central-1"),
  ("s3", 400, xml("AuthorizationHeaderMalformed", "<Region>eu-central-1</Region>"), {}, REGION),
  ("s3", 403, xml("AccessDenied"), {}, f"{DENIED}allow s3:GetObject, PutObject"),
  ("gs", 401, '{"error": {"code": 401, "message": "Invalid Credentials"}}', {},
   "the credentials are not valid or have expired (HTTP 401); log in with `gcloud"),
  ("gs", 403, '{"error": {"code": 403, "message": "does not have storage.objects.get"}}', {},
   f"{DENIED}grant roles/storage.objectUser on the bucket"),
]  # fmt: skip
USES = {
  "list": lambda url: list_inputs(f"{url}images", "cat"),
  "describe": lambda url: list_inputs(f"{url}images/a.png", "cat"),
  "read": lambda url: ObjectPath(f"{url}a.png").read_bytes(),
  "write": lambda url: ObjectPath(f"{url}a.png").write(b"new"),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
  "answer", ANSWERS, ids=lambda one: "-".join(map(str, (*one[:2], one[4][:15])))
)
def test_refusals_are_one_line_with_the_remedy(refusing, answer, use):
  *served, message = answer
  server, scheme = refusing(*served), served[0]
  with pytest.raises((StoreError, ValueError)) as raised:
    USES[use](f"{scheme}://bucket/")
  line = str(raised.value)
  assert line.startswith(f"{scheme}://bucket/")
  assert message in line
  assert SECRET not in line
  assert "\n" not in line
  assert server.requests <= 4  # with the client's own search for the region
