"""Tracking through `Sam3.track` and `Sam3.video`: streams, groups, corrections, files, errors."""

import itertools

import numpy as np
import pytest
from small_video import SIZE, moving_frames, small_model

from sam3_jax import VisualPrompt
from sam3_jax.inference.video import groups
from sam3_jax.inference.video.session import VideoSession
from sam3_jax.rules import Rules

HEIGHT, WIDTH = SIZE
CLICK = VisualPrompt(points=[[5, 5]])
OTHER = VisualPrompt(points=[[30, 12]])


@pytest.fixture(scope="module")
def model():
  return small_model()


def square(x, y, side=8):
  mask = np.zeros(SIZE, bool)
  mask[y : y + side, x : x + side] = True
  return mask


def values(frame):
  """What a frame shows, to compare."""
  found = frame.instances
  return (
    frame.index, found.ids.tolist(), found.scores.tolist(), found.boxes.tolist(),
    [found.masks.rle(i) for i in range(len(found))],
  )  # fmt: skip


def results(frames):
  return [values(frame) for frame in frames]


def test_track_yields_every_frame(model):
  frames = list(model.track(moving_frames(5), [CLICK, OTHER]))
  assert [frame.index for frame in frames] == [0, 1, 2, 3, 4]
  assert all(frame.size == SIZE for frame in frames)
  found = frames[0].instances
  assert found.ids.tolist() == [1, 2]
  assert found.masks[0].shape == SIZE
  for mask, (x0, y0, x1, y1) in zip(np.asarray(found.masks), found.boxes.astype(int), strict=True):
    assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
  assert ((found.scores > 0.5) & (found.scores <= 1)).all()


def test_endless_source_keeps_nothing(model):
  def camera():
    for t in itertools.count():
      yield moving_frames(40)[t % 40]

  session = model.video(camera(), history=False)
  frames = session.stream({None: [CLICK]})
  taken = list(itertools.islice(frames, 45))
  assert [frame.index for frame in taken] == list(range(45))
  (group,) = session.tracker.state.groups
  assert len(group.previous) <= 20
  assert len(group.rows) <= 20
  assert len(group.backward) <= 20
  assert list(session.tracker.state.store) == [(1, 0)]
  frames.close()


@pytest.mark.parametrize("selection", [True, False])
def test_stream_equals_session(model, monkeypatch, selection):
  """What a stream forgets is never read. Two thirds of the frames have low scores."""
  monkeypatch.setattr(groups, "frame_score", lambda logits, iou: float(int(iou[0] * 1e6) % 3 == 0))
  frames = moving_frames(60)
  rules = model.config.video.rules
  rules = type(rules)(memory_selection=selection)
  streamed = results(model.track(frames, CLICK, rules=rules))
  session = model.video(frames, rules=rules)
  session.add(CLICK)
  assert results(session.run()) == streamed
  unread = len(session.tracker.state.owners[1].previous)
  assert unread == 59


@pytest.mark.slow
def test_prompts_on_different_frames(model):
  frames = moving_frames(8)
  got = results(model.track(frames, {0: CLICK, 3: [OTHER, square(3, 3)]}))
  assert [ids for _, ids, *_ in got] == [[1]] * 3 + [[1, 2, 3]] * 5
  session = model.video(frames)
  session.add(CLICK, 0)
  session.add(OTHER, 3)
  session.add(mask=square(3, 3), frame=3)
  close(results(session.run()), got)
  assert len(session.tracker.state.groups) == 3
  alone = model.video(frames)
  alone.add(OTHER, 3, identity=2)
  close(results(alone.run()), [one(x, 2) for x in got[3:]])


def one(result, identity):
  index, ids, *parts = result
  i = ids.index(identity)
  return index, [identity], *([part[i]] for part in parts)


def close(got, want):
  """Equal but for the rounding of other batches."""
  assert [x[:2] for x in got] == [x[:2] for x in want]
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a[2], b[2], rtol=1e-5)


def test_clip_of_every_second_frame(model):
  frames = moving_frames(9)
  got = results(model.track(frames, CLICK, start=1, stop=8, every=2))
  assert [index for index, *_ in got] == [1, 3, 5, 7]
  assert [x[1:] for x in got] == [x[1:] for x in results(model.track(frames[1:8:2], CLICK))]


def test_both_directions(model):
  session = model.video(moving_frames(7))
  session.add(CLICK, 3)
  assert [frame.index for frame in session.run("both")] == [3, 4, 5, 6, 3, 2, 1, 0]
  assert [frame.index for frame in session.run("backward", stop=1)] == [3, 2]
  assert values(session.at(3))[1] == [1]


def test_masks_of_one_frame_are_one_group(model):
  session = model.video(moving_frames(3))
  session.add(mask=square(2, 2))
  session.add(mask=square(6, 6))
  session.add(CLICK)
  list(session.run())
  session.add(mask=square(20, 5))
  assert [group.objects for group in session.tracker.state.groups] == [[1, 2], [3], [4]]
  shown = np.asarray(session.at(0).instances.masks)
  assert not (shown[0] & shown[1]).any()


def test_object_leaves_its_group_on_a_frame_that_was_not_tracked(model):
  session = model.video(moving_frames(6))
  session.add(mask=square(2, 2))
  session.add(mask=square(20, 6))
  list(session.run(stop=3))
  session.correct(2, 2, points=[[22, 8]])
  assert [group.objects for group in session.tracker.state.groups] == [[1, 2]]
  session.correct(2, 5, points=[[22, 8]])
  assert [group.objects for group in session.tracker.state.groups] == [[1], [2]]
  assert {x[0] for x in results(session.run())} == set(range(6))


def test_a_backward_pass_keeps_the_objects_that_it_does_not_track(model):
  session = model.video(moving_frames(6))
  session.add(CLICK)
  session.add(OTHER, 4)
  shown = {}  # by frame: the last line of a frame counts in files of tracks
  for frame in session.run("both"):
    shown.setdefault(frame.index, []).append(frame.instances)
  for index in range(1, 4):
    first, last = shown[index]
    assert (first.ids.tolist(), last.ids.tolist()) == ([1], [1, 2])
    np.testing.assert_array_equal(first.masks[0], last.masks[0])


def test_removed_object_is_gone(model):
  session = model.video(moving_frames(4))
  for prompt in (CLICK, OTHER):
    session.add(prompt)
  frames = session.run()
  assert next(frames).instances.ids.tolist() == [1, 2]
  session.remove(1)
  assert next(frames).instances.ids.tolist() == [2]
  assert session.objects == [2]
  assert session.add(CLICK, 2) == 3
  assert session.tracker.state.slots[3] == 0
  assert next(frames).instances.ids.tolist() == [2, 3]


def test_removed_mask_leaves_no_group_behind(model, tmp_path):
  frames = moving_frames(3)
  session = model.video(frames)
  session.add(CLICK)
  session.add(mask=square(3, 9))
  session.remove(2)
  session.save(tmp_path / "session")
  loaded = VideoSession.load(model, tmp_path / "session", frames)
  assert loaded.add(mask=square(5, 9)) == 3
  assert [group.objects for group in loaded.tracker.state.groups] == [[1], [3]]


def test_rules_of_a_session_decide_whether_objects_overlap(model):
  def overlaps(separate):
    rules = Rules(separate_objects=separate, min_memory_score=0.02)
    shared = []
    for frame in model.track(moving_frames(2), [CLICK, OTHER], rules=rules):
      masks = np.asarray(frame.instances.masks)
      shared.append((masks.sum(axis=0) > 1).any())
    return shared[1]

  assert overlaps(False)
  assert not overlaps(True)
  programs = model.video_programs
  other = programs.with_rules(Rules(separate_objects=True))
  assert programs.with_rules(Rules(max_points=2)) is programs
  assert other is programs.with_rules(Rules(separate_objects=True, max_points=2))
  assert other.answer is programs.answer


@pytest.mark.slow
def test_store_on_disk_equals_store_in_memory(model, tmp_path):
  frames = moving_frames(40)
  got = []
  for options in ({}, {"budget": 20_000, "directory": tmp_path / "store"}):
    session = model.video(frames, **options)
    session.add(CLICK, 20)
    list(session.run("both"))
    session.correct(1, 5, points=[[7, 8]], memory=True)
    got.append(results(session.run("both")))
  assert got[0] == got[1]
  assert list((tmp_path / "store").iterdir())
  assert session.tracker.state.store.bytes_in_memory <= 20_000


def test_saved_session_continues(model, tmp_path):
  frames = moving_frames(30)
  for history in (True, False):
    session = model.video(frames, history=history)
    session.add(CLICK, 2)
    session.add(mask=square(3, 9), frame=4)
    running = session.run()
    got = results(itertools.islice(running, 20))
    session.save(tmp_path / "session")
    loaded = VideoSession.load(model, tmp_path / "session", frames)
    got += results(running)
    assert got[20:] == results(loaded.resume())
    assert loaded.objects == [1, 2]


def test_saved_session_keeps_prompts_that_were_not_used(model, tmp_path):
  frames = moving_frames(6)
  session = model.video(frames)
  session.add(CLICK)
  session.add(mask=square(3, 9))
  session.save(tmp_path / "session")
  loaded = VideoSession.load(model, tmp_path / "session", frames)
  assert loaded.add(mask=square(5, 9)) == session.add(mask=square(5, 9)) == 3
  assert [group.objects for group in loaded.tracker.state.groups] == [[1], [2, 3]]
  assert results(loaded.run()) == results(session.run())
  with pytest.raises(ValueError, match="video of 40 x 24 with 6 frames"):
    VideoSession.load(model, tmp_path / "session", frames[:4])
  damaged = bytearray((tmp_path / "session").read_bytes())
  damaged[len(damaged) // 2] ^= 255
  (tmp_path / "flipped").write_bytes(damaged)
  with pytest.raises(ValueError, match=r"flipped is damaged at .*CRC.*: remove it"):
    VideoSession.load(model, tmp_path / "flipped", frames)
  (tmp_path / "damaged").write_bytes((tmp_path / "session").read_bytes()[:300])
  with pytest.raises(ValueError, match="damaged"):
    VideoSession.load(model, tmp_path / "damaged", frames)


@pytest.mark.slow
def test_one_program_for_each_bucket_and_kind_of_prompt():
  model = small_model()
  frames = moving_frames(12)
  for count in (1, 2, 3, 4):
    list(model.track(frames, [CLICK] * count))
    list(model.track(frames, [square(i, i) for i in range(count)]))
  one_frame = dict(model.video_programs.compilations)
  assert one_frame["track"] == one_frame["remember"] == 3  # buckets 1, 2, 4
  assert one_frame["encode"] == one_frame["answer"] == one_frame["answer_mask"] == 1
  for _ in range(2):
    session = model.video(frames)
    for prompt in (CLICK, OTHER, VisualPrompt(box=[2, 2, 9, 9])):
      session.add(prompt, 3)
    list(session.run("both"))
    session.correct(1, 8, points=[[7, 8], [9, 9]], point_labels=[1, 0])
    session.correct(2, 9, mask=square(3, 3))
    session.correct(3, 1, points=[[7, 8]], memory=True)
    list(session.run("both"))
  counts = model.video_programs.compilations
  assert counts["track"] == one_frame["track"] + 1  # several conditioning frames
  assert counts["answer"] == counts["answer_mask"] == counts["answer_with_memory"] == 1
  assert counts["remember"] == 3
  assert counts["write"] <= 3


ERRORS = [
  (
    lambda s: s.add(VisualPrompt(points=[[41, 3]])),
    r"point \[41, 3\] is outside the 40 x 24 image",
  ),
  (lambda s: s.add(CLICK, 6), "frame 6 is after the end"),
  (lambda s: s.add(CLICK, -1), "frame number from 0"),
  (lambda s: s.add(CLICK, identity=1), "identity 1 is there already"),
  (lambda s: s.add(CLICK, identity="a"), "identity must be a whole number"),
  (lambda s: s.add(mask=np.zeros((24, 41), bool)), "mask is 24 x 41 .* are 24 x 40"),
  (lambda s: s.add(), "either a prompt"),
  (lambda s: s.add(CLICK, mask=square(1, 1)), "either a prompt"),
  (lambda s: s.correct(9, 0, points=[[3, 3]]), r"no object 9; there are \[1\]"),
  (lambda s: s.correct(1, 0), "needs points"),
  (lambda s: s.correct(2, 0, points=[[3, 3]]), "object 2 was removed"),
  (lambda s: s.remove(9), "no object 9"),
  (lambda s: s.add(CLICK, identity=2), "identity 2 was removed"),
  (lambda s: s.run("sideways"), "direction must be one of"),
  (lambda s: s.run(start=6), "frame 6 is after the end"),
  (lambda s: s.run(stop=-1), "stop is -1: give a frame number from 0"),
  (lambda s: s.run(stop=2.5), "stop is 2.5: give a frame number from 0"),
]


@pytest.fixture(scope="module")
def session(model):
  session = model.video(moving_frames(6))
  session.add(CLICK)
  session.add(CLICK)
  session.remove(2)
  return session


@pytest.mark.parametrize(("call", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_error(session, call, message):
  with pytest.raises(ValueError, match=message) as error:
    call(session)
  assert "\n" not in str(error.value)
  assert session.objects == [1]


@pytest.mark.parametrize("rules", [{"a": 1}, "x", {}])
def test_rules_of_another_type(model, rules):
  with pytest.raises(TypeError, match=r"^rules must be sam3_jax\.Rules, such as .*; got ") as error:
    model.track(moving_frames(2), CLICK, rules=rules)
  assert "\n" not in str(error.value)


def test_errors_of_sources_and_models(model):
  frames = moving_frames(3)
  with pytest.raises(ValueError, match="no frames"):
    model.track(frames[:0], CLICK)
  with pytest.raises(ValueError, match="no frames"):
    model.track(iter(()), CLICK)
  with pytest.raises(ValueError, match="no prompt given"):
    model.track(frames, [])
  with pytest.raises(TypeError, match="phrases, Prompts, VisualPrompts or masks"):
    model.track(frames, [3])
  with pytest.raises(ValueError, match="frame 7 is after the end"):
    model.track(frames, {7: CLICK})
  with pytest.raises(ValueError, match="frame 7 are outside the clip"):
    list(model.track(iter(frames), {7: CLICK}))
  with pytest.raises(ValueError, match=r"use model.track\(source"):
    model.video(iter(frames)).add(CLICK)
  with pytest.raises(ValueError, match="no object to track"):
    model.video(frames).run()
  for options in ({"start": "1s"}, {"stop": "1s"}, {"every": "0.5s"}):
    with pytest.raises(ValueError, match="no frame rate: give frame numbers"):
      model.video(frames, **options)
  with pytest.raises(ValueError, match="resample must be one of"):
    model.video(frames, resample="nearest")
  session = model.video(frames, history=False)
  session.add(CLICK)
  with pytest.raises(ValueError, match="one direction"):
    session.run("both")
  list(session.run())
  with pytest.raises(ValueError, match="keeps no history"):
    session.correct(1, 0, points=[[3, 3]])


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_prompts_on_several_frames_need_no_history(model, direction):
  """They are given before the pass, so the store has all that it reads."""

  def tracked(history):
    with model.video(moving_frames(30), history=history) as session:
      session.add(CLICK, 2)
      session.correct(1, 9, points=[[20, 12]])
      session.correct(1, 25, points=[[12, 14], [30, 4]], point_labels=[1, 0])
      return results(session.run(direction))

  assert tracked(False) == tracked(True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_memories_have_the_dtype_of_the_model(model, dtype):
  other = model if dtype == "float32" else small_model(dtype)
  with other.video(moving_frames(2)) as session:
    session.add(CLICK)
    list(session.run())
    assert session.tracker.state.bank.memory.dtype == dtype
    assert session.tracker.state.store.get((1, 1)).memory.dtype == dtype


def test_checkpoint_without_tracker(model):
  other = small_model()
  other.params = {name: tree for name, tree in other.params.items() if name != "video"}
  with pytest.raises(ValueError, match="small cannot track objects: it has no tracker; convert"):
    other.track(moving_frames(2), CLICK)


@pytest.mark.slow
def test_memory_is_flat(model):
  """300 frames of a stream: the resident memory at frame 100 and at the end."""

  def resident():
    with open("/proc/self/statm") as file:
      return int(file.read().split()[1]) * 4096

  def camera():
    for t in range(300):
      yield moving_frames(40)[t % 40]

  sizes = [resident() for _ in model.track(camera(), [CLICK, OTHER])]
  assert sizes[-1] - sizes[100] < 0.03 * sizes[100]
