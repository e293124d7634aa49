"""Compiles the programs of the common requests before the first one, by running them once."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sam3_jax.checkpoint.bundle import VISUAL
from sam3_jax.inference.predictor import Sam3, prompts_at_once
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.server.device_work import Concept, DeviceWork, Image, Unit, Visual

Step = Callable[[str, float], None]  # name of the next step, fraction of the work done so far


def warm_up(model: Sam3, step: Step) -> None:
  """Compiles the programs for an upload, a concept, and a click, a box or a mask on one object.

  Requests with more than eight exemplar boxes, or with more points, compile their own programs.

  Args:
    model: of the server.
    step: is told of the progress.
  """
  step("compiling: image encoder, text encoder, decoder", 0.0)
  model.compile(images=1, prompts=1)
  work, side = DeviceWork(model), model.config.image_size
  step("compiling: first run", 0.5)
  pixels = np.zeros((side, side, 3), np.uint8)
  [embedding] = work.compute([Unit(Image(pixels, (side, side)))])
  concept = Unit(Concept(embedding, Prompt("object"), 0.5))
  for count in sorted(prompts_at_once(model.platform)):
    work.compute([concept] * count)
  if VISUAL in model.params:
    step("compiling: points, boxes and masks", 0.6)
    click = VisualPrompt(points=[[side / 2, side / 2]])
    units = [Unit(Visual(embedding, click, multimask)) for multimask in (True, False)]
    [first] = work.compute(units[:1])
    mask = np.where(first.logits[0] == 0, np.float32(1), first.logits[0])
    refine = VisualPrompt(points=click.points, mask=mask)
    units += [Unit(Visual(embedding, refine, False))]
    with ThreadPoolExecutor() as pool:
      list(pool.map(lambda unit: work.compute([unit]), units))
  step("ready", 1.0)
