"""The tracker's network against Meta's code (goldens/video), stage by stage, and its invariances.

The goldens are outputs in float32 for two clicks on frame 0, and for the ten frames after it. Each
stage gets the recorded outputs of the frames before it.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import (
  GOLDENS,
  VIDEO_CONFIG,
  VIDEO_SEED,
  parameters,
  video_parameters,
  visual_parameters,
)
from PIL import Image
from support import QUICK, assert_close, difference, normal

from sam3_jax.config import RELEASED, VideoConfig
from sam3_jax.model.sam3 import Detector
from sam3_jax.model.video import tracker
from sam3_jax.model.video.tracker import VideoTracker, time_code
from sam3_jax.model.visual.head import VisualHead, no_prompts
from sam3_jax.model.visual.prompt_encoder import PromptEncoder
from sam3_jax.ops.bilinear import resize
from sam3_jax.types import VisualPrompts
from sam3_jax.utils.param_tree import flatten

LATEST = 6  # previous frames whose memories are read
# Largest difference over largest magnitude, the worst of all frames, as measured on a CPU. Ten
# times as much is allowed.
MEASURED = {
  "time code": 6.0e-8,
  "projected time code": 1.2e-7,
  "first mask": 1.4e-6,
  "mask": 1.8e-6,
  "iou": 2.8e-7,
  "object": 9.1e-8,
  "pointer": 7.2e-7,
  "prompted memory": 7.7e-7,
  "memory": 8.8e-7,
  "memory attention": 7.3e-7,
}
CLOSE = 2.5e-6  # of the same objects in other batches and orders; measured 2.7e-7


@pytest.fixture(scope="module")
def goldens():
  return dict(np.load(GOLDENS / "video" / "stages.npz"))


@pytest.fixture(scope="module")
def frames():
  """The second neck's maps of the first ten frames."""
  stored = np.load(GOLDENS / "video" / "frames.npz")
  return [encode(image) for image in stored["frames"][:10]]


def encode(image):
  """As Meta's video code reads a list of images: bicubic, normalized in float16."""
  half, size = np.float16, (VIDEO_CONFIG.image_size,) * 2
  pixels = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))
  pixels = ((pixels / np.float32(255)).astype(half) - half(0.5)) / half(0.5)
  trees = parameters(VIDEO_SEED), visual_parameters(VIDEO_SEED)
  return jax.device_get(_encode(*trees, pixels[None].astype(np.float32)))


@functools.partial(jax.jit, compiler_options=QUICK)
def _encode(detector, visual, pixels):
  trunk = lambda detector, pixels: detector.trunk(pixels)  # noqa: E731
  features = Detector(VIDEO_CONFIG).apply({"params": detector}, pixels, method=trunk)
  return VisualHead(VIDEO_CONFIG).apply({"params": visual}, features, method=VisualHead.encode)


def run(method, *args, dtype=jnp.float32):
  """Runs a jitted method of the tracker or of the visual head; returns NumPy arrays."""
  head = method.__qualname__.startswith("VisualHead")
  tree = visual_parameters(VIDEO_SEED) if head else video_parameters(VIDEO_SEED)
  return jax.device_get(_jitted(tree, args, method, jnp.dtype(dtype)))


@functools.partial(jax.jit, static_argnames=("method", "dtype"), compiler_options=QUICK)
def _jitted(params, args, method, dtype):
  module = VisualHead if method.__qualname__.startswith("VisualHead") else VideoTracker
  return module(VIDEO_CONFIG, dtype).apply({"params": params}, *args, method=method)


_resize = jax.jit(
  resize, static_argnames=("size", "antialias"), static_argnums=1, compiler_options=QUICK
)


def check(stage, got, want):
  off = difference(got, want)
  assert off <= 10 * MEASURED[stage], f"{stage}: off by {off:.1e}, measured {MEASURED[stage]:.1e}"


def mask_map(logits, binary):
  """The input of the memory encoder for the decoder's logits."""
  side = VIDEO_CONFIG.image_size
  logits = jax.device_get(_resize(logits, (side, side)))
  if binary:
    return np.where(logits > 0, np.float32(10), np.float32(-10))
  return 20 / (1 + np.exp(-logits)) - 10


def thin(memory):
  """As the goldens store memories: channels first, every second row and column."""
  grid = VIDEO_CONFIG.grid
  return memory.reshape(-1, grid, grid, memory.shape[-1]).transpose(0, 3, 1, 2)[..., ::2, ::2]


@pytest.fixture(scope="module")
def memories(goldens, frames):
  """The memory of each frame, from the recorded masks."""
  found = []
  for i in range(9):
    mask = mask_map(goldens[f"click.{i}.mask_logits"][:, 0], binary=i == 0)
    absent = goldens[f"click.{i}.object_logits"][:, 0] <= 0
    found.append(run(VideoTracker.encode_memory, frames[i].coarse[0], mask, absent))
  return found


def read(frame, frames, memories, goldens, slots=(10, 16)):
  """`read_memory` on a frame: the conditioning frame 0, then the latest frames, as Meta selects
  them."""
  kept, pointers = slots
  cells, channels = memories[0].shape[1:]
  memory = np.zeros((1, kept, cells, channels), np.float32)
  index, valid = np.zeros((1, kept), np.int32), np.zeros((1, kept), bool)
  previous = list(range(1, frame))
  conditioning = VIDEO_CONFIG.video.memories - 1
  rows = [(0, conditioning), *((i, frame - 1 - i) for i in previous[-LATEST:])]
  for slot, (i, code) in enumerate(rows):
    memory[:, slot], index[:, slot], valid[:, slot] = memories[i], code, True
  pointer = np.zeros((1, pointers, VIDEO_CONFIG.width), np.float32)
  time, known = np.zeros((1, pointers), np.float32), np.zeros((1, pointers), bool)
  # The oldest frame of the list gives no pointer.
  for slot, i in enumerate([0, *previous[:0:-1]]):
    pointer[:, slot], known[:, slot] = goldens[f"click.{i}.pointer"], True
    time[:, slot] = (frame - i) / (12 - 1)  # the video has 12 frames
  return frames[frame].coarse[0], memory, index, valid, pointer, time, known


def test_codes_of_time(goldens):
  times = goldens["time.positions"][None]
  code = jax.jit(time_code, static_argnums=1)(times, VIDEO_CONFIG.width)
  check("time code", code[0], goldens["time.code"])
  check("projected time code", run(project_time, times)[0], goldens["time.projected"])


def project_time(module, times):
  return module.pointer_time(time_code(times, module.config.width))


def test_clicks(goldens, frames):
  """Two clicks: the second one corrects the mask of the first."""
  image, (middle, fine) = frames[0].coarse, (frames[0].middle, frames[0].fine)
  xy = goldens["click.points"][None].astype(np.float32)
  labels, first = goldens["click.labels"][None].astype(np.int32), np.ones(1, bool)
  index = np.zeros(1, np.int32)

  one = VisualPrompts(index, xy[:, :1], labels[:, :1])
  found = run(VisualHead.detect_tracked, image, (middle, fine), one, first)
  best = found.mask_logits[:, 1 + found.iou[0, 1:].argmax()]
  check("first mask", _resize(best, (120, 160))[:, ::2, ::2], goldens["click.first"][:, 0])

  both = VisualPrompts(index, xy, labels, best.clip(-32, 32), first)
  found = run(VisualHead.detect_tracked, image, (middle, fine), both, first)
  check("mask", found.mask_logits[:, 0], goldens["click.0.mask_logits"][:, 0])
  check("object", found.object_logit, goldens["click.0.object_logits"][:, 0])
  check("iou", found.iou[:, 0], goldens["click.0.iou"][:, 0])
  pointer = run(VideoTracker.pointer, found.tokens[:, 0], found.object_logit > 0)
  check("pointer", pointer, goldens["click.0.pointer"])


def test_memories(goldens, memories):
  check("prompted memory", thin(memories[0]), goldens["click.0.cond_memory"])
  for i in (1, 2):
    check("memory", thin(memories[i]), goldens[f"click.{i}.memory_features"])
  tokens = np.concatenate([memories[0], *memories[3:9]], axis=1)
  spatial = tokens.shape[1] // 2  # every second one is stored
  check("memory", tokens[:, ::2], goldens["click.9.memory"][:, :spatial])


@pytest.mark.parametrize("frame", [1, 2, 9])
def test_tracked_frame(goldens, frames, memories, frame):
  """Conditions the frame, decodes it without a prompt, and makes the pointer of the best mask."""
  conditioned = run(VideoTracker.read_memory, *read(frame, frames, memories, goldens))
  recorded, key = goldens, f"click.{frame}"
  cells = conditioned.reshape(1, -1, VIDEO_CONFIG.width)[:, ::4]
  check("memory attention", cells, recorded[f"{key}.memory_attention"])

  levels = frames[frame].middle, frames[frame].fine
  found = run(VisualHead.detect_tracked, conditioned, levels, jax.device_get(no_prompts(1)))
  best = 1 + found.iou[0, 1:].argmax()
  check("mask", found.mask_logits[:, best], recorded[f"{key}.mask_logits"][:, 0])
  check("iou", found.iou[:, best], recorded[f"{key}.iou"])
  check("object", found.object_logit, recorded[f"{key}.object_logits"][:, 0])
  pointer = run(VideoTracker.pointer, found.tokens[:, best], found.object_logit > 0)
  check("pointer", pointer, recorded[f"{key}.pointer"])


def test_mask_prompt(goldens, frames):
  """A given mask is decoded on the map without the embedding for missing memory, and only for its
  pointer."""
  masks = np.unpackbits(goldens["masks.inputs"], axis=-1).astype(np.float32)
  side = 4 * VIDEO_CONFIG.mask_size
  logits = run(VideoTracker.mask_prompt_logits, _resize(masks, (side, side), antialias=True))
  objects = len(masks)
  prompts = dataclasses.replace(no_prompts(objects), mask=logits, has_mask=np.ones(objects, bool))
  levels = frames[0].middle, frames[0].fine
  found = run(VisualHead.detect_tracked, frames[0].coarse, levels, jax.device_get(prompts))
  pointer = run(VideoTracker.pointer, found.tokens[:, 0], masks.any(axis=(1, 2)))
  check("pointer", pointer, goldens["masks.0.cond_pointer"])


@pytest.fixture(scope="module")
def remembered():
  """Arguments of `read_memory`: three objects, the last one without memory and pointers."""
  cells, channels = VIDEO_CONFIG.grid**2, VIDEO_CONFIG.video.memory_channels
  valid = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]], bool)
  known = np.array([[1, 0], [0, 0], [0, 0]], bool)
  return [
    normal(1, VIDEO_CONFIG.grid, VIDEO_CONFIG.grid, VIDEO_CONFIG.width),
    normal(2, 3, 3, cells, channels),
    np.array([[6, 0, 1], [2, 6, 3], [0, 0, 0]], np.int32),
    valid,
    normal(3, 3, 2, VIDEO_CONFIG.width),
    np.array([[0.5, 1], [0.2, 0.4], [0, 0]], np.float32),
    known,
  ]


def test_padding_and_other_objects_change_nothing(remembered):
  coarse, *args = remembered
  together = run(VideoTracker.read_memory, coarse, *args)
  other = [np.array(x) for x in args]
  memory, index, valid, pointer, time, known = other
  memory[~valid], index[~valid], pointer[~known], time[~known] = 1e3, 4, 1e3, 9
  assert_close(run(VideoTracker.read_memory, coarse, *other), together, rel=CLOSE)
  alone = run(VideoTracker.read_memory, coarse, *(x[1:2] for x in args))
  assert_close(alone, together[1:2], rel=CLOSE)


def test_order_of_memories_changes_nothing(remembered):
  coarse, memory, index, valid, *pointers = remembered
  turned = (x[:, ::-1] for x in (memory, index, valid))
  back = (x[:, ::-1] for x in pointers)
  got = run(VideoTracker.read_memory, coarse, *turned, *back)
  assert_close(got, run(VideoTracker.read_memory, *remembered), rel=CLOSE)


def test_object_without_memory_gets_the_map_itself(remembered):
  np.testing.assert_array_equal(run(VideoTracker.read_memory, *remembered)[2], remembered[0])


@pytest.mark.slow
def test_gradients_are_finite(remembered):
  def total(params, coarse, *args):
    tracked = VideoTracker(VIDEO_CONFIG)
    return tracked.apply({"params": params}, coarse, *args, method=VideoTracker.read_memory).sum()

  gradient = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICK)
  grads = jax.device_get(gradient(video_parameters(VIDEO_SEED), *remembered))
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
  assert np.abs(grads[1]).min() > 0


def test_absent_objects(remembered):
  """Their pointer is a constant, and their memory is shifted in every cell."""
  params, present = video_parameters(VIDEO_SEED), np.array([True, False])
  pointer = run(VideoTracker.pointer, normal(4, 2, VIDEO_CONFIG.width), present)
  np.testing.assert_array_equal(pointer[1], params["no_object_pointer"])
  assert difference(pointer[0], params["no_object_pointer"]) > 0.1
  mask = np.full((2, 8, 8), -10, np.float32)
  seen, gone = run(VideoTracker.encode_memory, remembered[0], mask, ~present)
  expected = np.broadcast_to(params["no_object_memory"], seen.shape)
  assert_close(gone - seen, expected, rel=2e-6)  # measured 2.2e-7


def test_points_are_those_of_still_images():
  """A prompt with a point gets the tokens of `detect`; one without gets two instead of none."""
  xy, labels = np.float32([[[0.1, 0.2]], [[0.5, 0.5]]]), np.int32([[1], [-1]])
  still, still_valid = points(PromptEncoder.points, xy, labels)
  tracked, valid = points(PromptEncoder.tracked_points, xy, labels)
  np.testing.assert_array_equal(still[0], tracked[0])
  np.testing.assert_array_equal(still_valid, [[True, True], [False, False]])
  assert valid.all()
  not_a_point = visual_parameters(VIDEO_SEED)["prompt"]["not_a_point"]
  np.testing.assert_array_equal(tracked[1], np.repeat(not_a_point, 2, axis=0))


def points(method, xy, labels):
  @functools.partial(jax.jit, compiler_options=QUICK)
  def tokens(params, xy, labels):
    encoder = PromptEncoder(VIDEO_CONFIG.width, VIDEO_CONFIG.image_size)
    return encoder.apply({"params": params}, xy, labels, method=method)

  return jax.device_get(tokens(visual_parameters(VIDEO_SEED)["prompt"], xy, labels))


@pytest.mark.slow
def test_bfloat16(remembered):
  found = run(VideoTracker.read_memory, *remembered, dtype=jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  exact = run(VideoTracker.read_memory, *remembered)
  assert difference(found.astype(np.float32), exact) < 0.05  # measured 0.008


def test_released_sizes():
  config = dataclasses.replace(RELEASED, video=VideoConfig())
  shapes = flatten(tracker.parameter_shapes(config))
  # The 159 tensors of sam3.pt beyond those of visual prompts, without no_mem_pos_enc.
  assert sum(x.size for x in shapes.values()) == 7_521_521
  assert shapes["memory_attention/layers/cross_attn/key/kernel"].shape == (4, 64, 256)
  assert shapes["memory_encoder/mask/conv4/kernel"].shape == (3, 3, 64, 256)


def test_random_parameters_have_the_shapes_of_the_seeded_ones():
  made = flatten(tracker.parameter_shapes(VIDEO_CONFIG))
  seeded = flatten(video_parameters(VIDEO_SEED))
  assert {k: x.shape for k, x in made.items()} == {k: x.shape for k, x in seeded.items()}


def test_a_model_without_tracker_has_no_parameters_of_one():
  with pytest.raises(
    ValueError, match="this model has no tracker; its configuration needs `video`"
  ):
    tracker.parameter_shapes(RELEASED)
