"""The routes of videos."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import FileResponse, JSONResponse, Response

from sam3_jax.server.cookie import Session
from sam3_jax.server.errors import ApiError
from sam3_jax.server.json_body import JsonRoute
from sam3_jax.server.schemas import error_responses
from sam3_jax.server.settings import MAX_PHRASE
from sam3_jax.server.video import schemas
from sam3_jax.server.video.export import Exporter
from sam3_jax.server.video.service import MAX_SIDE, VideoService
from sam3_jax.server.video.store import StoredVideo
from sam3_jax.server.video.track import MEDIA_TYPE, TrackResponse, track

PREFIX = "/v1/videos"
_NO_UPLOADS = ("multipart/form-data", "application/x-www-form-urlencoded", "application/json")
_BINARY = {"schema": {"type": "string", "format": "binary"}}
_UPLOAD = {
  "requestBody": {
    "required": True,
    "description": "The bytes of the video file: MP4, WebM, MKV or another one that FFmpeg reads.",
    "content": dict.fromkeys(("video/mp4", "video/webm", "application/octet-stream"), _BINARY),
  }
}
_LINE = schemas.TrackLine.model_json_schema(ref_template="#/components/schemas/{model}")
_LINE.pop("$defs", None)  # they are among the components
_LINES = {
  200: {
    "description": "Lines of JSON (NDJSON), sent as frames leave.",
    "content": {MEDIA_TYPE: {"schema": _LINE}},
  }
}
_WORK = error_responses(404, 413, 415, 429, 503)
Number = Annotated[int, Path(ge=0, le=10**9, description="Number of a frame, from 0.")]
Identity = Annotated[int, Path(ge=0, le=10**9, description="Id of an object.")]


def stored_video(request: Request, id: str, session: Session) -> StoredVideo:
  """The video of a path's id; raises ApiError if it is unknown to the session."""
  return request.app.state.videos.store.find(id, session)


Stored = Annotated[StoredVideo, Depends(stored_video)]


def router(service: VideoService, exporter: Exporter) -> APIRouter:
  """The routes below `/v1/videos`."""
  routes = APIRouter(prefix=PREFIX, route_class=JsonRoute)

  @routes.post(
    "", status_code=201, response_model=schemas.VideoUploadResponse,
    responses=error_responses(413, 415, 429), openapi_extra=_UPLOAD,
  )  # fmt: skip
  async def upload_video(request: Request, session: Session) -> Any:
    """Uploads a video. The body is the file; coordinates are pixels of its frames as displayed.
    The video is deleted when it was not used for an hour."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind in _NO_UPLOADS:
      raise ApiError(
        "unsupported_media_type",
        f"send the file itself as the body, as application/octet-stream; got {kind}.",
      )
    return await service.open(request, session)

  @routes.get("/{id}", response_model=schemas.VideoStateResponse, responses=error_responses(404))
  async def video(id: str, stored: Stored) -> Any:
    """The size, the objects and the phrases of a video."""
    return service.state(id, stored)

  @routes.delete("/{id}", status_code=204, responses=error_responses(404))
  async def delete_video(stored: Stored) -> None:
    """Deletes a video with its objects and results; what tracks it is stopped."""
    service.store.remove(stored)

  @routes.get(
    "/{id}/frames/{number}", response_class=Response,
    responses={200: {"content": {"image/jpeg": _BINARY}}} | error_responses(404, 415),
  )  # fmt: skip
  async def frame(
    request: Request, stored: Stored, number: Number,
    side: Annotated[int, Query(ge=16, le=MAX_SIDE, description="Pixels of the longer side.")] = (
      MAX_SIDE
    ),
  ) -> Response:  # fmt: skip
    """A frame as JPEG, upright, not larger than it is."""
    data = await service.frame(request, stored, number, side)
    return Response(data, media_type="image/jpeg")

  @routes.get(
    "/{id}/frames/{number}/objects", response_model=schemas.VideoFrame,
    responses=error_responses(404),
  )  # fmt: skip
  async def objects(stored: Stored, number: Number) -> Any:
    """What is known of a frame: results of prompts on it and of the last passes."""
    return JSONResponse(service.objects(stored, number))

  @routes.post("/{id}/prompts", response_model=schemas.VideoPromptResponse, responses=_WORK)
  async def video_prompt(request: Request, stored: Stored, asked: schemas.VideoPrompt) -> Any:
    """Adds an object by points or a box on a frame, or the instances of a phrase."""
    return JSONResponse(await service.prompt(request, stored, asked))

  @routes.post(
    "/{id}/objects/{identity}/corrections", response_model=schemas.VideoPromptResponse,
    responses=_WORK,
  )  # fmt: skip
  async def correct(
    request: Request, stored: Stored, identity: Identity, asked: schemas.Correction
  ) -> Any:
    """Corrects an object on a frame; other frames change with the next pass."""
    return JSONResponse(await service.correct(request, stored, identity, asked))

  @routes.delete("/{id}/objects/{identity}", status_code=204, responses=_WORK)
  async def remove(request: Request, stored: Stored, identity: Identity) -> None:
    """Removes an object, also from the results."""
    await service.remove(request, stored, identity)

  @routes.delete("/{id}/phrases", status_code=204, responses=_WORK)
  async def forget(
    request: Request, stored: Stored,
    phrase: Annotated[str, Query(max_length=MAX_PHRASE, description="As it was given.")],
  ) -> None:  # fmt: skip
    """Removes a phrase and its objects, also from the results."""
    await service.forget(request, stored, phrase)

  @routes.post(
    "/{id}/track", response_class=Response, responses=_LINES | error_responses(404, 409, 429, 503)
  )
  async def track_video(
    request: Request, stored: Stored, asked: schemas.TrackRequest
  ) -> TrackResponse:
    """Tracks all objects. Each line of the response is a frame, sent as it leaves; the first line
    has `start`, and the last one `end` or `error`. To close the connection stops it."""
    return await track(service, request, stored, asked)

  @routes.delete("/{id}/track", status_code=204, responses=error_responses(404))
  async def stop(stored: Stored) -> None:
    """Stops tracking after the current frame; the stream then ends. Results are kept."""
    if stored.running is not None:
      stored.running.stop()

  @routes.get(
    "/{id}/export/{form}", response_class=Response,
    responses={200: {"content": {"application/octet-stream": _BINARY}}}
    | error_responses(404, 409, 429),
  )  # fmt: skip
  async def export(
    request: Request, stored: Stored, form: schemas.ExportFormat,
    name: Annotated[str, Query(max_length=200, description="Of the video file.")] = "video",
  ) -> FileResponse:  # fmt: skip
    """The results as a file: `tracks` (a line of JSON per frame), `ytvis` (YouTube-VIS),
    `coco-vid`, `mot`, or `overlay` (MP4)."""
    return await exporter.export(request, stored, form, name)

  return routes
