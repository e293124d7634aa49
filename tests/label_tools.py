"""A server for tests of the label tools' protocols, whose model is replaced by rules.

Each phrase finds one instance in the left half of the image, with the score that `SCORES` gives it;
a visual prompt returns the boxes around its points and its box, the best of which is exact.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from PIL import Image

from sam3_jax.outputs.rle import encode
from sam3_jax.server.errors import ApiError, as_api_error, body
from sam3_jax.server.settings import Settings

SCORES = {"lion": 0.9, "cat": 0.6, "dog": 0.3}
WIDTH, HEIGHT = 80, 60
RADIUS = 5  # of the box around a point


class RuleService:
  """Takes the place of `Service`.

  Attributes:
    asked: all requests for prompts.
    uploads: number of uploads.
  """

  def __init__(self, folder: Path, settings: Settings):
    self.settings, self.asked, self.uploads = settings, [], 0
    self.model = SimpleNamespace(info={"name": "rules"})
    self.images: dict[tuple[str, str], tuple[int, int]] = {}
    self.store = SimpleNamespace(uploads=folder, find=self._find)
    self.error: ApiError | None = None  # that the next call of prompt raises

  async def upload(self, request, file, session):
    try:
      with Image.open(file) as image:
        width, height = image.size
    except OSError:
      raise ApiError("unsupported_image", "the uploaded file is not an image.") from None
    finally:
      file.unlink()
    self.uploads += 1
    self.images[f"id{self.uploads}", session] = height, width
    return {"id": f"id{self.uploads}", "width": width, "height": height}

  def _find(self, identity, session):
    try:
      return self.images[identity, session]
    except KeyError:
      raise ApiError("unknown_image", "there is no image with this id.") from None

  async def prompt(self, request, stored, asked):
    self.asked.append(asked)
    if error := self.error:
      self.error = None
      raise error
    concepts = [
      {"phrase": one.phrase, "instances": _instances(one, stored, asked)} for one in asked.concepts
    ]
    return {
      "concepts": concepts,
      "visual": [{"masks": _masks(one, stored)} for one in asked.visual],
    }


def left_half(size: tuple[int, int]) -> np.ndarray:
  mask = np.zeros(size, bool)
  mask[:, : size[1] // 2] = True
  return mask


def client(folder: Path, *routers, **settings) -> tuple[TestClient, RuleService]:
  """A client of an application with routers of this service, and the service."""
  service = RuleService(folder, Settings(**settings))
  app = FastAPI()

  @app.exception_handler(ApiError)
  async def fail(_: Request, error: ApiError):
    ours = as_api_error(error)
    return JSONResponse(body(ours.code, ours.detail), ours.status_code, ours.headers)

  for router in routers:
    app.include_router(router(service))
  return TestClient(app), service


def _instances(concept, size, asked):
  score = SCORES.get(concept.phrase, 0.8)
  if score <= asked.threshold:
    return []
  height, width = size
  mask = None if asked.format == "none" else encode(left_half(size))
  return [{"score": score, "box": [-1.0, 0.0, width / 2, float(height)], "area": 0, "mask": mask}]


def _masks(prompt, size):
  corners = [np.array(point) + sign * RADIUS for point in prompt.points for sign in (-1, 1)]
  corners += np.reshape(prompt.box or [], (-1, 2)).tolist()
  (x0, y0), (x1, y1) = np.min(corners, axis=0).astype(int), np.max(corners, axis=0).astype(int)
  mask = np.zeros(size, bool)
  mask[max(y0, 0) : y1, max(x0, 0) : x1] = True
  exact = {"score": 0.95, "box": [x0, y0, x1, y1], "area": 0, "mask": encode(mask)}
  worse = exact | {"score": 0.5, "mask": encode(np.ones(size, bool))}
  return [worse, exact, worse] if prompt.multimask else [exact]
