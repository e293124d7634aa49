"""Images of label tools, which send the same image again with each prompt."""

import asyncio
import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fastapi import Request
from jaxtyping import Bool, Float

from sam3_jax.outputs.rle import decode
from sam3_jax.server.errors import ApiError
from sam3_jax.server.results import check_masks
from sam3_jax.server.schemas import PromptsRequest
from sam3_jax.server.service import Service
from sam3_jax.server.store import new_id

MAX_IMAGES = 1_000


class Uploaded(NamedTuple):
  """An encoded image; its size in pixels as displayed."""

  id: str
  width: int
  height: int


class Instance(NamedTuple):
  """An instance of a concept, or the object of a visual prompt.

  Attributes:
    score: in [0, 1]; the estimated IoU for visual prompts.
    box: xyxy in pixels.
    rle: COCO's run lengths of its mask; None if masks were not asked for.
  """

  score: float
  box: Float[np.ndarray, "4"]
  rle: dict[str, Any] | None

  def mask(self) -> Bool[np.ndarray, "h w"] | None:
    """The mask over the image, decoded anew: all masks of a large image would not fit into
    memory."""
    return None if self.rle is None else decode(self.rle).astype(bool)


class KnownImages:
  """Encodes each image once, while the server keeps its embedding.

  Its images belong to a session of its own, so that no other client can use them.
  """

  def __init__(self, service: Service):
    self._service, self._session = service, new_id()
    self._known: OrderedDict[str, Uploaded] = OrderedDict()

  async def upload(self, request: Request, data: bytes) -> Uploaded:
    """The image with these bytes, which is encoded unless it is known.

    Raises:
      ApiError: it is not an image, or the server is busy.
    """
    key = await asyncio.to_thread(_key, data)
    if key not in self._known:
      file = self._service.store.uploads / new_id()
      await asyncio.to_thread(_write, file, data)
      sent = await self._service.upload(request, file, self._session)
      self._known[key] = Uploaded(sent["id"], sent["width"], sent["height"])
      if len(self._known) > MAX_IMAGES:
        self._known.popitem(last=False)
    image = self._known[key]
    self._known.move_to_end(key)
    return image

  async def prompts(
    self, request: Request, data: bytes, asked: PromptsRequest
  ) -> tuple[list[list[Instance]], list[list[Instance]]]:
    """Instances of each concept, and masks of each visual prompt, of the image with these bytes.

    Args:
      request: of the client, whose disconnection drops the work.
      data: of an image.
      asked: prompts, with the format "rle" or "none".

    Raises:
      ApiError: as `upload`, for an invalid prompt, or for too many masks to decode.
    """
    try:
      found = await self._prompts(request, data, asked)
    except ApiError as error:
      if error.code != "unknown_image":
        raise
      self._known.pop(_key(data), None)  # its embedding was dropped
      found = await self._prompts(request, data, asked)
    concepts = [_instances(one["instances"]) for one in found["concepts"]]
    visual = [_instances(one["masks"]) for one in found["visual"]]
    masks = [one.rle for rows in (*concepts, *visual) for one in rows if one.rle is not None]
    if masks:
      check_masks(len(masks), masks[0]["size"], "polygons")
    return concepts, visual

  async def _prompts(self, request: Request, data: bytes, asked: PromptsRequest) -> Any:
    image = await self.upload(request, data)
    stored = self._service.store.find(image.id, self._session)
    return await self._service.prompt(request, stored, asked)


def _key(data: bytes) -> str:
  return hashlib.sha256(data).hexdigest()


def _write(file: Path, data: bytes) -> None:
  file.touch(mode=0o600, exist_ok=False)
  file.write_bytes(data)


def _instances(rows: list[dict[str, Any]]) -> list[Instance]:
  return [
    Instance(float(row["score"]), np.asarray(row["box"], np.float64), row["mask"]) for row in rows
  ]
