"""What is measured: a step of the work, and how many images, prompts or instances it takes."""

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Step:
  """Attributes:
  label: of the step with a count.
  counts: that are measured.
  growth: further counts, which show how time and memory grow.
  """

  label: str
  counts: tuple[int, ...]
  growth: tuple[int, ...] = ()


STEPS = {
  "preprocess": Step("preprocess {} image", (1,)),
  "encode": Step("encode {} image", (1,), (1, 2, 4, 8)),
  "encode_visual": Step("encode {} image, for points too", (1,)),
  "text": Step("encode {} phrase", (1,)),
  "decode": Step("decode {} prompt", (1, 8, 64), (1, 2, 4, 8, 16, 32, 64, 128)),
  "visual": Step("{} point, a prompt each", (1, 32, 1000)),
  "predict": Step("image and {} prompt to masks", (1,)),
  "postprocess": Step("{} mask to the image's size", (1, 10, 50, 200)),
}
GROWTH = "growth"  # the further counts of the steps that have some
START = "start"  # the command, from its start to its end
CHOICES = (*STEPS, GROWTH, START)
DEFAULT = tuple(STEPS)


def chosen(only: Collection[str], most: int | None = None) -> list[tuple[str, int]]:
  """Steps and counts, up to `most`, of these of `CHOICES`, in order. Growth adds to every step that
  grows; alone it is all that is measured of them."""
  cases = []
  for name, step in STEPS.items():
    counts = {*step.counts} if name in only else set()
    counts |= {*step.growth} if GROWTH in only else set()
    cases += [(name, count) for count in sorted(counts) if most is None or count <= most]
  return cases


def label(case: str, count: int) -> str:
  """Such as "decode 8 prompts"."""
  text = STEPS[case].label if case in STEPS else case
  if count > 1:
    for one in ("image", "phrase", "prompt", "point", "mask"):
      text = text.replace(f"{{}} {one}", f"{{}} {one}s")
  return text.format(count)
