"""An endless video in which objects come and go: memory and programs stay bounded, and no id is
given twice. Detections and masks follow a script."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from small_video import SMALL, moving_frames, small_model

from sam3_jax import Rules
from sam3_jax.inference.video.concept_detector import ConceptDetector
from sam3_jax.inference.video.concept_objects import FrameDetections
from sam3_jax.inference.video.concept_tracker import ConceptTracker
from sam3_jax.inference.video.tracker import Tracker

LIFE, EVERY = 60, 17  # frames for which an object is there, and between two new ones
SIDE = SMALL.mask_size
RULES = Rules(max_lost_frames=20)


def mask(number, frame):
  """The mask of an object on a frame: a square that moves, or nothing."""
  logits = np.full((SIDE, SIDE), -4, np.float32)
  age = frame - EVERY * number
  if 0 <= age < LIFE:
    x, y = (5 * number + age // 8) % (SIDE - 5), (3 * number) % (SIDE - 5)
    logits[y : y + 5, x : x + 5] = 4
  return logits


def present(frame):
  return [n for n in range(max(0, (frame - LIFE) // EVERY), frame // EVERY + 1)
          if 0 <= frame - EVERY * n < LIFE]  # fmt: skip


class Script:
  """Replaces detections and tracked masks of a session."""

  def __init__(self, monkeypatch):
    self.owners, self.position, self.numbers = {}, 0, []
    record, decide, step = Tracker.record, ConceptTracker._decide, ConceptTracker.step

    def follow(tracker, frame, position, *rest):
      self.position = position
      return step(tracker, frame, position, *rest)

    def kept(tracker, prompts, detected):
      self.numbers = present(self.position)
      masks = np.array([mask(n, self.position) for n in self.numbers], np.float32)
      boxes, scores = np.zeros((len(masks), 4), np.float32), np.full(len(masks), 0.9, np.float32)
      return [FrameDetections(scores, boxes, masks.reshape(-1, SIDE, SIDE)).kept(RULES)]

    def tracked(tracker, found, frame, groups, backward):
      results, pointers = record(tracker, found, frame, groups, backward)
      return {
        i: one._replace(mask_logits=mask(self.owners[i], frame)) for i, one in results.items()
      }, pointers

    def spy(tracker, concept, position, detections, *rest):
      decision = decide(tracker, concept, position, detections, *rest)
      for identity, row in decision.new.items():
        found = detections.mask_logits[row]
        drawn = [n for n in self.numbers if (mask(n, position) == found).all()]
        assert identity not in self.owners
        self.owners[identity] = drawn[0]
      return decision

    monkeypatch.setattr(ConceptTracker, "step", follow)
    monkeypatch.setattr(ConceptDetector, "kept", kept)
    monkeypatch.setattr(Tracker, "record", tracked)
    monkeypatch.setattr(ConceptTracker, "_decide", spy)


def resident():
  return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(monkeypatch, frames, early):
  """Tracks, and returns the growth of resident memory, programs, and ids of each object."""
  script = Script(monkeypatch)
  model = small_model(config=SMALL)
  images = moving_frames(16)
  shown, known, memory, programs = {}, {}, {}, {}
  with model.video(images, history=False, rules=RULES) as session:
    session.close()
  source = (images[t % 16] for t in range(frames))
  session = model.video(source, history=False, rules=dataclasses.replace(RULES))
  for frame in session.stream({None: ["a square"]}):
    for identity in frame.instances.ids.tolist():
      shown.setdefault(script.owners[identity], set()).add(identity)
      known.setdefault(identity, frame.index)
    if frame.index in (early, frames - 1):
      memory[frame.index] = resident()
      programs[frame.index] = model.video_programs.compilations
  state = session.tracker.state
  assert len(state.slots) <= 12
  assert len(state.store) <= 12 * 5
  assert all(len(table) <= 40 for group in state.groups
             for table in (group.previous, group.conditioning, group.backward))  # fmt: skip
  return memory[frames - 1] / memory[early] - 1, programs, shown


@pytest.mark.slow
def test_memory_and_programs_are_bounded_and_ids_are_never_given_again(monkeypatch):
  frames, early = 1500, 500
  growth, programs, shown = run(monkeypatch, frames, early)
  assert growth < 0.02
  assert programs[early] == programs[frames - 1]
  assert all(len(ids) == 1 for ids in shown.values())
  assert len(shown) >= frames // EVERY - 1


@pytest.mark.slow
def test_lost_objects_give_way_to_those_of_another_phrase(monkeypatch):
  """There is room for one object; that of the second phrase comes when the first one is lost."""
  record = Tracker.record
  square = np.full((1, SIDE, SIDE), -4, np.float32)
  square[0, 2:7, 2:7] = 4
  visible = [FrameDetections(np.array([0.9], np.float32), np.zeros((1, 4), np.float32), square)]
  nothing = [visible[0].select(np.zeros(1, bool))]
  position = iter(range(12))

  def kept(tracker, prompts, detected):
    frame = next(position)
    return (visible if frame < 3 else nothing) + (visible if frame >= 6 else nothing)

  def tracked(tracker, found, frame, groups, backward):
    results, pointers = record(tracker, found, frame, groups, backward)
    mask = square[0] if frame < 3 or frame >= 8 else -abs(square[0])
    return {i: one._replace(mask_logits=mask) for i, one in results.items()}, pointers

  monkeypatch.setattr(Tracker, "record", tracked)
  rules = Rules(max_num_objects=1)
  with small_model().video(moving_frames(10), history=False, rules=rules) as session:
    monkeypatch.setattr(ConceptDetector, "kept", lambda *_: nothing)
    session.find("a square")
    session.find("a circle")
    monkeypatch.setattr(ConceptDetector, "kept", kept)
    shown = [frame.instances.ids.tolist() for frame in session.run(hold=0)]
    assert shown == [[1]] * 3 + [[]] * 4 + [[2]] * 3
    assert session.removed == {1}
    assert session.finder.owner(2).phrase == "a circle"
