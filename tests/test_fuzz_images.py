"""Reads a few mutated images; `benchmarks/fuzz_images.py` reads hundreds."""

import fuzz_images
import image_mutants
import pytest


def test_mutants_are_deterministic():
  first, again = (list(image_mutants.mutants(40, seed=3, bombs=False)) for _ in range(2))
  assert first == again
  assert list(image_mutants.mutants(40, seed=4, bombs=False)) != first


@pytest.mark.slow
def test_mutants_are_read_or_rejected():
  faults, figures = fuzz_images.run(60, seed=1, bombs=False)
  assert faults == []
  assert figures["read"] + figures["refused"] == 60
  assert figures["read"] > 5


@pytest.mark.parametrize(
  ("results", "fault"),
  [
    ({"header": "size 2 3", "path": "size 2 3", "bytes": "size 2 3"}, ""),
    ({"header": "size 2 3", "path": "a is damaged", "bytes": "b is damaged"}, ""),
    ({"header": "size 3 2", "path": "size 2 3"}, "the header's reader disagrees"),
    ({"header": "a is none", "path": "size 2 3"}, "the header's reader disagrees"),
    ({"header": "size 2 3", "path": "size 2 3", "bytes": "b is damaged"}, "readers disagree"),
    ({"header": "x", "path": "FAULT KeyError: 3"}, "FAULT"),
    ({"header": "x", "path": "two\nlines"}, "no one-line message"),
  ],
)
def test_unexpected_errors_are_reported(results, fault):
  found = fuzz_images.faults_of(results)
  assert bool(found) == bool(fault)
  assert fault in " ".join(found)
