"""A server that answers at once, with the answers of `material`.

  python -m load.instant WORK PORT

It is what remains of a server if its model takes no time, and costs as little as possible.
"""

import asyncio
import json
import sys
from pathlib import Path

from load import digest

MILLISECONDS = {"queue": 0.0, "decode": 0.0, "masks": 0.0}


async def respond(
  answers: dict[str, bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
  """Serves one connection."""
  try:
    while head := await reader.readuntil(b"\r\n\r\n"):
      line, *fields = head.decode("latin-1").split("\r\n")
      method, path, _ = line.split(" ")
      lengths = [field[15:] for field in fields if field.lower().startswith("content-length:")]
      body = await reader.readexactly(int(lengths[0]) if lengths else 0)
      status, sent = _answer(answers, method, path, body)
      writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(sent)}\r\n\r\n".encode() + sent)
      await writer.drain()
  except (asyncio.IncompleteReadError, ConnectionError):
    pass
  finally:
    writer.close()


def _answer(answers: dict[str, bytes], method: str, path: str, body: bytes) -> tuple[int, bytes]:
  if method == "DELETE":
    return 204, b""
  if method == "GET":
    return 200, b"{}"
  return 201 if path == "/v1/images" else 200, answers[digest(body)]


async def main(work: Path, port: int) -> None:
  content = json.loads((work / "answers.json").read_text())["answers"]
  answers = {
    name: json.dumps(answer | {"milliseconds": MILLISECONDS}).encode()
    for name, answer in content.items()
  }
  server = await asyncio.start_server(
    lambda *streams: respond(answers, *streams), "127.0.0.1", port
  )
  async with server:
    await server.serve_forever()


if __name__ == "__main__":
  asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
