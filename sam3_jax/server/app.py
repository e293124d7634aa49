"""The routes of the server; `create_app` makes an ASGI application of them."""

import contextlib
from collections.abc import AsyncIterator, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from sam3_jax.inference.predictor import Sam3
from sam3_jax.server import anylabeling, label_studio, schemas
from sam3_jax.server.access_log import Log
from sam3_jax.server.cookie import COOKIE, Session, session_of
from sam3_jax.server.disconnect import Disconnected
from sam3_jax.server.errors import ApiError, as_api_error, body, first_fault
from sam3_jax.server.json_body import JsonRoute
from sam3_jax.server.metrics import Metrics
from sam3_jax.server.model_card import model_card
from sam3_jax.server.openapi import document
from sam3_jax.server.schemas import error_responses
from sam3_jax.server.security import Guard
from sam3_jax.server.service import Service, receive_file
from sam3_jax.server.settings import Settings
from sam3_jax.server.store import StoredImage, new_id
from sam3_jax.server.video import routes as video_routes
from sam3_jax.server.video.export import Exporter
from sam3_jax.server.video.service import VideoService

STATIC = Path(__file__).parent / "static"
DESCRIPTION = (
  "Upload an image once, then prompt it: phrases and exemplar boxes find all instances of a "
  "concept; points, boxes and masks select one object. Upload a video, prompt its frames, and "
  "track the objects. Coordinates are pixels of the image as displayed, x before y. "
  'Every error is {"error": {"code": ..., "message": ...}}.'
)
_NO_UPLOADS = ("multipart/form-data", "application/x-www-form-urlencoded", "application/json")
_UPLOAD = {
  "requestBody": {
    "required": True,
    "description": "The bytes of the image file, in any format that `sam3-jax segment` reads.",
    "content": {
      kind: {"schema": {"type": "string", "format": "binary"}}
      for kind in ("image/jpeg", "image/png", "image/webp", "application/octet-stream")
    },
  }
}


def create_app(
  model: Sam3,
  settings: Settings,
  *,
  log: Log | None = None,
  step: Callable[[str, float], None] = lambda *_: None,
  failed: Callable[[], object] = lambda: None,
  compiled: bool = True,
  max_batch: int | None = None,
) -> FastAPI:
  """Makes the application.

  The device's thread and the processes that decode images start with the application (ASGI's
  lifespan). `app.state.service` is the `Service`.

  Args:
    model: a loaded checkpoint.
    settings: limits and security.
    log: of requests and errors; None for none.
    step: is told of the progress of compiling.
    failed: is called if compiling fails.
    compiled: compile the common programs before `/readyz` says 200.
    max_batch: as in `DeviceWork`.
  """
  log = log or Log(requests=False)
  metrics = Metrics()
  service = Service(model, settings, metrics, log_error=log.error, max_batch=max_batch)
  directory = service.store.directory / "videos"
  videos, exporter = VideoService(model, settings, service.engine, directory, metrics), Exporter()

  @contextlib.asynccontextmanager
  async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    service.start(step, compiled, failed)
    videos.start()
    try:
      yield
    finally:
      exporter.close()
      videos.stop()
      service.stop()
      videos.close()

  app = FastAPI(
    title="sam3-jax", version=version("sam3-jax"), lifespan=lifespan,
    docs_url=None, redoc_url=None, description=DESCRIPTION,
  )  # fmt: skip
  app.state.service, app.state.videos = service, videos
  app.router.route_class = JsonRoute
  app.add_middleware(
    Guard, settings=settings, metrics=metrics, log=log.request, log_error=log.error
  )
  _add_errors(app)
  _add_api(app, service)
  app.include_router(video_routes.router(videos, exporter))
  _add_operations(app, service)
  app.include_router(label_studio.router(service))
  app.include_router(anylabeling.router(service))
  _add_page(app)
  app.openapi = lambda: document(app)
  return app


def stored_image(request: Request, id: str, session: Session) -> StoredImage:
  """The image of a path's id; raises ApiError if it is unknown to the session."""
  return request.app.state.service.store.find(id, session)


Stored = Annotated[StoredImage, Depends(stored_image)]


def _add_api(app: FastAPI, service: Service) -> None:
  @app.get("/v1/model", response_model=schemas.ModelResponse, responses=error_responses())
  async def model() -> Any:
    """The model, what it knows, and the limits of requests."""
    return model_card(service.model, service.settings)

  @app.post(
    "/v1/images", status_code=201, response_model=schemas.UploadResponse,
    responses=error_responses(413, 415, 429, 503), openapi_extra=_UPLOAD,
  )  # fmt: skip
  async def upload(request: Request, session: Session) -> Any:
    """Uploads and encodes an image. The body is the file; coordinates are pixels of the image as
    displayed, with the EXIF orientation applied."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _NO_UPLOADS:
      raise ApiError(
        "unsupported_media_type",
        f"send the file itself as the body, as application/octet-stream; got {kind}.",
      )
    file = service.store.uploads / new_id()
    try:
      await receive_file(request, file)
      return await service.upload(request, file, session)
    finally:
      file.unlink(missing_ok=True)

  @app.get("/v1/images/{id}", response_model=schemas.ImageResponse, responses=error_responses(404))
  async def image(id: str, stored: Stored) -> Any:
    """The size of an uploaded image."""
    return {"id": id, "height": stored.size[0], "width": stored.size[1]}

  @app.delete("/v1/images/{id}", status_code=204, responses=error_responses(404))
  async def delete(stored: Stored) -> None:
    """Deletes an image and its embedding."""
    service.store.remove(stored)

  @app.post(
    "/v1/images/{id}/prompts", response_model=schemas.PromptsResponse,
    responses=error_responses(404, 413, 415, 429, 503),
  )  # fmt: skip
  async def prompts(request: Request, stored: Stored, asked: schemas.PromptsRequest) -> Any:
    """Segments all instances of concepts, and the objects of points, boxes and masks."""
    return JSONResponse(await service.prompt(request, stored, asked))

  @app.post(
    "/v1/images/{id}/everything", response_model=schemas.EverythingResponse,
    responses=error_responses(404, 413, 415, 429, 503),
  )  # fmt: skip
  async def everything(request: Request, stored: Stored, asked: schemas.EverythingRequest) -> Any:
    """Segments everything in an image, with a grid of point prompts."""
    return JSONResponse(await service.everything(request, stored, asked))


def _add_operations(app: FastAPI, service: Service) -> None:
  @app.get("/healthz", response_model=schemas.Status)
  async def healthz() -> Any:
    """Whether the process responds."""
    return {"status": "ok"}

  @app.get("/readyz", response_model=schemas.Status, responses={503: {"model": schemas.Status}})
  async def readyz() -> Any:
    """Whether the programs are compiled."""
    if service.engine.is_ready:
      return {"status": "ok"}
    status = "failed" if service.engine.error else "compiling"
    return JSONResponse({"status": status}, 503, {"Retry-After": "2"})

  @app.get("/metrics", response_class=Response, include_in_schema=False)
  async def metrics() -> Response:
    return Response(service.metrics.text(), media_type=service.metrics.content_type)


def _add_page(app: FastAPI) -> None:
  @app.get("/", include_in_schema=False)
  async def page(request: Request) -> Response:
    if not (STATIC / "index.html").is_file():
      raise ApiError("not_found", "this server has no page.")
    response = FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
    if session_of(request) is None:
      secure = request.url.scheme == "https"
      response.set_cookie(
        COOKIE, new_id(), path="/", httponly=True, samesite="strict", secure=secure
      )
    return response

  app.mount("/static", StaticFiles(directory=STATIC, check_dir=False), name="static")


def _add_errors(app: FastAPI) -> None:
  @app.exception_handler(HTTPException)
  async def http(_: Request, error: HTTPException) -> Response:
    ours = as_api_error(error)
    return JSONResponse(body(ours.code, ours.detail), ours.status_code, ours.headers)

  @app.exception_handler(RequestValidationError)
  async def invalid(_: Request, error: RequestValidationError) -> Response:
    code, message = first_fault(error.errors())
    return JSONResponse(body(code, message), 400)

  @app.exception_handler(Disconnected)
  async def disconnected(*_: Any) -> Response:
    return Response(status_code=499)  # nobody receives it; the access log shows it
