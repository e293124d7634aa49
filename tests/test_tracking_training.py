"""Training the tracker: what a clip computes is what a session computes, and the command."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_video
import training_files
import training_model
import training_runs
from support import QUICK, assert_close

from sam3_jax import VisualPrompt
from sam3_jax.checkpoint import bundle
from sam3_jax.cli.main import main
from sam3_jax.config import VideoConfig
from sam3_jax.inference.video import selection
from sam3_jax.inference.video.functions import VideoFunctions
from sam3_jax.model.video import tracker
from sam3_jax.training import sharding, step, tracker_init, tracking, trainer
from sam3_jax.training.config import TrainConfig
from sam3_jax.training.tracker_init import new_tracker
from sam3_jax.training.video_examples import CLICK, ClipBatch
from sam3_jax.utils.param_tree import flatten, nest

files = training_files.files
quick = training_runs.quick
FRAMES, CORRECTED, LENGTH = 7, 3, 20
CLICKS = (8.5, 8.5), (20.5, 12.5)


@pytest.mark.parametrize("seed", range(8))
def test_reads_equal_those_of_a_session(seed):
  """The memories and pointers of every frame, with random scores and prompted frames."""
  rng = np.random.default_rng(seed)
  video = VideoConfig(memories=int(rng.integers(2, 8)))
  prompted = [0, *(t for t in range(1, 8) if rng.random() < 0.25)]
  scores = {t: float(rng.choice([0.0, 0.005, 0.5])) for t in range(1, 8) if t not in prompted}
  for t in range(1, 8):
    earlier = {p: score for p, score in scores.items() if p < t}
    conditioning = [p for p in prompted if p < t]
    previous = selection.previous_frames(
      earlier, t, length=LENGTH, min_score=video.rules.min_memory_score
    )
    want = selection.plan_reading(
      conditioning, previous, earlier, t, memories=video.memories, length=LENGTH
    )
    found = tracking.plan_reads(
      jnp.array([[scores.get(p, 1.0) for p in range(t)]], jnp.float32),
      jnp.array([p in prompted for p in range(t)]),
      video,
    )
    index, valid, time, pointed = (np.asarray(x)[0] for x in found)
    assert {(p, int(index[p])) for p in range(t) if valid[p]} == set(want.memories)
    read = {(p, round(float(time[p]), 5)) for p in range(t) if pointed[p]}
    assert read == {(p, round(x, 5)) for p, x in want.pointers}


@pytest.mark.slow
@pytest.mark.parametrize("separate", [False, True])
def test_a_clip_is_tracked_as_in_a_session(monkeypatch, separate):
  """Two clicked objects, and a correction of both: scores of every frame. If objects are separate,
  the second one has the same clicks as the first, and is hidden on some frames."""
  rules = dataclasses.replace(small_video.VIDEO.rules, separate_objects=separate)
  config = dataclasses.replace(
    small_video.SMALL, video=dataclasses.replace(small_video.VIDEO, rules=rules)
  )
  clicks = CLICKS[:1] * 2 if separate else CLICKS
  model, side = small_video.small_model(config=config), config.image_size
  frames = np.full((LENGTH, side, side, 3), 40, np.uint8)
  for t, frame in enumerate(frames):
    frame[4 + t : 14 + t, 2 + t : 12 + t] = (230, 90, 30)

  session = model.video(list(frames))
  ids = [session.add(VisualPrompt(points=[point])) for point in clicks]
  for _ in session.run(stop=CORRECTED + 1):
    pass
  before = [session.tracker.state.owners[i].record(CORRECTED) for i in ids]
  for i in ids:
    session.correct(i, CORRECTED, points=[[16, 16]], point_labels=[1])
  for _ in session.run(start=CORRECTED, stop=FRAMES):
    pass
  records = [[session.tracker.state.owners[i].record(t) for i in ids] for t in range(1, FRAMES)]
  records[CORRECTED - 1] = before
  want = {
    "object_logit": np.array([[r.object_logits[0] for r in row] for row in records]),
    "iou": np.array([[r.iou[0] for r in row] for row in records]),
  }

  calls = iter(range(FRAMES - 1))

  def note(found, *_):
    call = next(calls)
    empty = jnp.zeros((FRAMES - 1, *found.iou.shape), jnp.float32)
    return {name: empty.at[call].set(getattr(found, name)) for name in want}

  def middle(key, mask, inside):
    return jnp.full((len(mask), 2), 0.5, jnp.float32), jnp.ones(len(mask), jnp.int32)

  monkeypatch.setattr(tracking, "_frame_sums", note)
  monkeypatch.setattr(tracking, "corrective_click", middle)
  labels = np.full((1, 2, 2), -1, np.int32)
  labels[:, :, 0] = 1
  xy = np.zeros((1, 2, 2, 2), np.float32)
  xy[0, :, 0] = np.array(clicks) / side
  clips = _clips(frames[None, :FRAMES], xy=xy, labels=labels, kind=np.array([CLICK], np.int32))
  functions = VideoFunctions(config, jnp.float32)

  @jax.jit
  def run(params, clips):
    key = jax.random.key(0)
    return tracking.tracking_sums(params, functions, config.video, clips, key)

  compiled = run.lower(model.params, clips).compile(compiler_options=QUICK)
  got = compiled(model.params, clips)
  if separate:
    hidden = want["object_logit"] <= -10
    assert hidden.any()
    for scores in (want, got):  # in training, the scores before an object is hidden
      scores["object_logit"] = np.where(hidden, 0, scores["object_logit"])
  # Rounding decides which of two almost equal objects has a cell: 4e-5 was measured.
  assert_close(got, want, rel=4e-4 if separate else 2e-5)


def _clips(frames, **fields):
  """Clips of two visible objects, corrected on one frame."""
  clips, count, side = len(frames), frames.shape[1], small_video.SMALL.mask_size
  masks = np.zeros((clips, count, 2, side, side), np.uint8)
  masks[:, :, 0, :4, :4], masks[:, :, 1, 8:12, 8:12] = 255, 255
  corrected = np.zeros((clips, count), bool)
  corrected[:, CORRECTED] = True
  values = {
    "frames": frames,
    "sizes": np.full((clips, 2), frames.shape[2], np.int32),
    "ids": np.arange(clips, dtype=np.int32),
    "masks": masks,
    "visible": np.ones((clips, count, 2), bool),
    "valid": np.ones((clips, 2), bool),
    "corrected": corrected,
  }
  return ClipBatch(**values | fields)


def test_losses_of_a_frame():
  """One object found exactly, one missed, one that is absent, and padding."""
  inside = np.zeros((4, 4, 4), bool)
  inside[:2, :2, :2] = True
  logits = np.full((4, 4, 4), -20, np.float32)
  logits[0][inside[0]] = 20
  found = tracking.TrackedObjects(
    jnp.array(logits), jnp.array([0.9, 0.3, 0.2, 0.7]), jnp.array([2.0, 2.0, -3.0, 9.0]), None
  )
  sums = tracking._frame_sums(
    found, jnp.array(inside, jnp.float32), jnp.array(inside), jnp.array([True, True, True, False])
  )
  assert sums["objects"] == 3
  assert sums["visible"] == 2
  assert sums["tracked_iou"] == pytest.approx(1)
  assert sums["mask"] == pytest.approx(20 * 4 / 16, rel=1e-5)
  assert sums["dice"] == pytest.approx(1 - 1 / 5, rel=1e-5)
  assert sums["iou"] == pytest.approx(0.1**2 + 0.3**2 + 0.2**2, rel=1e-5)
  assert sums["object"] == pytest.approx(2 * np.log1p(np.exp(-2)) + np.log1p(np.exp(-3)), rel=1e-5)


@pytest.fixture
def clip_run(files):
  """A run of three steps on clips, from the checkpoint of `files`."""
  video = dataclasses.asdict(small_video.VIDEO) | {"rules": {}}
  values = {
    "objective": "video", "steps": 3, "save_every": 2, "tracker": video, "ema_decay": 0.5,
    "clips": {"batch_size": 2, "frames": 3, "max_objects": 2, "prefetch": 0, "size": [64, 64],
      "mask_probability": 1.0, "box_probability": 0.0},
    "optimizer": {"name": "muon", "learning_rate": 0.1, "warmup_steps": 0, "cooldown_steps": 0},
  }  # fmt: skip
  (files / "clips.json").write_text(json.dumps(values))
  return files / "clips.json"


@pytest.fixture
def random_tracker(monkeypatch):
  """New trackers get random parameters from NumPy: compiling `init` takes longer than a test."""
  shapes = {}

  def init(config, key):
    shapes.setdefault(config.video, tracker.parameter_shapes(config))
    return nest(training_model.random_parameters(shapes[config.video]))

  monkeypatch.setattr(tracker_init, "init", init)
  monkeypatch.setattr(tracker_init, "_coarse_cells", lambda model, parts: cells(model.width))


def cells(width):
  """Cells of coarse maps: a few channels vary much, and all have a large mean."""
  rng = np.random.default_rng(0)
  mixed = rng.standard_normal((500, width)) * np.geomspace(9, 1, width) @ rotation(width, rng)
  return np.float32(mixed + 20 * rng.standard_normal(width))


def rotation(width, rng):
  return np.linalg.qr(rng.standard_normal((width, width)))[0]


def train(path, out="out"):
  folder = path.parent
  return ["train", str(path), "--checkpoint", str(folder / "toy"), "--out", str(folder / out)]


@pytest.mark.slow
def test_training_changes_only_the_tracker(clip_run, files, monkeypatch):
  """All other parameters are equal, bit for bit; the trained checkpoint tracks."""
  monkeypatch.setattr(
    trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:1], fsdp)
  )
  quickly = step.make_step
  monkeypatch.setattr(trainer, "make_step", lambda *given: quickly(*given, compiler_options=QUICK))
  monkeypatch.setattr(tracker_init, "SCENES", 1)
  assert main(train(clip_run)) == 0
  loaded = bundle.load(files / "out" / "final")
  assert loaded.config.video == small_video.VIDEO
  found = flatten(jax.device_get(loaded.params))
  for path, x in (training_model.parameters() | training_model.visual_parameters()).items():
    np.testing.assert_array_equal(found[path], x, err_msg=path)
  begun = new_tracker(small_video.SMALL, nest(found), 0)
  same = [path for path, x in flatten(begun, "video/").items() if np.array_equal(found[path], x)]
  assert same == []
  assert main(train(clip_run)) == 0  # a finished run


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"trainable": "visual/.*"}, "trainable matches visual/"),
    ({"lora": {"rank": 2}}, "the objective video trains a tracker on top of a checkpoint's model"),
    ({"clips": None}, "clips are for the objective video, which needs them"),
    ({"best_metric": "cgf1"}, "best_metric must be one of jf_mask, jf_click_1; got 'cgf1'."),
    ({"video": {"dice_weight": -1}}, "video.dice_weight must be 0 or more; got -1."),
    ({"scenes": {}}, "the objective video trains on clips: remove annotations and scenes."),
    ({"gradient_accumulation_steps": 3}, "clips.batch_size 2 cannot be divided into 3"),
    ({"clips": {"image_size": 48}}, "clips.image_size must be the run's image_size, 32; got 48"),
    ({"clips": {"frames": 17}}, "clips.frames must be at most 16; got 17."),
    (
      {"clips": {"frames": 8, "max_corrected": 4}},
      "clips.max_corrected 4 must be less than the 4 conditioning frames that the tracker reads.",
    ),
    ({"mask_size": 10}, "mask_size must be a multiple of 16 for this model; got 10."),
  ],
)
@pytest.mark.usefixtures("quick", "random_tracker")
def test_invalid_configurations_are_refused(clip_run, capsys, values, message):
  clip_run.write_text(json.dumps(json.loads(clip_run.read_text()) | values))
  assert main(train(clip_run)) == 2
  error = capsys.readouterr().err
  assert message in error
  assert error.count("\n") == 1


def test_a_checkpoint_without_the_visual_head_is_refused(clip_run, files, capsys):
  tokenizer = (files / "toy" / "tokenizer.model").read_bytes()
  params = nest(training_model.parameters())
  bundle.save(files / "bare", params, training_model.CONFIG, tokenizer, info={"name": "bare"})
  command = train(clip_run)
  command[command.index("--checkpoint") + 1] = str(files / "bare")
  assert main(command) == 2
  assert "train it first, with objective visual." in capsys.readouterr().err


def test_fields_of_other_objectives_are_refused():
  for values, message in (
    ({"video": {"mask_weight": 1.0}}, "video is for the objective video, but the objective is"),
    ({"clips": {}}, "clips are for the objective video"),
    ({"tracker": {}}, "tracker is for the objective video; the objective is detection"),
  ):
    with pytest.raises(ValueError, match=message):
      TrainConfig.from_dict({"checkpoint": "x"} | values)


def test_check_reads_no_parameters(clip_run, files, capsys):
  assert main([*train(clip_run), "--check"]) == 0
  assert "clips of 100,000 moving scenes to train on" in capsys.readouterr().out


@pytest.mark.usefixtures("random_tracker")
def test_a_new_tracker_finds_the_same_content_anywhere():
  """In the channels that rotary positions hardly turn, a cell's query is most similar to the memory
  of the same cell; the other channels of the first layer prefer near cells."""
  video = dataclasses.replace(small_video.VIDEO, layers=2)
  model = dataclasses.replace(small_video.SMALL, video=video)
  flat = flatten(new_tracker(model, {}, 0))
  encoder, cross = "memory_encoder", "memory_attention/layers/cross_attn"
  x = cells(model.width)[:20]
  memory = x @ flat[f"{encoder}/image_project/kernel"][0, 0]
  memory = memory + flat[f"{encoder}/image_project/bias"]
  memory = memory @ flat[f"{encoder}/project/kernel"][0, 0]
  count = video.memory_channels * tracker_init.SHARE[0] // tracker_init.SHARE[1]
  slow = tracker_init.slow_channels(model.width)
  normalized = (x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True)
  for layer in range(2):
    query, key = (
      given @ flat[f"{cross}/{name}/kernel"][layer] + flat[f"{cross}/{name}/bias"][layer]
      for name, given in (("query", normalized), ("key", memory))
    )
    same = query[:, slow[:count]] @ key[:, slow[:count]].T
    assert (np.argmax(same, axis=1) == np.arange(20)).mean() >= 0.9  # 0.05 by chance
  near = [channel for channel in slow[count:] if channel < model.width // 2]
  assert len(near)
  assert (flat[f"{cross}/key/bias"][0, near] == tracker_init.POSITION).all()


def test_slow_channels():
  """Both parts of both axes' pairs, from the lowest frequency up."""
  frequency = np.tile(10000 ** (-np.arange(0, 16, 4) / 16), 4)
  found = tracker_init.slow_channels(16)
  assert sorted(found) == list(range(16))
  assert (np.diff(frequency[found]) >= 0).all()
