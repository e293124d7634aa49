"""The transformers side of `parity_video.py`: tracks the objects of prompts through the frames.

Needs the extra `reference`, like `reference.py`. transformers' tracker is patched where it differs
from Meta's released code:

- The map that the memory encoder takes: Meta converts the logits to values in [-10, 10] and then
  resizes the values; transformers resizes the logits first.
- Frames are read by Meta's selection: the latest frames with a score above 0.01, and always the one
  before. The oldest of them gives no pointer, and the time of a pointer is its rank.

Memories stay in float32, as in sam3-jax; transformers and Meta's code round them to bfloat16.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sam3_jax.converters import hf_patches

MIN_SCORE = 0.01  # of frames to read
MASK_STRIDE = 16  # cells of the memory encoder's mask per cell of the map


def run(folder: Path, frames: Path, prompts: Path, out: Path) -> None:
  """Tracks in float32 and writes every stage of every frame; arguments as in `ours_video.py`."""
  import torch
  import torchvision
  import transformers

  model, loading = hf_patches.load_video_tracker(folder)
  if missing := sorted(loading["missing_keys"]):
    raise SystemExit(f"{folder} lacks {len(missing)} tensors of the tracker, such as {missing[0]}")
  images, kinds = np.load(frames), json.loads(prompts.read_text())
  side = model.image_size
  processor = transformers.Sam3ImageProcessor(size={"height": side, "width": side})
  pixels = processor(images=list(images), return_tensors="pt").pixel_values
  session = transformers.Sam3TrackerVideoInferenceSession(pixels, dtype=torch.float32)
  for number, prompt in enumerate(kinds.values()):
    _add(session, number, prompt, side / np.array(images.shape[2:0:-1]), torch)
  arrays, patched = {}, _MetaOrder(model)
  with torch.inference_mode():
    for frame in range(len(images)):
      model(session, frame_idx=frame)
      arrays[f"{frame}/encoded"] = session.cache.get_vision_features(frame)["vision_feats"][-1][
        :, 0
      ]
      for number, kind in enumerate(kinds):
        stages = _stages(session.output_dict_per_obj[number], frame) | patched.read[number, frame]
        arrays |= {f"{kind}/{frame}/{stage}": x for stage, x in stages.items()}
  versions = {m.__name__: m.__version__ for m in (torch, torchvision, transformers)}
  np.savez(out, versions=json.dumps(versions), **{k: np.asarray(x) for k, x in arrays.items()})


def _add(session, number: int, prompt: dict, scale: np.ndarray, torch) -> None:
  """Adds an object; `scale` is from pixels of the frame to pixels of the model's input."""
  points, labels = list(prompt.get("points", [])), list(prompt.get("point_labels", []))
  if "box" in prompt:
    points, labels = [prompt["box"][:2], prompt["box"][2:], *points], [2, 3, *labels]
  inputs = {
    "point_coords": torch.tensor((np.array(points) * scale)[None, None], dtype=torch.float32),
    "point_labels": torch.tensor([[labels]], dtype=torch.int32),
  }
  session.add_point_inputs(session.obj_id_to_idx(number), 0, inputs)
  session.obj_with_new_inputs.append(number)


def _stages(outputs: dict, frame: int) -> dict:
  found = (outputs["cond_frame_outputs"] | outputs["non_cond_frame_outputs"])[frame]
  stages = {
    "mask_logits": found["pred_masks"][0, 0],
    "iou": found["iou"],
    "object": found["object_score_logits"].reshape(()),
    "pointer": found["object_pointer"].reshape(-1),
    "memory": found["maskmem_features"][:, 0],
  }
  if frame > 0:
    stages["conditioned"] = found["conditioned"][0].permute(1, 2, 0)
  return stages


class _MetaOrder:
  """Replaces methods of a model, so that it computes what Meta's code does when it tracks forward.

  Attributes:
    read: for each object and frame, the frames whose memories and pointers are read.
  """

  def __init__(self, model):
    self.read: dict[tuple[int, int], dict[str, list[int]]] = {}
    self._model, self._decoded = model, {}
    self._decode, self._infer = model._single_frame_forward, model._run_single_frame_inference
    model._single_frame_forward = self._keep_decoded
    model._run_single_frame_inference = self._with_decoded
    model._gather_memory_frame_outputs = self._memories
    model._get_object_pointers = self._pointers
    model._encode_new_memory = self._encode_memory

  def _keep_decoded(self, **inputs):
    found = self._decode(**inputs)
    self._decoded = {"iou": found.iou_scores.max(), "conditioned": inputs["image_embeddings"][-1]}
    return found

  def _with_decoded(self, **inputs):
    self.read[inputs["obj_idx"], inputs["frame_idx"]] = {}
    return self._infer(**inputs) | self._decoded

  def _memories(self, session, number: int, frame: int, reverse: bool = False):
    """Pairs of the age of a memory, 0 for a prompted frame, and the outputs of its frame."""
    prompted, tracked = session.output_dict_per_obj[number].values()
    latest = self._selected(session, number, frame)[-(self._model.num_maskmem - 1) :]
    ages = [(len(latest) - i, t) for i, t in enumerate(latest) if t in tracked]
    self.read[number, frame]["memories"] = [*prompted, *(t for _, t in ages)]
    return [(0, outputs) for outputs in prompted.values()] + [(age, tracked[t]) for age, t in ages]

  def _pointers(self, session, number: int, frame: int, count: int, *_):
    """Times and pointers, and the number by which times are divided, plus 1."""
    prompted, tracked = session.output_dict_per_obj[number].values()
    selected, limit = self._selected(session, number, frame), self._limit(count)
    found = [(frame - t, t, outputs) for t, outputs in prompted.items()]
    ranks = range(1, min(limit, len(selected)))
    found += [(n, selected[-n], tracked[selected[-n]]) for n in ranks if selected[-n] in tracked]
    self.read[number, frame]["pointers"] = [t for _, t, _ in found]
    return [time for time, _, _ in found], [x["object_pointer"] for _, _, x in found], limit

  def _selected(self, session, number: int, frame: int) -> list[int]:
    """The previous frames to read, oldest first; the last one is the frame before, always."""
    tracked, selected = session.output_dict_per_obj[number]["non_cond_frame_outputs"], []
    for t in range(frame - 1, 0, -1):
      if t in tracked and len(selected) < self._limit(session.num_frames) - 1:
        logit = tracked[t]["object_score_logits"].reshape(())
        present = 2 * logit.sigmoid() - 1 if logit > 0 else 0
        if present * tracked[t]["iou"] > MIN_SCORE:
          selected.insert(0, t)
    return selected if frame - 1 in selected else [*selected, frame - 1]

  def _limit(self, frames: int) -> int:
    return min(frames, self._model.config.max_object_pointers_in_encoder)

  def _encode_memory(
    self, current_vision_feats, pred_masks_high_res, object_score_logits, is_mask_from_pts
  ):
    """The memories of a frame and their code of position, cells first."""
    from torch.nn import functional

    model, logits = self._model, pred_masks_high_res
    size = model.backbone_feature_sizes[-1]
    inside = (logits > 0).float() if is_mask_from_pts else logits.sigmoid()
    values = functional.interpolate(
      inside * model.config.sigmoid_scale_for_mem_enc + model.config.sigmoid_bias_for_mem_enc,
      size=[MASK_STRIDE * cells for cells in size], mode="bilinear", antialias=True,
    )  # fmt: skip
    image = current_vision_feats.permute(1, 2, 0).unflatten(2, tuple(size))
    memory, code = model.memory_encoder(image, values)
    absent = (object_score_logits <= 0).float().reshape(-1, 1, 1, 1)
    memory = memory + absent * model.occlusion_spatial_embedding_parameter[..., None, None]
    return memory.flatten(2).permute(2, 0, 1), code.flatten(2).permute(2, 0, 1)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("folder", "frames", "prompts", "out"):
    parser.add_argument(name, type=Path)
  run(**vars(parser.parse_args()))


if __name__ == "__main__":
  main()
