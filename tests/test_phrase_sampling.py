"""Sampling phrases for a scene."""

import itertools

import numpy as np
import pytest

from sam3_jax.datasets.synthetic.drawings import all_concepts, concepts, new_concepts
from sam3_jax.datasets.synthetic.phrase_sampling import _text, lookalikes, plural, sample_phrases

NAMES = [concept.name for concept in concepts()]
UNSEEN_PLURAL_EVERY = 6


def seeded(seed: int) -> np.random.Generator:
  return np.random.default_rng(seed)


def number(name: str) -> int:
  return NAMES.index(name)


def sample(*present: str, seed: int = 0, **options):
  return sample_phrases(seeded(seed), [number(name) for name in present], **options)


def without_article(seed: int, concept: int) -> str:
  """A random text of a concept, without article."""
  text = _text(np.random.default_rng([seed, concept]), concept, 0.0)
  return text.removeprefix("the ").removeprefix("an ").removeprefix("a ")


class TestConcepts:
  def test_every_phrase_names_one_concept(self):
    forms = [
      form
      for concept in all_concepts()
      for text in (*concept.phrases, *concept.synonyms, *concept.unseen)
      for form in {text, plural(text)}
    ]
    assert len(forms) == len(set(forms))

  def test_concepts_of_any_color_have_no_color_in_phrases(self):
    colors = {"red", "green", "blue", "yellow", "orange", "purple", "pink", "black", "brown"}
    for concept in concepts():
      words = " ".join((*concept.phrases, *concept.synonyms, *concept.unseen)).split()
      assert not concept.any_color or not colors & set(words), concept.name

  def test_no_phrase_has_left_or_right(self):
    """Otherwise scenes could not be mirrored."""
    for concept in concepts():
      words = " ".join((*concept.phrases, *concept.synonyms, *concept.unseen)).split()
      assert not {"left", "right"} & set(words)


class TestSamplePhrases:
  def test_one_phrase_per_concept_with_all_its_objects(self):
    found = sample("cat", "dog", "cat", "star", "cat")
    present = [phrase for phrase in found if phrase.objects]
    assert [phrase.concept for phrase in present] == [number(n) for n in ("cat", "dog", "star")]
    assert [phrase.objects for phrase in present] == [(0, 2, 4), (1,), (3,)]
    assert found[:3] == present

  @pytest.mark.parametrize("seed", range(20))
  def test_as_many_absent_phrases_as_present_ones(self, seed):
    rng = np.random.default_rng(seed)
    present = [int(one) for one in rng.choice(78, rng.integers(1, 13), replace=False)]
    found = sample_phrases(rng, present)
    absent = [phrase for phrase in found if phrase.concept is None]
    assert len(absent) == len(present) == len(found) - len(present)
    assert all(phrase.objects == () for phrase in absent)
    forbidden = {
      form
      for concept in present
      for text in (*concepts()[concept].phrases, *concepts()[concept].synonyms)
      for form in (text, plural(text))
    }
    bare = {text.removeprefix(a) for text, *_ in absent for a in ("a ", "an ", "the ")}
    assert not bare & forbidden
    assert len({phrase.text for phrase in found}) == len(found)

  @pytest.mark.parametrize(
    ("there", "twins"),
    [
      ("green-apple", {"red apple"}),
      ("blue-book", {"orange book", "green book"}),
      ("red-heart", {"blue heart", "green heart", "yellow heart", "purple heart"}),
      ("police-car", {"car", "ambulance", "bus", "fire engine"}),
      ("lion", {"tiger", "cat", "dog"}),
    ],
  )
  def test_similar_concepts_first(self, there, twins):
    for seed in range(20):
      _, first = sample(there, seed=seed, usual=1.0)
      assert first.text in twins

  def test_more_absent_phrases_are_similar_first(self):
    similar = {concepts()[one].phrases[0] for one in lookalikes(number("red-heart"))}
    for seed in range(10):
      found = sample("red-heart", seed=seed, usual=1.0, absent=6.0)[1:]
      assert len(found) == 6
      alike = [phrase.text in similar for phrase in found]
      assert alike == sorted(alike, reverse=True)
      assert 1 < sum(alike) < 6

  def test_present_similar_concepts_are_not_absent(self):
    hearts = ("red-heart", "blue-heart", "green-heart", "yellow-heart", "purple-heart")
    found = sample(*hearts, usual=1.0)
    assert not {"red heart", "blue heart"} & {phrase.text for phrase in found[5:]}
    assert len(found) == 10  # other concepts instead

  def test_all_concepts_leave_none_absent(self):
    assert all(phrase.concept is not None for phrase in sample(*NAMES))

  def test_first_phrase_is_the_most_frequent(self):
    first = [sample("doughnut", seed=seed)[0].text == "doughnut" for seed in range(300)]
    assert 0.68 < np.mean(first) < 0.85  # 0.7, and a part of the rest

  def test_same_generator_same_phrases(self):
    assert sample("cat", "bus", seed=5) == sample("cat", "bus", seed=5)
    assert sample("cat", "bus", seed=5) != sample("cat", "bus", seed=6)

  def test_articles(self):
    texts = {
      _text(np.random.default_rng([seed, concept]), concept, 0.0)
      for seed, concept in itertools.product(range(40), range(78))
    }
    assert {"an elephant", "a lion", "the lion"} <= texts
    assert not any(text.startswith(("a a", "a e", "a i", "a o", "an b", "an c")) for text in texts)
    assert "a pair of cherries" in texts
    assert not {"a cherries", "a grapes", "a tropical fish"} & texts


class TestNew:
  NUMBERS = range(78, 81)

  def test_new_concept_always_has_a_phrase(self):
    for new in self.NUMBERS:
      first, *_ = phrases = sample_phrases(seeded(0), [new, 3, new], new=new)
      assert (first.concept, first.objects, first.named) == (new, (0, 2), new)
      assert sum(one.named == new for one in phrases) == 1
      phrases = sample_phrases(seeded(0), [3], new=new)
      absent = [one for one in phrases if one.named == new]
      assert [(one.concept, one.objects) for one in absent] == [(None, ())]

  def test_other_phrases_are_unchanged(self):
    for seed in range(20):
      without, with_new = (
        [one.named for one in sample_phrases(seeded(seed), [3, 4], absent=2.0, new=new)]
        for new in (None, 79)
      )
      assert [one for one in with_new if one != 79] == without

  def test_other_scenes_have_no_phrase_for_new_concepts(self):
    words = {text for one in new_concepts() for text in (*one.phrases, *one.synonyms)}
    for seed in range(60):
      rng = np.random.default_rng(seed)
      found = sample_phrases(rng, rng.choice(78, 5).tolist(), absent=4.0, usual=0.0)
      assert all(one.named < 78 for one in found)
      assert not words & {one.text for one in found}

  def test_new_concepts_have_similar_known_concepts(self):
    for new in self.NUMBERS:
      assert lookalikes(new)
      assert max(lookalikes(new)) < 78
    assert all(max(lookalikes(one)) < 78 for one in range(78))


class TestUnseen:
  def test_training_never_uses_unseen_phrases(self):
    used = {without_article(seed, concept) for seed in range(60) for concept in range(78)}
    unseen = {text for concept in concepts() for text in concept.unseen}
    assert len(unseen) > 15
    assert not used & unseen
    withheld = {plural(one.phrases[0]) for one in concepts()[::UNSEEN_PLURAL_EVERY]} - {
      "grapes",
      "cherries",
    }
    shown = {plural(one.phrases[0]) for one in concepts()[1::UNSEEN_PLURAL_EVERY]}
    assert not used & withheld
    assert len(used & shown) > 8

  def test_only_unseen_phrases_are_used(self):
    trained = {text for one in concepts() for text in (*one.phrases, *one.synonyms)}
    for seed in range(20):
      present = np.random.default_rng(seed).choice(NAMES, 6, replace=False)
      for phrase in sample(*present, seed=seed, unseen=True):
        assert phrase.text not in trained

  def test_concepts_without_unseen_phrases_are_left_out(self):
    bare = next(
      one.name for n, one in enumerate(concepts()) if not one.unseen and n % UNSEEN_PLURAL_EVERY
    )
    assert all(phrase.concept is None for phrase in sample(bare, unseen=True))


class TestLookalikes:
  def test_every_concept_has_some(self):
    assert all(lookalikes(concept) for concept in range(78))

  def test_similarity_is_symmetric_and_irreflexive(self):
    for concept in range(78):
      assert concept not in lookalikes(concept)
      assert len(set(lookalikes(concept))) == len(lookalikes(concept))
      assert all(concept in lookalikes(other) for other in lookalikes(concept))


@pytest.mark.parametrize(
  ("one", "many"),
  [
    ("cat", "cats"),
    ("bus", "buses"),
    ("octopus", "octopuses"),
    ("torch", "torches"),
    ("gift box", "gift boxes"),
    ("butterfly", "butterflies"),
    ("key", "keys"),
    ("mouse", "mice"),
    ("tropical fish", "tropical fish"),
    ("slice of pizza", "slices of pizza"),
    ("bunch of grapes", "bunches of grapes"),
    ("pair of cherries", "pairs of cherries"),
    ("cherries", "cherries"),
  ],
)
def test_plural(one, many):
  assert plural(one) == many
