"""Motions in videos: paths, turns and changes of size, and panning cameras.

All values are rounded, so that the last bits of a machine's sines do not matter.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

Points = Float[np.ndarray, "t 2"]  # x, y in pixels

CYCLE = 48  # frames after which an object leaves again, and a camera turns back
SHORTEST = 12  # frames of a video in which an object can leave and return
_SPEEDS = 0.01, 0.04  # per frame, relative to the shorter side of the image
_PAN = 0.012  # largest speed of a camera in the same unit
_DENSE = 32  # points of a curve between two targets


@dataclasses.dataclass(frozen=True)
class Motion:
  """Where an object is in each frame, how large, and how it is turned.

  Attributes:
    xy: center in pixels.
    side: longer side in pixels, before it is turned.
    angle: in radians, clockwise.
    kind: name of the path, from `KINDS`.
  """

  xy: Points
  side: Float[np.ndarray, " t"]
  angle: Float[np.ndarray, " t"]
  kind: str


class Meeting(NamedTuple):
  """A point to pass, x and y in pixels, and the index of the frame."""

  x: float
  y: float
  frame: int


@dataclasses.dataclass(frozen=True)
class _Field:
  """What a path depends on: the image, the number of frames, and the object's side."""

  width: int
  height: int
  frames: int
  side: float

  @property
  def shorter(self) -> int:
    return min(self.width, self.height)

  @property
  def low(self) -> Float[np.ndarray, "2"]:
    """The least xy of a center inside the image."""
    return np.full(2, 0.4 * self.side)

  @property
  def high(self) -> Float[np.ndarray, "2"]:
    return np.array([self.width, self.height]) - self.low


def sample_motion(
  rng: np.random.Generator,
  size: tuple[int, int],
  frames: int,
  side: float,
  meeting: Meeting | None = None,
) -> Motion:
  """Samples the motion of an object.

  Args:
    rng: random generator.
    size: height and width of the image.
    frames: number of frames, at least 1.
    side: mean of the object's longer side in pixels.
    meeting: the path passes this point, if its kind has targets.
  """
  field = _Field(size[1], size[0], frames, side)
  names = [name for name in KINDS if name != "leaving" or frames >= SHORTEST]
  weights = np.array([KINDS[name][1] for name in names])
  name = str(rng.choice(names, p=weights / weights.sum()))
  xy = KINDS[name][0](rng, field, meeting)
  return Motion(np.round(xy, 3), np.round(_sides(rng, field), 3), _angles(rng, frames), name)


def pan(rng: np.random.Generator, size: tuple[int, int], frames: int) -> Int[np.ndarray, "t 2"]:
  """Samples the x and y of a camera in each frame, in whole pixels from 0; some stand still."""
  if rng.random() < 0.4:
    return np.zeros((frames, 2), np.int64)
  time, angle = np.arange(frames), rng.uniform(0, 2 * np.pi)
  speed = min(size) * rng.uniform(0.2, 1) * _PAN
  direction = speed * np.array([np.cos(angle), 0.5 * np.sin(angle)])
  reach = np.abs(direction) * CYCLE
  offset = _folded(time[:, None] * direction, -reach, np.zeros(2))
  offset = np.rint(np.round(offset, 3)).astype(np.int64)
  return offset - offset.min(axis=0)


def _still(rng: np.random.Generator, field: _Field, meeting: Meeting | None) -> Points:
  return np.tile(_target(rng, field), (field.frames, 1))


def _straight(rng: np.random.Generator, field: _Field, meeting: Meeting | None) -> Points:
  targets, speed = _targets(rng, field, meeting)
  return _along(targets, speed, field.frames)


def _curved(rng: np.random.Generator, field: _Field, meeting: Meeting | None) -> Points:
  """A smooth curve through the targets (Catmull and Rom's spline)."""
  targets, speed = _targets(rng, field, meeting)
  before, after = 2 * targets[0] - targets[1], 2 * targets[-1] - targets[-2]
  # Ends that continue straight on would make two targets a straight line.
  bend = rng.normal(0, 0.5 * field.shorter, (2, 2))
  knots = np.concatenate([[before + bend[0]], targets, [after + bend[1]]])
  t = np.linspace(0, 1, _DENSE, endpoint=False)[:, None]
  p0, p1, p2, p3 = (knots[k : len(knots) - 3 + k, None] for k in range(4))
  curve = p1 + 0.5 * t * (
    p2 - p0 + t * (2 * p0 - 5 * p1 + 4 * p2 - p3 + t * (3 * (p1 - p2) + p3 - p0))
  )
  points = np.concatenate([curve.reshape(-1, 2), targets[-1:]])
  return _along(points, speed, field.frames)


def _bouncing(rng: np.random.Generator, field: _Field, meeting: Meeting | None) -> Points:
  """Off the borders of the image, or like a ball on the ground."""
  start, angle = _target(rng, field), rng.uniform(0, 2 * np.pi)
  time, speed = np.arange(field.frames)[:, None], _speed(rng, field)
  direction = 1.5 * speed * np.array([np.cos(angle), np.sin(angle)])
  xy = _folded(start + time * direction, field.low, field.high)
  if rng.random() < 0.5:
    period, height = rng.uniform(8, 20), rng.uniform(0.15, 0.4) * field.shorter
    phase = (time[:, 0] / period + rng.uniform()) % 1
    ground = max(start[1], field.low[1] + height)
    xy[:, 1] = ground - 4 * height * phase * (1 - phase)
  return xy


def _leaving(rng: np.random.Generator, field: _Field, meeting: Meeting | None) -> Points:
  """Leaves over a border and returns, again and again; sometimes it starts outside."""
  xy = _target(rng, field) + np.arange(field.frames)[:, None] * rng.normal(0, 0.3, 2)
  cycle = min(field.frames, CYCLE)
  inside, gone = cycle * rng.uniform(0.15, 0.3), cycle * rng.uniform(0.12, 0.25)
  slope = max(2.0, cycle * rng.uniform(0.08, 0.15))
  time = np.arange(field.frames)
  if rng.random() < 0.25:
    time = time + inside + slope
  time = time % (cycle + 0.0)
  out = np.clip((time - inside) / slope, 0, 1) - np.clip(
    (time - inside - slope - gone) / slope, 0, 1
  )
  out = out * out * (3 - 2 * out)
  axis, far = int(rng.integers(2)), bool(rng.integers(2))
  extent = (field.width, field.height)[axis]
  distance = xy[:, axis] if not far else extent - xy[:, axis]
  # Drawings may be stretched and turned, and grow.
  reach = distance + 1.3 * field.side
  xy[:, axis] += out * reach * (1 if far else -1)
  return xy


_Path = Callable[[np.random.Generator, _Field, Meeting | None], Points]
KINDS: dict[str, tuple[_Path, float]] = {
  "still": (_still, 0.12),
  "straight": (_straight, 0.28),
  "curved": (_curved, 0.25),
  "bouncing": (_bouncing, 0.2),
  "leaving": (_leaving, 0.15),
}


def _speed(rng: np.random.Generator, field: _Field) -> float:
  low, high = np.log(_SPEEDS)
  return field.shorter * float(np.exp(rng.uniform(low, high)))


def _target(rng: np.random.Generator, field: _Field) -> Float[np.ndarray, "2"]:
  return rng.uniform(field.low, field.high)


def _targets(
  rng: np.random.Generator, field: _Field, meeting: Meeting | None
) -> tuple[Points, float]:
  """At least two targets, far enough for all frames at a speed; the second is the meeting."""
  speed, targets = _speed(rng, field), [_target(rng, field)]
  if meeting is not None and meeting.frame > 0:
    start = targets[0]
    for _ in range(8):  # a start at a distance that needs a usual speed
      speed = float(np.hypot(*(start - meeting[:2]))) / meeting.frame
      if _SPEEDS[0] <= speed / field.shorter <= _SPEEDS[1]:
        break
      start = _target(rng, field)
    targets, speed = [start, np.array(meeting[:2])], max(speed, _SPEEDS[0] * field.shorter)
  length = sum(np.hypot(*(b - a)) for a, b in itertools.pairwise(targets))
  while length <= speed * field.frames or len(targets) < 2:
    targets.append(_target(rng, field))
    length += float(np.hypot(*(targets[-1] - targets[-2])))
  return np.array(targets), speed


def _along(points: Points, speed: float, frames: int) -> Points:
  """Positions along a polyline at a constant speed; it must be long enough."""
  lengths = np.hypot(*np.diff(points, axis=0).T)
  travelled = np.concatenate([[0], np.cumsum(lengths)])
  wanted = speed * np.arange(frames)
  return np.stack([np.interp(wanted, travelled, column) for column in points.T], axis=1)


def _folded(values: Points, low: np.ndarray, high: np.ndarray) -> Points:
  """Reflects values at two bounds, as often as needed."""
  span = np.maximum(high - low, 1e-6)
  phase = (values - low) % (2 * span)
  return low + np.minimum(phase, 2 * span - phase)


def _sides(rng: np.random.Generator, field: _Field) -> Float[np.ndarray, " t"]:
  """Constant, or growing and shrinking."""
  swing = rng.uniform(0.1, 0.35) if rng.random() < 0.5 else 0.0
  period, phase = rng.uniform(20, 60), rng.uniform(0, 2 * np.pi)
  time = np.arange(field.frames)
  return field.side * np.exp(swing * np.sin(2 * np.pi * time / period + phase))


def _angles(rng: np.random.Generator, frames: int) -> Float[np.ndarray, " t"]:
  """Constant, spinning or swinging."""
  time, kind = np.arange(frames), rng.random()
  rate, swing = np.deg2rad(rng.uniform(-6, 6)), np.deg2rad(rng.uniform(5, 30))
  period = rng.uniform(10, 40)
  if kind < 0.4:
    return np.zeros(frames)
  if kind < 0.7:
    return np.round(rate * time, 4)
  return np.round(swing * np.sin(2 * np.pi * time / period), 4)
