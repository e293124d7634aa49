"""Files of sessions: all that is known of the objects, so that tracking can continue later."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from sam3_jax.inference.video.archive import Archive, write_archive
from sam3_jax.inference.video.bank import MemoryBank
from sam3_jax.inference.video.clip import Pass
from sam3_jax.inference.video.concept_objects import ConceptObjects
from sam3_jax.inference.video.groups import FrameRecord, Group
from sam3_jax.inference.video.held_frames import HeldFrame
from sam3_jax.inference.video.lifetimes import Lifetimes
from sam3_jax.inference.video.prompts import Answer
from sam3_jax.inference.video.results import ShownObject
from sam3_jax.inference.video.store import StoredFrame
from sam3_jax.inference.video.tracked_concept import TrackedConcept
from sam3_jax.inference.video.tracker import ObjectResult
from sam3_jax.inputs.concept import Concept
from sam3_jax.inputs.prompts import Prompt, prompt_as_json
from sam3_jax.inputs.video import open_video
from sam3_jax.rules import Rules
from sam3_jax.utils.identity import Origin

FORMAT = 2
_HEADER, _STORED, _PENDING = "session", "stored", "pending"
_CONCEPT, _HELD = "concept", "held"


def save(session: Any, path: str | Path) -> None:
  """Writes a session; see `VideoSession.save`."""
  write_archive(path, _arrays(session))


def load(kind: Any, model: Any, path: str | Path, source: Any = None) -> Any:
  """Reads a session; see `VideoSession.load`.

  Args:
    kind: the class of the session.
    model, path, source: as there.
  """
  with Archive(path) as archive:
    if _HEADER not in archive:
      raise ValueError(f"{path} is not a file of a video session.")
    header = json.loads(archive[_HEADER].tobytes())
    if header["format"] != FORMAT:
      raise ValueError(
        f"{path} has format {header['format']}, and this sam3-jax reads {FORMAT}: update sam3-jax."
      )
    for name, own in (("checkpoint", model.identity), ("dtype", model.dtype.name)):
      if header[name] != own:
        raise ValueError(
          f"{path} was saved with the {name} {header[name]:.12}, and the model has {own:.12}: load "
          "it with the model that saved it."
        )
    origin = header["origin"] if source is None else source
    if origin is None:
      raise ValueError(f"{path} does not name its video, which was not a file: pass source=.")
    start, stop, every = header["range"]
    session = kind(
      model, open_video(origin),
      start=start, stop=stop, every=every,
      rules=Rules(**header["rules"]), history=header["history"],
      resample=header["resample"], origin=header["origin"],
    )  # fmt: skip
    found = [*session.clip.size, session.clip.length]
    if found != header["video"]:
      raise ValueError(
        f"{path} is of a video of {_video(header['video'])}, and {session.clip.source.name} is one "
        f"of {_video(found)}."
      )
    _restore(session, header, archive)
  return session


def _video(values: list[Any]) -> str:
  height, width, length = values
  return f"{width} x {height} with {'unknown' if length is None else length} frames"


def _header(session: Any) -> dict[str, Any]:
  state = session.tracker.state
  return {
    "format": FORMAT,
    "checkpoint": session.model.identity,
    "dtype": session.model.dtype.name,
    "origin": session.origin,
    "range": list(session.clip.range),
    "video": [*session.clip.size, session.clip.length],
    "resample": session.resample,
    "rules": dataclasses.asdict(state.rules),
    "history": state.history,
    "slots": list(state.slots.items()),
    "groups": [_group_values(group) for group in state.groups],
    "masked": [[t, state.groups.index(group)] for t, group in session.masked.items()],
    "removed": sorted(session.removed),
    "last_id": session.last_id,
    "concepts": [_concept_values(one) for one in session.finder.concepts],
    "held": [_held_values(one) for one in session.held.frames],
    "hidden": sorted(session.held.hidden),
    "hold": session.hold,
    "passes": [dataclasses.asdict(each) for each in session.passes],
    "answers": [
      [t, identity, answer.object_logit, answer.iou]
      for t, answers in session.pending.items()
      for identity, answer in answers.items()
    ],
  }


def _arrays(session: Any) -> Iterator[tuple[str, Any]]:
  header = json.dumps(_header(session)).encode()
  yield _HEADER, np.frombuffer(header, np.uint8)
  state = session.tracker.state
  if state.bank is not None:
    for name, array in vars(jax.device_get(state.bank)).items():
      yield f"bank.{name}", array
  for t, answers in session.pending.items():
    for identity, answer in answers.items():
      for name in ("pointer", "logits", "shown"):
        if (array := getattr(answer, name)) is not None:
          yield f"{_PENDING}.{t}.{identity}.{name}", array
  for i, one in enumerate(session.finder.concepts):
    if isinstance(one.prompt, Concept):
      yield f"{_CONCEPT}.{i}.tokens", np.asarray(one.prompt.tokens)
      yield f"{_CONCEPT}.{i}.positive", np.asarray(one.prompt.positive)
  for i, frame in enumerate(session.held.frames):
    for j, one in enumerate(frame.objects):
      yield f"{_HELD}.{i}.{j}", one.result.mask_logits
  for identity, t in state.store:
    for name, array in vars(state.store.get((identity, t))).items():
      yield f"{_STORED}.{identity}.{t}.{name}", array


def _restore(session: Any, header: dict[str, Any], archive: Archive) -> None:
  state = session.tracker.state
  state.slots = dict(header["slots"])
  state.groups = [_group(values) for values in header["groups"]]
  if "bank.memory" in archive:
    bank = MemoryBank(archive["bank.memory"], archive["bank.pointers"])  # pyright: ignore[reportArgumentType]
    state.bank = jax.device_put(bank, state.device)
  session.masked.update({t: state.groups[i] for t, i in header["masked"]})
  session.removed.update(header["removed"])
  session.last_id = header["last_id"]
  session.finder.concepts += [
    _concept(values, archive, f"{_CONCEPT}.{i}", session.model.origin)
    for i, values in enumerate(header["concepts"])
  ]
  session.held.frames += [
    _held(values, archive, f"{_HELD}.{i}") for i, values in enumerate(header["held"])
  ]
  session.held.hidden.update(header["hidden"])
  session.hold = header["hold"]
  session.passes = [Pass(**each) for each in header["passes"]]
  for t, identity, logit, iou in header["answers"]:
    prefix = f"{_PENDING}.{t}.{identity}"
    optional = {
      name: archive[f"{prefix}.{name}"]
      for name in ("logits", "shown")
      if f"{prefix}.{name}" in archive
    }
    answer = Answer(archive[f"{prefix}.pointer"], logit, iou, **optional)
    session.pending.setdefault(t, {})[identity] = answer
  for name in archive:
    if name.startswith(f"{_STORED}.") and name.endswith(".memory"):
      _, identity, t, _ = name.split(".")
      parts = (
        f"{_STORED}.{identity}.{t}.{field.name}" for field in dataclasses.fields(StoredFrame)
      )
      state.store.put((int(identity), int(t)), StoredFrame(*(archive[part] for part in parts)))


def _concept_values(one: TrackedConcept) -> dict[str, Any]:
  prompt = one.prompt
  objects = one.objects
  return {
    "prompt": {"text": prompt.text} if isinstance(prompt, Concept) else prompt_as_json(prompt),
    "position": one.position,
    "number": one.number,
    "ids": objects.ids,
    "scores": list(objects.scores.items()),
    "lives": {name: np.asarray(x).tolist() for name, x in objects.lives._asdict().items()},
  }


def _concept(
  values: dict[str, Any], archive: Archive, prefix: str, origin: Origin
) -> TrackedConcept:
  if f"{prefix}.tokens" in archive:
    arrays: Any = (archive[f"{prefix}.{name}"] for name in ("tokens", "positive"))
    prompt = Concept(*arrays, text=values["prompt"]["text"], origin=origin)
  else:
    prompt = Prompt(**values["prompt"])
  count = len(values["ids"])
  lives = {
    name: np.array(x, bool if name == "confirmed" else np.int64)
    for name, x in values["lives"].items()
  }
  lives["duplicates"] = lives["duplicates"].reshape(count, count)
  objects = ConceptObjects(values["ids"], Lifetimes(**lives), dict(values["scores"]))
  return TrackedConcept(prompt, values["position"], values["number"], objects)


def _held_values(frame: HeldFrame) -> dict[str, Any]:
  values: dict[str, Any] = {x.name: getattr(frame, x.name) for x in dataclasses.fields(frame)}
  return values | {
    "objects": [
      [x.identity, x.result.object_logit, x.result.iou, x.score, x.phrase, x.concept]
      for x in frame.objects
    ]
  }


def _held(values: dict[str, Any], archive: Archive, prefix: str) -> HeldFrame:
  objects = [
    ShownObject(identity, ObjectResult(archive[f"{prefix}.{j}"], logit, iou), *rest)
    for j, (identity, logit, iou, *rest) in enumerate(values["objects"])
  ]
  fields: dict[str, Any] = values | {"objects": objects}
  return HeldFrame(**fields)


def _group_values(group: Group) -> dict[str, Any]:
  def records(table: dict[int, FrameRecord]) -> list[Any]:
    return [[t, record.object_logits.tolist(), record.iou.tolist()] for t, record in table.items()]

  return {
    "objects": group.objects,
    "prompted": [[identity, sorted(frames)] for identity, frames in group.prompted.items()],
    "conditioning": records(group.conditioning),
    "previous": records(group.previous),
    "scores": list(group.scores.items()),
    "backward": list(group.backward.items()),
    "unseen": sorted(group.unseen),
    "rows": list(group.rows.items()),
  }


def _group(values: dict[str, Any]) -> Group:
  def records(rows: list[Any]) -> dict[int, FrameRecord]:
    return {
      t: FrameRecord(np.array(logits, np.float32), np.array(iou, np.float32))
      for t, logits, iou in rows
    }

  return Group(
    objects=values["objects"],
    prompted={identity: set(frames) for identity, frames in values["prompted"]},
    conditioning=records(values["conditioning"]),
    previous=records(values["previous"]),
    scores=dict(values["scores"]),
    backward=dict(values["backward"]),
    unseen=set(values["unseen"]),
    rows=dict(values["rows"]),
  )
