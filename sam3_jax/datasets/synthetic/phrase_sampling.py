"""Samples phrases for a scene: of its concepts and of absent ones, similar concepts first."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sam3_jax.datasets.synthetic.drawings import all_concepts, concepts

# Groups of concepts that are easily confused, the most similar first, by their names in
# concepts.tsv. A concept may be in several groups.
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
# Concepts that are easily confused with new concepts.
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
_UNSEEN_PLURAL_EVERY = 6  # training never uses the plural of every sixth concept


class Phrase(NamedTuple):
  """A phrase for a scene.

  Attributes:
    text: the phrase.
    concept: index of its concept; None if it is absent from the scene.
    objects: indices of the matching objects.
    named: index of the concept that it names, present or absent.
  """

  text: str
  concept: int | None
  objects: tuple[int, ...]
  named: int


def sample_phrases(
  rng: np.random.Generator,
  present: Sequence[int],
  *,
  absent: float = 1.0,
  usual: float = 0.7,
  unseen: bool = False,
  new: int | None = None,
) -> list[Phrase]:
  """Samples one phrase for each concept of a scene, and phrases of absent concepts.

  Args:
    rng: random generator.
    present: the concept of each object.
    absent: number of absent phrases per present phrase; at least 1 in total.
    usual: probability of the first phrase of a concept; otherwise a synonym, plural or article is
      used.
    unseen: use only synonyms and plurals that training never uses; concepts without any are left
      out.
    new: a new concept, which always gets a phrase.

  Returns:
    Phrases of present concepts, then of similar absent ones, then of others.
  """
  distinct = list(dict.fromkeys(present))
  others = _absent(rng, distinct, max(1, round(absent * len(distinct))))
  if new is not None and new not in distinct:
    others = [new, *others]
  phrases = []
  for concept in [*distinct, *others]:
    text = _unseen(rng, concept) if unseen else _text(rng, concept, usual)
    if text:
      objects = tuple(number for number, one in enumerate(present) if one == concept)
      phrases.append(Phrase(text, concept if objects else None, objects, concept))
  return phrases


@functools.cache
def lookalikes(concept: int) -> tuple[int, ...]:
  """Indices of the concepts that are easily confused with a concept, the most similar first."""
  names = [one.name for one in all_concepts()]
  groups = [line.split() for line in _LOOKALIKES.strip().splitlines()]
  alike = [name for group in groups if names[concept] in group for name in group]
  alike += _NEW_LOOKALIKES.get(names[concept], "").split()
  return tuple(names.index(name) for name in dict.fromkeys(alike) if name != names[concept])


def plural(text: str) -> str:
  """The plural of a phrase of concepts.tsv."""
  if text in _PLURAL_ALREADY:
    return text
  if text in _PLURALS:
    return _PLURALS[text]
  if text.endswith(("s", "x", "ch", "sh")):
    return f"{text}es"
  if text.endswith("y") and text[-2] not in "aeiou":
    return f"{text[:-1]}ies"
  return f"{text}s"


def _absent(rng: np.random.Generator, present: Sequence[int], count: int) -> list[int]:
  """Samples absent concepts: one similar to each present one, more similar ones, then any."""
  similar = [[one for one in lookalikes(concept) if one not in present] for concept in present]
  closest = [
    row[0] if rng.random() < 0.5 else row[rng.integers(len(row))] for row in similar if row
  ]
  further = rng.permutation([one for row in similar for one in row]).astype(int)
  rest = rng.permutation([n for n in range(len(concepts())) if n not in present])
  alike = [int(one) for one in dict.fromkeys([*closest, *further])]
  chosen = [*alike[: max(1, round(count * 2 / 3))], *(int(one) for one in rest)]
  return list(dict.fromkeys(chosen))[:count]


def _text(rng: np.random.Generator, concept: int, usual: float) -> str:
  known = all_concepts()[concept]
  if rng.random() < usual:
    return known.phrases[0]
  texts = (*known.phrases, *known.synonyms)
  text = texts[rng.integers(len(texts))]
  form = rng.integers(4)
  if form == 0 and concept % _UNSEEN_PLURAL_EVERY:
    return plural(text)
  if form == 1 and text not in _PLURAL_ALREADY:
    article = "the" if rng.random() < 0.5 else "an" if text[0] in "aeiou" else "a"
    return f"{article} {text}"
  return text


def _unseen(rng: np.random.Generator, concept: int) -> str | None:
  known = all_concepts()[concept]
  texts = list(known.unseen)
  if concept % _UNSEEN_PLURAL_EVERY == 0 and plural(known.phrases[0]) != known.phrases[0]:
    texts.append(plural(known.phrases[0]))
  return texts[rng.integers(len(texts))] if texts else None
