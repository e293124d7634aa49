"""SAM 3 (Segment Anything with Concepts) in JAX and Flax, tuned for TPUs.

model = sam3_jax.Sam3.from_checkpoint("sam3-tiny")
embedding = model.encode("photo.jpg")
instances = model.decode(embedding, "yellow school bus").instances()
"""

from sam3_jax.compat.keras_hub import SAM3PromptableConceptImageSegmenter
from sam3_jax.config import RELEASED, SIZES, Config
from sam3_jax.inference.mask_generator import MaskGeneration, Segments
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inference.refine import add_instance, refine_by_clicks, refine_instance
from sam3_jax.inference.video.session import VideoSession
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.preprocess import read_image
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.outputs.detections import Detections, VisualMasks
from sam3_jax.outputs.instances import Instances
from sam3_jax.outputs.masks import Masks
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.registry import find_checkpoint
from sam3_jax.rules import Rules
from sam3_jax.types import ImageEmbedding, TextEmbedding

__all__ = [
  "RELEASED",
  "SIZES",
  "Concept",
  "Config",
  "Detections",
  "ImageEmbedding",
  "Instances",
  "MaskGeneration",
  "Masks",
  "Prompt",
  "Rules",
  "SAM3PromptableConceptImageSegmenter",
  "Sam3",
  "Segments",
  "TextEmbedding",
  "Tokenizer",
  "TrackedFrame",
  "VideoSession",
  "VisualMasks",
  "VisualPrompt",
  "add_instance",
  "find_checkpoint",
  "read_image",
  "refine_by_clicks",
  "refine_instance",
]
__version__ = "0.1.0"


def __dir__() -> list[str]:
  return [*__all__, "__version__"]
