"""The transformers side of `parity.py`: writes a seeded checkpoint and runs the prompts on it.

Needs the extra `reference` (torch, torchvision, transformers, scikit-image), which may be installed
in another virtual environment.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np
from sam3_jax.converters import hf_patches
from weights import weights

# Parts of names that determine a tensor's scale: in transformers' layout, and in the recipe's.
WORDS = (
  (r"^tracker_model\.(.*\.)?shared_(image_)?embedding\..*", "positional_encoding_gaussian_matrix"),
  (r"point_embed\.", "point_embeddings."),
  (r"upscale_conv", "output_upscaling"),
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


def config_values(size: str) -> dict:
  """Arguments of `Sam3Config`: the released sizes, or the tiny ones of this project's tests.

  The epsilon of Meta's trunk is 1e-5; transformers' default of 1e-6 is an error of its port.
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


EPSILON = {"layer_norm_eps": hf_patches.EPSILON}


def make(size: str, folder: Path, photo: str) -> None:
  """Writes config.json, model.safetensors and photo.png, in the layout of the released checkpoint,
  with detector and tracker."""
  import skimage.data
  import torch
  from PIL import Image
  from transformers import Sam3Config, Sam3Model, Sam3TrackerVideoModel, Sam3VideoConfig

  folder.mkdir(parents=True, exist_ok=True)
  config = Sam3Config(**config_values(size))
  whole = Sam3VideoConfig(detector_config=config.to_dict())
  whole.tracker_config = _video_config(config)
  whole.architectures = ["Sam3VideoModel"]
  whole.save_pretrained(folder)
  with torch.device("meta"):  # the tracker shares the detector's trunk and has its own neck
    detector = Sam3Model(config).state_dict()
    tracker = Sam3TrackerVideoModel(whole.tracker_config, remove_vision_encoder=True).state_dict()
  neck = "vision_encoder.neck."
  tensors = {f"detector_model.{name}": x for name, x in detector.items()}
  tensors |= {f"tracker_model.{name}": x for name, x in tracker.items()}
  tensors |= {
    f"tracker_neck.{name.removeprefix(neck)}": x
    for name, x in detector.items()
    if name.startswith(neck)
  }
  shapes = {name: tuple(x.shape) for name, x in tensors.items()}
  _write_safetensors(folder / "model.safetensors", shapes)
  Image.fromarray(getattr(skimage.data, photo)()).save(folder / "photo.png")
  count = sum(int(np.prod(shape)) for shape in shapes.values())
  print(f"{count:,} parameters in {len(shapes):,} tensors")


def _video_config(config):
  """The tracker's configuration for a detector of these sizes."""
  from transformers import Sam3TrackerVideoConfig

  vision, width = config.vision_config, config.vision_config.fpn_hidden_size
  return Sam3TrackerVideoConfig(
    **hf_patches.tracker_values(vision), image_size=vision.backbone_config.image_size,
    memory_attention_hidden_size=width,
    memory_encoder_hidden_size=width, mask_downsampler_embed_dim=width,
    memory_fuser_embed_dim=width, memory_fuser_intermediate_dim=4 * width,
    memory_attention_feed_forward_hidden_size=config.detr_encoder_config.intermediate_size,
  )  # fmt: skip


def _write_safetensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
  """Writes one tensor at a time, which safetensors' own writer cannot do."""
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


def run(folder: Path, inputs: Path, out: Path, dtype: str) -> None:
  """Runs the prompts in `inputs`, which ours.py wrote, on the photo; writes arrays."""
  import torch
  import torchvision
  import transformers
  from PIL import Image

  config = hf_patches.detector_config(folder)
  prompts, kind = json.loads(inputs.read_text()), getattr(torch, dtype)
  side = config.vision_config.backbone_config.image_size
  photo = Image.open(folder / "photo.png").convert("RGB")
  processor = transformers.Sam3ImageProcessor(size={"height": side, "width": side})
  pixels = processor(images=photo, return_tensors="pt").pixel_values.to(kind)
  arrays = {}
  with torch.inference_mode():
    model, _ = hf_patches.load_detector(folder, dtype)
    arrays |= _concepts(model, pixels, prompts["concepts"], photo.size[::-1], torch)
    del model
    if prompts["visual"]:
      model, _ = hf_patches.load_tracker(folder, dtype)
      arrays |= _visual(model, pixels, prompts["visual"], torch)
  versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers)}
  np.savez(out, versions=json.dumps(versions), **arrays)


def _concepts(model, pixels, inputs: dict, size: tuple[int, int], torch) -> dict:
  """Outputs of all queries for each prompt; `size` is the photo's height and width."""
  arrays, embedding = {}, model.get_vision_features(pixels)
  for kind, prompt in inputs.items():
    output = model(vision_embeds=embedding, **hf_patches.concept_inputs(model, **prompt))
    masks = output.pred_masks[0].float()
    source = torch.cat(  # as Meta: resize the logits to the image, then threshold; in chunks
      [
        torch.nn.functional.interpolate(
          part[:, None], size=size, mode="bilinear", align_corners=False
        )[:, 0]
        > 0
        for part in masks.split(20)
      ]
    )
    arrays |= {
      f"{kind}/logits": output.pred_logits[0].float().numpy(),
      f"{kind}/presence": output.presence_logits[0].float().numpy().reshape(()),
      f"{kind}/boxes": output.pred_boxes[0].float().numpy(),
      f"{kind}/mask_logits": masks.numpy(),
      f"{kind}/semantic_logits": output.semantic_seg[0, 0].float().numpy(),
      f"{kind}/masks": np.packbits(source.flatten(1).numpy(), axis=1),
    }
  return arrays


def _visual(model, pixels, inputs: dict, torch) -> dict:
  """All masks of each kind's prompts."""
  embedding = hf_patches.visual_embedding(model, pixels)
  arrays = {}
  for kind, prompt in inputs.items():
    given = {
      "input_points": torch.tensor([prompt["points"]]) if prompt["points"] else None,
      "input_labels": torch.tensor([prompt["labels"]]) if prompt["points"] else None,
      "input_boxes": torch.tensor([prompt["boxes"]]) if prompt["boxes"] else None,
    }
    if prompt["mask"] is not None:  # logits of an earlier output, clipped as in Meta's predictor
      earlier, row, output_index = prompt["mask"]
      mask = arrays[f"{earlier}/mask_logits"][row, output_index].clip(-32, 32)
      given["input_masks"] = torch.from_numpy(mask)[None, None].to(model.dtype)
    output = model(image_embeddings=embedding, multimask_output=prompt["multimask"], **given)
    arrays |= {
      f"{kind}/mask_logits": output.pred_masks[0].float().numpy(),
      f"{kind}/iou": output.iou_scores[0].float().numpy(),
      f"{kind}/object": output.object_score_logits[0, :, 0].float().numpy(),
    }
  return arrays


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  steps = parser.add_subparsers(dest="step", required=True)
  step = steps.add_parser("make")
  step.add_argument("--size", choices=("tiny", "full"), required=True)
  step.add_argument("--photo", required=True)
  step.add_argument("folder", type=Path)
  step = steps.add_parser("run")
  step.add_argument("folder", type=Path)
  step.add_argument("inputs", type=Path)
  step.add_argument("out", type=Path)
  step.add_argument("--dtype", required=True)
  arguments = vars(parser.parse_args())
  {"make": make, "run": run}[arguments.pop("step")](**arguments)


if __name__ == "__main__":
  main()
