"""Sessions step by step, and phrases that are forgotten."""

import dataclasses

import pytest
from small_video import SMALL, moving_frames, small_model

from sam3_jax import Rules, VisualPrompt

pytestmark = pytest.mark.slow  # its programs are compiled for other thresholds

FRAMES, HOLD = 8, 4
CLICK = VisualPrompt(points=[[20, 12]])


@pytest.fixture(scope="module")
def model():
  """Finds objects of any phrase."""
  rules = Rules(
    score_threshold_detection=0.0, new_det_thresh=0.0, hotstart_unmatch_thresh=100,
    hotstart_delay=HOLD,
  )  # fmt: skip
  video = dataclasses.replace(SMALL.video, rules=rules)
  return small_model(config=dataclasses.replace(SMALL, video=video))


def summary(frames):
  return [(frame.index, frame.instances.ids.tolist(), frame.phrases) for frame in frames]


def test_a_step_is_a_frame(model):
  with model.video(moving_frames(FRAMES)) as session:
    session.add(CLICK, 2)
    steps = list(session.steps("both"))
    assert [len(step) for step in steps] == [1] * len(steps)
    assert summary(one for step in steps for one in step) == summary(session.run("both"))


def test_frames_of_phrases_leave_late(model):
  with model.video(moving_frames(FRAMES)) as session:
    assert len(session.find("cat")) >= 1
    clicked = session.add(CLICK, 5)
    leaving, parts = [], []
    for frames in session.steps():
      leaving.append([frame.index for frame in frames])
      parts += [session.taking_part(frame.index, session.passes[0]) for frame in frames]
    first = [[]] * (HOLD - 1)
    rest = [[frame] for frame in range(FRAMES)]
    assert leaving == [*first, *rest]
    assert parts == [(set(), {"cat"})] * 5 + [({clicked}, {"cat"})] * 3


def test_a_forgotten_phrase_takes_its_objects_along(model):
  with model.video(moving_frames(FRAMES)) as session:
    session.find("cat")
    clicked = session.add(CLICK, 0)
    session.find("dog")
    assert session.phrases == ["cat", "dog"]
    ids = session.forget("cat")
    assert clicked not in ids
    assert len(ids) >= 1
    assert session.phrases == ["dog"]
    assert not set(ids) & set(session.objects)
    phrases = {phrase for frame in session.run() for phrase in frame.phrases}
    assert "cat" not in phrases
    with pytest.raises(ValueError, match=r"there is no phrase 'cat'; there are \['dog'\]"):
      session.forget("cat")
