"""Decisions about the objects of phrases against Meta's code: five scripted videos with every rule
and option (goldens/video/heuristics.npz), and single functions (functions.npz)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import GOLDENS, VIDEO_SEED
from support import QUICK

from sam3_jax import Rules
from sam3_jax.inference.video import concept_objects
from sam3_jax.inference.video.association import associate, pairwise_iou, suppress_overlaps
from sam3_jax.inference.video.components import clean_mask
from sam3_jax.inference.video.concept_objects import (
  ConceptObjects,
  FrameDetections,
  replace_lost,
)
from sam3_jax.inference.video.functions import hide_shrunk
from sam3_jax.inference.video.held_frames import HeldFrame, HeldFrames
from sam3_jax.inference.video.lifetimes import Lifetimes, hide_occluded, judge
from sam3_jax.inference.video.results import ShownObject
from sam3_jax.inference.video.tracker import ObjectResult
from sam3_jax.ops.bilinear import resize

META = Rules.meta()
OPTIONS = dataclasses.replace(
  META, decrease_trk_keep_alive_for_empty_masklets=True, suppress_det_close_to_boundary=True,
  o2o_matching_masklets_enable=True, suppress_unmatched_only_within_hotstart=False,
  masklet_confirmation_enable=True, init_trk_keep_alive=0, max_trk_keep_alive=8,
  min_trk_keep_alive=-4,
)  # fmt: skip
CASES = {  # rules, and number of frames of the noise
  "heuristics": (META, 48),
  "limit": (dataclasses.replace(META, max_num_objects=9), 30),
  "reverse": (META, 36),
  "options": (OPTIONS, 48),
  "plain": (dataclasses.replace(META, hotstart_delay=0, recondition_every_nth_frame=0), 20),
}
SIZE = (90, 120)  # of the frames
SLOTS = 20  # of arrays of fixed size


@pytest.fixture(scope="module")
def goldens():
  return dict(np.load(GOLDENS / "video" / "heuristics.npz"))


@pytest.fixture(scope="module")
def functions():
  return dict(np.load(GOLDENS / "video" / "functions.npz"))


@functools.cache
def noise(frames):
  generator = np.random.Generator(np.random.PCG64([VIDEO_SEED, 23]))
  return generator.standard_normal((frames, 48, 48)).astype(np.float32) * np.float32(0.3)


def logits(packed, added):
  inside = np.unpackbits(packed, axis=-1)[..., :48] > 0
  return np.where(inside, np.float32(4), np.float32(-4)) + added


def boxes(masks):
  rows = []
  for mask in masks:
    y, x = np.nonzero(mask)
    rows.append([x.min() / 48, y.min() / 48, (x.max() + 1) / 48, (y.max() + 1) / 48])
  return np.array(rows, np.float32).reshape(-1, 4)


def detections(goldens, name, added, rules):
  masks = logits(goldens[f"{name}.raw_masks"], added)
  found = FrameDetections(goldens[f"{name}.raw_scores"], boxes(masks > 0), masks)
  return found.kept(rules)


@functools.partial(jax.jit, compiler_options=QUICK)
def remembered(masks, owner):
  order = jnp.arange(SLOTS, dtype=jnp.int32)
  return hide_shrunk(resize(masks, (192, 192)), owner, order, META.shrink_threshold)


def frames_of(goldens, case):
  count = sum(name.startswith(f"{case}.0") and name.endswith(".frame") for name in goldens)
  return [f"{case}.{i:03d}" for i in range(count)]


def pairs(table):
  return sorted(map(tuple, np.asarray(table).tolist()))


class Follower:
  """Decides every frame of a case beside the goldens; collects what differs."""

  def __init__(self, goldens, case):
    self.goldens, self.case = goldens, case
    self.rules, count = CASES[case]
    self.noise, self.objects, self.faults = noise(count), ConceptObjects(), []
    self.held, self.shown, self.next_id = HeldFrames(SIZE, self.rules), {}, 0

  def run(self):
    for name in frames_of(self.goldens, self.case):
      self.frame(name)
    self.shown |= {frame.index: frame for frame in self.held.rest()}
    return self

  def compare(self, name, what, got, wanted):
    got, wanted = np.asarray(got), np.asarray(wanted)
    if got.shape != wanted.shape or not np.allclose(got, wanted, atol=1e-5):
      self.faults.append(f"{name} {what}: {got.tolist()}, expected {wanted.tolist()}")

  def frame(self, name):
    rules, ids = self.rules, list(self.objects.ids)
    golden = {key: self.goldens.get(f"{name}.{key}") for key in KEYS}
    frame = int(golden["frame"])
    found = detections(self.goldens, name, self.noise[frame], rules)
    masks = np.zeros((0, 48, 48), np.float32)
    if ids:
      masks = logits(golden["raw_tracks"], self.noise[frame])
      masks = np.stack([clean_mask(mask, rules.fill_hole_area) for mask in masks])
      iou = pairwise_iou(found.mask_logits > 0, masks > 0)
      self.compare(name, "iou", iou, golden["iou"])
    scores = dict(self.objects.scores)
    object_logits = golden["track_object_logits"]
    decision = self.objects.decide(
      frame, found, masks, object_logits, rules,
      first_id=self.next_id, room=rules.max_num_objects - len(ids), reverse=self.case == "reverse",
    )  # fmt: skip
    self.next_id += len(decision.new)
    self.compare(name, "scores", found.scores, golden["det_scores"])
    self.compare(name, "ids", ids, golden["track_ids"])
    self.compare(name, "new ids", list(decision.new), golden["new_ids"])
    self.compare(name, "new", list(decision.new.values()), golden["new_detections"])
    self.compare(name, "removed", sorted(decision.removed), sorted(golden["removed_ids"]))
    self.compare(name, "dropped", decision.dropped, golden["dropped_by_limit"])
    self.compare(name, "ids after", self.objects.ids, golden["ids_after"])
    if ids:
      occluded = [identity in decision.occluded for identity in ids]
      self.compare(name, "occluded", occluded, golden["suppressed_by_overlap"])
    wanted = golden["reconditioned"]
    wanted = [] if wanted is None else pairs(wanted)
    if sorted(decision.reconditions.items()) != wanted:
      self.faults.append(f"{name} reconditions: {decision.reconditions}, expected {wanted}")
    last = zip(self.objects.ids, self.objects.lives.last_occluded, strict=True)
    last = [(i, int(t)) for i, t in last if i in ids]
    if last != pairs(golden["last_occluded"]):
      self.faults.append(f"{name} last occluded: {last}, expected {golden['last_occluded']}")
    self.memories(name, ids, masks, decision, golden)
    self.show(frame, ids, masks, object_logits, found, scores, decision)

  def memories(self, name, ids, masks, decision, golden):
    if not ids:
      return
    rows = np.zeros((SLOTS, 48, 48), np.float32)
    rows[: len(ids)] = masks
    rows[[ids.index(one) for one in decision.occluded]] = -10
    owner = np.where(np.arange(SLOTS) < len(ids), 0, np.arange(SLOTS)).astype(np.int32)
    kept = np.asarray(remembered(rows, owner))[: len(ids)]
    self.compare(name, "areas", (kept > 0).sum(axis=(1, 2)), golden["memory_areas"])
    total, wanted = kept.sum(axis=(1, 2), dtype=np.float64), golden["memory_mask_sum"]
    if not np.allclose(total, wanted, rtol=1e-4):
      self.faults.append(f"{name} memory: {total}, expected {wanted}")

  def show(self, frame, ids, masks, object_logits, found, scores, decision):
    held = HeldFrame(frame, 0.0, removed=decision.removed, unconfirmed=decision.unconfirmed)
    for identity, mask, logit in zip(ids, masks, object_logits, strict=True):
      if identity in decision.occluded:
        mask = np.full_like(mask, concept_objects.EMPTY_LOGIT)
      if identity not in decision.hidden:
        result = ObjectResult(mask, float(logit), 1.0)
        held.objects.append(ShownObject(identity, result, scores[identity], "shape", 0))
    for identity, row in decision.new.items():
      score = float(found.scores[row])
      mask = clean_mask(found.mask_logits[row], self.rules.fill_hole_area)
      result = ObjectResult(mask, float(np.log(score / (1 - score))), 1.0)
      held.objects.append(ShownObject(identity, result, score, "shape", 0))
    delay = self.rules.hotstart_delay
    self.shown |= {out.index: out for out in self.held.add(held, delay)}


KEYS = (
  "frame", "raw_tracks", "iou", "track_object_logits", "det_scores", "track_ids", "new_ids",
  "new_detections", "removed_ids", "dropped_by_limit", "ids_after", "suppressed_by_overlap",
  "reconditioned", "last_occluded", "memory_areas", "memory_mask_sum",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_decision_equals_metas(goldens, case):
  follower = Follower(goldens, case).run()
  assert not follower.faults, "\n".join(follower.faults[:5])
  for frame in goldens[f"{case}.order"].tolist():
    name, shown = f"{case}.out.{frame}", follower.shown[frame]
    assert shown.instances.ids.tolist() == goldens[f"{name}.ids"].tolist(), name
    np.testing.assert_allclose(shown.instances.scores, goldens[f"{name}.scores"], atol=1e-6)
    masks = np.unpackbits(goldens[f"{name}.masks"], axis=-1)[..., : SIZE[1]] > 0
    np.testing.assert_array_equal(np.asarray(shown.instances.masks), masks, name)


def test_each_changed_threshold_is_noticed(goldens):
  changes = {
    "assoc_iou_thresh": 0.6, "trk_assoc_iou_thresh": 0.99, "new_det_thresh": 0.9,
    "hotstart_unmatch_thresh": 5, "hotstart_dup_thresh": 3, "det_nms_thresh": 0.9,
    "recondition_every_nth_frame": 8,
    "suppress_overlapping_based_on_recent_occlusion_threshold": 0.0,
  }  # fmt: skip
  for name, value in changes.items():
    follower = Follower(goldens, "heuristics")
    follower.rules = dataclasses.replace(META, **{name: value})
    assert len(frames_of(goldens, "heuristics")) == 48
    try:
      faults = follower.run().faults
    except (IndexError, ValueError):  # another number of objects than the script has masks
      continue
    assert faults, name


def test_single_functions_equal_metas(functions):
  inside = functions["nms.masks"] > 0
  scores = np.where(functions["nms.scores"] > 0.5, functions["nms.scores"], 0)
  kept = suppress_overlaps(pairwise_iou(inside, inside), scores, 0.1)
  np.testing.assert_array_equal(kept, functions["nms.keep"])
  masks, tracks = functions["associate.masks"] > 0, functions["associate.tracks"] > 0
  ids, empty = functions["associate.ids"], ~tracks.any(axis=(1, 2))
  iou = pairwise_iou(masks, tracks)
  found = associate(iou, functions["associate.scores"], empty, np.ones(6, bool), 99, META)
  assert np.flatnonzero(found.new).tolist() == functions["associate.new"].tolist()
  assert ids[found.unmatched].tolist() == functions["associate.unmatched"].tolist()
  assert ids[found.empty].tolist() == functions["associate.empty"].tolist()
  q, n = np.nonzero(found.matched)
  assert pairs(np.stack([q, ids[n]], axis=1)) == pairs(functions["associate.matches"])
  high = [(int(ids[n]), int(q)) for n, q in enumerate(found.reconditions) if q >= 0]
  assert sorted(high) == pairs(functions["associate.high"])
  inside = np.unpackbits(functions["occlusion.masks"], axis=-1)[..., :48] > 0
  iou, empty = pairwise_iou(inside, inside), ~inside.any(axis=(1, 2))
  lives = Lifetimes.none().added(0, 6, META)._replace(last_occluded=functions["occlusion.last"])
  for reverse, wanted in ((False, "occlusion.forward"), (True, "occlusion.reverse")):
    _, hidden = hide_occluded(lives, iou, empty, 9, reverse, META)
    np.testing.assert_array_equal(hidden, functions[wanted])


def test_decisions_on_the_device_equal_those_on_the_host(goldens, functions):
  """The functions run under `jit`, with unused rows, over all frames of a case."""
  case = "heuristics"
  rules, count = CASES[case]
  slots = most = SLOTS

  @functools.partial(jax.jit, compiler_options=QUICK)
  def decide(lives, iou, pair_iou, scores, empty, alive, frame):
    found = associate(iou, scores, empty, alive, 99, rules, jnp)
    lives, verdict = judge(lives, found, alive, frame, False, rules, jnp)
    lives, hidden = hide_occluded(lives, pair_iou, empty, frame, False, rules, jnp)
    return found, lives, verdict, hidden

  lives = Lifetimes.none()
  for name in frames_of(goldens, case):
    frame = int(goldens[f"{name}.frame"])
    found = detections(goldens, name, noise(count)[frame], rules)
    n = len(lives.first_frame)
    masks = np.zeros((n, 48, 48), bool)
    if n:
      masks = logits(goldens[f"{name}.raw_tracks"], noise(count)[frame])
      masks = np.stack([clean_mask(mask, rules.fill_hole_area) for mask in masks]) > 0
    iou, pair_iou = pairwise_iou(found.mask_logits > 0, masks), pairwise_iou(masks, masks)
    empty, alive = ~masks.any(axis=(1, 2)), np.ones(n, bool)
    host = associate(iou, found.scores, empty, alive, 99, rules)
    own, verdict = judge(lives, host, alive, frame, False, rules)
    own, hidden = hide_occluded(own, pair_iou, empty, frame, False, rules)

    def padded(x, *sizes):
      widths = [(0, size - have) for size, have in zip(sizes, x.shape, strict=True)]
      return np.pad(np.asarray(x), widths)

    table = Lifetimes(*(padded(x, *(slots,) * x.ndim) for x in lives))
    device = decide(
      table, padded(iou, most, slots), padded(pair_iou, slots, slots), padded(found.scores, most),
      padded(empty, slots), padded(alive, slots), frame,
    )  # fmt: skip
    q = len(found.scores)
    np.testing.assert_array_equal(device[0].new[:q], host.new)
    np.testing.assert_array_equal(np.asarray(device[0].order)[:q][host.new], host.order[host.new])
    np.testing.assert_array_equal(device[0].reconditions[:n], host.reconditions)
    np.testing.assert_array_equal(device[2].removed[:n], verdict.removed)
    np.testing.assert_array_equal(device[3][:n], hidden)
    for got, wanted in zip(device[1], own, strict=True):
      np.testing.assert_array_equal(np.asarray(got)[(slice(n),) * wanted.ndim], wanted)
    assert not np.asarray(device[2].removed)[n:].any()
    lives = own.added(frame, int(host.new.sum()), rules)
    lives = lives.without(np.pad(verdict.removed, (0, int(host.new.sum()))))
  scores = np.where(functions["nms.scores"] > 0.5, functions["nms.scores"], 0)
  inside = jnp.asarray(functions["nms.masks"] > 0)
  kept = suppress_overlaps(pairwise_iou(inside, inside, jnp), jnp.asarray(scores), 0.1, jnp)
  np.testing.assert_array_equal(kept, functions["nms.keep"])


def one_object(lost=0, **rules):
  """An object of frame 0 that no detection confirmed for some frames, and the rules."""
  rules = Rules(**rules)
  objects = ConceptObjects()
  mask = np.full((1, 8, 8), -4, np.float32)
  mask[0, 2:6, 2:6] = 4
  found = FrameDetections(np.array([0.9], np.float32), np.zeros((1, 4), np.float32), mask)
  decide(objects, 0, found, mask[:0], rules, room=5)
  for frame in range(20, 20 + lost):
    decide(objects, frame, found.select(np.zeros(1, bool)), mask, rules, room=5)
  return objects, found, mask, rules


def decide(objects, frame, found, mask, rules, room):
  logits = np.full(len(mask), 3, np.float32)
  return objects.decide(frame, found, mask, logits, rules, first_id=7 + frame, room=room)


def test_a_lost_object_ends_without_being_hidden_before():
  objects, found, mask, rules = one_object(lost=2, max_lost_frames=3)
  assert objects.ids == [7]
  decision = decide(objects, 22, found.select(np.zeros(1, bool)), mask, rules, room=5)
  assert (decision.gone, decision.removed, objects.ids) == ([7], [], [])
  objects, found, mask, rules = one_object(lost=2)
  decision = decide(objects, 22, found.select(np.zeros(1, bool)), mask, rules, room=5)
  assert decision.gone == []


def test_a_lost_object_gives_way_if_there_is_no_room():
  """Also to one of another concept; the one that was lost the longest is first."""
  objects, found, mask, rules = one_object(lost=2)
  longer, *_ = one_object(lost=3)
  longer.ids, longer.scores = [9], {9: 0.9}
  other = found._replace(mask_logits=-mask)
  decisions = [
    decide(objects, 23, other, mask, rules, room=0),
    decide(longer, 23, found.select(np.zeros(1, bool)), mask, rules, room=0),
    decide(ConceptObjects(), 23, found, mask[:0], rules, room=0),
  ]
  assert [one.dropped for one in decisions] == [1, 0, 1]
  every = [objects, longer, ConceptObjects()]
  for some, gone in ((slice(1, 3), [[9], []]), (slice(0, 3), [[7], [9], []])):
    replace_lost(every[some], decisions[some])
    assert [one.gone for one in decisions[some]] == gone
  assert (objects.ids, longer.ids) == ([], [])
  objects, found, mask, rules = one_object()
  seen = decide(objects, 20, found, mask, rules, room=0)
  replace_lost([objects, ConceptObjects()], [seen, decisions[2]])
  assert (seen.gone, objects.ids) == ([], [7])


def test_an_object_that_was_never_occluded_is_hidden_in_a_backward_pass_only():
  lives = Lifetimes.none().added(0, 2, Rules())._replace(last_occluded=np.array([-1, 5]))
  same, empty = np.ones((2, 2)), np.zeros(2, bool)
  for reverse, wanted in ((False, [False, False]), (True, [True, False])):
    assert hide_occluded(lives, same, empty, 4, reverse, Rules())[1].tolist() == wanted


def test_rules_are_checked_and_metas_differ_only_where_said():
  changed = {
    name for name, value in dataclasses.asdict(Rules()).items()
    if value != getattr(Rules.meta(), name)
  }  # fmt: skip
  assert changed == {"boxes_on_next_frame", "keep_unprompted", "replace_lost"}
  with pytest.raises(ValueError, match=r"rules new_det_thresh must be in \[0, 1\]; got 1.5"):
    Rules(new_det_thresh=1.5)
  with pytest.raises(ValueError, match=r"max_num_objects must be .* from 1 to 128; got 200"):
    Rules(max_num_objects=200)
  with pytest.raises(ValueError, match=r"rules hotstart_delay must be .* from 0 to 65536; got -1"):
    Rules(hotstart_delay=-1)


def test_detections_replace_tracked_masks_where_both_match_best():
  for trust, wanted in ((0.0, {}), (0.5, {7: 0}), (0.99, {})):
    objects, found, mask, rules = one_object(trust_detections=trust)
    smaller = found.mask_logits.copy()
    smaller[0, 2] = -4
    shifted = found.mask_logits.copy()
    shifted[0, 2:4] = -4
    both = FrameDetections(
      np.array([0.9, 0.9], np.float32), np.zeros((2, 4), np.float32),
      np.concatenate([smaller, shifted]),
    )  # fmt: skip
    assert decide(objects, 1, both, mask, rules, room=5).refined == wanted
