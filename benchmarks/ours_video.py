"""The sam3-jax side of `parity_video.py`: tracks the objects of prompts through the frames."""

import argparse
import json
from pathlib import Path

import numpy as np


def run(bundle: Path, frames: Path, prompts: Path, out: Path) -> None:
  """Tracks in float32 and writes every stage of every frame.

  Args:
    bundle: the converted checkpoint.
    frames: a file of NumPy, uint8 [T, h, w, 3].
    prompts: JSON; for each object, its prompt on the first frame in pixels.
    out: npz; arrays FRAME/encoded and OBJECT/FRAME/STAGE, maps with channels last.
  """
  import flax
  import jax
  import jaxlib

  from sam3_jax import Sam3, VisualPrompt

  model = Sam3.from_checkpoint(bundle, dtype="float32")
  arrays = {}
  with model.video(np.load(frames)) as session:
    kinds = json.loads(prompts.read_text())
    objects = {kind: session.add(VisualPrompt(**prompt)) for kind, prompt in kinds.items()}
    for frame in session.run():
      arrays[f"{frame.index}/encoded"] = session.load_frame(frame.index).embedding.coarse[0]
      for kind, stages in _stages(session, objects, frame.index).items():
        arrays |= {f"{kind}/{frame.index}/{stage}": x for stage, x in stages.items()}
  versions = {m.__name__: m.__version__ for m in (jax, jaxlib, flax)}
  np.savez(out, versions=json.dumps(versions), **jax.device_get(arrays))


def _stages(session, objects: dict[str, int], frame: int) -> dict[str, dict]:
  """The stages of each object on the frame that was tracked last."""
  state, stages = session.tracker.state, {}
  for kind, identity in objects.items():
    group, stored = state.owners[identity], state.store.get((identity, frame))
    record = group.record(frame)
    stages[kind] = {
      "mask_logits": stored.mask_logits,
      "iou": record.iou[0],
      "object": record.object_logits[0],
      "pointer": stored.pointer,
      "memory": stored.memory.T,
    }
  if frame > 0:
    conditioned = _conditioned(session, frame)
    readings = {id(group): reading for group, reading in session.tracker.readings}
    for kind, identity in objects.items():
      reading = readings[id(state.owners[identity])]
      stages[kind] |= {
        "conditioned": conditioned[state.slots[identity]],
        "memories": [t for t, _ in reading.memories],
        "pointers": [t for t, _ in reading.pointers],
      }
  return stages


def _conditioned(session, frame: int):
  """The frame's map after memory attention, in the slot of each object. Computed again: the program
  that tracks does not return it. What it reads is still in the bank."""
  from sam3_jax.inference.video.tracker import PARTS

  model, tracker = session.model, session.tracker
  params = {name: model.params[name] for name in PARTS}
  embedding, reads = session.load_frame(frame).embedding, tracker.state.pack(tracker.readings)
  return model.video_programs.read(params, tracker.state.bank, embedding, reads)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("bundle", "frames", "prompts", "out"):
    parser.add_argument(name, type=Path)
  run(**vars(parser.parse_args()))


if __name__ == "__main__":
  main()
