"""Phrases and exemplar boxes in video against Meta's code (goldens/video/video.npz), from pixels,
and what is on purpose not as Meta's."""

import dataclasses

import numpy as np
import pytest
from golden_model import GOLDENS
from support import difference
from video_model import HEIGHT, WIDTH, video_frames, video_model, video_parts

from sam3_jax import Prompt, Rules, VideoSession, VisualPrompt
from sam3_jax.inference.video import concept_tracker
from sam3_jax.inference.video.concept_detector import ConceptDetector
from sam3_jax.inference.video.concept_tracker import ConceptTracker, share_equal_masks
from sam3_jax.inference.video.tracker import ObjectResult

PHRASE, BOX = "a moving shape", (0.3, 0.3, 0.5, 0.55)  # the box as fractions
META = Rules.meta()
# Largest difference over largest magnitude, as measured on a CPU. Ten times as much is allowed.
# From this call on, rounding decides the numbers of `box`: two of its objects are nearly equal, and
# one keeps 0.293 (SSE 4.2) or 0.304 (AVX 2) of its cells. It is remembered as hidden below 0.3.
ROUNDED = {"box": 8}
ROUNDED_CELLS = 0.01  # of a mask; measured 0.0048
MEASURED = {"scores": 6.3e-7, "logits": 2.4e-7, "masks": 3.3e-7, "memory": 1.9e-6, "pointer": 6e-7}


@pytest.fixture(scope="module")
def goldens():
  return dict(np.load(GOLDENS / "video" / "video.npz"))


@pytest.fixture(scope="module")
def model(goldens):
  """The seeded model, in which most frames have the concept."""
  model = video_model()
  params = video_parts()
  head = dict(params["decoder"]["presence_head"])
  bias = head["fc3"]["bias"] + np.float32(goldens["presence_bias_added"])
  head["fc3"] = dict(head["fc3"]) | {"bias": bias}
  params["decoder"] = dict(params["decoder"]) | {"presence_head": head}
  before, model.params = model.params, params
  yield model
  model.params = before


def prompt_of(case):
  box = [np.array(BOX) * [WIDTH, HEIGHT, WIDTH, HEIGHT]]
  return {
    "phrase": Prompt(PHRASE), "both": Prompt(PHRASE, boxes=box), "box": Prompt(boxes=box)
  }[case]  # fmt: skip


def unpacked(masks, width):
  return np.unpackbits(masks, axis=-1)[..., :width].astype(bool)


class Follower:
  """Runs a session beside a case of the goldens. Our ids count from 1, Meta's from 0."""

  def __init__(self, goldens, case, monkeypatch):
    self.goldens, self.case, self.calls = goldens, case, 0
    self.faults, self.errors = [], {}
    decide = ConceptTracker._decide

    def spy(tracker, concept, position, detections, clean, *rest):
      ids = list(concept.objects.ids)
      decision = decide(tracker, concept, position, detections, clean, *rest)
      self.frame(ids, position, detections, clean, decision, concept.objects)
      return decision

    monkeypatch.setattr(ConceptTracker, "_decide", spy)

  def measure(self, what, got, wanted):
    self.errors[what] = max(self.errors.get(what, 0), difference(got, wanted))

  def equal(self, what, got, wanted):
    got, wanted = np.asarray(got).tolist(), np.asarray(wanted).tolist()
    if got != wanted:
      self.faults.append(f"call {self.calls}, {what}: {got}, expected {wanted}")

  def frame(self, ids, position, detections, clean, decision, objects):
    name = f"{self.case}.{self.calls:03d}"
    golden = {key: self.goldens.get(f"{name}.{key}") for key in KEYS}
    self.equal("frame", position, golden["frame"])
    self.equal("ids", np.array(ids, int) - 1, golden["track_ids"])
    self.equal("number of detections", len(detections.scores), len(golden["det_scores"]))
    self.equal("new ids", np.array([*decision.new], int) - 1, golden["new_ids"])
    self.equal("new", [*decision.new.values()], golden["new_detections"])
    removed = sorted(golden["removed_ids"].tolist())
    self.equal("removed", np.array(sorted(decision.removed), int) - 1, removed)
    self.equal("ids after", np.array(objects.ids) - 1, golden["ids_after"])
    if len(detections.scores):
      self.measure("scores", detections.scores, golden["det_scores"])
    if ids and self.calls >= ROUNDED.get(self.case, 99):
      masks = np.array([clean[i].mask_logits for i in ids]) > 0
      wanted = unpacked(golden["track_mask_logits"], 48)
      self.equal("nearly equal", (masks != wanted).mean((1, 2)) <= ROUNDED_CELLS, [True] * len(ids))
    elif ids:
      logits = [clean[i].object_logit for i in ids]
      self.measure("logits", logits, golden["track_object_logits"])
      masks = np.array([clean[i].mask_logits for i in ids])
      if (wanted := golden["track_mask_logits"]).dtype == np.uint8:
        self.equal("masks", (masks > 0).sum(), unpacked(wanted, 48).sum())
        self.equal("masks", ((masks > 0) != unpacked(wanted, 48)).sum(), 0)
      else:
        self.measure("masks", masks, wanted)
    self.calls += 1

  def outputs(self, frames):
    for frame in frames:
      name, found = f"{self.case}.out.{frame.index}", frame.instances
      self.equal(f"{frame.index} shown ids", found.ids - 1, self.goldens[f"{name}.ids"])
      if not len(found):
        continue
      self.measure("scores", found.scores, self.goldens[f"{name}.scores"])
      wanted = unpacked(self.goldens[f"{name}.masks"], WIDTH)
      self.equal(f"{frame.index} pixels", (np.asarray(found.masks) != wanted).sum(), 0)
      # Meta's boxes end in the last pixel, ours after it.
      ends = self.goldens[f"{name}.boxes"] * [WIDTH, HEIGHT, WIDTH, HEIGHT]
      ends[:, 2:] += ends[:, :2] + 1
      np.testing.assert_allclose(found.boxes, ends, atol=1e-4)

  def memories(self, state):
    for name in self.goldens:
      parts = name.split(".")
      if parts[:2] != [self.case, "memory"] or parts[-1] != "ids":
        continue
      prefix, frame = name.removesuffix(".ids"), int(parts[2])
      features = self.goldens[f"{prefix}.features"]  # of the first two objects
      for j, identity in enumerate(self.goldens[name][: len(features)] + 1):
        stored = state.store.get((int(identity), frame))
        memory = np.asarray(stored.memory).reshape(-1, 12, 12)[:, ::2, ::2]
        self.measure("memory", memory, features[j])
        self.measure("pointer", stored.pointer, self.goldens[f"{prefix}.pointers"][j])


KEYS = (
  "frame", "track_ids", "det_scores", "new_ids", "new_detections", "removed_ids", "ids_after",
  "track_object_logits", "track_mask_logits",
)  # fmt: skip


@pytest.mark.parametrize("case", ["phrase", "both", "box"])
def test_every_frame_equals_metas(goldens, model, case, monkeypatch):
  length = len(goldens[f"{case}.order"])
  follower = Follower(goldens, case, monkeypatch)
  with model.video(video_frames()[:length], resample="bicubic", rules=META) as session:
    session.find(prompt_of(case))
    follower.outputs(session.run())
    follower.memories(session.tracker.state)
  assert follower.calls == sum(f"{case}.{i:03d}.frame" in goldens for i in range(99))
  assert not follower.faults, "\n".join(follower.faults[:5])
  for what, error in follower.errors.items():
    assert error <= 10 * MEASURED[what], f"{what}: {error:.1e}, measured {MEASURED[what]:.1e}"


def tracks(frames):
  return [
    (one.index, one.instances.ids.tolist(), np.asarray(one.instances.masks).tobytes(), one.phrases)
    for one in frames
  ]


@pytest.mark.slow
def test_a_stream_equals_a_session_and_frames_leave_late(model):
  # A stream counts as 16 frames or more, which changes the times of pointers in a shorter video.
  frames = video_frames()[np.arange(16) % 12]
  with model.video(frames) as session:
    session.find(PHRASE)
    wanted = tracks(session.run())
  asked = []

  def camera():
    for frame in frames:
      asked.append(len(asked))
      yield frame

  got = []
  for frame in model.track(camera(), PHRASE, rules=dataclasses.replace(Rules(), hotstart_delay=5)):
    assert len(asked) in (frame.index + 5, len(frames))
    got.append(frame)
  assert [one.index for one in got] == list(range(len(frames)))
  got = model.track(iter(frames), PHRASE)
  assert tracks(got) == wanted
  asked.clear()
  for frame in model.track(camera(), PHRASE, hold=0):
    assert len(asked) == frame.index + 1


@pytest.mark.slow
def test_several_phrases_are_found_as_each_of_them_alone(model):
  frames = video_frames()[:6]
  alone = {}
  for phrase in (PHRASE, "a yellow truck"):
    alone[phrase] = list(model.track(frames, phrase))
  click = VisualPrompt(points=[[100, 30]])
  clicked = list(model.track(frames, click))
  known = {}
  for both in model.track(frames, [PHRASE, "a yellow truck", click]):
    ids = both.instances.ids.tolist()
    assert len(set(ids)) == len(ids)
    for phrase in alone:
      one, wanted = both.of(phrase), alone[phrase][both.index].instances
      # Programs for another number of slots round differently, and these objects are nearly equal.
      differ = np.asarray(one.masks) != np.asarray(wanted.masks)
      assert differ.sum() <= 1e-4 * differ.size  # measured 1.3e-5
      np.testing.assert_array_equal(one.scores, wanted.scores)
      for mine, theirs in zip(one.ids.tolist(), wanted.ids.tolist(), strict=True):
        assert known.setdefault((phrase, theirs), mine) == mine
    one, wanted = both.of(None), clicked[both.index].instances
    np.testing.assert_array_equal(np.asarray(one.masks), np.asarray(wanted.masks))


@pytest.mark.slow
def test_many_phrases_are_detected_in_groups(model, monkeypatch):
  frames, phrases = video_frames()[:3], [f"{PHRASE} {n}" for n in range(4)] + [PHRASE]
  detect, numbers = ConceptDetector.detect, []

  def spy(tracker, embedding, prompts):
    numbers.append(len(prompts))
    return detect(tracker, embedding, prompts)

  monkeypatch.setattr(ConceptDetector, "detect", spy)
  wanted = tracks(model.track(frames, phrases))
  assert set(numbers[-3:]) == {5}
  numbers.clear()
  monkeypatch.setattr(concept_tracker, "TOGETHER", 2)
  assert tracks(model.track(frames, phrases)) == wanted
  assert any(ids for _, ids, *_ in wanted)
  assert numbers[-3:] == [2, 2, 1]


def test_a_box_keeps_its_objects_and_is_of_its_frame(goldens, model):
  frames = video_frames()
  with model.video(frames, resample="bicubic") as session:
    found = session.find(prompt_of("box"))
    shown = [frame.instances.ids.tolist() for frame in session.run()]
    assert set(found) <= set(session.objects)
    assert shown[-1]  # with Meta's rules all objects are removed on frame 8
    concept = session.finder.concepts[0]
    assert concept.prompt_on(1, False, session.tracker.state.rules) is None
    assert concept.prompt_on(1, False, META) is None
  both = dataclasses.replace(concept, prompt=prompt_of("both"))
  asked = [both.prompt_on(t, False, META) for t in range(3)]
  assert [len(one.boxes) for one in asked] == [boxes for _, _, boxes in goldens["both.asked"]][:3]
  assert not both.prompt_on(1, False, Rules()).boxes


def test_wrong_prompts_and_options_are_refused(model):
  frames = video_frames()[:2]
  with pytest.raises(ValueError, match="outside"):
    list(model.track(frames, Prompt(boxes=[[500, 500, 510, 510]])))
  with pytest.raises(ValueError, match="phrase is empty"):
    list(model.track(frames, [""]))
  for twice in ([PHRASE, "a Moving  shape"], {0: PHRASE, 1: [prompt_of("both")]}):
    with pytest.raises(ValueError, match=r"phrase '.*' is given twice: give each phrase once\.$"):
      model.track(frames, twice)
  with pytest.raises(ValueError, match="hold must be a whole number of frames from 0"):
    list(model.track(frames, PHRASE, hold=-1))
  with model.video(frames) as session:
    with pytest.raises(TypeError, match="find takes one phrase"):
      session.find([PHRASE, "a dog"])
    with pytest.raises(ValueError, match="frame 7 is after the end"):
      session.find(PHRASE, 7)


def test_a_saved_session_continues_with_its_phrases_and_held_frames(model, tmp_path):
  frames = video_frames()[:7]
  rules = dataclasses.replace(Rules(), hotstart_delay=4)

  def session():
    one = model.video(frames, rules=rules)
    one.find(PHRASE)
    return one

  wanted = tracks(session().run())
  first = session()
  run = first.run()
  got = tracks([next(run), next(run)])
  first.save(tmp_path / "session.npz")
  second = VideoSession.load(model, tmp_path / "session.npz", frames)
  assert len(second.held.frames) == 3
  assert second.objects == first.objects
  assert got + tracks(second.resume()) == wanted


def test_a_found_object_is_removed_and_corrected(model):
  with model.video(video_frames()[:4]) as session:
    found = session.find(PHRASE)
    list(session.run())
    session.remove(found[1])
    session.correct(found[2], 2, points=[[100, 30]])
    session.correct(found[2], 2, points=[[100, 30], [20, 100]], point_labels=[1, 0])
    for frame in session.run():
      assert found[1] not in frame.instances.ids
    assert found[1] not in session.objects
    shown = session.at(2)
    assert set(shown.phrases) == {PHRASE}
    assert session.find("a yellow truck")[0] > max(found)


def test_objects_with_the_same_mask_share_no_cell():
  rng = np.random.default_rng(0)
  mask = rng.standard_normal((8, 8)).astype(np.float32) * 4
  other = mask + rng.standard_normal((8, 8)).astype(np.float32) * 1e-5
  results = {
    3: ObjectResult(mask, 2.0, 0.9), 5: ObjectResult(-mask, 2.0, 0.8),
    9: ObjectResult(other, 1.9, 0.7), 11: ObjectResult(mask + 0.1, 2.0, 0.6),
  }  # fmt: skip
  shared = share_equal_masks(results)
  assert shared[9].mask_logits is mask
  assert (shared[9].object_logit, shared[9].iou) == (2.0, 0.7)
  assert all(shared[i] is results[i] for i in (3, 5, 11))


@pytest.mark.slow
def test_several_concepts_of_other_images_are_tracked(model):
  frames = video_frames()[:3]
  embedding = model.encode(frames[0])
  boxes = [[48, 36, 80, 66]], [[89, 7, 126, 45]]
  concepts = [model.concept(embedding, Prompt(boxes=one)) for one in boxes]
  with model.video(frames) as session:
    found = [session.find(concept) for concept in concepts]
    shown = list(session.run())
    assert [one.number for one in session.finder.concepts] == [0, 1]
  assert all(found)
  assert not set(found[0]) & set(found[1])
  assert all(frame.phrases == () for frame in shown)


def test_a_phrase_that_cannot_be_found_leaves_nothing_behind(model, monkeypatch):
  with model.video(video_frames()[:2]) as session:
    with monkeypatch.context() as patched:
      patched.setattr(ConceptDetector, "detect", lambda *_: 1 / 0)
      with pytest.raises(ZeroDivisionError):
        session.find(PHRASE)
    assert session.phrases == []
    assert (found := session.find(PHRASE))
    for prompt, frame in ((PHRASE.upper(), 0), (prompt_of("both"), 0), (PHRASE, 1)):
      with pytest.raises(ValueError, match="is given twice"):
        session.find(prompt, frame)
    assert session.objects == found
    with pytest.raises(ValueError, match=r"there is no phrase 'cat cat.*; there are \[") as error:
      session.forget(" ".join(["cat"] * 200))
    assert len(str(error.value)) < 200
    session.forget(PHRASE)
    assert session.find(PHRASE, 1)
