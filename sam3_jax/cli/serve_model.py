"""The work of `sam3-jax serve`: loads the model and runs the server until a signal."""

import contextlib
import os
import signal
import socket
import threading
import time
import webbrowser
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from sam3_jax.inference.predictor import Sam3
from sam3_jax.server.access_log import Log
from sam3_jax.server.app import create_app
from sam3_jax.server.protocol import MAX_HEADERS, Protocol
from sam3_jax.server.settings import Settings
from sam3_jax.utils.console import Console, loading, say
from sam3_jax.utils.os_errors import error_text

GRACE = 30  # seconds that running requests have after SIGTERM
BACKLOG = 256


def listen(host: str, port: int) -> socket.socket:
  """A listening socket.

  Raises:
    ValueError: the address cannot be used, or the port is taken.
  """
  try:
    found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    family, kind, protocol, _, address = found[0]
    listening = socket.socket(family, kind, protocol)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listening.bind(address)
      listening.listen(BACKLOG)
    except OSError:
      listening.close()
      raise
    return listening
  except OSError as error:
    raise ValueError(
      f"cannot listen on {host}, port {port} ({error_text(error)}); choose another --port or "
      "--host."
    ) from error


def run(
  checkpoint: Path,
  settings: Settings,
  listening: socket.socket,
  *,
  dtype: str | None,
  open_page: bool,
  access_log: bool,
  quiet: bool,
) -> None:
  """Serves until SIGTERM or Ctrl-C.

  Args:
    checkpoint: directory of the model.
    settings: of the server.
    listening: from `listen`; connections wait until the model is loaded.
    dtype: as in `Sam3.from_checkpoint`.
    open_page: open the page, which waits until the programs are compiled.
    access_log: log requests.
    quiet: print errors only.
  """
  console = Console(stderr=True, quiet=quiet)
  start = time.perf_counter()
  with loading(console, checkpoint, quiet=quiet) as step:
    model = Sam3.from_checkpoint(checkpoint, dtype=dtype, progress=step)
  url = page_url(settings, listening.getsockname()[1])

  def report(step: str, fraction: float) -> None:
    if fraction < 1:
      say(console, step)
      return
    say(console, f"ready after {time.perf_counter() - start:.1f} s: {url}")
    if settings.token:
      say(console, f"with the token: {url}#token=TOKEN")

  def stop() -> None:
    server.should_exit = True

  log = Log(requests=access_log and not quiet)
  app = create_app(model, settings, log=log, step=report, failed=stop)
  server = uvicorn.Server(
    uvicorn.Config(
      app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=False,
      server_header=False, h11_max_incomplete_event_size=MAX_HEADERS,
      timeout_graceful_shutdown=GRACE, timeout_keep_alive=30,
    )
  )  # fmt: skip
  if open_page:
    browse(url + (f"#token={settings.token}" if settings.token else ""))
  with _own_signals():
    server.run(sockets=[listening])
  if (error := app.state.service.engine.error) is not None:
    raise error
  say(console, "stopped")
  if app.state.service.is_compiling:
    os._exit(0)  # does not wait until it has compiled


def page_url(settings: Settings, port: int) -> str:
  """The address of the page on this machine."""
  host = settings.host.strip("[]")
  host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
  return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def browse(url: str) -> None:
  """Opens the browser in a thread, as some browsers block."""
  threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
  """Ends in order on SIGTERM and Ctrl-C: uvicorn raises the signal again after its shutdown."""
  numbers = (signal.SIGINT, signal.SIGTERM)
  before = {number: signal.signal(number, lambda *_: None) for number in numbers}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
