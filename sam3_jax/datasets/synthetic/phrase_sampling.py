"""What is asked of a scene: phrases of what is there, and of what is not, look-alikes first."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam3_jax.datasets.synthetic.drawings import concepts, everything

# Groups of things that are easily taken for each other, by the names of concepts.tsv; the closest
# first. A thing may be in several.
_LOOKALIKES = """
green-apple red-apple
blue-book orange-book green-book
red-heart blue-heart green-heart yellow-heart purple-heart
police-car automobile ambulance bus fire-engine
lion tiger cat dog
locomotive tractor fire-engine
airplane helicopter rocket
basketball soccer-ball balloon
lemon banana star
strawberry cherries red-apple lady-beetle
sunflower rose
cactus christmas-tree
mouse rabbit elephant
panda penguin
pig dog horse
frog turtle snake snail
spider octopus crab lady-beetle
butterfly honeybee lady-beetle
whale tropical-fish
hamburger hot-dog pizza
doughnut birthday-cake ice-cream
watermelon pizza strawberry
carrot pineapple banana
grapes cherries
key hammer guitar
bell balloon
wrapped-gift birthday-cake
monkey dog
mushroom umbrella-on-ground
sailboat bicycle
top-hat t-shirt camera
"""
# What the new things are taken for; scenes without them do not know of it.
_NEW_LOOKALIKES = {
  "avocado": "green-apple lemon watermelon green-heart",
  "crown": "birthday-cake top-hat bell star",
  "owl": "penguin monkey cat",
}
_PLURALS = {
  "slice of pizza": "slices of pizza",
  "piece of pizza": "pieces of pizza",
  "slice of watermelon": "slices of watermelon",
  "piece of watermelon": "pieces of watermelon",
  "bunch of grapes": "bunches of grapes",
  "cluster of grapes": "clusters of grapes",
  "pair of cherries": "pairs of cherries",
  "bowl of ice cream": "bowls of ice cream",
  "cake with candles": "cakes with candles",
  "sausage in a bun": "sausages in buns",
  "mouse": "mice",
}
_PLURAL_ALREADY = frozenset(
  ("cherries", "grapes", "red cherries", "two cherries", "tropical fish", "fish", "exotic fish")
)
_EVERY = 6  # of so many concepts one is never asked in the plural in training


class Phrase(NamedTuple):
  """A phrase, the number of its concept (None: nothing of it is there), which objects match, and
  the number of the concept that it names, there or not."""

  text: str
  concept: int | None
  objects: tuple[int, ...]
  named: int


def ask(
  rng: np.random.Generator,
  present: Sequence[int],
  *,
  absent: float = 1.0,
  usual: float = 0.7,
  unseen: bool = False,
  new: int | None = None,
) -> list[Phrase]:
  """One phrase for each concept that is there, and at least as many for others.

  Args:
    rng: is drawn from.
    present: the concept of each object.
    absent: phrases of what is not there for each one of what is; at least 1 in all.
    usual: how often a concept is called by its first phrase; else by a synonym, in the plural or
      with an article.
    unseen: call every concept by a synonym or a plural that training never uses; concepts that
      have neither are left out.
    new: a new concept, which is asked for in any case.

  Returns:
    Those of what is there, then look-alikes of it that are not, then others.
  """
  there = list(dict.fromkeys(present))
  others = _missing(rng, there, max(1, round(absent * len(there))))
  if new is not None and new not in there:
    others = [new, *others]
  asked = []
  for concept in [*there, *others]:
    text = _unseen(rng, concept) if unseen else _text(rng, concept, usual)
    if text:
      objects = tuple(number for number, one in enumerate(present) if one == concept)
      asked.append(Phrase(text, concept if objects else None, objects, concept))
  return asked


@functools.cache
def lookalikes(concept: int) -> tuple[int, ...]:
  """Numbers of the things that this one is easily taken for, the closest first."""
  names = [one.name for one in everything()]
  groups = [line.split() for line in _LOOKALIKES.strip().splitlines()]
  alike = [name for group in groups if names[concept] in group for name in group]
  alike += _NEW_LOOKALIKES.get(names[concept], "").split()
  return tuple(names.index(name) for name in dict.fromkeys(alike) if name != names[concept])


def plural(text: str) -> str:
  """Of a phrase of concepts.tsv."""
  if text in _PLURAL_ALREADY:
    return text
  if text in _PLURALS:
    return _PLURALS[text]
  if text.endswith(("s", "x", "ch", "sh")):
    return f"{text}es"
  if text.endswith("y") and text[-2] not in "aeiou":
    return f"{text[:-1]}ies"
  return f"{text}s"


def _missing(rng: np.random.Generator, there: Sequence[int], count: int) -> list[int]:
  """Concepts that are not there: a look-alike for each that is, more of them, then any."""
  kin = [[one for one in lookalikes(concept) if one not in there] for concept in there]
  closest = [row[0] if rng.random() < 0.5 else row[rng.integers(len(row))] for row in kin if row]
  further = rng.permutation([one for row in kin for one in row]).astype(int)
  rest = rng.permutation([n for n in range(len(concepts())) if n not in there])
  alike = [int(one) for one in dict.fromkeys([*closest, *further])]
  chosen = [*alike[: max(1, round(count * 2 / 3))], *(int(one) for one in rest)]
  return list(dict.fromkeys(chosen))[:count]


def _text(rng: np.random.Generator, concept: int, usual: float) -> str:
  known = everything()[concept]
  if rng.random() < usual:
    return known.phrases[0]
  every = (*known.phrases, *known.synonyms)
  text = every[rng.integers(len(every))]
  form = rng.integers(4)
  if form == 0 and concept % _EVERY:
    return plural(text)
  if form == 1 and text not in _PLURAL_ALREADY:
    article = "the" if rng.random() < 0.5 else "an" if text[0] in "aeiou" else "a"
    return f"{article} {text}"
  return text


def _unseen(rng: np.random.Generator, concept: int) -> str | None:
  known = everything()[concept]
  texts = list(known.unseen)
  if concept % _EVERY == 0 and plural(known.phrases[0]) != known.phrases[0]:
    texts.append(plural(known.phrases[0]))
  return texts[rng.integers(len(texts))] if texts else None
