"""Compares a converted model with transformers, if it is installed, for `convert --verify`.

Both get the inputs of fingerprint.py. transformers reads sources in the layout of Hugging Face
directly. Other sources are first exported to that layout, so a fault that conversion and export
share is not found.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import bundle, fingerprint
from sam3_jax.checkpoint.fingerprint import BOX, CENTER, IMAGE, PHRASE, ModelOutputs
from sam3_jax.config import LiteTextConfig
from sam3_jax.inputs.preprocess import resize
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.types import VisualMasks

from . import hf_patches
from .export import export

LIMIT = 1e-4  # of each array's largest value; the parity table's largest is 2.3e-5
PACKAGES = ("torch", "transformers")
REMEDY = "pip install 'sam3-jax[reference]'"


class IncompleteError(ValueError):
  """transformers does not find all tensors."""


def compare(directory: Path, source: Path, answers: ModelOutputs, *, direct: bool) -> str:
  """Returns a line with the largest difference from transformers.

  Args:
    directory: a sam3-jax checkpoint.
    source: the file that it was converted from.
    answers: the output of that checkpoint, computed in float32.
    direct: whether transformers can read the source as it is.

  Raises:
    ValueError: a difference exceeds `LIMIT`, or transformers does not find all tensors.
  """
  if missing := [name for name in PACKAGES if not importlib.util.find_spec(name)]:
    verb = "is" if len(missing) == 1 else "are"
    names = " and ".join(missing)
    return f"not compared with transformers: {names} {verb} not installed; {REMEDY}"
  import transformers  # pyright: ignore[reportMissingImports]

  name, theirs = f"transformers {transformers.__version__}", source.parent
  if not hasattr(transformers, "Sam3LiteTextModel"):
    return f"not compared with {name}, which is too old: {REMEDY}"
  errors, through = {}, ""
  if direct and source.name.startswith("model.") and (theirs / "config.json").exists():
    with contextlib.suppress(IncompleteError):  # a layout that only `convert` knows
      errors = dict(differences(directory, theirs, answers))
  if not errors:
    with tempfile.TemporaryDirectory(prefix=".verify.", dir=directory.parent) as temporary:
      theirs, through = Path(temporary) / "huggingface", ", after export to its layout"
      export(directory, theirs, "huggingface")
      errors = dict(differences(directory, theirs, answers))
  worst = max(errors, key=lambda key: errors[key])
  if not errors[worst] <= LIMIT:  # also catches NaN
    raise ValueError(
      f"{worst} differs from that of {name} for {source} by {errors[worst]:.1e} of its largest "
      f"value, {LIMIT:.0e} allowed: the conversion or that package is wrong; please report it."
    )
  return f"{name}{through}: equal within {errors[worst]:.1e} ({worst}), {LIMIT:.0e} allowed"


def differences(
  directory: Path, theirs: Path, answers: ModelOutputs
) -> Iterator[tuple[str, float]]:
  """Yields name and relative difference of each output, as a fraction of its largest value.

  Args:
    directory: a sam3-jax checkpoint.
    theirs: the same model in a directory that transformers reads.
    answers: the output of that checkpoint.
  """
  import torch  # pyright: ignore[reportMissingImports]

  stored = bundle.open_stored(directory)
  side = stored.config.image_size
  pixels = resize(fingerprint.image(), side).transpose(2, 0, 1)[None] / np.float32(127.5) - 1
  with torch.inference_mode():
    model = _complete(*hf_patches.load_detector(theirs), theirs)
    yield from _concepts(model, torch.from_numpy(pixels), stored, answers)
    del model
    if answers.masks is not None:
      model = _complete(*hf_patches.load_tracker(theirs), theirs)
      yield from _visual(model, torch.from_numpy(pixels), side, answers.masks)


def _concepts(model, pixels, stored: bundle.Stored, answers: ModelOutputs):
  import torch  # pyright: ignore[reportMissingImports]

  config = stored.config
  ids = Tokenizer(stored.tokenizer, context=config.text.context)([PHRASE])[0].tolist()
  mask_padding = isinstance(config.text, LiteTextConfig) and config.text.mask_padding
  corners = (np.reshape(BOX, (2, 2)) / IMAGE[::-1]).astype(np.float32)
  box = [*corners.mean(0).tolist(), *(corners[1] - corners[0]).tolist()]
  embedding, found = model.get_vision_features(pixels), answers.found
  for row, kind in enumerate(("phrase", "phrase and box")):
    inputs = hf_patches.concept_inputs(model, ids, [box] * row, [1] * row, mask_padding)
    output = model(vision_embeds=embedding, **inputs)
    presence, clamp = np.asarray(found.presence_logit[row], np.float32), hf_patches.PRESENCE_CLAMP
    scores = torch.sigmoid(output.pred_logits[0]) * torch.sigmoid(torch.tensor(presence))
    for name, ours, expected in (
      ("presence", np.clip(presence, -clamp, clamp), output.presence_logits[0, 0]),
      ("scores", found.scores[row], scores),
      ("boxes", found.boxes[row], output.pred_boxes[0]),
      ("mask_logits", found.mask_logits[row], output.pred_masks[0]),
      ("semantic_logits", found.semantic_logits[row], output.semantic_seg[0, 0]),
    ):
      yield f"decode {kind}: {name}", _relative_error(ours, expected)


def _visual(model, pixels, side: int, masks: VisualMasks):
  import torch  # pyright: ignore[reportMissingImports]

  scale = side / np.array(IMAGE[::-1])
  output = model(
    image_embeddings=hf_patches.visual_embedding(model, pixels),
    input_points=torch.tensor([[[(np.array(CENTER) * scale).tolist()]]], dtype=model.dtype),
    input_labels=torch.tensor([[[1]]]),
    input_boxes=torch.tensor([[(np.array(BOX) * np.tile(scale, 2)).tolist()]], dtype=model.dtype),
    multimask_output=True,
  )
  for name, ours, expected in (
    ("mask_logits", masks.mask_logits, output.pred_masks[0]),
    ("iou", masks.iou, output.iou_scores[0]),
    ("object_logit", masks.object_logit, output.object_score_logits[0, :, 0]),
  ):
    yield f"decode visual: {name}", _relative_error(ours, expected)


def _relative_error(ours: Any, theirs: Any) -> float:
  ours, expected = np.asarray(ours, np.float64), np.asarray(theirs.float(), np.float64)
  return float(np.abs(ours - expected).max() / max(np.abs(expected).max(), fingerprint.TINY))


def _complete(model: Any, loading: dict[str, Any], directory: Path) -> Any:
  """Returns the model; raises IncompleteError if tensors are missing."""
  if missing := [*loading["missing_keys"], *loading["mismatched_keys"]]:
    raise IncompleteError(
      f"transformers does not find {len(missing)} tensors in {directory}, {missing[0]} the first."
    )
  return model
