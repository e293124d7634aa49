"""The server of a small random model, for tests: an application and a client inside the process."""

import contextlib
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import training_model
from PIL import Image
from starlette.testclient import TestClient
from support import quick

from sam3_jax import Sam3, Tokenizer
from sam3_jax.server.access_log import Log
from sam3_jax.server.app import create_app
from sam3_jax.server.settings import Settings
from sam3_jax.utils.param_tree import nest

BASE = "http://127.0.0.1:8000"


@functools.cache
def small_model() -> Sam3:
  """A random model that takes all kinds of prompts; one for all tests of a process."""
  params = nest(training_model.parameters() | training_model.visual_parameters())
  tokenizer = Tokenizer(Path(__file__).parent / "goldens" / "tokenizer.model", context=8)
  info = {"name": "toy", "licence": "CC0-1.0", "trained": False}
  return quick(Sam3(training_model.CONFIG, params, tokenizer, info=info, dtype="float32"))


def pixels(seed: int = 0, height: int = 40, width: int = 60) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(seed: int = 0, height: int = 40, width: int = 60) -> bytes:
  """A PNG file of random pixels."""
  buffer = io.BytesIO()
  Image.fromarray(pixels(seed, height, width)).save(buffer, "PNG")
  return buffer.getvalue()


@contextlib.contextmanager
def served(
  model: Sam3, *, log: io.StringIO | None = None, max_batch: int | None = None, **settings: Any
) -> Iterator[TestClient]:
  """A client of a running application; `client.app.state.service` is its service."""
  options = {"readers": 0} | settings
  written = Log(log) if log is not None else None
  app = create_app(model, Settings(**options), log=written, compiled=False, max_batch=max_batch)
  with TestClient(app, base_url=BASE, raise_server_exceptions=False) as client:
    assert app.state.service.engine.wait_ready(10)
    yield client


def upload(client: TestClient, seed: int = 0, **kwargs: Any) -> str:
  """Uploads an image; returns its id."""
  response = client.post("/v1/images", content=png(seed), **kwargs)
  assert response.status_code == 201, response.text
  return response.json()["id"]


def error_of(response: Any) -> tuple[int, str]:
  """Status and code of an error, which must have a one-line message and nothing else."""
  value = response.json()
  assert list(value) == ["error"], value
  assert sorted(value["error"]) == ["code", "message"], value
  assert "\n" not in value["error"]["message"]
  assert value["error"]["message"]
  assert response.headers["content-type"] == "application/json"
  return response.status_code, value["error"]["code"]
