"""The measured cases: a step and its number of images, prompts or masks."""

import dataclasses
from collections.abc import Collection


@dataclasses.dataclass(frozen=True)
class Step:
  """A step that can be measured.

  Attributes:
    label: description, with a slot for the count.
    counts: measured counts.
    growth: additional counts, to measure how time and memory grow.
  """

  label: str
  counts: tuple[int, ...]
  growth: tuple[int, ...] = ()


STEPS = {
  "preprocess": Step("preprocess {} image", (1,)),
  "encode": Step("encode {} image", (1,), (1, 2, 4, 8)),
  "encode_visual": Step("encode {} image, also for visual prompts", (1,)),
  "text": Step("encode {} phrase", (1,)),
  "decode": Step("decode {} prompt", (1, 8, 64), (1, 2, 4, 8, 16, 32, 64, 128)),
  "visual": Step("{} point, one prompt each", (1, 32, 1000)),
  "predict": Step("image and {} prompt to masks", (1,)),
  "postprocess": Step("{} mask to the image's size", (1, 10, 50, 200)),
}
GROWTH = "growth"  # the additional counts of all steps
START = "start"  # the whole command
CHOICES = (*STEPS, GROWTH, START)
DEFAULT = tuple(STEPS)


def chosen(only: Collection[str], most: int | None = None) -> list[tuple[str, int]]:
  """The steps and counts to measure, in order.

  Args:
    only: names in `CHOICES`. `GROWTH` adds its counts to every step that has them.
    most: largest count; None for no limit.
  """
  cases = []
  for name, step in STEPS.items():
    counts = {*step.counts} if name in only else set()
    counts |= {*step.growth} if GROWTH in only else set()
    cases += [(name, count) for count in sorted(counts) if most is None or count <= most]
  return cases


def label(case: str, count: int) -> str:
  """Describes a case, such as "decode 8 prompts"."""
  text = STEPS[case].label if case in STEPS else case
  if count > 1:
    for noun in ("image", "phrase", "prompt", "point", "mask"):
      text = text.replace(f"{{}} {noun}", f"{{}} {noun}s")
  return text.format(count)
