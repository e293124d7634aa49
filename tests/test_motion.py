"""The paths of objects in moving scenes."""

import numpy as np
import pytest

from sam3_jax.datasets.synthetic import motion


class TestMotion:
  @pytest.mark.parametrize("kind", motion.KINDS)
  @pytest.mark.parametrize("frames", [2, 24, 500])
  def test_paths_are_finite_and_have_all_frames(self, kind, frames, monkeypatch):
    monkeypatch.setattr(motion, "KINDS", {kind: motion.KINDS[kind]})
    if kind == "leaving" and frames < motion.SHORTEST:
      return
    for seed in range(20):
      rng = np.random.default_rng(seed)
      one = motion.sample_motion(rng, (100, 160), frames, 30.0)
      assert one.xy.shape == (frames, 2)
      assert np.isfinite(one.xy).all()
      assert one.side.shape == one.angle.shape == (frames,)
      assert 20 < one.side.min() <= one.side.max() < 43
      inside = ((one.xy > -10) & (one.xy < (170, 110))).all(axis=1).mean()
      # Scenes reject paths that are outside for too long; see `test_leaving_objects_return`.
      assert 0 < inside < 1 if kind == "leaving" else inside > 0.6

  def test_straight_paths_pass_a_meeting(self, monkeypatch):
    monkeypatch.setattr(motion, "KINDS", {"straight": motion.KINDS["straight"]})
    for seed in range(20):
      meeting = motion.Meeting(70.0, 50.0, 12)
      one = motion.sample_motion(np.random.default_rng(seed), (100, 160), 24, 20.0, meeting)
      assert np.hypot(*(one.xy[9:16] - (70, 50)).T).min() < 12

  def test_values_are_rounded(self):
    """So that the last bits of sines of another machine do not matter."""
    one = motion.sample_motion(np.random.default_rng(2), (100, 160), 24, 20.0)
    for values, digits in ((one.xy, 3), (one.side, 3), (one.angle, 4)):
      assert np.array_equal(values, np.round(values, digits))
