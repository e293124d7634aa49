"""`convert --verify` beside the package that the weights come from, where that is installed.

Of transformers' answers to the questions of fingerprint.py, with a converted model's. A source in
the layout of Hugging Face is read by transformers itself; any other through our way back to that
layout, so that what is wrong both ways does not show.
"""

import contextlib
import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sam3_jax.checkpoint import bundle, fingerprint
from sam3_jax.checkpoint.fingerprint import BOX, CENTRE, IMAGE, PHRASE, ModelOutputs
from sam3_jax.config import LiteTextConfig
from sam3_jax.inputs.preprocess import resize
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.types import VisualMasks

from . import hf_patches
from .export import export

LIMIT = 1e-4  # of each array's largest value; the parity table's largest is 2.3e-5
NEEDED = ("torch", "transformers")
REMEDY = "pip install 'sam3-jax[reference]'"


class NotWhole(ValueError):
  """transformers does not find all tensors."""


def compare(folder: Path, source: Path, answers: ModelOutputs, *, direct: bool) -> str:
  """A line that says how far the answers are from transformers'.

  Args:
    folder: a checkpoint of ours.
    source: the file that it was converted from.
    answers: of that checkpoint, computed in float32.
    direct: whether transformers reads the source as it is.

  Raises:
    ValueError: an answer is further away than `LIMIT`, or transformers does not find all tensors.
  """
  if missing := [name for name in NEEDED if not importlib.util.find_spec(name)]:
    return f"not compared with transformers, without {' and '.join(missing)} here: {REMEDY}"
  import transformers  # pyright: ignore[reportMissingImports]

  name, theirs = f"transformers {transformers.__version__}", source.parent
  if not hasattr(transformers, "Sam3LiteTextModel"):
    return f"not compared with {name}, which is too old: {REMEDY}"
  offs, through = {}, ""
  if direct and source.name.startswith("model.") and (theirs / "config.json").exists():
    with contextlib.suppress(NotWhole):  # of a layout that `convert` knows, and transformers not
      offs = dict(differences(folder, theirs, answers))
  if not offs:
    with tempfile.TemporaryDirectory(prefix=".live.", dir=folder.parent) as temporary:
      theirs, through = Path(temporary) / "huggingface", ", through the layout of Hugging Face"
      export(folder, theirs, "huggingface")
      offs = dict(differences(folder, theirs, answers))
  worst = max(offs, key=lambda key: offs[key])
  if not offs[worst] <= LIMIT:  # NaN is over, too
    raise ValueError(
      f"{worst} is off by {offs[worst]:.1e} of its largest value from what {name} computes of "
      f"{source}, {LIMIT:.0e} allowed: the conversion or that package is wrong; please report it."
    )
  return f"{name}{through}: equal within {offs[worst]:.1e} ({worst}), {LIMIT:.0e} allowed"


def differences(folder: Path, theirs: Path, answers: ModelOutputs) -> Iterator[tuple[str, float]]:
  """Of each array of the answers, as a fraction of its largest value.

  Args:
    folder: a checkpoint of ours.
    theirs: the same in a folder that transformers reads.
    answers: of ours.
  """
  import torch  # pyright: ignore[reportMissingImports]

  stored = bundle.open_stored(folder)
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
    given = hf_patches.concept(model, ids, [box] * row, [1] * row, mask_padding)
    answer = model(vision_embeds=embedding, **given)
    presence, clamp = np.asarray(found.presence_logit[row], np.float32), hf_patches.PRESENCE_CLAMP
    odds = torch.sigmoid(answer.pred_logits[0]) * torch.sigmoid(torch.tensor(presence))
    for name, ours, wanted in (
      ("presence", np.clip(presence, -clamp, clamp), answer.presence_logits[0, 0]),
      ("scores", found.scores[row], odds),
      ("boxes", found.boxes[row], answer.pred_boxes[0]),
      ("mask_logits", found.mask_logits[row], answer.pred_masks[0]),
      ("semantic_logits", found.semantic_logits[row], answer.semantic_seg[0, 0]),
    ):
      yield f"decode {kind}: {name}", _off(ours, wanted)


def _visual(model, pixels, side: int, masks: VisualMasks):
  import torch  # pyright: ignore[reportMissingImports]

  scale = side / np.array(IMAGE[::-1])
  answer = model(
    image_embeddings=hf_patches.visual_embedding(model, pixels),
    input_points=torch.tensor([[[(np.array(CENTRE) * scale).tolist()]]], dtype=model.dtype),
    input_labels=torch.tensor([[[1]]]),
    input_boxes=torch.tensor([[(np.array(BOX) * np.tile(scale, 2)).tolist()]], dtype=model.dtype),
    multimask_output=True,
  )
  for name, ours, wanted in (
    ("mask_logits", masks.mask_logits, answer.pred_masks[0]),
    ("iou", masks.iou, answer.iou_scores[0]),
    ("object_logit", masks.object_logit, answer.object_score_logits[0, :, 0]),
  ):
    yield f"decode visual: {name}", _off(ours, wanted)


def _off(ours: Any, theirs: Any) -> float:
  ours, wanted = np.asarray(ours, np.float64), np.asarray(theirs.float(), np.float64)
  return float(np.abs(ours - wanted).max() / max(np.abs(wanted).max(), fingerprint.TINY))


def _complete(model: Any, loading: dict[str, Any], folder: Path) -> Any:
  """The model; NotWhole where tensors are missing."""
  if missing := [*loading["missing_keys"], *loading["mismatched_keys"]]:
    raise NotWhole(
      f"transformers does not find {len(missing)} tensors in {folder}, {missing[0]} the first."
    )
  return model
