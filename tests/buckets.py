"""A server that speaks as much of Cloud Storage's JSON protocol as gcsfs and TensorStore ask for.

Of the public reference of the API (storage/v1): listing with a delimiter, metadata, reading ranges,
three kinds of uploads, conditions on generations, deleting alone and in batches, pages.
"""

import datetime
import http.server
import json
import re
import threading
import time
import urllib.parse

NAME = re.compile(r"(?:/download)?/storage/v1/b/([^/?]+)/o/([^?]+)")


class Server(http.server.ThreadingHTTPServer):
  """Objects by name, in a bucket that is called `bucket`; each has a generation and bytes.

  Attributes:
    lag: seconds for which listings show objects as they were, like an eventually consistent store.
    denied: prefixes of names that may not be read or written.
  """

  daemon_threads = True
  request_queue_size = 128

  def __init__(self):
    super().__init__(("localhost", 0), Handler)
    self.objects, self.uploads, self.generation = {}, {}, 1000
    self.written, self.updated, self.deleted = {}, {}, {}  # times, by name
    self.lag, self.denied = 0.0, ()
    self.lock = threading.Lock()
    self.address = f"http://localhost:{self.server_port}"

  def handle_error(self, *_):
    """A client that hangs up."""

  def put(self, name, data, query):
    """Stores an object, if its generation is the one that is expected; else None."""
    with self.lock:
      wanted, (found, _) = query.get("ifGenerationMatch"), self.objects.get(name, (0, b""))
      if wanted is not None and int(wanted) != found:
        return None
      self.generation += 1
      self.objects[name] = self.generation, data
      self.updated[name] = time.time()
      self.written.setdefault(name, self.updated[name])
      return self.describe(name)

  def delete(self, name, query):
    """Deletes an object; returns the status."""
    with self.lock:
      wanted, (found, _) = query.get("ifGenerationMatch"), self.objects.get(name, (0, b""))
      if not found:
        return 404
      if wanted is not None and int(wanted) != found:
        return 412
      del self.objects[name], self.written[name]
      self.deleted[name] = time.time()
      return 204

  def describe(self, name):
    generation, data = self.objects.get(name, (1, b""))
    written = datetime.datetime.fromtimestamp(self.updated.get(name, 0), datetime.UTC)
    date = dict.fromkeys(("timeCreated", "updated"), written.strftime("%Y-%m-%dT%H:%M:%S.%fZ"))
    sizes = {"size": str(len(data)), "generation": str(generation), "metageneration": "1"}
    return {"kind": "storage#object", "name": name, "bucket": "bucket", **sizes, **date}

  def list(self, query):
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    size, after = int(query.get("maxResults", 1000)), query.get("pageToken", "")
    items, prefixes, since = [], set(), time.time() - self.lag
    with self.lock:
      known = {name for name in self.objects if not self.lag or self.written[name] < since}
      known |= {name for name, when in self.deleted.items() if when > since}
      names = sorted(name for name in known if name.startswith(prefix) and name > after)
      more = {"nextPageToken": names[size - 1]} if len(names) > size else {}
      return self.page(prefix, delimiter, names[:size], items, prefixes) | more

  def page(self, prefix, delimiter, names, items, prefixes):
    for name in names:
      inside, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
      if found:
        prefixes.add(prefix + inside + delimiter)
      else:
        items.append(self.describe(name))
    return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True
  server: Server

  def parse(self):
    path, _, text = self.path.partition("?")
    query = dict(urllib.parse.parse_qsl(text))
    match = NAME.fullmatch(path)
    return path, query, urllib.parse.unquote(match[2]) if match else None

  def do_GET(self):
    path, query, name = self.parse()
    if path == "/storage/v1/b/bucket":
      return self.answer({"kind": "storage#bucket", "name": "bucket"})
    if path == "/storage/v1/b/bucket/o":
      return self.answer(self.server.list(query))
    if not path.removeprefix("/download").startswith("/storage/v1/b/bucket/"):
      message = "The specified bucket does not exist."
      return self.answer({"error": {"code": 404, "message": message}}, 404)
    if name.startswith(tuple(self.server.denied)):
      return self.answer({"error": {"code": 403, "message": "secret=abc denied"}}, 403)
    generation, data = self.server.objects.get(name, (0, b""))
    if not generation:
      message = f"No such object: bucket/{name}"
      return self.answer({"error": {"code": 404, "message": message}}, 404)
    if query.get("alt") != "media":
      return self.answer(self.server.describe(name))
    headers = {"x-goog-generation": str(generation), "ETag": f'"{generation}"'}
    if query.get("ifGenerationNotMatch") == str(generation):
      return self.answer(b"", 304, headers)
    if query.get("ifGenerationMatch", str(generation)) != str(generation):
      return self.answer(b"", 412, headers)
    if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
      begin, end = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
      if begin >= len(data):
        return self.answer(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
      headers["Content-Range"] = f"bytes {begin}-{end}/{len(data)}"
      return self.answer(data[begin : end + 1], 206, headers)
    return self.answer(data, 200, headers)

  def do_POST(self):
    path, query, _ = self.parse()
    body = self.body()
    if path.startswith("/batch/"):
      return self.delete_all(body)
    if path.startswith("/put/"):
      return self.go_on(path, body)
    kind, name = query.get("uploadType"), query.get("name")
    if name and name.startswith(tuple(self.server.denied)):
      return self.answer({"error": {"code": 403, "message": "denied"}}, 403)
    if kind == "resumable":
      name = name or json.loads(body)["name"]
      key = str(len(self.server.uploads))
      self.server.uploads[key] = name, b"", query
      return self.answer({}, 200, {"Location": f"{self.server.address}/put/{key}"})
    if kind == "multipart":
      boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
      about, body = (part.split(b"\n\n", 1)[1] for part in body.split(b"--" + boundary)[1:3])
      name, body = name or json.loads(about)["name"], body[:-1]
    return self.stored(name, body, query)

  def do_PUT(self):
    return self.go_on(self.path, self.body())

  def body(self):
    if self.headers.get("Transfer-Encoding") != "chunked":
      return self.rfile.read(int(self.headers.get("Content-Length") or 0))
    data = b""
    while size := int(self.rfile.readline(), 16):
      data += self.rfile.read(size + 2)[:-2]
    self.rfile.readline()
    return data

  def go_on(self, path, body):
    """A piece of an upload, the last of which tells the size of the whole."""
    key = path.rpartition("/")[2]
    name, before, query = self.server.uploads[key]
    if self.headers.get("Content-Range", "").endswith("/*"):
      self.server.uploads[key] = name, before + body, query
      return self.answer(b"", 308, {"Range": f"bytes=0-{len(before + body) - 1}"})
    return self.stored(name, before + body, query)

  def do_DELETE(self):
    _, query, name = self.parse()
    return self.answer(b"", self.server.delete(name, query))

  def delete_all(self, body):
    """A batch of deletions."""
    parts = []
    for name in re.findall(rb"DELETE /storage/v1/b/bucket/o/([^ ?]+)", body):
      deleted = self.server.delete(urllib.parse.unquote(name.decode()), {}) == 204
      status = "204 No Content" if deleted else "404 Not Found"
      parts.append(f"--b\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n")
    text = "".join(parts) + "--b--\r\n"
    return self.answer(text.encode(), 200, {"Content-Type": "multipart/mixed; boundary=b"})

  def stored(self, name, body, query):
    described = self.server.put(name, body, query)
    return self.answer(described, 200) if described else self.answer({}, 412)

  def answer(self, content, status=200, headers=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
      self.send_header(name, value)
    if status not in (204, 304):
      self.send_header("Content-Length", str(len(data)))
    self.end_headers()
    if status not in (204, 304):
      self.wfile.write(data)

  def log_message(self, *_):
    pass
