"""Meta's own package `sam3` as a side of the benchmark.

The image model is assembled as in its builder, but in any size (see `train_meta.build`), and reads
sam3.pt. bfloat16 uses autocast, with float32 parameters.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from speed.server import Unable, serve


class Meta:
  def __init__(self, settings: dict[str, Any]):
    if settings["device"] not in (None, "cpu"):
      raise Unable("this comparison runs Meta's code on a CPU only")
    start = time.perf_counter()
    import torch
    from PIL import Image
    from sam3.model.data_misc import FindStage
    from sam3.model.sam3_image_processor import Sam3Processor
    from train_meta import build

    torch.set_grad_enabled(False)
    self.torch, self.stage = torch, FindStage
    imported = time.perf_counter()
    tokens = torch.tensor(settings["tokens"])
    self.model = build(settings["config"], tokens).eval()
    self.model.backbone.language_backbone.tokenizer = lambda texts, **_: tokens[: len(texts)]
    self.model.inst_interactive_predictor = None
    stored = torch.load(Path(settings["checkpoint"]) / "sam3.pt", weights_only=True)
    stored = stored.get("model", stored)
    own = {k.removeprefix("detector."): x for k, x in stored.items() if k.startswith("detector.")}
    missing = self.model.load_state_dict(own, strict=False).missing_keys
    if missing := [name for name in missing if not name.endswith("freqs_cis")]:
      raise Unable(f"its checkpoint lacks {len(missing)} tensors, {missing[0]} the first")
    loaded = time.perf_counter()
    self.processor = Sam3Processor(self.model, settings["config"]["image_size"], device="cpu")
    self.photo = Image.open(settings["image"]).convert("RGB")
    self.low = settings["dtype"] == "bfloat16"
    self.facts = {
      "import": imported - start,
      "load": loaded - imported,
      "dtype": settings["dtype"],
      "device": "cpu",
      "versions": {"torch": torch.__version__, "sam3": "0.1.4"},
    }

  def _precision(self) -> contextlib.AbstractContextManager:
    return self.torch.autocast("cpu", self.torch.bfloat16, enabled=self.low)

  def encode(self, count: int) -> Callable[[], Any]:
    def run():
      with self._precision():
        return self.processor.set_image_batch([self.photo] * count)

    return run

  def text(self, count: int) -> Callable[[], Any]:
    def run():
      with self._precision():
        return self.model.backbone.forward_text([""] * count, device="cpu")

    return run

  def decode(self, count: int) -> Callable[[], Any]:
    encoded = self.encode(1)()["backbone_out"] | self.text(count)()
    rows = self.torch.arange(count)
    stage = self.stage(
      img_ids=0 * rows, text_ids=rows, input_boxes=None, input_boxes_mask=None,
      input_boxes_label=None, input_points=None, input_points_mask=None,
    )  # fmt: skip

    def run():
      with self._precision():
        return self.model.forward_grounding(
          backbone_out=dict(encoded),
          find_input=stage,
          find_target=None,
          geometric_prompt=self.model._get_dummy_prompt(count),
        )

    return run

  def predict(self, count: int) -> Callable[[], Any]:
    if count > 1:
      raise Unable("its processor takes one image and one phrase")

    def run():
      with self._precision():
        state = self.processor.set_image(self.photo)
        return self.processor.set_text_prompt("", state)["masks"].numpy()

    return run

  def preprocess(self, count: int) -> Callable[[], Any]:
    from torchvision.transforms import v2

    convert, transform = v2.functional.to_image, self.processor.transform
    return lambda: [transform(convert(self.photo)) for _ in range(count)]


if __name__ == "__main__":
  serve(Meta)
