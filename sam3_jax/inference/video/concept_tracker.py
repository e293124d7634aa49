"""Phrases in video: each frame is detected, tracked and compared, as Meta's dense pipeline does it.

One frame takes these steps: detect every concept; track all objects to the frame; decide what the
detections mean for the objects (`concept_objects`); give reconditioned objects a new pointer; make
memories of the objects that were there before; add the new objects, and remove the wrong ones.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sam3_jax.inference.video.components import clean_mask
from sam3_jax.inference.video.concept_detector import TOGETHER, ConceptDetector, FrameEmbedding
from sam3_jax.inference.video.concept_objects import (
  EMPTY_LOGIT,
  Decision,
  FrameDetections,
  replace_lost,
)
from sam3_jax.inference.video.functions import TrackedObjects
from sam3_jax.inference.video.groups import FrameRecord, Group
from sam3_jax.inference.video.held_frames import HeldFrame
from sam3_jax.inference.video.prompts import (
  MASK_IOU,
  Answer,
  give_way,
  mask_answer,
  resize_mask,
)
from sam3_jax.inference.video.results import ShownObject
from sam3_jax.inference.video.tracked_concept import TrackedConcept
from sam3_jax.inference.video.tracker import ObjectResult, Pointers, Results, Tracker
from sam3_jax.inputs.prompts import ConceptPrompt, Prompt, as_concept_prompts, check_boxes
from sam3_jax.inputs.video_source import Frame
from sam3_jax.model.video.tracker import MASK_PROMPT_STRIDE
from sam3_jax.rules import Rules
from sam3_jax.types import VisualEmbedding

SAME_LOGIT = 1e-3  # masks whose logits differ by less are the same up to rounding


class ConceptTracker:
  """Runs concept prompts on the frames of a session.

  Attributes:
    model: a `Sam3`.
    tracker: of the session, for all its objects.
    size: height and width of the frames.
    detector: of its concepts.
    concepts: the prompts, in the order in which they were given.
  """

  def __init__(self, model: Any, tracker: Tracker, size: tuple[int, int]):
    self.model, self.tracker, self.size = model, tracker, size
    self.detector = ConceptDetector(model, tracker, size)
    self.concepts: list[TrackedConcept] = []

  @property
  def _rules(self) -> Rules:
    return self.tracker.state.rules

  def check(self, prompt: Any) -> ConceptPrompt:
    """A prompt of `find`, checked; raises ValueError or TypeError."""
    found = as_concept_prompts(prompt)
    if len(found) != 1:
      raise TypeError(f"find takes one phrase, Prompt or Concept; got {len(found)} of them.")
    [one] = found
    self.model.tokenizer.check([one.phrase])
    if isinstance(one, Prompt):
      check_boxes(one, *self.size)
    return one

  def owner(self, identity: int) -> TrackedConcept | None:
    """The concept that found an object; None for a clicked one."""
    return next((one for one in self.concepts if identity in one.objects.ids), None)

  def step(
    self,
    frame: Frame,
    position: int,
    embedding: FrameEmbedding,
    concepts: Sequence[TrackedConcept],
    clicked: Sequence[Group],
    backward: bool,
    next_id: int,
    ahead: Any = None,
  ) -> HeldFrame:
    """Detects and tracks all objects on a frame.

    Args:
      frame, position: the frame.
      embedding: of the frame.
      concepts: those that take part.
      clicked: groups of clicked objects that take part.
      backward: direction of the pass.
      next_id: the smallest id that was never given.
      ahead: a function that is called while the device computes, such as to encode the next frame.

    Returns:
      The objects of the frame; `new` and `removed` name those that come and go.
    """
    state = self.tracker.state
    owners = state.owners
    found = {identity for one in concepts for identity in one.objects.ids}
    groups = [*clicked, *{id(owners[i]): owners[i] for i in sorted(found)}.values()]
    started = self._propagate(position, embedding.visual, groups, found, backward)
    prompts = [one.prompt_on(position, backward, self._rules) for one in concepts]
    detected = self.detector.detect(embedding.concepts, prompts[:TOGETHER])
    if ahead is not None:
      ahead()
    results, pointers = self._tracked(position, groups, started, backward)
    kept = self.detector.kept(prompts[:TOGETHER], detected)
    for start in range(TOGETHER, len(prompts), TOGETHER):
      some = prompts[start : start + TOGETHER]
      kept += self.detector.kept(some, self.detector.detect(embedding.concepts, some))
    held = HeldFrame(frame.index, frame.time)
    memories: list[Results] = []
    added: list[tuple[TrackedConcept, FrameDetections, Decision]] = []
    for concept, prompt, detections in zip(concepts, prompts, kept, strict=True):
      clean = share_equal_masks({i: self._clean(results[i]) for i in concept.objects.ids})
      scores = dict(concept.objects.scores)
      decision = self._decide(
        concept, position, detections, clean, next_id, len(held.new), prompt is not None, backward
      )
      next_id += len(decision.new)
      held.new += decision.new
      self._change_masks(clean, detections, decision)
      self._recondition(position, embedding.visual, detections, decision, results, pointers)
      memories.append(clean)
      added.append((concept, detections, decision))
      held.objects += self._shown(concept, clean, scores, detections, decision)
    self._memorize(
      position, embedding.visual, groups, clicked, started, memories, results, pointers
    )
    self._add(position, embedding.visual, added)
    for group in clicked:
      held.objects += [ShownObject(i, self._clean(results[i])) for i in group.objects]
    if self._rules.replace_lost:
      replace_lost([one.objects for one in concepts], [decision for *_, decision in added])
    for *_, decision in added:
      for identity in (*decision.removed, *decision.gone):
        state.remove(identity)
      held.removed += decision.removed
      held.gone += decision.gone
      held.unconfirmed += decision.unconfirmed
    if not state.history:
      for group in groups:
        state.forget_conditioning(group, position, backward)
    return held

  def _propagate(
    self, position: int, embedding: VisualEmbedding, groups: Sequence[Group], found: set[int],
    backward: bool,
  ) -> TrackedObjects | None:  # fmt: skip
    """Starts to track groups to the frame, except those with a prompt on it; None for no group."""
    tracked = _unprompted(groups, position)
    self.tracker.readings = []
    if not tracked:
      return None
    return self.tracker.propagate(embedding, position, tracked, backward, found)

  def _tracked(
    self, position: int, groups: Sequence[Group], started: TrackedObjects | None, backward: bool
  ) -> tuple[Results, Pointers]:
    """What groups have on the frame, from tracking or from their prompts."""
    results, pointers = {}, {}
    if started is not None:
      tracked = _unprompted(groups, position)
      results, pointers = self.tracker.record(started, position, tracked, backward)
    for group in groups:
      if position in group.conditioning:
        group.pass_over(position, backward)
        given = self.tracker.conditioned(group, position)
        results |= given[0]
        pointers |= given[1]
    return results, pointers

  def _decide(
    self, concept: TrackedConcept, position: int, detections: FrameDetections, clean: Results,
    next_id: int, added: int, prompted: bool, backward: bool,
  ) -> Decision:  # fmt: skip
    """Decides for a concept; `added` is the number of objects that others got on this frame."""
    room = self._rules.max_num_objects - len(self.tracker.state.slots) - added
    side, ids = self.tracker.state.config.mask_size, concept.objects.ids
    masks = np.array([clean[i].mask_logits for i in ids], np.float32).reshape(-1, side, side)
    logits = np.array([clean[i].object_logit for i in ids], np.float32)
    return concept.objects.decide(
      position, detections, masks, logits, self._rules,
      first_id=next_id, room=room, reverse=backward, prompted=prompted,
    )  # fmt: skip

  def _clean(self, result: ObjectResult) -> ObjectResult:
    """Without small holes and islands."""
    return result._replace(mask_logits=clean_mask(result.mask_logits, self._rules.fill_hole_area))

  def _change_masks(self, clean: Results, detections: FrameDetections, decision: Decision) -> None:
    """Gives objects the masks of detections that are trusted, and empties those of hidden ones."""
    for identity, row in decision.refined.items():
      refined = clean[identity]._replace(mask_logits=detections.mask_logits[row])
      clean[identity] = self._clean(refined)
    for identity in decision.occluded:
      empty = np.full_like(clean[identity].mask_logits, EMPTY_LOGIT)
      clean[identity] = clean[identity]._replace(mask_logits=empty)

  def _recondition(
    self, position: int, embedding: VisualEmbedding, detections: FrameDetections,
    decision: Decision, results: Results, pointers: Pointers,
  ) -> None:  # fmt: skip
    """Makes the frame a conditioning frame of the groups of reconditioned objects, whose pointers
    become those of their detections. The memory stays that of the tracked mask, as with Meta."""
    state = self.tracker.state
    owners, side = state.owners, state.config.mask_size
    groups: dict[int, Group] = {}
    answers: dict[int, Answer] = {}
    for identity, row in decision.reconditions.items():
      group = owners[identity]
      answer = self._answer(embedding, detections.mask_logits[row])
      earlier = [answers[i] for i in group.objects if i in answers]
      if answer.shown is not None:
        give_way(earlier, answer.shown)
      answers[identity] = answer
      group.prompted[identity].add(position)
      groups[id(group)] = group
    for identity, answer in answers.items():
      mask = answer.mask_logits(side)
      results[identity] = ObjectResult(mask, answer.object_logit, answer.iou)
      pointers[identity] = answer.pointer
    for group in groups.values():
      found = [results[i] for i in group.objects]
      logits = np.array([one.object_logit for one in found], np.float32)
      group.condition(position, FrameRecord(logits, np.array([x.iou for x in found], np.float32)))

  def _answer(self, embedding: VisualEmbedding, mask_logits: np.ndarray) -> Answer:
    """The answer to a detected mask as a mask prompt."""
    side = MASK_PROMPT_STRIDE * self.tracker.state.config.mask_size
    mask = (resize_mask(mask_logits, (side, side)) > 0).astype(np.float32)
    pointer = self.tracker.mask_pointer(embedding, mask)
    return mask_answer(pointer, resize_mask(mask, self.size) > 0.5, bool(mask.any()))

  def _memorize(
    self, position: int, embedding: VisualEmbedding, groups: Sequence[Group],
    clicked: Sequence[Group], started: TrackedObjects | None, memories: Sequence[Results],
    results: Results, pointers: Pointers,
  ) -> None:  # fmt: skip
    """Makes memories of the objects that were there before the frame."""
    tracker = self.tracker
    free = _unprompted(clicked, position)
    if free and started is not None:
      tracker.memorize_tracked(embedding, position, started, free, results, pointers)
    found = [group for group in groups if not any(group is one for one in clicked)]
    if found:
      tracker.memorize_found(embedding, position, found, memories, results, pointers)

  def _add(
    self, position: int, embedding: VisualEmbedding,
    added: Sequence[tuple[TrackedConcept, FrameDetections, Decision]],
  ) -> None:  # fmt: skip
    """Adds the new objects of all concepts, those of a concept as a group."""
    state = self.tracker.state
    answers: dict[int, Answer] = {}
    for _, detections, decision in added:
      group, mine = Group(), []
      for identity, row in decision.new.items():
        state.add(identity, group)
        group.prompted[identity].add(position)
        answer = self._answer(embedding, detections.mask_logits[row])
        if answer.shown is not None:
          give_way(mine, answer.shown)
        mine.append(answer)
        answers[identity] = answer
    if answers:
      self.tracker.remember(embedding, position, answers)

  def _shown(
    self, concept: TrackedConcept, clean: Results, scores: dict[int, float],
    detections: FrameDetections, decision: Decision,
  ) -> list[ShownObject]:  # fmt: skip
    """What a frame shows of a concept's objects, new ones included; `scores` are of the others."""
    number, phrase = concept.number, concept.phrase
    found = [
      ShownObject(i, one, scores[i], phrase, number)
      for i, one in clean.items()
      if i not in decision.hidden
    ]
    for identity, row in decision.new.items():
      score = float(detections.scores[row])
      logit = float(np.log(score / (1 - score)))
      mask = clean_mask(detections.mask_logits[row], self._rules.fill_hole_area)
      result = ObjectResult(mask, logit, MASK_IOU)
      found.append(ShownObject(identity, result, score, phrase, number))
    return found


def _unprompted(groups: Sequence[Group], position: int) -> list[Group]:
  """The groups without a prompt on a frame."""
  return [group for group in groups if position not in group.conditioning]


def share_equal_masks(results: Results) -> Results:
  """Gives objects with the same mask exactly the same logits, those of the first one, so that not
  rounding decides which of them a cell belongs to."""
  ids, shared = list(results), dict(results)
  inside = [results[i].mask_logits > 0 for i in ids]
  areas = [int(mask.sum()) for mask in inside]
  for k, identity in enumerate(ids):
    for j, other in enumerate(ids[:k]):
      if not areas[k] or abs(areas[j] - areas[k]) > 0.01 * areas[k]:
        continue
      mine, first = results[identity], shared[other]
      if np.abs(mine.mask_logits - first.mask_logits).max() < SAME_LOGIT:
        shared[identity] = first._replace(iou=mine.iou)
        break
  return shared
