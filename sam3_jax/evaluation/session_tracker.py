"""A model as the tracker of `evaluate_tracking`: a new session for each call."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from sam3_jax.evaluation.tracking import Image, Mask, ObjectPrompt, ObjectPrompts, Tracker
from sam3_jax.inputs.visual_prompts import ComputedPrompt


def session_tracker(model: Any) -> Tracker:
  """Returns a function that tracks objects with a model.

  Clicks are given one after another, as a user does: each one after the first corrects the mask of
  the clicks before it.

  Args:
    model: a `Sam3` whose checkpoint has a tracker.
  """

  def track(
    frames: Sequence[Image], prompts: Mapping[int, ObjectPrompts]
  ) -> Iterator[dict[int, Mask]]:
    session = model.video(list(frames))
    for t in sorted(prompts):
      for identity, prompt in prompts[t].items():
        _add(session, t, identity, prompt)
    for frame in session.run():
      found = frame.instances
      yield {int(number): np.asarray(found.masks[k]) for k, number in enumerate(found.ids)}

  return track


def _add(session: Any, t: int, identity: int, prompt: ObjectPrompt) -> None:
  """Adds an object to a session."""
  if prompt.mask is not None:
    session.add(frame=t, mask=prompt.mask, identity=identity)
    return
  first = ComputedPrompt(prompt.points[:1] or None, prompt.labels[:1] or None, prompt.box)
  session.add(first, t, identity=identity)
  for count in range(2, len(prompt.points) + 1):
    session.correct(identity, t, points=prompt.points[:count], point_labels=prompt.labels[:count])
