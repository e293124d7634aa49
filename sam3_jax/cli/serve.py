"""Declares `sam3-jax serve`."""

import os
from pathlib import Path
from typing import Annotated

import typer

from sam3_jax.cli import arguments
from sam3_jax.cli.options import Computed, Debug, Dtype, OnDevice, Quiet


def serve(
  checkpoint: Annotated[
    str, typer.Option(metavar="DIR", help="Directory or name of a checkpoint.")
  ] = "sam3-tiny",
  host: Annotated[
    str,
    typer.Option(
      metavar="ADDRESS",
      help="Address to listen on. Addresses that other machines can reach need --token.",
    ),
  ] = "127.0.0.1",
  port: Annotated[
    int, typer.Option(min=0, max=65535, metavar="N", help="Port; 0 chooses a free one.")
  ] = 8000,
  open_page: Annotated[
    bool, typer.Option("--open", metavar="", help="Open the page in the browser.")
  ] = False,
  token: Annotated[
    str | None,
    typer.Option(
      metavar="TOKEN",
      help="Token that clients must send. The environment variable SAM3_JAX_TOKEN sets it without "
      "showing it in the list of processes.",
    ),
  ] = None,
  allow_origin: Annotated[
    list[str] | None,
    typer.Option(
      metavar="ORIGIN", help="Let pages of this site use the API (CORS). May be repeated."
    ),
  ] = None,
  allow_host: Annotated[
    list[str] | None,
    typer.Option(
      metavar="NAME",
      help="Accept this name in the header Host, such as a proxy's. May be repeated.",
    ),
  ] = None,
  store: Annotated[
    Path | None,
    typer.Option(
      metavar="DIR", help="Keep the embeddings of images here after exit. Default: delete them."
    ),
  ] = None,
  memory: Annotated[
    int,
    typer.Option(
      min=0, metavar="BYTES", help="Bytes of embeddings to keep in memory; others are on disk."
    ),
  ] = 2 * 2**30,
  disk: Annotated[
    int,
    typer.Option(
      min=0, metavar="BYTES", help="Bytes of embeddings to keep on disk; the oldest are deleted."
    ),
  ] = 16 * 2**30,
  max_bytes: Annotated[
    int, typer.Option(min=1, metavar="BYTES", help="Reject larger image files.")
  ] = 64 * 2**20,
  max_pixels: Annotated[
    int, typer.Option(min=1, metavar="N", help="Reject images with more than N pixels.")
  ] = 100_000_000,
  readers: Annotated[
    int, typer.Option(min=1, metavar="N", help="Processes that decode images.")
  ] = 2,
  max_videos: Annotated[
    int, typer.Option(min=0, metavar="N", help="Videos that may be open at a time; 0 for none.")
  ] = 4,
  max_video_bytes: Annotated[
    int, typer.Option(min=1, metavar="BYTES", help="Reject larger video files.")
  ] = 2**30,
  max_video_frames: Annotated[
    int, typer.Option(min=1, metavar="N", help="Reject videos with more than N frames.")
  ] = 20_000,
  label_studio_url: Annotated[
    str | None,
    typer.Option(
      metavar="URL",
      help="Read the images of tasks from this Label Studio, such as http://localhost:8080, and "
      "from nowhere else.",
    ),
  ] = None,
  label_studio_key: Annotated[
    str | None,
    typer.Option(
      metavar="KEY",
      help="Access token of Label Studio. The environment variable LABEL_STUDIO_API_KEY sets it "
      "without showing it in the list of processes.",
    ),
  ] = None,
  device: OnDevice = None,
  dtype: Computed = Dtype.auto,
  no_access_log: Annotated[
    bool,
    typer.Option(
      "--no-access-log", metavar="", help="Write no JSON line to stderr for each request."
    ),
  ] = False,
  quiet: Quiet = False,
  debug: Debug = False,
) -> None:
  """Serve a page to try the model in, and an HTTP API, described by /openapi.json.

  Programs are compiled first; /readyz then responds with 200. --open opens the page before that,
  and an image that is opened in it waits for the programs. Stop with Ctrl-C or SIGTERM: running
  requests are finished, and temporary files are deleted. Images and embeddings are deleted on exit
  unless --store is given. One process owns the device; to use several devices, start several
  servers.
  """
  if store is not None:
    arguments.check_writable(store, "--store")
  try:
    import fastapi  # noqa: F401  # pyright: ignore[reportMissingImports]
    import prometheus_client  # noqa: F401  # pyright: ignore[reportMissingImports]
    import uvicorn  # noqa: F401  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ImportError(f"serve needs {error.name}: pip install 'sam3-jax[serve]'.") from error

  from sam3_jax.server.settings import Settings

  settings = Settings(
    host=host,
    token=token or os.environ.get("SAM3_JAX_TOKEN") or None,
    allow_origins=tuple(allow_origin or ()),
    allow_hosts=tuple(allow_host or ()),
    store=store,
    memory=memory,
    disk=disk,
    max_bytes=max_bytes,
    max_pixels=max_pixels,
    readers=readers,
    max_videos=max_videos,
    max_video_bytes=max_video_bytes,
    max_video_frames=max_video_frames,
    label_studio_url=label_studio_url or None,
    label_studio_key=label_studio_key or os.environ.get("LABEL_STUDIO_API_KEY") or None,
  )
  arguments.use_device(device)

  from sam3_jax.cli.serve_model import listen, run

  with listen(host, port) as socket:
    directory = arguments.find(checkpoint, quiet)
    run(
      directory,
      settings,
      socket,
      dtype=None if dtype is Dtype.auto else dtype.value,
      open_page=open_page,
      access_log=not no_access_log,
      quiet=quiet,
    )
