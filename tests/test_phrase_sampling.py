"""What is asked of a scene."""

import itertools

import numpy as np
import pytest

from sam3_jax.datasets.synthetic.drawings import concepts, everything, new_concepts
from sam3_jax.datasets.synthetic.phrase_sampling import _text, ask, lookalikes, plural

NAMES = [concept.name for concept in concepts()]
EVERY = 6


def number(name: str) -> int:
  return NAMES.index(name)


def asked(*present: str, seed: int = 0, **options):
  return ask(np.random.default_rng(seed), [number(name) for name in present], **options)


def spoken(seed: int, concept: int) -> str:
  """Without its article."""
  text = _text(np.random.default_rng([seed, concept]), concept, 0.0)
  return text.removeprefix("the ").removeprefix("an ").removeprefix("a ")


class TestConcepts:
  def test_no_phrase_names_two_things(self):
    every = [
      form
      for concept in everything()
      for text in (*concept.phrases, *concept.synonyms, *concept.unseen)
      for form in {text, plural(text)}
    ]
    assert len(every) == len(set(every))

  def test_things_of_any_color_are_not_called_by_one(self):
    colors = {"red", "green", "blue", "yellow", "orange", "purple", "pink", "black", "brown"}
    for concept in concepts():
      words = " ".join((*concept.phrases, *concept.synonyms, *concept.unseen)).split()
      assert not concept.any_color or not colors & set(words), concept.name

  def test_no_phrase_tells_left_from_right(self):
    """Or scenes and their phrases could not be mirrored."""
    for concept in concepts():
      words = " ".join((*concept.phrases, *concept.synonyms, *concept.unseen)).split()
      assert not {"left", "right"} & set(words)


class TestAsk:
  def test_every_concept_once_with_all_its_objects(self):
    found = asked("cat", "dog", "cat", "star", "cat")
    present = [phrase for phrase in found if phrase.objects]
    assert [phrase.concept for phrase in present] == [number(n) for n in ("cat", "dog", "star")]
    assert [phrase.objects for phrase in present] == [(0, 2, 4), (1,), (3,)]
    assert found[:3] == present

  @pytest.mark.parametrize("seed", range(20))
  def test_as_many_absent_ones_and_none_of_them_there(self, seed):
    rng = np.random.default_rng(seed)
    present = [int(one) for one in rng.choice(78, rng.integers(1, 13), replace=False)]
    found = ask(rng, present)
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
  def test_look_alikes_first(self, there, twins):
    for seed in range(20):
      _, first = asked(there, seed=seed, usual=1.0)
      assert first.text in twins

  def test_further_absent_ones_are_of_both_kinds(self):
    kin = {concepts()[one].phrases[0] for one in lookalikes(number("red-heart"))}
    for seed in range(10):
      found = asked("red-heart", seed=seed, usual=1.0, absent=6.0)[1:]
      assert len(found) == 6
      alike = [phrase.text in kin for phrase in found]
      assert alike == sorted(alike, reverse=True)
      assert 1 < sum(alike) < 6

  def test_twins_that_are_there_are_not_absent(self):
    everything = ("red-heart", "blue-heart", "green-heart", "yellow-heart", "purple-heart")
    found = asked(*everything, usual=1.0)
    assert not {"red heart", "blue heart"} & {phrase.text for phrase in found[5:]}
    assert len(found) == 10  # other things instead

  def test_all_things_at_once_leave_nothing_absent(self):
    assert all(phrase.concept is not None for phrase in asked(*NAMES))

  def test_the_first_phrase_mostly(self):
    first = [asked("doughnut", seed=seed)[0].text == "doughnut" for seed in range(300)]
    assert 0.68 < np.mean(first) < 0.85  # 0.7, and some of the rest

  def test_same_generator_same_phrases(self):
    assert asked("cat", "bus", seed=5) == asked("cat", "bus", seed=5)
    assert asked("cat", "bus", seed=5) != asked("cat", "bus", seed=6)

  def test_articles_fit(self):
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

  def test_is_asked_for_in_any_case(self):
    for new in self.NUMBERS:
      there, *_ = asked_new = ask(np.random.default_rng(0), [new, 3, new], new=new)
      assert (there.concept, there.objects, there.named) == (new, (0, 2), new)
      assert sum(one.named == new for one in asked_new) == 1
      absent = [one for one in ask(np.random.default_rng(0), [3], new=new) if one.named == new]
      assert [(one.concept, one.objects) for one in absent] == [(None, ())]

  def test_the_others_are_asked_for_as_ever(self):
    for seed in range(20):
      names = [one.named for one in ask(np.random.default_rng(seed), [3, 4], absent=2.0)]
      more = [one.named for one in ask(np.random.default_rng(seed), [3, 4], absent=2.0, new=79)]
      assert [one for one in more if one != 79] == names

  def test_no_other_scene_asks_for_it(self):
    words = {text for one in new_concepts() for text in (*one.phrases, *one.synonyms)}
    for seed in range(60):
      rng = np.random.default_rng(seed)
      found = ask(rng, rng.choice(78, 5).tolist(), absent=4.0, usual=0.0)
      assert all(one.named < 78 for one in found)
      assert not words & {one.text for one in found}

  def test_is_taken_for_known_things(self):
    for new in self.NUMBERS:
      assert lookalikes(new)
      assert max(lookalikes(new)) < 78
    assert all(max(lookalikes(one)) < 78 for one in range(78))


class TestUnseen:
  def test_training_never_says_them(self):
    said = {spoken(seed, concept) for seed in range(60) for concept in range(78)}
    unseen = {text for concept in concepts() for text in concept.unseen}
    assert len(unseen) > 15
    assert not said & unseen
    withheld = {plural(one.phrases[0]) for one in concepts()[::EVERY]} - {"grapes", "cherries"}
    shown = {plural(one.phrases[0]) for one in concepts()[1::EVERY]}
    assert not said & withheld
    assert len(said & shown) > 8

  def test_asks_by_nothing_else(self):
    trained = {text for one in concepts() for text in (*one.phrases, *one.synonyms)}
    for seed in range(20):
      present = np.random.default_rng(seed).choice(NAMES, 6, replace=False)
      for phrase in asked(*present, seed=seed, unseen=True):
        assert phrase.text not in trained

  def test_leaves_out_what_has_none(self):
    bare = next(one.name for n, one in enumerate(concepts()) if not one.unseen and n % EVERY)
    assert all(phrase.concept is None for phrase in asked(bare, unseen=True))


class TestLookalikes:
  def test_everything_has_some(self):
    assert all(lookalikes(concept) for concept in range(78))

  def test_are_mutual_and_never_oneself(self):
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
