"""Writes the sample video of the README: `python benchmarks/moving_scene.py --out docs`.

    docs/moving_scene.mp4        48 frames of a moving scene, as H.264
    docs/moving_scene.json       the masks of its objects, in YouTube-VIS's format
    docs/moving_scene.sam3.gif   what sam3-tiny finds and tracks from a phrase

Needs PyAV (`pip install "sam3-jax[video]"`). The masks are those of the scene,
and the video is a lossy copy of it.
"""

import argparse
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from sam3_jax.cli import main as command
from sam3_jax.datasets.synthetic import drawings
from sam3_jax.datasets.synthetic.moving_scene_files import Record
from sam3_jax.datasets.synthetic.moving_scenes import MovingScene, compose
from sam3_jax.datasets.synthetic.scene_files import info
from sam3_jax.outputs.rle import encode
from sam3_jax.utils.atomic_files import write_json

SEED, FRAMES, SIZE, RATE = 131, 48, (240, 320), 12
NAME, PHRASE = "moving_scene", "red apple"
CRF = 23  # constant rate factor of x264: lower is better and larger
EVERY, COLORS = 2, 24  # frames and colors of the animation


def scene(seed: int = SEED) -> MovingScene:
  """The sample: three objects, drawn by an artist that sam3-tiny was trained on."""
  rng = np.random.default_rng([20, seed])
  return compose(rng, drawings.TRAINING, SIZE, FRAMES, objects=3)


def write_video(path: Path, made: MovingScene) -> None:
  """Encodes the frames as H.264."""
  import av

  height, width = made.size
  with av.open(str(path), "w") as container:
    options = {"crf": str(CRF), "preset": "slow"}
    stream = container.add_stream("libx264", rate=Fraction(RATE), options=options)
    stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
    for frame in made:
      container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.image, format="rgb24")))
    container.mux(stream.encode())


def write_masks(path: Path, made: MovingScene, seed: int) -> None:
  """Writes the masks, as `sam3-jax scenes --video` does."""
  record = Record(info(f"the sample moving scene, seed {seed}, style {made.style}"))
  frames = list(made)
  masks = [[encode(frame.mask(k)) for k in range(len(made.concepts))] for frame in frames]
  phrases = made.phrases(np.random.default_rng(seed), usual=1.0)
  record.add(NAME, made, phrases, masks, any(frame.occluded for frame in frames))
  write_json(path, record.content)


def write_animation(path: Path, video: Path, phrase: str) -> None:
  """Tracks the objects of a phrase with sam3-tiny, and writes the overlay video as a GIF."""
  import av

  with tempfile.TemporaryDirectory() as out:
    if status := command.main(["track", str(video), "--text", phrase, "--out", out, "--quiet"]):
      raise SystemExit(status)
    with av.open(str(next(Path(out).glob("*.sam3.mp4")))) as container:
      frames = [frame.to_image() for frame in container.decode(video=0)]
  frames = frames[::EVERY]
  some = np.concatenate([np.asarray(frame) for frame in frames[::4]])
  palette = Image.fromarray(some).quantize(COLORS)
  frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
  frames[0].save(
    path, save_all=True, append_images=frames[1:], duration=1000 * EVERY // RATE, loop=0
  )


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--out", type=Path, default=Path("docs"), metavar="DIR")
  parser.add_argument("--seed", type=int, default=SEED)
  parser.add_argument("--text", default=PHRASE, help="the phrase to track")
  given = parser.parse_args()
  made = scene(given.seed)
  given.out.mkdir(parents=True, exist_ok=True)
  write_video(given.out / f"{NAME}.mp4", made)
  write_masks(given.out / f"{NAME}.json", made, given.seed)
  video, animation = given.out / f"{NAME}.mp4", given.out / f"{NAME}.sam3.gif"
  write_animation(animation, video, given.text)
  for path in (video, animation):
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
  main()
