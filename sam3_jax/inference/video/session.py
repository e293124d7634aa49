"""Sessions: prompts on a video, tracking in either direction, corrections."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from sam3_jax.inference.video import session_file
from sam3_jax.inference.video.clip import Clip, Pass
from sam3_jax.inference.video.groups import Group
from sam3_jax.inference.video.held_frames import HeldFrame
from sam3_jax.inference.video.prompted_objects import PromptedObjects
from sam3_jax.inference.video.store import BUDGET, HostStore
from sam3_jax.inference.video.tracker import Results, Tracker
from sam3_jax.inference.video.tracker_state import TrackerState
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.frame_range import CLOSE, Position, Seconds, parse_position
from sam3_jax.inputs.prompts import Prompt
from sam3_jax.inputs.video_source import Frame, VideoSource
from sam3_jax.inputs.visual_prompts import VisualPrompt
from sam3_jax.model.video.tracker import video_config
from sam3_jax.outputs.tracked_frame import TrackedFrame
from sam3_jax.rules import Rules
from sam3_jax.utils.json_text import shown
from sam3_jax.utils.validation import check_flag, is_whole

Direction: TypeAlias = Literal["forward", "backward", "both"]
PromptsByFrame: TypeAlias = dict[int | Seconds | None, list[Any]]
DIRECTIONS: dict[str, tuple[bool, ...]] = {
  "forward": (False,), "backward": (True,), "both": (False, True)
}  # fmt: skip


class VideoSession(PromptedObjects):
  """Tracks objects in a video: prompts on any frame, passes in both directions, corrections.

  Frames are named by their numbers in the source, or by times such as "12.5s". Use `Sam3.video` to
  create one.

  Attributes:
    model: a `Sam3` whose checkpoint has a tracker.
    origin: the path of the video; None if it was no path.
    passes: what is left of the last `run`.
    hold: of the last `run`.
  """

  def __init__(
    self,
    model: Any,
    source: VideoSource,
    *,
    start: Position = 0,
    stop: Position | None = None,
    every: Position = 1,
    rules: Rules | None = None,
    history: bool = True,
    budget: float = BUDGET,
    directory: str | Path | None = None,
    resample: str = "bilinear",
    origin: str | None = None,
  ):
    """Arguments and errors as in `Sam3.video`. The source is open; `origin` is its path, for
    `load`."""
    if rules is not None and not isinstance(rules, Rules):
      raise TypeError(
        "rules must be sam3_jax.Rules, such as Rules(new_det_thresh=0.5), or None for those of the "
        f"checkpoint; got {shown(rules, 60)}."
      )
    rules = rules or video_config(model.config).rules
    programs, clip = model.video_programs.with_rules(rules), Clip(source, start, stop, every)
    state = TrackerState(
      config=model.config,
      rules=rules,
      dtype=model.dtype,
      device=model.device,
      write=programs.write,
      store=HostStore(budget, directory),
      history=check_flag("history", history),
      length=clip.length,
    )
    super().__init__(clip, Tracker(model, programs, state), resample)
    self.model, self.origin = model, origin
    self.passes: list[Pass] = []
    self.hold: int | None = None

  def __repr__(self) -> str:
    return f"VideoSession({self.clip.source.name}, objects {self.objects})"

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Closes the video, and removes the temporary files."""
    self.clip.source.close()
    self.tracker.state.store.close()

  def run(
    self,
    direction: Direction = "forward",
    *,
    start: Position | None = None,
    stop: Position | None = None,
    hold: int | None = None,
  ) -> Iterator[TrackedFrame]:
    """Tracks all objects through the clip, frame by frame as the iterator is advanced.

    Args:
      direction: "forward", "backward", or "both", which is forward and then backward.
      start: the first frame; all objects are then tracked from there, also those that were prompted
        on a later frame only. None: from the first prompt in the direction, each object from its
        own first prompt.
      stop: the frame before which each pass ends; None for the end of the clip.
      hold: with phrases, a frame is given out when N - 1 frames after it are tracked, so that
        objects that turn out to be wrong by then are not on it. None for `rules.hotstart_delay`; 0
        for at once.

    Yields:
      A frame with the objects that are visible: ids, scores (the probability that the object is on
      the frame), boxes, lazy masks. Prompted frames show what their prompts gave, and objects that
      the pass does not track there show what an earlier pass gave. While it runs, objects may be
      added, corrected and removed; that has an effect from the next frame on.

    Raises:
      ValueError: no object, a frame outside the clip, a direction that does not exist, "both" in a
        session without history, or a source that is read once.
    """
    return _flat(self.steps(direction, start=start, stop=stop, hold=hold))

  def steps(
    self,
    direction: Direction = "forward",
    *,
    start: Position | None = None,
    stop: Position | None = None,
    hold: int | None = None,
  ) -> Iterator[list[TrackedFrame]]:
    """As `run`, but after every tracked frame it yields the frames that leave, which may be none.
    At the end of a pass, it yields each frame that was held back.

    While it is suspended, `passes[0]` is the pass to which the frames belong.
    """
    if direction not in DIRECTIONS:
      raise ValueError(f"direction must be one of {list(DIRECTIONS)}; got {direction!r:.40}.")
    if not self._state.slots and not self.finder.concepts:
      raise ValueError(
        "there is no object to track: add one first, session.add(prompt, frame), or a phrase, "
        "session.find(phrase)."
      )
    if direction == "both" and not self._state.history:
      raise ValueError("a session without history runs in one direction; use model.video(source).")
    first = None if start is None else self.clip.position(start)
    end = None if stop is None else self._stop(stop)
    prompts = [one.position for one in self.finder.concepts]
    prompts += [t for group in self._clicked() for t in _prompted(group)]
    self._start(hold)
    self.passes = [
      Pass(
        backward,
        first if first is not None else max(prompts) if backward else min(prompts),
        end,
        first is not None,
      )
      for backward in DIRECTIONS[direction]
    ]
    return self._run({})

  def resume(self) -> Iterator[TrackedFrame]:
    """Continues the last `run` after the last frame that it yielded, also in a loaded session."""
    return _flat(self.resume_steps())

  def resume_steps(self) -> Iterator[list[TrackedFrame]]:
    """As `resume`, in the steps of `steps`."""
    return self._run({})

  def save(self, path: str | Path) -> None:
    """Writes the session to a file, with all that `resume` and corrections need.

    Raises:
      OSError: the file cannot be written.
    """
    session_file.save(self, path)

  @classmethod
  def load(cls, model: Any, path: str | Path, source: Any = None) -> "VideoSession":
    """Reads a session that `save` wrote.

    Args:
      model: the checkpoint that made it, with the same dtype.
      path: of the file.
      source: the video; None for the path that the session was opened with.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged file, or one of another checkpoint or video.
    """
    return session_file.load(cls, model, path, source)

  def stream(self, prompts: PromptsByFrame, hold: int | None = None) -> Iterator[TrackedFrame]:
    """Tracks forward once, adding objects on the way; for `Sam3.track`.

    Args:
      prompts: visual prompts, masks and concept prompts by the number of their frame, by its time,
        or by None for the first frame.
      hold: as in `run`.
    """
    self._start(hold)
    self.passes = [Pass(False, 0, None, False)]
    return _flat(self._run(prompts))

  def taking_part(self, frame: Position, current: Pass) -> tuple[set[int], set[str | None]]:
    """The ids of the clicked objects, and the phrases, that a pass tracks on a frame.

    Other objects keep what an earlier pass gave them there.
    """
    position = self.clip.position(frame)
    groups = [group for group in self._clicked() if _takes_part(group, position, current)]
    phrases = {
      one.phrase
      for one in self.finder.concepts
      if current.everyone or one.takes_part(position, current.backward)
    }
    return {identity for group in groups for identity in group.objects}, phrases

  def _run(self, prompts: PromptsByFrame) -> Iterator[list[TrackedFrame]]:
    left = dict(prompts)
    while self.passes:
      current = self.passes[0]
      frames = self.clip.frames(current.start, current.stop, current.backward)
      yield from self._pass(current, frames, left)
      self.passes = self.passes[1:]
    if left:
      name = self.clip.source.name
      raise ValueError(f"the prompts of frame {next(iter(left))} are outside the clip of {name}.")

  def _pass(
    self, current: Pass, frames: Iterator[tuple[int, Frame]], prompts: PromptsByFrame
  ) -> Iterator[list[TrackedFrame]]:
    backward, ahead = current.backward, self.clip.numbers is not None
    following = next(frames, None)

    def advance() -> None:
      """Encodes the next frame while the results of this one are copied and used."""
      nonlocal following
      following = next(frames, None)
      if following is not None:
        self.load_frame(*following)

    while following is not None:
      position, frame = following
      self._add_due(prompts, position, frame)
      self.remember_prompts()
      concepts = [
        one
        for one in self.finder.concepts
        if current.everyone or one.takes_part(position, backward)
      ]
      groups = [group for group in self._clicked() if _takes_part(group, position, current)]
      if concepts:
        loaded = self.load_frame(position, frame)
        held = self.step(
          loaded, position, concepts, groups, backward=backward, ahead=advance if ahead else None
        )
      else:
        held = HeldFrame(frame.index, frame.time)
        results = self._track(position, frame, groups, backward, advance if ahead else None)
        held.objects = self._shown(results)
      taking_part = {i for group in groups for i in group.objects}
      taking_part.update(i for one in concepts for i in one.objects.ids)
      held.objects += self._shown(self.results_at(position, without=taking_part))
      current.start = position + (-1 if backward else 1)
      leaves = False
      for one in self.held.add(held, self._delay):
        yield [one]
        leaves = True
      if not leaves:
        yield []
      if not ahead:
        following = next(frames, None)
    for one in self.held.rest():
      yield [one]

  def _add_due(self, prompts: PromptsByFrame, position: int, frame: Frame) -> None:
    """Adds the prompts of a frame."""
    for key in [key for key in prompts if _is_due(key, frame)]:
      given = prompts.pop(key)
      concepts = [one for one in given if isinstance(one, str | Prompt | Concept)]
      self.load_frame(position, frame, bool(concepts))
      for prompt in given:
        if isinstance(prompt, str | Prompt | Concept):
          self.find_at(position, prompt)
        else:
          visual = isinstance(prompt, VisualPrompt)
          self.add_at(position, prompt if visual else None, None if visual else prompt)

  def _track(
    self, position: int, frame: Frame, groups: list[Group], backward: bool, ahead: Any
  ) -> Results:
    """Tracks clicked objects to a frame."""
    tracked = [group for group in groups if position not in group.conditioning]
    started = None
    if tracked:
      embedding = self.load_frame(position, frame).embedding
      started = self.tracker.start(embedding, position, tracked, backward)
    if ahead is not None:
      ahead()
    results: Results = {}
    if started is not None:
      results |= self.tracker.finish(started, position, tracked, backward)
    for group in groups:
      if position in group.conditioning:
        group.pass_over(position, backward)
        results |= self.tracker.conditioned(group, position)[0]
    return results

  def _clicked(self) -> list[Group]:
    """The groups of clicked objects."""
    found = {identity for one in self.finder.concepts for identity in one.objects.ids}
    return [group for group in self._state.groups if not found.intersection(group.objects)]

  @property
  def _delay(self) -> int:
    """The number of frames held back, plus 1; or 0 for none."""
    if self.hold is None:
      return self._state.rules.hotstart_delay if self.finder.concepts else 0
    return self.hold

  def _start(self, hold: int | None) -> None:
    """Forgets the frames that an earlier run held back."""
    if hold is not None and not (is_whole(hold) and hold >= 0):
      raise ValueError(f"hold must be a whole number of frames from 0, or None; got {hold!r:.40}.")
    self.hold = hold
    self.held.frames.clear()

  def _stop(self, stop: Position) -> int | None:
    found = parse_position(stop, "stop")
    number = self.clip.source.frame_number(stop) if isinstance(found, Seconds) else found
    if self.clip.numbers is None or number > self.clip.numbers[-1]:
      return None
    return int(np.searchsorted(self.clip.numbers, number))


def _flat(steps: Iterator[list[TrackedFrame]]) -> Iterator[TrackedFrame]:
  for frames in steps:
    yield from frames


def _is_due(key: int | Seconds | None, frame: Frame) -> bool:
  """Whether the prompts of a number or a time are those of this frame."""
  if isinstance(key, Seconds):
    return frame.time >= key.value - CLOSE
  return key is None or key == frame.index


def _prompted(group: Group) -> set[int]:
  return set().union(*group.prompted.values())


def _takes_part(group: Group, position: int, current: Pass) -> bool:
  """Whether a group is tracked on a frame of a pass."""
  if not group.conditioning:
    return False
  if current.everyone:
    return True
  if current.backward:
    return position <= max(group.conditioning)
  return position >= min(group.conditioning)
