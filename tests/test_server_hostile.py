"""Hostile requests: each gets its documented status and code, in JSON, and harms nothing else."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from server_app import error_of, png, served, small_model, upload

from sam3_jax.outputs.rle import encode

TOKEN = "a-token-of-the-tests"
AUTHORIZED = {"Authorization": f"Bearer {TOKEN}"}
MAX_BYTES, MAX_JSON = 50_000, 20_000


@pytest.fixture(scope="module")
def log():
  return io.StringIO()


@pytest.fixture(scope="module")
def client(log):
  limits = {"max_bytes": MAX_BYTES, "max_json_bytes": MAX_JSON, "max_pixels": 10_000}
  with served(small_model(), log=log, token=TOKEN, **limits) as client:
    yield client


@pytest.fixture(scope="module")
def image(client):
  return upload(client, headers=AUTHORIZED)


def chunk(kind: bytes, data: bytes) -> bytes:
  checksum = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + checksum


def png_of_size(width: int, height: int) -> bytes:
  """A PNG file that claims a size, with a few bytes of pixels."""
  header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def gif() -> bytes:
  buffer = io.BytesIO()
  Image.new("P", (8, 8)).save(buffer, "GIF")
  return buffer.getvalue()


# Name: (method, path, keywords of the request, status, code). "ID" is an image that exists.
# Requests have the token unless they say otherwise; "json" may be a string.
GET = "/v1/model"
UPLOAD = "/v1/images"
ASK = "/v1/images/ID/prompts"
EVERYTHING = "/v1/images/ID/everything"
CAT = {"concepts": [{"phrase": "cat"}]}
DEEP = "[" * 200 + "]" * 200
CASES = {
  # Who asks.
  "dns rebinding": ("GET", GET, {"headers": {"Host": "evil.example"}}, 403, "forbidden_host"),
  "rebinding with port": ("GET", "/", {"headers": {"Host": "a.b:8000"}}, 403, "forbidden_host"),
  "rebinding healthz": ("GET", "/healthz", {"headers": {"Host": "evil"}}, 403, "forbidden_host"),
  "host with user": ("GET", GET, {"headers": {"Host": "localhost@a.b"}}, 403, "forbidden_host"),
  "host of a prefix": ("GET", GET, {"headers": {"Host": "localhost.a.b"}}, 403, "forbidden_host"),
  "other address": ("GET", GET, {"headers": {"Host": "192.0.2.1"}}, 403, "forbidden_host"),
  "broken host": ("GET", GET, {"headers": {"Host": "[::1"}}, 403, "forbidden_host"),
  "empty host": ("GET", GET, {"headers": {"Host": ""}}, 403, "forbidden_host"),
  "cross-site post": (
    "POST", UPLOAD, {"headers": {"Origin": "https://evil.example"}, "content": b"x"},
    403, "forbidden_origin",
  ),
  "null origin": ("POST", UPLOAD, {"headers": {"Origin": "null"}}, 403, "forbidden_origin"),
  "other port": (
    "POST", ASK, {"headers": {"Origin": "http://127.0.0.1:9"}, "json": CAT}, 403,
    "forbidden_origin",
  ),
  "cross-site image": (
    "GET", GET, {"headers": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}},
    403, "forbidden_origin",
  ),
  "cross-site frame": (
    "GET", GET, {"headers": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}},
    403, "forbidden_origin",
  ),
  "preflight": (
    "OPTIONS", UPLOAD,
    {"headers": {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}},
    403, "forbidden_origin",
  ),
  "no token": ("GET", GET, {"headers": {"Authorization": ""}}, 401, "unauthorized"),
  "wrong token": (
    "GET", GET, {"headers": {"Authorization": "Bearer wrong-token"}}, 401, "unauthorized"
  ),
  "start of the token": (
    "GET", GET, {"headers": {"Authorization": f"Bearer {TOKEN[:-1]}"}}, 401, "unauthorized"
  ),
  "token of another scheme": (
    "GET", GET, {"headers": {"Authorization": f"Digest {TOKEN}"}}, 401, "unauthorized"
  ),
  "token in Latin-1": (
    "GET", GET, {"headers": {"Authorization": b"Bearer \xff\xfe"}}, 401, "unauthorized"
  ),
  "wrong password": (
    "GET", GET, {"headers": {"Authorization": "Basic dXNlcjp3cm9uZw=="}}, 401, "unauthorized"
  ),
  "broken password": (
    "GET", GET, {"headers": {"Authorization": "Basic ===="}}, 401, "unauthorized"
  ),
  "metrics without token": (
    "GET", "/metrics", {"headers": {"Authorization": ""}}, 401, "unauthorized"
  ),
  "upload without token": (
    "POST", UPLOAD, {"headers": {"Authorization": ""}, "content": b"x"}, 401, "unauthorized"
  ),
  # Where.
  "no such path": ("GET", "/v2", {}, 404, "not_found"),
  "no pages of documentation": ("GET", "/docs", {}, 404, "not_found"),
  "wrong method": ("PUT", GET, {}, 405, "method_not_allowed"),
  "odd method": ("BREW", GET, {}, 405, "method_not_allowed"),
  "path traversal": ("GET", "/static/..%2f..%2fapp.py", {}, 404, "not_found"),
  "path traversal, twice encoded": ("GET", "/static/%252e%252e/app.py", {}, 404, "not_found"),
  "path traversal, absolute": ("GET", "/static//etc/passwd", {}, 404, "not_found"),
  "null byte": ("GET", "/static/a%00.js", {}, 404, "not_found"),
  "long name": ("GET", "/static/" + "a" * 5000, {}, 404, "not_found"),
  "id that is a path": ("GET", "/v1/images/..%2f..%2fetc%2fpasswd", {}, 404, "not_found"),
  "guessed id": ("GET", "/v1/images/" + "a" * 43, {}, 404, "unknown_image"),
  "id with line breaks": ("GET", "/v1/images/a%0d%0aSet-Cookie:x", {}, 404, "unknown_image"),
  # Images.
  "text file": ("POST", UPLOAD, {"content": b"hello"}, 415, "unsupported_image"),
  "empty file": ("POST", UPLOAD, {"content": b""}, 415, "unsupported_image"),
  "svg": ("POST", UPLOAD, {"content": b"<svg xmlns='x'/>"}, 415, "unsupported_image"),
  "pdf": ("POST", UPLOAD, {"content": b"%PDF-1.7\n"}, 415, "unsupported_image"),
  "postscript": ("POST", UPLOAD, {"content": b"%!PS-Adobe-3.0\n"}, 415, "unsupported_image"),
  "truncated image": ("POST", UPLOAD, {"content": png()[:400]}, 415, "unsupported_image"),
  "truncated gif": ("POST", UPLOAD, {"content": gif()[:20]}, 415, "unsupported_image"),
  "bomb": ("POST", UPLOAD, {"content": png_of_size(50_000, 50_000)}, 413, "too_many_pixels"),
  "side of 2**31": ("POST", UPLOAD, {"content": png_of_size(2**31 - 1, 2)}, 413, "too_many_pixels"),
  "too many pixels": ("POST", UPLOAD, {"content": png_of_size(101, 100)}, 413, "too_many_pixels"),
  "no pixels": ("POST", UPLOAD, {"content": png_of_size(0, 5)}, 415, "unsupported_image"),
  "large file": ("POST", UPLOAD, {"content": b"x" * (MAX_BYTES + 1)}, 413, "too_large"),
  "large stream": (
    "POST", UPLOAD, {"content": iter([b"x" * 30_000] * 3)}, 413, "too_large"
  ),
  "negative length": (
    "POST", UPLOAD, {"headers": {"Content-Length": "-1"}, "content": b"x"}, 400, "bad_request"
  ),
  "form": (
    "POST", UPLOAD, {"files": {"image": png()}}, 415, "unsupported_media_type"
  ),
  "url instead of a file": (
    "POST", UPLOAD, {"json": {"url": "http://169.254.169.254/"}}, 415, "unsupported_media_type"
  ),
  # JSON.
  "no JSON": ("POST", ASK, {"json": "{"}, 400, "bad_request"),
  "JSON cut off": ("POST", ASK, {"json": '{"concepts": [{"phrase": "c'}, 400, "bad_request"),
  "empty JSON": ("POST", ASK, {"json": ""}, 400, "bad_request"),
  "not UTF-8": ("POST", ASK, {"json": b'{"concepts": "\xff"}'}, 400, "bad_request"),
  "deep JSON": ("POST", ASK, {"json": DEEP}, 400, "bad_request"),
  "very deep JSON": ("POST", ASK, {"json": "[" * 9000}, 400, "bad_request"),
  "deep objects": ("POST", ASK, {"json": '{"a":' * 30 + "1" + "}" * 30}, 400, "bad_request"),
  "NaN": ("POST", ASK, {"json": '{"threshold": NaN}'}, 400, "bad_request"),
  "infinity": ("POST", ASK, {"json": '{"threshold": -Infinity}'}, 400, "bad_request"),
  "infinite exponent": ("POST", ASK, {"json": '{"threshold": 1e999}'}, 400, "bad_request"),
  "number of 5,000 digits": (
    "POST", ASK, {"json": '{"threshold": ' + "9" * 5000 + "}"}, 400, "bad_request"
  ),
  "list": ("POST", ASK, {"json": "[]"}, 400, "bad_request"),
  "number": ("POST", ASK, {"json": "1"}, 400, "bad_request"),
  "null": ("POST", ASK, {"json": "null"}, 400, "bad_request"),
  "large JSON": ("POST", ASK, {"json": " " * (MAX_JSON + 1)}, 413, "too_large"),
  "JSON as text": (
    "POST", ASK, {"content": json.dumps(CAT), "headers": {"Content-Type": "text/plain"}},
    415, "unsupported_media_type",
  ),
  "JSON as a form": (
    "POST", ASK,
    {"content": "a=b", "headers": {"Content-Type": "application/x-www-form-urlencoded"}},
    415, "unsupported_media_type",
  ),
  "unknown field": ("POST", ASK, {"json": CAT | {"checkpoint": "/etc"}}, 400, "bad_request"),
  "path of an image": ("POST", ASK, {"json": CAT | {"path": "/etc/passwd"}}, 400, "bad_request"),
  # Prompts.
  "no prompts": ("POST", ASK, {"json": {}}, 400, "invalid_prompt"),
  "129 prompts": (
    "POST", ASK, {"json": {"concepts": [{"phrase": "a"}] * 129}}, 400, "too_many_prompts"
  ),
  "100 of each": (
    "POST", ASK,
    {"json": {"concepts": [{"phrase": "a"}] * 100, "visual": [{"points": [[1, 1]]}] * 100}},
    400, "too_many_prompts",
  ),
  "10,000 prompts": ("POST", ASK, {"json": {"visual": [{}] * 10_000}}, 413, "too_large"),
  "3,000 prompts": ("POST", ASK, {"json": {"visual": [{}] * 3000}}, 400, "too_many_prompts"),
  "wrong type": ("POST", ASK, {"json": {"concepts": [{"phrase": 5}]}}, 400, "invalid_prompt"),
  "string as threshold": ("POST", ASK, {"json": CAT | {"threshold": "0.5"}}, 400, "bad_request"),
  "bool as threshold": ("POST", ASK, {"json": CAT | {"threshold": True}}, 400, "bad_request"),
  "threshold of 2": ("POST", ASK, {"json": CAT | {"threshold": 2}}, 400, "bad_request"),
  "unknown format": ("POST", ASK, {"json": CAT | {"format": "exe"}}, 400, "bad_request"),
  "long phrase": (
    "POST", ASK, {"json": {"concepts": [{"phrase": "cat " * 500}]}}, 400, "invalid_prompt"
  ),
  "empty phrase": ("POST", ASK, {"json": {"concepts": [{"phrase": " "}]}}, 400, "invalid_prompt"),
  "half a surrogate": (
    "POST", ASK, {"json": '{"concepts": [{"phrase": "\\ud800"}]}'}, 400, "invalid_prompt"
  ),
  "no phrase": ("POST", ASK, {"json": {"concepts": [{}]}}, 400, "invalid_prompt"),
  "box outside": (
    "POST", ASK, {"json": {"concepts": [{"boxes": [[900, 900, 950, 950]]}]}}, 400, "invalid_prompt"
  ),
  "box of three": (
    "POST", ASK, {"json": {"concepts": [{"boxes": [[1, 2, 3]]}]}}, 400, "invalid_prompt"
  ),
  "huge box": (
    "POST", ASK, {"json": {"visual": [{"box": [-1e300, 0, 1e300, 10]}]}}, 400, "invalid_prompt"
  ),
  "129 boxes": (
    "POST", ASK, {"json": {"concepts": [{"boxes": [[1, 2, 30, 40]] * 129}]}}, 400, "invalid_prompt"
  ),
  "labels without points": (
    "POST", ASK, {"json": {"visual": [{"point_labels": [1]}]}}, 400, "invalid_prompt"
  ),
  "label of 7": (
    "POST", ASK, {"json": {"visual": [{"points": [[1, 1]], "point_labels": [7]}]}}, 400,
    "invalid_prompt",
  ),
  "label of true": (
    "POST", ASK, {"json": {"visual": [{"points": [[1, 1]], "point_labels": [True]}]}}, 400,
    "invalid_prompt",
  ),
  "63 points": (
    "POST", ASK, {"json": {"visual": [{"points": [[10, 10]] * 63}]}}, 400, "invalid_prompt"
  ),
  "mask of another size": (
    "POST", ASK, {"json": {"visual": [{"mask": {"size": [9, 9], "counts": "1"}}]}}, 400,
    "invalid_prompt",
  ),
  "damaged mask": (
    "POST", ASK, {"json": {"visual": [{"mask": {"size": [40, 60], "counts": "~~ \x00"}}]}}, 400,
    "invalid_prompt",
  ),
  "mask of 2**62 pixels": (
    "POST", ASK, {"json": {"visual": [{"mask": {"size": [2**31, 2**31], "counts": "0"}}]}}, 400,
    "invalid_prompt",
  ),
  "empty mask": (
    "POST", ASK, {"json": {"visual": [{"mask": encode(np.zeros((40, 60), bool))}]}}, 400,
    "invalid_prompt",
  ),
  "grid of 10,000": (
    "POST", EVERYTHING, {"json": {"points_per_side": 10_000}}, 400, "bad_request"
  ),
  "layers of crops": ("POST", EVERYTHING, {"json": {"crop_n_layers": 8}}, 400, "bad_request"),
  "everything of nothing": (
    "POST", "/v1/images/none/everything", {"json": {}}, 404, "unknown_image"
  ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_hostile_request(client, image, name):
  method, path, options, status, code = CASES[name]
  options = dict(options)
  headers = AUTHORIZED | options.pop("headers", {})
  if isinstance(options.get("json"), str | bytes):
    options["content"] = options.pop("json")
    headers["Content-Type"] = "application/json"
  response = client.request(method, path.replace("ID", image), headers=headers, **options)
  assert error_of(response) == (status, code), response.text
  assert "default-src 'none'" in response.headers["content-security-policy"]
  assert response.headers["x-content-type-options"] == "nosniff"
  assert "set-cookie" not in response.headers
  asked = client.post(f"/v1/images/{image}/prompts", json=CAT, headers=AUTHORIZED)
  assert asked.status_code == 200  # others are still served


def test_there_are_enough_cases():
  assert len(CASES) >= 40


def test_the_log_has_no_secrets_and_no_forged_lines(client, log, image):
  client.get("/a%1b[31m%0aforged%e2%80%ae" + "b " * 1500, headers=AUTHORIZED)
  lines = [json.loads(line) for line in log.getvalue().splitlines()]
  assert lines[-1]["path"].startswith("/a\x1b[31m\nforged\u202e")
  assert len(lines[-1]["path"]) == 200
  assert (lines[-1]["route"], lines[-1]["status"]) == ("none", 404)
  assert not any("error" in line["event"] for line in lines)
  client.get(f"/v2/{image}/x")  # without a token, so it matches no route
  text = log.getvalue()
  assert TOKEN not in text
  assert image not in text
  assert text.isascii()
  assert text.replace("\n", "").isprintable()
