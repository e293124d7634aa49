"""Runs a model on the image and the prompts of `checkpoint.fingerprint`: for `--verify`."""

from collections.abc import Callable
from pathlib import Path

from sam3_jax.checkpoint.fingerprint import (
  BOX,
  CENTER,
  PHRASE,
  Fingerprint,
  ModelOutputs,
  image,
  summarize,
  write,
)
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.visual_prompts import VisualPrompt


def run(model: Sam3) -> ModelOutputs:
  """Runs every program of the model's checkpoint."""
  visual = "visual" in model.params
  embedding = model.encode(image(), visual=visual)
  text = model.encode_text(PHRASE)
  found = model.decode(embedding, [PHRASE, Prompt(PHRASE, [BOX], [1])])
  prompt = VisualPrompt([CENTER], [1], box=BOX)
  masks = model.decode_visual(embedding, prompt) if visual else None
  return ModelOutputs(embedding, text, found, masks)


def compute_fingerprint(model: Sam3) -> Fingerprint:
  """The fingerprint of a model.

  Raises:
    ValueError: an output is not finite.
  """
  return summarize(run(model), str(model.dtype))


def verify_conversion(
  folder: Path, source: Path, direct: bool, progress: Callable[[str, float], None]
) -> str:
  """Runs a converted checkpoint, writes its fingerprint, and compares with transformers.

  Args:
    folder: the checkpoint, complete but for the fingerprint.
    source: the file that it was converted from.
    direct: whether transformers reads the source as it is.
    progress: called with each step.

  Returns:
    A line that gives the largest difference from transformers, or why there was no comparison.

  Raises:
    ValueError: an output is not finite, or differs from transformers'.
  """
  # setuptools maps the directory converters/ to this name, which pyright cannot know.
  from sam3_jax.converters import verify_hf  # pyright: ignore[reportMissingImports]

  progress("running the model", 1.0)
  outputs = run(Sam3.from_checkpoint(folder, dtype="float32"))
  write(summarize(outputs, "float32"), folder)
  progress("comparing with transformers", 1.0)
  return verify_hf.compare(folder, source, outputs, direct=direct)
