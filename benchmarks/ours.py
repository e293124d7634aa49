"""The sam3-jax side of `parity.py`: converts the seeded checkpoint and runs it on the prompts."""

import argparse
import json
from pathlib import Path

import numpy as np


def convert(folder: Path, bundle: Path) -> None:
  """Converts the checkpoint that `reference.py make` wrote.

  The tokenizer is CLIP's, which all SAM 3 models use, so that nothing is downloaded.
  """
  from sam3_jax import converters

  tokenizer = Path(__file__).parents[1] / "tests" / "goldens" / "tokenizer.model"
  converters.convert(folder, bundle, tokenizer=tokenizer)


def run(bundle: Path, photo: Path, prompts: Path, out: Path, dtype: str) -> None:
  """Decodes `prompts` on the photo. Writes the outputs, and for the transformers side the model
  inputs: token ids, and boxes and points as numbers."""
  import flax
  import jax
  import jaxlib

  from sam3_jax import Prompt, Sam3

  model = Sam3.from_checkpoint(bundle, dtype=dtype)
  given = json.loads(prompts.read_text())
  concepts = {kind: Prompt(**prompt) for kind, prompt in given["concepts"].items()}
  embedding = model.encode(photo, visual=bool(given["visual"]))
  found = {kind: model.decode(embedding, prompt) for kind, prompt in concepts.items()}

  arrays, inputs = {}, {}
  for kind, detections in found.items():
    arrays |= {
      f"{kind}/logits": _logits(model, embedding, concepts[kind]),
      f"{kind}/presence": np.asarray(detections.presence_logit[0], np.float32),
      f"{kind}/boxes": np.asarray(detections.boxes[0], np.float32),
      f"{kind}/mask_logits": np.asarray(detections.mask_logits[0], np.float32),
      f"{kind}/semantic_logits": np.asarray(detections.semantic_logits[0], np.float32),
      f"{kind}/masks": _source_masks(detections),
      f"{kind}/scores": np.asarray(detections.scores[0], np.float32),
    }
    inputs[kind] = _concept_inputs(model, concepts[kind], np.asarray(embedding.sizes[0]))
  seen, visual = _visual(model, embedding, given["visual"])
  versions = {m.__name__: m.__version__ for m in (jax, jaxlib, flax)}
  np.savez(out, versions=json.dumps(versions), **arrays, **seen)
  both = {"concepts": inputs, "visual": visual}
  out.with_suffix(".inputs.json").write_text(json.dumps(both))


def _logits(model, embedding, prompt) -> np.ndarray:
  """The last layer's query logits; `decode` returns only scores."""
  import jax

  from sam3_jax.inputs.prompts import pack
  from sam3_jax.model.sam3 import Detector

  detector, zero = Detector(model.config, model.dtype), np.zeros(1, np.int32)
  sizes, text = np.asarray(embedding.sizes), model.encode_text(prompt)
  packed = pack([prompt], sizes, image=zero, first_id=zero, text=text)

  @jax.jit  # removes the unused masks
  def logits(params, embedding, packed):
    found = detector.apply({"params": params}, embedding, packed, method=Detector.detect_all_layers)
    return found.logits[-1, 0]

  return np.asarray(logits(model.params, embedding, packed), np.float32)


def _visual(model, embedding, kinds: dict) -> tuple[dict, dict]:
  """Decodes visual prompts, one call for each kind; also returns the prompts in pixels of the model
  input.

  The `mask` of a prompt names an earlier kind, and stands for the best mask of its first prompt.
  """
  from sam3_jax import VisualPrompt

  height, width = np.asarray(embedding.sizes[0]).tolist()
  scale = model.config.image_size / np.array([width, height])
  arrays, inputs = {}, {}
  for kind, prompts in kinds.items():
    visual, mask = [], None
    for values in prompts:
      if "mask" in values:
        earlier = values["mask"]
        mask = earlier, 0, int(arrays[f"{earlier}/iou"][0].argmax())
        values = values | {"mask": arrays[f"{earlier}/mask_logits"][0, mask[2]]}
      visual.append(VisualPrompt(**values))
    multimask = all(prompt.slots == 1 for prompt in visual)
    found = model.decode_visual(embedding, visual, multimask=multimask)
    arrays |= {
      f"{kind}/mask_logits": np.asarray(found.mask_logits, np.float32),
      f"{kind}/iou": np.asarray(found.iou, np.float32),
      f"{kind}/object": np.asarray(found.object_logit, np.float32),
    }
    inputs[kind] = {
      "points": [(np.array(prompt.points) * scale).tolist() for prompt in visual if prompt.points],
      "labels": [prompt.point_labels for prompt in visual if prompt.points],
      "boxes": [
        (np.array(prompt.box) * np.tile(scale, 2)).tolist() for prompt in visual if prompt.box
      ],
      "mask": mask,
      "multimask": multimask,
    }
  return arrays, inputs


def _source_masks(detections) -> np.ndarray:
  """The masks of all queries at the image's size, in the order of the queries, as packed bits."""
  [instances] = detections.instances(threshold=0.0)
  order = np.argsort(np.asarray(instances.ids))
  masks = (np.packbits(np.asarray(instances.masks[int(i)])) for i in order)
  return np.stack(list(masks))


def _concept_inputs(model, prompt, size: np.ndarray) -> dict:
  """Token ids, and boxes as fractions (center, width, height) with their labels."""
  height, width = (int(n) for n in size)
  boxes = [
    [(x0 + x1) / 2 / width, (y0 + y1) / 2 / height, (x1 - x0) / width, (y1 - y0) / height]
    for x0, y0, x1, y1 in prompt.boxes
  ]
  ids = model.tokenizer([prompt.phrase])[0].tolist()
  return {"ids": ids, "boxes": boxes, "labels": [int(label) for label in prompt.box_labels]}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  steps = parser.add_subparsers(dest="step", required=True)
  step = steps.add_parser("convert")
  step.add_argument("folder", type=Path)
  step.add_argument("bundle", type=Path)
  step = steps.add_parser("run")
  for name in ("bundle", "photo", "prompts", "out"):
    step.add_argument(name, type=Path)
  step.add_argument("--dtype", required=True)
  arguments = vars(parser.parse_args())
  {"convert": convert, "run": run}[arguments.pop("step")](**arguments)


if __name__ == "__main__":
  main()
