"""KerasHub's model class, with the inputs and outputs of its model card for `sam3_pcs`.

Replace `keras_hub.models` with `sam3_jax` in the card's example to run it on this package.
"""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from jaxtyping import Float

from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.utils.validation import as_array

PADDING_LABEL = -10  # KerasHub's and transformers' label of a padding box


class SAM3PromptableConceptImageSegmenter:
  """Concept segmentation with the inputs and outputs of KerasHub's class of the same name.

  The values follow Meta's released code, which KerasHub's differ from.
  """

  def __init__(self, model: Sam3):
    self.model = model

  @classmethod
  def from_preset(cls, preset: str, *, dtype: str | None = None, device: Any = None) -> Self:
    """Loads a checkpoint; the arguments are those of `Sam3.from_checkpoint`."""
    return cls(Sam3.from_checkpoint(preset, dtype=dtype, device=device))

  def predict(self, inputs: Mapping[str, Any]) -> dict[str, Float[np.ndarray, "B ..."]]:
    """Segments one prompt in each image.

    Args:
      inputs: a mapping with
        images: [B, h, w, 3], or one image [h, w, 3]; values in 0..255 (floats are rounded);
        prompts: one phrase per image; optional with boxes;
        boxes: exemplar boxes [B, N, 4], xyxy in pixels; optional with prompts;
        box_labels: [B, N], 1 for a positive box, 0 for a negative one, -10 for padding; default 1.

    Returns:
      scores [B, Q]; boxes [B, Q, 4], xyxy as fractions of width and height; masks [B, Q, Hm, Wm],
      probabilities on the decoder's grid. One image counts as B = 1.

    Raises:
      ValueError: an unknown key, values outside 0..255, unequal numbers of images and prompts, or
        neither prompts nor boxes.
    """
    if not isinstance(inputs, Mapping):
      raise TypeError(f"predict takes a mapping with images and prompts; got {type(inputs)}.")
    if unknown := inputs.keys() - {"images", "prompts", "boxes", "box_labels"}:
      raise ValueError(
        f"unknown inputs {sorted(unknown)}; there are images, prompts, boxes and box_labels."
      )
    if inputs.get("images") is None:
      raise ValueError("inputs need images: an array [B, h, w, 3] with values 0..255.")
    images = _images(inputs["images"])
    prompts = _prompts(inputs, len(images))
    embedding = self.model.encode(list(images))
    found = self.model.decode(embedding, prompts, range(len(images)))
    logits = np.asarray(found.mask_logits, np.float32)
    return {
      "scores": np.asarray(found.scores),
      "boxes": np.asarray(found.boxes),
      "masks": 0.5 * (1 + np.tanh(0.5 * logits)),  # the sigmoid, without overflow
    }


def _images(images: Any) -> np.ndarray:
  images = as_array(images)
  if images.ndim == 3:
    images = images[None]
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images must be [B, h, w, 3] or [h, w, 3]; got shape {images.shape}.")
  if not np.all((images >= 0) & (images <= 255)):  # NaN fails too
    raise ValueError(
      f"images must have values 0..255; got {np.min(images)} to {np.max(images)}. "
      "Scale them first: no scale is guessed."
    )
  for i, image in enumerate(images):
    if image.dtype.kind == "f" and image.max(initial=0) <= 1 and (image % 1).any():
      raise ValueError(
        f"image {i} has values from {image.min():.4g} to {image.max():.4g}, almost black on the "
        "scale 0..255: multiply by 255 if they are on the scale 0..1."
      )
  return np.rint(images).astype(np.uint8)


def _prompts(inputs: Mapping[str, Any], count: int) -> list[Prompt]:
  """One prompt per image, of its phrase and the boxes that are not padding."""
  texts, boxes, labels = (inputs.get(key) for key in ("prompts", "boxes", "box_labels"))
  texts = [texts] if isinstance(texts, str) else [None] * count if texts is None else list(texts)
  boxes = np.zeros((count, 0, 4)) if boxes is None else np.asarray(boxes, np.float64)
  boxes = boxes[None] if boxes.ndim == 2 else boxes
  labels = np.ones(boxes.shape[:-1]) if labels is None else np.asarray(labels)
  labels = labels[None] if labels.ndim == 1 else labels
  if boxes.ndim != 3 or boxes.shape[-1] != 4 or labels.shape != boxes.shape[:2]:
    raise ValueError(
      f"boxes must be [B, N, 4] and box_labels [B, N]; got {boxes.shape} and {labels.shape}."
    )
  if not count == len(texts) == len(boxes):
    raise ValueError(
      f"{count} images need {count} prompts and {count} rows of boxes; got {len(texts)} and "
      f"{len(boxes)}."
    )
  valid = labels != PADDING_LABEL
  return [
    Prompt(text, box[keep], label[keep])
    for text, box, label, keep in zip(texts, boxes, labels, valid, strict=True)
  ]
