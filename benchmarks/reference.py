"""The transformers side of `parity.py`: a seeded checkpoint in its layout, and its answers.

Runs with the extra `reference` (torch, torchvision, transformers, scikit-image) and imports nothing
of ours but the recipe of the weights and the clock, so it may have a virtual environment of its
own.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from weights import weights

# Words of the names in transformers' layout that decide a tensor's scale, as the recipe knows them.
WORDS = (
  (r"position_embedding", "positional_embedding"),
  (r"\.layer(\d)\.", lambda found: f".layers.{int(found[1]) - 1}."),
  (r"scale_layers", "dconv"),
  (r"box_head", "bbox_embed"),
  (r"box_rpb_embed", "boxRPB_embed"),
  (r"dot_product_scoring\.text_proj", "dot_prod_scoring.prompt_proj"),
  (r"dot_product_scoring\.query_proj", "dot_prod_scoring.hs_proj"),
  (r"mask_embedder", "mask_embed"),
)
TEXT_CONTEXT = 32
PADDING_LABEL = -10


def config_values(size: str) -> dict:
  """Keywords of `Sam3Config`: the released sizes, or the tiny ones of this project's tests.

  Meta's trunk normalises with epsilon 1e-5; transformers' default is 1e-6, an error of its port.
  """
  if size == "full":
    return {"vision_config": {"backbone_config": {"model_type": "sam3_vit_model"} | EPSILON}}
  attending = {"hidden_size": 128, "num_attention_heads": 8, "intermediate_size": 256}
  trunk = EPSILON | {
    "model_type": "sam3_vit_model", "hidden_size": 64, "intermediate_size": 296,
    "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 168,
    "pretrain_image_size": 56, "window_size": 4, "global_attn_indexes": [1, 3],
  }  # fmt: skip
  return {
    "vision_config": {
      "backbone_config": trunk,
      "fpn_hidden_size": 128,
      "backbone_feature_sizes": [[48, 48], [24, 24], [12, 12]],
    },
    "text_config": {
      "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2,
      "num_attention_heads": 2, "max_position_embeddings": TEXT_CONTEXT, "projection_dim": 512,
      "hidden_act": "gelu", "vocab_size": 49408,
    },
    "geometry_encoder_config": attending | {"num_layers": 2},
    "detr_encoder_config": attending | {"num_layers": 2},
    "detr_decoder_config": attending | {"num_layers": 3, "num_queries": 10},
    "mask_decoder_config": {"hidden_size": 128, "num_attention_heads": 8},
  }  # fmt: skip


EPSILON = {"layer_norm_eps": 1e-5}


def make(size: str, folder: Path, photo: str) -> None:
  """Writes config.json and model.safetensors of a Sam3Model, tensor by tensor, and photo.png."""
  import skimage.data
  import torch
  from PIL import Image
  from transformers import Sam3Config, Sam3Model

  folder.mkdir(parents=True, exist_ok=True)
  config = Sam3Config(**config_values(size))
  with torch.device("meta"):
    model = Sam3Model(config)
  config.architectures = ["Sam3Model"]
  config.save_pretrained(folder)
  shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
  _write_safetensors(folder / "model.safetensors", shapes)
  Image.fromarray(getattr(skimage.data, photo)()).save(folder / "photo.png")
  count = sum(int(np.prod(shape)) for shape in shapes.values())
  print(f"{count:,} parameters in {len(shapes):,} tensors")


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
  """One tensor in memory at a time, which safetensors' own writer cannot do."""
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for name, shape in shapes.items():
    start, end = end, end + 4 * int(np.prod(shape))
    header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name, shape in shapes.items():
      file.write(np.ascontiguousarray(weights(_recipe_name(name), shape), np.float32))


def _recipe_name(name: str) -> str:
  for pattern, words in WORDS:
    name = re.sub(pattern, words, name)
  return name


def run(folder: Path, questions: Path, out: Path, dtype: str) -> None:
  """Answers `questions` (what `parity.py` wrote) about the photo; writes arrays."""
  import torch
  import torchvision
  import transformers
  from PIL import Image

  model = transformers.Sam3Model.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
  side = model.config.vision_config.backbone_config.image_size
  photo = Image.open(folder / "photo.png").convert("RGB")
  processor = transformers.Sam3ImageProcessor(size={"height": side, "width": side})
  arrays = {}
  with torch.inference_mode():
    pixels = processor(images=photo, return_tensors="pt").pixel_values
    embedding = model.get_vision_features(pixels.to(model.dtype))
    for kind, question in json.loads(questions.read_text()).items():
      answer = model(vision_embeds=embedding, **_inputs(question, torch, model.dtype))
      masks = answer.pred_masks[0].float()
      source = torch.cat(  # Meta's rule: logits to the picture's size, then > 0; in pieces
        [
          torch.nn.functional.interpolate(
            part[:, None], size=photo.size[::-1], mode="bilinear", align_corners=False
          )[:, 0]
          > 0
          for part in masks.split(20)
        ]
      )
      arrays |= {
        f"{kind}/logits": answer.pred_logits[0].float().numpy(),
        f"{kind}/presence": answer.presence_logits[0].float().numpy().reshape(()),
        f"{kind}/boxes": answer.pred_boxes[0].float().numpy(),
        f"{kind}/mask_logits": masks.numpy(),
        f"{kind}/semantic_logits": answer.semantic_seg[0, 0].float().numpy(),
        f"{kind}/masks": np.packbits(source.flatten(1).numpy(), axis=1),
      }
  versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers)}
  np.savez(out, versions=json.dumps(versions), **arrays)


def _inputs(question: dict, torch, dtype) -> dict:
  """A text-only prompt gets one box of padding: without it transformers leaves out the geometry
  encoder and with it the class token that Meta's code always appends."""
  ids = torch.tensor([question["ids"]])
  boxes = question["boxes"] or [[0.5, 0.5, 0.5, 0.5]]
  return {
    "input_ids": ids,
    "attention_mask": (ids != 0).long(),
    "input_boxes": torch.tensor([boxes], dtype=dtype),
    "input_boxes_labels": torch.tensor([question["labels"] or [PADDING_LABEL]]),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  steps = parser.add_subparsers(dest="step", required=True)
  step = steps.add_parser("make")
  step.add_argument("--size", choices=("tiny", "full"), required=True)
  step.add_argument("--photo", required=True)
  step.add_argument("folder", type=Path)
  step = steps.add_parser("run")
  step.add_argument("folder", type=Path)
  step.add_argument("questions", type=Path)
  step.add_argument("out", type=Path)
  step.add_argument("--dtype", required=True)
  arguments = vars(parser.parse_args())
  {"make": make, "run": run}[arguments.pop("step")](**arguments)


if __name__ == "__main__":
  main()
