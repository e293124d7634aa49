"""sam3-jax as a side of the benchmark."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from speed.inputs import mask_logits, phrases, points
from speed.server import Unable, serve


class Ours:
  """The steps of the public API on a checkpoint."""

  def __init__(self, settings: dict[str, Any]):
    start = time.perf_counter()
    import flax
    import jax
    import jaxlib

    import sam3_jax
    from sam3_jax.cli.arguments import use_device

    use_device(settings["device"])
    imported = time.perf_counter()
    self.model = sam3_jax.Sam3.from_checkpoint(settings["checkpoint"], dtype=settings["dtype"])
    self.wait = jax.block_until_ready
    self.wait(self.model.params)
    self.photo = sam3_jax.read_image(settings["image"])
    self.facts = {
      "import": imported - start,
      "load": time.perf_counter() - imported,
      "dtype": str(self.model.dtype),
      "device": str(jax.devices()[0].device_kind),
      "versions": {m.__name__: m.__version__ for m in (sam3_jax, jax, jaxlib, flax)},
    }

  def encode(self, count: int) -> Callable[[], Any]:
    return lambda: self.wait(self.model.encode([self.photo] * count))

  def encode_visual(self, count: int) -> Callable[[], Any]:
    self._need_head()
    return lambda: self.wait(self.model.encode([self.photo] * count, visual=True))

  def text(self, count: int) -> Callable[[], Any]:
    return lambda: self.wait(self.model.encode_text(phrases(count)))

  def decode(self, count: int) -> Callable[[], Any]:
    embedding, prompts = self.model.encode(self.photo), phrases(count)
    text = self.model.encode_text(prompts)
    return lambda: self.wait(self.model.decode(embedding, prompts, text=text))

  def visual(self, count: int) -> Callable[[], Any]:
    from sam3_jax import VisualPrompt

    self._need_head()
    height, width, _ = self.photo.shape
    prompts = [VisualPrompt(points=[point]) for point in points(count) * [width, height]]
    embedding = self.model.encode(self.photo, visual=True)
    return lambda: self.wait(self.model.decode_visual(embedding, prompts))

  def _need_head(self) -> None:
    if "visual" not in self.model.params:
      raise Unable("the checkpoint has no head for visual prompts")

  def predict(self, count: int) -> Callable[[], Any]:
    def run():
      found = self.model.decode(
        self.model.encode([self.photo] * count), phrases(count), range(count)
      )
      return [np.asarray(each.masks) for each in found.instances()]

    return run

  def preprocess(self, count: int) -> Callable[[], Any]:
    from sam3_jax.inputs.preprocess import resize

    return lambda: [resize(self.photo, self.model.config.image_size) for _ in range(count)]

  def postprocess(self, count: int) -> Callable[[], Any]:
    import jax.numpy as jnp

    from sam3_jax import Detections

    side = self.model.config.mask_size
    found = Detections(
      scores=jnp.ones((1, count)),
      boxes=jnp.ones((1, count, 4)),
      mask_logits=jnp.asarray(mask_logits(count, side), self.model.dtype)[None],
      presence_logit=jnp.ones(1),
      semantic_logits=jnp.zeros((1, side, side)),
      image_index=jnp.zeros(1, jnp.int32),
      sizes=jnp.asarray([self.photo.shape[:2]], jnp.int32),
      ids=jnp.arange(count, dtype=jnp.int32)[None],
    )
    return lambda: np.asarray(found.instances()[0].masks)


if __name__ == "__main__":
  serve(Ours)
