"""The transformers side of `video_speed.py`: `Sam3VideoModel` without patches. Needs the
extra `reference`."""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from video_sides import Stopwatch, rules, serve, threshold


def run(folder: Path, frames: Path, phrase: str, tokens: list[int], dtype: str) -> None:
  """Tracks a phrase; arguments as in `ours_video_speed.py`, and the ids of the phrase's tokens."""
  torch.set_grad_enabled(False)
  transformers.logging.set_verbosity_error()
  kind, images = getattr(torch, dtype), np.load(frames)
  config = transformers.AutoConfig.from_pretrained(folder)
  config.low_res_mask_size = 4 * config.detector_config.vision_config.backbone_feature_sizes[-1][0]
  loaded = transformers.Sam3VideoModel.from_pretrained(
    folder, config=config, dtype=kind, output_loading_info=True
  )
  model, missing = loaded[0].eval(), loaded[1]["missing_keys"]
  if missing:
    raise SystemExit(f"{folder} lacks {len(missing)} tensors, such as {sorted(missing)[0]}")
  side = model.tracker_model.image_size
  processor = transformers.Sam3ImageProcessor(size={"height": side, "width": side})
  session = transformers.models.sam3_video.modeling_sam3_video.Sam3VideoInferenceSession(
    video=None, video_height=images.shape[1], video_width=images.shape[2], dtype=kind
  )
  session.processed_frames = dict.fromkeys(range(len(images)))  # read one by one
  prompt = session.add_prompt(phrase)
  ids = torch.tensor([tokens])
  session.prompt_input_ids[prompt] = ids
  session.prompt_attention_masks[prompt] = (ids != 0).long()
  watch = Stopwatch()
  watch.watch(model.detector_model, "get_vision_features", "encode")
  watch.watch(model, "get_vision_features_for_tracker", "encode")
  watch.watch(model, "run_detection", "detect")
  watch.watch(model, "run_tracker_propagation", "track")
  watch.watch(model, "run_memory_encoder", "memory")
  frame = -1

  def track() -> int:
    nonlocal frame
    frame += 1
    pixels = processor(images=[images[frame]], return_tensors="pt").pixel_values[0]
    session.processed_frames[frame] = pixels.to(kind)
    if frame == 0:
      _use_rules(model, session, torch)
    return len(model(inference_session=session, frame_idx=frame).object_ids)

  versions = {m.__name__: m.__version__ for m in (torch, transformers)}
  serve(watch, track, {"versions": versions})


def _use_rules(model, session, torch) -> None:
  """Sets the thresholds by the detections on the first frame."""
  model.det_nms_thresh, model.score_threshold_detection = 0.0, 0.0
  pixels = session.get_frame(0).unsqueeze(0)
  with torch.inference_mode():
    found = model.run_detection(session, model.detector_model.get_vision_features(pixels))
  [scores] = (one["scores"].float().tolist() for one in found.values())
  for name, value in rules(threshold(scores)).items():
    setattr(model, name, value)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("folder", "frames"):
    parser.add_argument(name, type=Path)
  parser.add_argument("--phrase", required=True)
  parser.add_argument("--tokens", type=json.loads, required=True)
  parser.add_argument("--dtype", required=True)
  run(**vars(parser.parse_args()))


if __name__ == "__main__":
  main()
