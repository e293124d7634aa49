"""JSON values of requests and responses, with examples; the OpenAPI document is made of them.

Coordinates are pixels of the image as displayed (EXIF orientation applied), x before y; boxes are
x0, y0, x1, y1.
"""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sam3_jax.inference.mask_generator import MaskGeneration
from sam3_jax.inputs.visual_prompts import MAX_POINTS
from sam3_jax.server.settings import MAX_BOXES, MAX_PHRASE, MAX_POINTS_PER_SIDE, MAX_PROMPTS

Number = Annotated[float, Field(allow_inf_nan=False)]
Box = Annotated[list[Number], Field(min_length=4, max_length=4)]
Point = Annotated[list[Number], Field(min_length=2, max_length=2)]
Label = Annotated[int, Field(ge=0, le=1)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Format = Literal["rle", "polygons", "png", "none"]


class Request(BaseModel):
  """No conversions, no unknown fields."""

  model_config = ConfigDict(extra="forbid", strict=True)


class Rle(BaseModel):
  """COCO's compressed run lengths."""

  model_config = ConfigDict(extra="forbid", strict=True)
  size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
  counts: str = Field(description="As pycocotools writes them, decoded to a string.")


class Concept(Request):
  """A noun phrase, exemplar boxes, or both: finds all instances."""

  phrase: Annotated[str, Field(max_length=MAX_PHRASE)] | None = None
  boxes: Annotated[list[Box], Field(max_length=MAX_BOXES)] = []
  box_labels: Annotated[list[Label], Field(max_length=MAX_BOXES)] | None = Field(
    default=None, description="1 for a positive exemplar, 0 for a negative one; null for all 1."
  )


class Visual(Request):
  """Points, a box or a mask: segments one object."""

  points: Annotated[list[Point], Field(max_length=MAX_POINTS)] = []
  point_labels: Annotated[list[Label], Field(max_length=MAX_POINTS)] | None = Field(
    default=None, description="1 for a point on the object, 0 for a point off it; null for all 1."
  )
  box: Box | None = None
  mask: Rle | None = Field(default=None, description="A mask of the image's size to start from.")
  multimask: bool = Field(default=True, description="Three masks for an ambiguous click, else one.")


class PromptsRequest(Request):
  """Prompts on one image."""

  model_config = ConfigDict(
    extra="forbid",
    strict=True,
    json_schema_extra={
      "examples": [
        {"concepts": [{"phrase": "lion"}], "threshold": 0.5},
        {
          "concepts": [{"phrase": None, "boxes": [[10, 20, 110, 90]], "box_labels": [1]}],
          "visual": [{"points": [[320, 240]], "point_labels": [1]}],
          "format": "polygons",
        },
      ]
    },
  )
  concepts: Annotated[list[Concept], Field(max_length=MAX_PROMPTS)] = []
  visual: Annotated[list[Visual], Field(max_length=MAX_PROMPTS)] = []
  threshold: Fraction = Field(
    default=0.5, description="Minimum score of a concept's instance, exclusive."
  )
  max_detections: int = Field(default=100, ge=1, le=1000, description="Instances of each concept.")
  format: Format = "rle"


class EverythingRequest(Request):
  """Options of SAM's mask generator; see `MaskGeneration`."""

  model_config = ConfigDict(
    extra="forbid", strict=True, json_schema_extra={"examples": [{"points_per_side": 16}]}
  )
  points_per_side: int = Field(default=16, ge=1, le=MAX_POINTS_PER_SIDE)
  points_per_batch: int = Field(default=64, ge=1, le=256)
  multimask_output: bool = True
  pred_iou_thresh: Fraction = 0.8
  stability_score_thresh: Fraction = 0.95
  stability_score_offset: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 1.0
  box_nms_thresh: Fraction = 0.7
  min_mask_region_area: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
  format: Format = "rle"

  @property
  def options(self) -> MaskGeneration:
    names = {field.name for field in dataclasses.fields(MaskGeneration)}
    return MaskGeneration(**{k: v for k, v in self.model_dump().items() if k in names})


Mask = Rle | list[list[float]] | str | None


class Instance(BaseModel):
  """An instance of a concept, or one object of an image."""

  model_config = ConfigDict(
    json_schema_extra={
      "examples": [{"score": 0.97, "box": [12.5, 8.0, 200.1, 180.9], "area": 17342, "mask": None}]
    }
  )
  score: float
  box: list[float]
  area: int = Field(description="Pixels of the mask; -1 if `format` is none.")
  mask: Mask = Field(description="RLE, polygons, base64 of a 1-bit PNG, or null; see `format`.")


class ConceptResult(BaseModel):
  """The instances of a concept, best first."""

  phrase: str | None
  instances: list[Instance]


class VisualResult(BaseModel):
  """The masks of a visual prompt in the model's order; the score is the estimated IoU."""

  masks: list[Instance]


class PromptMilliseconds(BaseModel):
  queue: float
  decode: float
  masks: float


class PromptsResponse(BaseModel):
  concepts: list[ConceptResult]
  visual: list[VisualResult]
  milliseconds: PromptMilliseconds


class EverythingResponse(BaseModel):
  instances: list[Instance]
  milliseconds: PromptMilliseconds


class ImageResponse(BaseModel):
  """An encoded image."""

  id: str = Field(description="256 random bits; whoever knows it may use the image.")
  width: int
  height: int


class UploadMilliseconds(BaseModel):
  read: float
  queue: float
  encode: float


class UploadResponse(ImageResponse):
  milliseconds: UploadMilliseconds


class Limits(BaseModel):
  bytes: int
  pixels: int
  prompts: int
  boxes: int
  points: int
  video_bytes: int
  video_frames: int


class ModelResponse(BaseModel):
  """The model that the server runs."""

  name: str
  licence: str
  trained: bool
  description: str
  concepts: list[str] | None = Field(description="The only concepts it knows; null for any.")
  visual: bool = Field(description="Whether it takes points, boxes and masks.")
  video: bool = Field(description="Whether the server tracks objects in videos.")
  image_size: int
  version: str = Field(description="Of sam3-jax.")
  limits: Limits


class Status(BaseModel):
  status: str


class ErrorDetail(BaseModel):
  code: str
  message: str


class ErrorResponse(BaseModel):
  error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
  """The documentation of errors of a route."""
  return {status: {"model": ErrorResponse} for status in (*statuses, 400, 401, 403, 405, 408, 431)}
