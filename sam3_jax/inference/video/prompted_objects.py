"""The objects of a session: prompts, corrections, removal, and what is known of a frame."""

from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from sam3_jax.inference.video.clip import Clip
from sam3_jax.inference.video.components import clean_mask
from sam3_jax.inference.video.concept_detector import FrameEmbedding
from sam3_jax.inference.video.concept_tracker import ConceptTracker
from sam3_jax.inference.video.frame_pixels import RESAMPLES, model_pixels
from sam3_jax.inference.video.groups import Group
from sam3_jax.inference.video.held_frames import HeldFrame, HeldFrames
from sam3_jax.inference.video.prompts import Answer, give_way
from sam3_jax.inference.video.results import ShownObject, shown_frame
from sam3_jax.inference.video.tracked_concept import TrackedConcept
from sam3_jax.inference.video.tracker import ObjectResult, Results, Tracker
from sam3_jax.inference.video.tracker_state import TrackerState
from sam3_jax.inputs.frame_range import Position
from sam3_jax.inputs.prompts import ConceptPrompt
from sam3_jax.inputs.tokenizer import check_distinct
from sam3_jax.inputs.video_source import Frame
from sam3_jax.inputs.visual_prompts import VisualPrompt, check_visual
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.types import ImageEmbedding, VisualEmbedding
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import as_array, check_flag, is_whole

EMBEDDINGS = 4  # encoded frames that are kept, for prompts on the same frames


class LoadedFrame(NamedTuple):
  """A frame and its embedding.

  Attributes:
    frame: from the source.
    embedding: for the tracker.
    concepts: for phrases; None in a session without any.
  """

  frame: Frame
  embedding: VisualEmbedding
  concepts: ImageEmbedding | None = None


class PromptedObjects:
  """Objects and their prompts on the frames of a clip; the base of `VideoSession`.

  Attributes:
    clip: the frames to track.
    tracker: runs the model, and has the state of all objects.
    resample: how frames are resized, one of `frame_pixels.RESAMPLES`.
    pending: answers to prompts of which no memory was made yet, by position and object.
    masked: by position, the group that masks there join until it is tracked.
    removed, last_id: ids that are not given again, and the largest id so far.
    finder: finds and tracks the objects of phrases.
    held: frames that were tracked, but not given out yet.
  """

  def __init__(self, clip: Clip, tracker: Tracker, resample: str):
    if resample not in RESAMPLES:
      raise ValueError(f"resample must be one of {RESAMPLES}; got {resample!r:.40}.")
    self.clip, self.tracker, self.resample = clip, tracker, resample
    self.pending: dict[int, dict[int, Answer]] = {}
    self.masked: dict[int, Group] = {}
    self.removed: set[int] = set()
    self.last_id = 0
    self.finder = ConceptTracker(tracker.model, tracker, clip.size)
    self.held = HeldFrames(clip.size, tracker.state.rules)
    self._loaded: OrderedDict[int, LoadedFrame] = OrderedDict()

  @property
  def objects(self) -> list[int]:
    """The ids of all objects."""
    return sorted(self._state.slots)

  @property
  def _state(self) -> TrackerState:
    return self.tracker.state

  def add(
    self,
    prompt: VisualPrompt | None = None,
    frame: Position = 0,
    *,
    mask: Any = None,
    identity: int | None = None,
  ) -> int:
    """Adds an object by a prompt on a frame.

    Masks that are added on the same frame before it is tracked form a group: where they overlap,
    the last one wins. An object with points or a box is a group of its own (see `groups`).

    Args:
      prompt: points, a box, or both.
      frame: its number or time.
      mask: instead of a prompt, bool [h, w] of the size of the frames.
      identity: of the object; None for the largest so far plus 1.

    Returns:
      Its id.

    Raises:
      ValueError: the prompt is outside the frame or the clip, a mask of another size, an identity
        that was given before, too many objects.
      TypeError: an argument of the wrong type.
    """
    return self.add_at(self.clip.position(frame), prompt, mask, identity)

  def correct(
    self,
    identity: int,
    frame: Position,
    *,
    points: Any = None,
    point_labels: Any = None,
    box: Any = None,
    mask: Any = None,
    memory: bool = False,
  ) -> None:
    """Corrects an object on a frame, by points, a box or a mask, before the next `run`.

    Points replace those given before on this frame; the object's mask there is the starting point.
    The frame becomes a conditioning frame of the object's group. An object of a group whose other
    objects were never tracked to this frame becomes a group of its own.

    Args:
      identity: of the object.
      frame: number or time of the frame.
      points, point_labels, box: as in `VisualPrompt`.
      mask: instead, bool [h, w] of the size of the frames.
      memory: whether the object's conditioning frames and its neighboring frame are read, if a
        pass has reached this frame. Meta's code does not read them by default.

    Raises:
      ValueError: no such object, one that was removed, one that was tracked in a session without
        history, or as `add`.
      TypeError: an argument of the wrong type.
    """
    self._known(identity)
    if not self._state.history and self._state.owners[identity].previous:
      raise ValueError("this session keeps no history to correct; use model.video(source).")
    position = self.clip.position(frame)
    check_flag("memory", memory)
    prompt = None
    if any(x is not None for x in (points, point_labels, box)) or mask is None:
      prompt = VisualPrompt(points=points, point_labels=point_labels, box=box)
    prompt, mask = self._checked(prompt, mask)
    loaded = self.load_frame(position)
    group = self._state.owners[identity]
    given = self.pending.get(position, {})
    if any(i != identity and i not in given and not group.record(position) for i in group.objects):
      group = self._state.split(identity)
    if mask is None:
      answer = self.tracker.answer(
        loaded.embedding, identity, position, prompt, self.clip.size,
        self._earlier(group, identity, position), memory,
      )  # fmt: skip
    else:
      answer = self.tracker.answer_mask(loaded.embedding, mask)
    self._store(group, identity, position, answer)

  def remove(self, identity: int) -> None:
    """Removes an object; raises ValueError if there is no such object."""
    self._known(identity)
    for position in list(self.pending):
      self.pending[position].pop(identity, None)
      if not self.pending[position]:
        self.pending.pop(position)
    self._state.remove(identity)
    self._drop_empty_masked()
    self.removed.add(identity)
    self.held.hidden.add(identity)
    if (concept := self.finder.owner(identity)) is not None:
      concept.objects.remove([identity])

  def at(self, frame: Position) -> TrackedFrame:
    """What is known of a frame: the answers to its prompts, and the masks of the last passes.

    Raises:
      ValueError: the frame is outside the clip.
    """
    position = self.clip.position(frame)
    found = self._loaded[position].frame if position in self._loaded else self.clip.read(position)
    shown = self._shown(self.results_at(position))
    return shown_frame(found.index, found.time, self.clip.size, shown)

  def results_at(self, position: int, without: Collection[int] = ()) -> Results:
    """What is known of objects on a frame, by id; `without` names ids to leave out."""
    state, answers = self._state, self.pending.get(position, {})
    results: Results = {}
    for group in state.groups:
      record = group.record(position)
      for member, identity in enumerate(group.objects):
        if identity in without:
          continue
        if identity in answers:
          answer = answers[identity]
          logits = answer.mask_logits(self._state.config.mask_size)
          results[identity] = ObjectResult(logits, answer.object_logit, answer.iou)
        elif record is not None and (identity, position) in state.store:
          logits = state.store.get((identity, position)).mask_logits
          numbers = float(record.object_logits[member]), float(record.iou[member])
          results[identity] = ObjectResult(logits, *numbers)
    return results

  def remember_prompts(self) -> None:
    """Makes memories of all prompts since the last time."""
    for position in sorted(self.pending):
      embedding = self.load_frame(position).embedding
      self.tracker.remember(embedding, position, self.pending.pop(position))
    self.masked.clear()

  def add_at(self, position: int, prompt: Any, mask: Any, identity: int | None = None) -> int:
    """As `add`, on a position in the clip."""
    if identity is None:
      identity = self.last_id + 1
    elif not is_whole(identity) or identity < 0:
      raise ValueError(f"identity must be a whole number from 0; got {identity!r:.40}.")
    elif identity in self._state.slots or identity in self.removed:
      state = "was removed" if identity in self.removed else "is there already"
      raise ValueError(f"identity {identity} {state}; give another one, or None for a new one.")
    prompt, mask = self._checked(prompt, mask)
    loaded = self.load_frame(position)
    group = Group() if mask is None else self.masked.setdefault(position, Group())
    self._state.add(identity, group)
    try:
      if mask is None:
        answer = self.tracker.answer(
          loaded.embedding, identity, position, prompt, self.clip.size, None
        )
      else:
        answer = self.tracker.answer_mask(loaded.embedding, mask)
    except BaseException:
      self._state.remove(identity)
      self._drop_empty_masked()
      raise
    self.last_id = max(self.last_id, identity)
    self._store(group, identity, position, answer)
    return identity

  def find(self, prompt: str | ConceptPrompt, frame: Position = 0) -> list[int]:
    """Finds all objects of a concept on a frame, and from there on in `run`.

    As with Meta's code, `run` goes over this frame again.

    Args:
      prompt: a phrase, a `Prompt` with exemplar boxes on this frame, or a `Concept`.
      frame: its number or time.

    Returns:
      The ids of the objects found on this frame. Some may turn out to be wrong.

    Raises:
      ValueError: a box outside the frame, a frame outside the clip, or a phrase that was given
        before, also on another frame or with other boxes: it would find the same objects again.
      TypeError: a prompt of another type.
    """
    return self.find_at(self.clip.position(frame), prompt)

  @property
  def phrases(self) -> list[str | None]:
    """The phrases of `find`, in their order; None for exemplar boxes without a phrase."""
    return [one.phrase for one in self.finder.concepts]

  def forget(self, phrase: str) -> list[int]:
    """Removes a phrase and all objects that it found; returns their ids.

    Raises:
      ValueError: `find` was not called with this phrase.
    """
    chosen = [one for one in self.finder.concepts if one.phrase == phrase]
    if not chosen:
      raise ValueError(f"there is no phrase {phrase!r:.60}; there are {shown(self.phrases)}.")
    ids = [identity for one in chosen for identity in one.objects.ids]
    for identity in ids:
      self.remove(identity)
    self.finder.concepts = [one for one in self.finder.concepts if one.phrase != phrase]
    return ids

  def find_at(self, position: int, prompt: Any) -> list[int]:
    """As `find`, on a position in the clip."""
    number = 1 + max((one.number for one in self.finder.concepts), default=-1)
    concept = TrackedConcept(self.finder.check(prompt), position, number)
    check_distinct([*self.phrases, concept.phrase])
    self.remember_prompts()
    loaded = self.load_frame(position, concepts=True)
    found = self.step(loaded, position, [concept], [], backward=False).new
    self.finder.concepts.append(concept)
    return found

  def step(
    self, loaded: LoadedFrame, position: int, concepts: list[TrackedConcept],
    clicked: list[Group], *, backward: bool, ahead: Any = None,
  ) -> HeldFrame:  # fmt: skip
    """Finds and tracks objects on a frame; see `ConceptTracker.step`."""
    concepts_of_frame: Any = loaded.concepts
    embedding = FrameEmbedding(concepts_of_frame, loaded.embedding)
    held = self.finder.step(
      loaded.frame, position, embedding, concepts, clicked, backward, self.last_id + 1, ahead
    )
    self.last_id = max([self.last_id, *held.new])
    self.removed.update(held.removed, held.gone)
    return held

  def _shown(self, results: Results) -> list[ShownObject]:
    """Results of a frame as they are shown."""
    area, found = self._state.rules.fill_hole_area, []
    for identity, result in results.items():
      clean = result._replace(mask_logits=clean_mask(result.mask_logits, area))
      concept = self.finder.owner(identity)
      if concept is None:
        found.append(ShownObject(identity, clean))
      else:
        score = concept.objects.scores[identity]
        found.append(ShownObject(identity, clean, score, concept.phrase, concept.number))
    return found

  def _store(self, group: Group, identity: int, position: int, answer: Answer) -> None:
    given = self.pending.setdefault(position, {})
    if answer.shown is not None:
      give_way([x for i, x in given.items() if i in group.objects and i != identity], answer.shown)
    given[identity] = answer
    group.prompted[identity].add(position)

  def _earlier(self, group: Group, identity: int, position: int) -> Any:
    """The mask that a correction starts from."""
    if identity in self.pending.get(position, {}):
      return self.pending[position][identity].mask_logits(self._state.config.mask_size)
    if group.sees(position):
      return self._state.store.get((identity, position)).mask_logits
    return None

  def _checked(self, prompt: Any, mask: Any) -> tuple[Any, Bool[np.ndarray, "h w"] | None]:
    """A prompt or a mask, checked against the frames; the other one is None."""
    height, width = self.clip.size
    if (prompt is None) == (mask is None):
      raise ValueError(
        "give either a prompt, VisualPrompt(points=[[x, y]]), or mask=, for one object."
      )
    if mask is None:
      if not isinstance(prompt, VisualPrompt):
        raise TypeError(f"the prompt must be a VisualPrompt; got {shown(prompt)}.")
      check_visual(prompt, height, width, self._state.config.mask_size)
      return prompt, None
    array = as_array(mask)
    if array.dtype.kind not in "biu" or array.ndim != 2:
      raise TypeError(
        f"mask must be a bool array [h, w]; got {array.dtype} of shape {list(array.shape)}."
      )
    if array.shape != (height, width):
      raise ValueError(
        f"mask is {array.shape[0]} x {array.shape[1]} (height x width), but the frames of "
        f"{self.clip.source.name} are {height} x {width}: give a mask over the whole frame."
      )
    return None, array.astype(bool)

  def _drop_empty_masked(self) -> None:
    """Drops groups of masks whose objects are all removed; the state has dropped them, too."""
    self.masked = {t: group for t, group in self.masked.items() if group.objects}

  def _known(self, identity: Any) -> None:
    if identity in self.removed:
      raise ValueError(f"object {identity} was removed; add it again for a new id.")
    if identity not in self._state.slots:
      raise ValueError(f"there is no object {identity!r:.40}; there are {self.objects}.")

  def load_frame(
    self, position: int, frame: Frame | None = None, concepts: bool = False
  ) -> LoadedFrame:
    """A frame and its embedding, from the last ones if it is among them.

    Args:
      position: of the frame.
      frame: None to read it.
      concepts: whether phrases need it, too; they do if the session has any.
    """
    concepts = concepts or bool(self.finder.concepts)
    known = self._loaded.get(position)
    if known is None or (concepts and known.concepts is None):
      if frame is None:
        frame = self.clip.read(position) if known is None else known.frame
      pixels = model_pixels(frame.image, self._state.config.image_size, self.resample)
      if concepts:
        both = self.finder.detector.encode(pixels)
        known = LoadedFrame(frame, both.visual, both.concepts)
      else:
        known = LoadedFrame(frame, self.tracker.encode(pixels))
      self._loaded[position] = known
      if len(self._loaded) > EMBEDDINGS:
        self._loaded.popitem(last=False)
    return known
