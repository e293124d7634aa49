"""transformers as a side of the benchmark: Sam3Model, and Sam3TrackerModel for visual prompts.
Needs the extra `reference`.

A text prompt gets one padding box. Without it, transformers skips the geometry encoder and so the
class token, which Meta's code always appends.
"""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from speed.inputs import mask_logits, points
from speed.server import Unable, serve

PADDING_LABEL = -10
POINTS_PER_CALL = 32  # each takes 170 MB, for its own map


class Transformers:
  def __init__(self, settings: dict[str, Any]):
    start = time.perf_counter()
    import torch
    import transformers
    from PIL import Image

    torch.set_grad_enabled(False)
    self.torch, self.device = torch, device(settings["device"], torch.cuda.is_available())
    imported = time.perf_counter()
    model = transformers.Sam3Model.from_pretrained(
      settings["checkpoint"], dtype=getattr(torch, settings["dtype"])
    )
    self.model = model.eval().to(self.device)
    self.settings = settings
    loaded = time.perf_counter()
    self.photo = Image.open(settings["image"]).convert("RGB")
    side = settings["config"]["image_size"]
    self.mask_size = 4 * side // settings["config"]["patch"]
    self.processor = transformers.Sam3ImageProcessor(size={"height": side, "width": side})
    self.ids = torch.tensor(settings["tokens"], device=self.device)
    self.facts = {
      "import": imported - start,
      "load": loaded - imported,
      "dtype": settings["dtype"],
      "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
      "versions": {m.__name__: m.__version__ for m in (torch, transformers)},
    }

  def _done(self, result: Any) -> Any:
    if self.device == "cuda":
      self.torch.cuda.synchronize()
    return result

  def _pixels(self, count: int) -> Any:
    pixels = self.processor(images=[self.photo] * count, return_tensors="pt").pixel_values
    return pixels.to(self.device, self.model.dtype)

  def _text(self, count: int) -> dict[str, Any]:
    ids = self.ids[:count]
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}

  def _boxes(self, count: int) -> dict[str, Any]:
    boxes = self.torch.full((count, 1, 4), 0.5, device=self.device, dtype=self.model.dtype)
    labels = self.torch.full((count, 1), PADDING_LABEL, device=self.device)
    return {"input_boxes": boxes, "input_boxes_labels": labels}

  def encode(self, count: int) -> Callable[[], Any]:
    return lambda: self._done(self.model.get_vision_features(self._pixels(count)))

  def encode_visual(self, count: int) -> Callable[[], Any]:
    """Encodes with both models, as each has its own trunk."""
    tracker = self._tracker()

    def run():
      self.model.get_vision_features(self._pixels(count))
      return self._done(tracker.get_image_embeddings(self._pixels(count)))

    return run

  def text(self, count: int) -> Callable[[], Any]:
    return lambda: self._done(self.model.get_text_features(**self._text(count)))

  def decode(self, count: int) -> Callable[[], Any]:
    """One call for all prompts; the embedding is expanded as views, one row for each prompt."""
    embedding, text = self.model.get_vision_features(self._pixels(1)), self._text(count)
    for name in ("fpn_hidden_states", "fpn_position_encoding"):
      rows = tuple(x.expand(count, *x.shape[1:]) for x in getattr(embedding, name))
      setattr(embedding, name, rows)
    given = {
      "vision_embeds": embedding,
      "text_embeds": self.model.get_text_features(**text),
      "attention_mask": text["attention_mask"],
    }
    return lambda: self._done(self.model(**given, **self._boxes(count)))

  def visual(self, count: int) -> Callable[[], Any]:
    model = self._tracker()
    embedding = model.get_image_embeddings(self._pixels(1))
    side = self.settings["config"]["image_size"]
    coordinates = self.torch.tensor(side * points(count), device=self.device, dtype=model.dtype)

    def run():
      for chunk in coordinates.split(POINTS_PER_CALL):
        model(image_embeddings=embedding, input_points=chunk[None, :, None])
      return self._done(None)

    return run

  def _tracker(self) -> Any:
    """Loads the model for visual prompts."""
    import transformers

    tracker = transformers.Sam3TrackerModel.from_pretrained(
      self.settings["checkpoint"], dtype=self.model.dtype
    )
    return tracker.eval().to(self.device)

  def predict(self, count: int) -> Callable[[], Any]:
    def run():
      found = self.model(
        pixel_values=self._pixels(count), **self._text(count), **self._boxes(count)
      )
      return self._done(self._instances(found, count))

    return run

  def preprocess(self, count: int) -> Callable[[], Any]:
    return lambda: self.processor(images=[self.photo] * count, return_tensors="pt")

  def postprocess(self, count: int) -> Callable[[], Any]:
    dtype, device = self.model.dtype, self.device
    ones = self.torch.ones(1, count, device=device, dtype=dtype)
    found = SimpleNamespace(
      pred_logits=9 * ones,
      pred_boxes=ones[..., None].expand(1, count, 4),
      pred_masks=self.torch.tensor(
        mask_logits(count, self.mask_size)[None], device=device, dtype=dtype
      ),
      presence_logits=9 * ones[:, :1],
    )
    return lambda: self._instances(found, 1)

  def _instances(self, found: Any, count: int) -> list[np.ndarray]:
    sizes = [self.photo.size[::-1]] * count
    instances = self.processor.post_process_instance_segmentation(
      found, threshold=0.5, target_sizes=sizes
    )
    return [each["masks"].cpu().numpy() for each in instances]


def device(wanted: str | None, cuda: bool) -> str:
  """PyTorch's name of the device; by default a GPU if available, as in sam3-jax."""
  if wanted == "tpu" or (wanted == "gpu" and not cuda):
    raise Unable(f"its PyTorch finds no {wanted}")
  return "cuda" if cuda and wanted != "cpu" else "cpu"


if __name__ == "__main__":
  serve(Transformers)
