"""The files that the packages read: a checkpoint in the layout of each, an image, and tokens."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from sam3_jax.checkpoint import bundle
from sam3_jax.config import SIZES, Config
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.param_tree import nest
from speed.cases import STEPS
from speed.inputs import phrases

CLONE = Path(__file__).parents[2]
# CLIP's vocabulary, which all SAM 3 models use, so that nothing is downloaded.
VOCABULARY = CLONE / "tests" / "goldens" / "tokenizer.model"
IMAGE_SIZE = 1500, 2000  # height, width


class Material:
  """The files of a benchmark.

  Attributes:
    bundle: directory of the checkpoint in our layout.
    name: the checkpoint's name in the report.
    config: its sizes.
    image: a PNG file.
    tokens: token ids, for as many phrases as the largest case needs.
  """

  def __init__(self, checkpoint: Path | None, size: str | None, source_image: Path, work: Path):
    """Writes the files that do not exist yet.

    Args:
      checkpoint: a directory, or None for seeded weights.
      size: a key of `config.SIZES`, for seeded weights.
      source_image: an image, which is resized to `IMAGE_SIZE`.
      work: directory to write to.
    """
    self.work = work
    if checkpoint is None:
      if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}; got {size!r}.")
      self.name = f"seeded weights of size {size}"
      self.bundle = work / size
      if not self.bundle.exists():
        bundle.save(
          self.bundle, seeded(SIZES[size]), SIZES[size], VOCABULARY.read_bytes(),
          info={"name": self.name, "trained": False},
        )  # fmt: skip
    else:
      self.name, self.bundle = checkpoint.name, checkpoint.absolute()
    self.config = bundle.inspect(self.bundle).config
    tokenizer = Tokenizer(self.bundle / "tokenizer.model", context=self.config.text.context)
    most = max(max(step.counts + step.growth) for step in STEPS.values())
    self.tokens = tokenizer(phrases(most)).tolist()
    self.image = work / "image.png"
    with Image.open(source_image) as image:
      image.convert("RGB").resize(IMAGE_SIZE[::-1]).save(self.image, compress_level=1)

  def check_peers(self) -> None:
    """Raises ValueError if no other package can run this model."""
    if self.config.trunk.stem:
      raise ValueError("no other package supports the checkpoint's convolutional stem; give --size")

  def in_layout(self, layout: str) -> Path:
    """Exports the checkpoint to another layout and returns its directory; raises ValueError or
    ImportError if that is not possible."""
    # setuptools maps the directory converters/ to this name, which pyright cannot know.
    from sam3_jax.converters.export import export  # pyright: ignore[reportMissingImports]

    directory = self.work / f"{self.bundle.name}-{layout}"
    if not directory.exists():
      export(self.bundle, directory, layout)
    return directory


def seeded(config: Config) -> dict:
  """Random parameters that keep activations of order one. Drawn with NumPy, as `init` would have to
  be compiled."""
  return nest(drawn(np.random.default_rng(0), bundle.expected_shapes(config, visual=True)))


def drawn(rng: np.random.Generator, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
  """Random arrays of these shapes, by path."""
  found = {}
  for path, shape in shapes.items():
    scale = 1 / np.sqrt(shape[-2]) if path.endswith("/kernel") else 0.1
    found[path] = np.float32(scale) * rng.standard_normal(shape, dtype=np.float32)
    if path.endswith("/scale"):
      found[path] += 1
  return found
