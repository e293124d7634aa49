"""Settings of the server: whom it serves, and the limits of a request and of all requests."""

import dataclasses
import ipaddress
import re
from pathlib import Path

from sam3_jax.inputs.prompts import BOX_SIZES
from sam3_jax.inputs.visual_prompts import MAX_POINTS

MAX_PROMPTS = 128  # of a request, concepts and visual prompts together
MAX_BOXES = BOX_SIZES[-1]  # of a concept
MAX_PHRASE = 1000  # characters; the tokenizer's limit is much lower
MAX_POINTS_PER_SIDE = 32  # of the grid of "everything"
# Pixels of all masks of a response by format: about a minute of work at worst.
MAX_MASK_PIXELS = {"rle": 40_000_000_000, "polygons": 4_000_000_000, "png": 4_000_000_000}
_ORIGIN = re.compile(r"https?://[^/\s?#@]+")
_MIN_TOKEN = 8  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Settings of `create_app`.

  Attributes:
    host: the address that the server listens on.
    token: that clients must send; None for none, which is allowed on a loopback address only.
    allow_origins: origins of other sites whose pages may use the API, such as "https://a.org".
    allow_hosts: names in the header Host that are accepted besides this machine's own names.
    max_bytes: of an uploaded image.
    max_json_bytes: of any other body.
    max_pixels: of an image.
    body_seconds: a body must begin to arrive within this time.
    body_rate: bytes a second that a body must arrive at after that.
    max_images: uploads that may wait for the device.
    max_waiting_prompts: prompts that may wait for the device.
    max_everything: calls of "everything" at a time.
    max_requests: requests at a time.
    memory: bytes of embeddings in memory, in host or device memory.
    disk: bytes of embeddings on disk.
    store: directory that keeps the embeddings after exit; None for a temporary directory.
    expire_seconds: an image that was not used for this time is forgotten.
    readers: processes that decode images; 0 decodes in threads of this process, which a hostile
      file can crash.
    decode_seconds: to decode an image, to open a video, or to decode a frame of it.
    max_video_bytes: of an uploaded video.
    max_video_frames: of a video.
    max_video_pixels: of a frame of a video.
    max_videos: that may be open.
    max_video_objects: of a video.
    video_memory: bytes of what all videos keep of tracked frames in memory; the rest is on disk.
    video_expire_seconds: a video that was not used for this time is deleted.
    label_studio_url: of the Label Studio whose images are read; None for none.
    label_studio_key: an access token for it.
  """

  host: str = "127.0.0.1"
  token: str | None = None
  allow_origins: tuple[str, ...] = ()
  allow_hosts: tuple[str, ...] = ()
  max_bytes: int = 64 * 2**20
  max_json_bytes: int = 8 * 2**20
  max_pixels: int = 100_000_000
  body_seconds: float = 20.0
  body_rate: float = 32 * 2**10
  max_images: int = 32
  max_waiting_prompts: int = 512
  max_everything: int = 2
  max_requests: int = 256
  memory: int = 2 * 2**30
  disk: int = 16 * 2**30
  store: Path | None = None
  expire_seconds: float = 24 * 3600.0
  readers: int = 2
  decode_seconds: float = 20.0
  max_video_bytes: int = 2**30
  max_video_frames: int = 20_000
  max_video_pixels: int = 10_000_000
  max_videos: int = 4
  max_video_objects: int = 64
  video_memory: int = 4 * 2**30
  video_expire_seconds: float = 3600.0
  label_studio_url: str | None = None
  label_studio_key: str | None = None

  def __post_init__(self):
    if self.token is None and not is_loopback(self.host):
      raise ValueError(
        f"--host {self.host} lets other machines in, which needs a token: give --token TOKEN, or "
        "set SAM3_JAX_TOKEN. `python -c 'import secrets; print(secrets.token_urlsafe())'` makes "
        "one."
      )
    if self.token is not None:
      fits = self.token.isascii() and self.token.isprintable() and " " not in self.token
      if len(self.token) < _MIN_TOKEN or not fits:
        raise ValueError(
          f"a token must have at least {_MIN_TOKEN} visible ASCII characters without spaces; "
          f"this one has {len(self.token)} characters."
        )
    for origin in self.allow_origins:
      if not _ORIGIN.fullmatch(origin):
        raise ValueError(
          f"--allow-origin must be a scheme and a host, such as https://a.org; got {origin!r}."
        )

  @property
  def limits(self) -> dict[str, int]:
    """The limits that clients are told."""
    return {
      "bytes": self.max_bytes,
      "pixels": self.max_pixels,
      "prompts": MAX_PROMPTS,
      "boxes": MAX_BOXES,
      "points": MAX_POINTS,
      "video_bytes": self.max_video_bytes,
      "video_frames": self.max_video_frames,
    }


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach an address."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host.strip("[]")).is_loopback
  except ValueError:
    return False
