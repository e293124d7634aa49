"""The detector as a Flax NNX module, by `flax.nnx.bridge.ToNNX`: parameters become NNX state.

  python examples/nnx_bridge.py docs/scene.jpg lion

Linen stays the implementation. The bridge gives NNX users one module whose parameters they can
inspect, filter, differentiate and update with the tools of NNX.
"""

import argparse
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.nnx import bridge

import sam3_jax
from sam3_jax.inputs.preprocess import ImageSource
from sam3_jax.inputs.prompts import pack
from sam3_jax.model.sam3 import Detector


def to_nnx(model: sam3_jax.Sam3) -> bridge.ToNNX:
  """A model's detector as an NNX module that owns a copy of its parameters.

  Args:
    model: a loaded checkpoint.

  Returns:
    A module to call with `method=`, such as `Detector.detect`.
  """
  module = bridge.ToNNX(Detector(model.config), rngs=nnx.Rngs(0))
  params = jax.tree.map(nnx.Param, model.params)
  for name, value in params.items():
    setattr(module, name, value)
  return module


def detect(model: sam3_jax.Sam3, module: bridge.ToNNX, image: ImageSource, phrase: str) -> Any:
  """All queries' predictions for one phrase in one image, by the NNX module."""
  embedding = model.encode(image)
  prompt, row = sam3_jax.Prompt(phrase), np.zeros(1, np.int32)
  text = model.encode_text(prompt)
  prompts = pack([prompt], np.asarray(embedding.sizes)[row], image=row, first_id=row, text=text)

  @nnx.jit
  def run(module, embedding, prompts):
    return module(embedding, prompts, method=Detector.detect)

  return run(module, embedding, prompts)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("image")
  parser.add_argument("phrase")
  parser.add_argument("--checkpoint", default="sam3-tiny")
  arguments = parser.parse_args()
  model = sam3_jax.Sam3.from_checkpoint(arguments.checkpoint)
  module = to_nnx(model)
  count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
  print(f"{count / 1e6:.1f} M parameters as NNX state")
  detections = detect(model, module, arguments.image, arguments.phrase)
  scores = np.asarray(detections.scores)[0]
  print(f"{(scores > 0.5).sum()} of {scores.size} queries score above 0.5")


if __name__ == "__main__":
  main()
