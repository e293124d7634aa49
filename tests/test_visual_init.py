"""Initial parameters of a new head for visual prompts."""

import jax
import numpy as np
import pytest
import training_model

from sam3_jax.training.visual_init import new_head, position_kernel
from sam3_jax.utils.param_tree import flatten, nest


def test_new_head_attends_to_equal_positions():
  """The dot product of queries and keys is largest at equal positions, over all attention heads."""
  frequencies = np.asarray(jax.random.normal(jax.random.key(0), (2, 64)))
  kernel = position_kernel(frequencies)
  assert kernel.shape == (128, 64)
  assert kernel.sum(0).tolist() == [1] * 64
  xy = np.stack(np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 24)), -1).reshape(-1, 2)
  angles = 2 * np.pi * xy @ frequencies
  projected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1) @ kernel
  fits = projected @ projected.T
  np.testing.assert_allclose(np.diag(fits), 32, rtol=1e-5)  # sin2 + cos2 of 32 frequencies
  assert (fits.argmax(1) == np.arange(len(xy))).all()
  # Each head has its share, from low frequencies to high ones.
  lengths = (frequencies**2).sum(0)
  used = [np.flatnonzero(kernel[:64, 8 * head : 8 * head + 8].any(1)) for head in range(8)]
  assert sorted(np.concatenate(used).tolist()) == sorted(np.argsort(lengths)[:32].tolist())


@pytest.mark.slow
def test_new_head_does_not_change_the_detector():
  parts = nest(training_model.parameters())
  head = new_head(training_model.CONFIG, parts, 0)
  np.testing.assert_array_equal(
    head["neck"]["level2"]["smooth"]["kernel"], parts["neck"]["level2"]["smooth"]["kernel"] / 4
  )
  for path, x in flatten(parts).items():
    np.testing.assert_array_equal(x, training_model.parameters()[path])
  assert {p: x.shape for p, x in flatten(head, "visual/").items()} == {
    p: x.shape for p, x in training_model.visual_parameters().items()
  }
