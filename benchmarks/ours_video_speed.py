"""The sam3-jax side of `video_speed.py`."""

import argparse
from pathlib import Path

import jax
import jaxlib
import numpy as np
from video_sides import Stopwatch, rules, serve, threshold

from sam3_jax import Rules, Sam3


def run(bundle: Path, frames: Path, phrase: str, dtype: str) -> None:
  """Tracks a phrase.

  Args:
    bundle: the converted checkpoint.
    frames: a file of NumPy, uint8 [T, h, w, 3].
    phrase: to be found on the first frame.
    dtype: of the computation.
  """
  model, images = Sam3.from_checkpoint(bundle, dtype=dtype), np.load(frames)
  found = model.decode(model.encode(images[0]), phrase)
  limit = threshold(np.asarray(found.scores[0], np.float32))
  watch = Stopwatch(jax.block_until_ready)
  session = model.video(images, rules=Rules(**rules(limit)), history=False)
  programs = session.tracker.programs
  watch.watch(programs, "encode_both", "encode")
  watch.watch(model, "decode", "detect")
  watch.watch(programs, "propagate", "track")
  for name in ("memorize_found", "remember"):
    watch.watch(programs, name, "memory")
  tracked = None

  def track() -> int:
    nonlocal tracked
    if tracked is None:
      session.find(phrase)
      tracked = session.run(hold=0)
    next(tracked)
    return len(session.objects)

  about = {
    "versions": {m.__name__: m.__version__ for m in (jax, jaxlib)},
    "tokens": model.tokenizer([phrase])[0].tolist(),
  }
  serve(watch, track, about)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__)
  for name in ("bundle", "frames"):
    parser.add_argument(name, type=Path)
  parser.add_argument("--phrase", required=True)
  parser.add_argument("--dtype", required=True)
  run(**vars(parser.parse_args()))


if __name__ == "__main__":
  main()
