"""JSON values of requests and responses for videos; see `server/schemas.py`."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from sam3_jax.inputs.visual_prompts import MAX_POINTS
from sam3_jax.server.schemas import Box, Label, Number, Point, Request, Rle
from sam3_jax.server.settings import MAX_PHRASE

Direction = Literal["forward", "backward", "both"]
ExportFormat = Literal["tracks", "ytvis", "coco-vid", "mot", "overlay"]
FrameNumber = Annotated[int, Field(ge=0, le=10**9, description="Number of a frame, from 0.")]
POINT_LABELS = "1 for a point on the object, 0 for a point off it; null for all 1."


class VideoPrompt(Request):
  """A phrase finds all instances of a concept, from this frame on; points, a box or both select one
  object."""

  model_config = ConfigDict(
    extra="forbid",
    strict=True,
    json_schema_extra={
      "examples": [
        {"frame": 0, "phrase": "lion"},
        {"frame": 0, "points": [[20, 12]]},
        {"frame": 0, "box": [4, 4, 30, 20], "points": [[8, 8]], "point_labels": [0]},
      ]
    },
  )
  frame: FrameNumber
  phrase: Annotated[str, Field(max_length=MAX_PHRASE)] | None = None
  points: Annotated[list[Point], Field(max_length=MAX_POINTS)] = Field(
    default=[], description="x, y in pixels of the frame."
  )
  point_labels: Annotated[list[Label], Field(max_length=MAX_POINTS)] | None = Field(
    default=None, description=POINT_LABELS
  )
  box: Box | None = None


class Correction(Request):
  """Points, a box or both for one object on a frame; they replace those given before there."""

  model_config = ConfigDict(
    extra="forbid",
    strict=True,
    json_schema_extra={
      "examples": [{"frame": 1, "points": [[20, 12], [2, 2]], "point_labels": [1, 0]}]
    },
  )
  frame: FrameNumber
  points: Annotated[list[Point], Field(max_length=MAX_POINTS)] = Field(
    default=[], description="x, y in pixels of the frame."
  )
  point_labels: Annotated[list[Label], Field(max_length=MAX_POINTS)] | None = Field(
    default=None, description=POINT_LABELS
  )
  box: Box | None = None


class TrackRequest(Request):
  """A pass over the video, or one in each direction."""

  model_config = ConfigDict(
    extra="forbid", strict=True, json_schema_extra={"examples": [{"direction": "both"}]}
  )
  direction: Direction = Field(
    default="forward", description="Of the pass; `both` is forward and then backward."
  )
  start: FrameNumber | None = Field(
    default=None,
    description="The first frame, for all objects; null for the first prompt of each object.",
  )
  stop: FrameNumber | None = Field(
    default=None, description="The frame before which each pass ends; null for the end."
  )


class VideoObject(BaseModel):
  """An object on a frame. An id stands for the same object on all frames."""

  id: int
  phrase: str | None = Field(description="The phrase that found it.")
  score: Number
  box: Box
  area: int = Field(description="Pixels of the mask.")
  mask: Rle


class VideoFrame(BaseModel):
  """The visible objects of a frame."""

  frame: int
  time: float = Field(description="Seconds since the first frame.")
  objects: list[VideoObject]


class VideoUploadMilliseconds(BaseModel):
  read: float


class VideoResponse(BaseModel):
  """An open video."""

  id: str = Field(description="256 random bits; whoever knows it may use the video.")
  width: int
  height: int
  frames: int
  fps: float = Field(description="Frames per second, on average.")


class VideoUploadResponse(VideoResponse):
  milliseconds: VideoUploadMilliseconds


class VideoStateResponse(VideoResponse):
  objects: list[int] = Field(description="The ids of all objects.")
  phrases: list[str] = Field(description="The phrases whose instances are found.")
  tracked: int = Field(description="The number of frames with results.")
  running: bool


class VideoPromptMilliseconds(BaseModel):
  queue: float
  device: float


class VideoPromptResponse(BaseModel):
  """What a prompt gives on its frame."""

  objects: list[int] = Field(
    description="The ids: one of a click or a box, or those of a phrase on this frame."
  )
  result: VideoFrame
  milliseconds: VideoPromptMilliseconds


class TrackLine(BaseModel):
  """A line of the stream: a frame, or what the pass does. The last line has `end` or `error`."""

  start: dict[str, int] | None = Field(
    default=None, description='The first line: {"frames": N}, the number of frames to come.'
  )
  frame: int | None = None
  time: float | None = None
  objects: list[VideoObject] | None = None
  end: dict[str, bool | int | float] | None = Field(
    default=None, description='The last line: {"frames": N, "stopped": false, "seconds": S}.'
  )
  error: dict[str, str] | None = Field(default=None, description="As in an error response.")
