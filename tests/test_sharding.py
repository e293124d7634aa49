"""The programs on a mesh: equal to one device, without collectives, and with sharded parameters."""

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import golden_model
import hlo
import jax
import numpy as np
import pytest
import tpu_batch
import training_model
from jax.sharding import PartitionSpec as P
from support import QUICK, assert_close, quick
from tpu_batch import lower_decoder, lower_encoder

from sam3_jax import Prompt, Sam3, Tokenizer, VisualPrompt
from sam3_jax.inference import sharding
from sam3_jax.inference.programs import Programs
from sam3_jax.inputs.prompts import pack
from sam3_jax.types import TextEmbedding
from sam3_jax.utils.param_tree import flatten, nest

CLOSE = 1e-5  # of the largest value; measured 2.0e-6 (masks), the order of sums
PROMPTS = [
  "yellow school bus",
  Prompt(boxes=[[3, 4, 20, 30]]),
  Prompt("ear", boxes=[[0, 0, 10, 10], [5, 5, 15, 20]], box_labels=[1, 0]),
  "cat",
  "ear",
]
INDEX = [0, 2, 2, 1, 0]


@pytest.fixture(scope="module")
def tokenizer(tokenizer_path):
  return Tokenizer(tokenizer_path)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(jax.devices()[:4])


@pytest.fixture(scope="module")
def images():
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((40, 60), (33, 20), (64, 48))]


@pytest.fixture(scope="module")
def alone(tokenizer, images):
  """The results of one device."""
  model = model_on(None, tokenizer)
  embedding = model.encode(images)
  return jax.device_get((embedding, model.decode(embedding, PROMPTS, INDEX, max_detections=4)))


def test_returning_the_trunk_s_map_costs_nothing():
  """`Sam3` and `batch` keep it for later visual prompts."""
  rows = (
    np.zeros((1, golden_model.CONFIG.image_size, golden_model.CONFIG.image_size, 3), np.uint8),
    np.ones((1, 2), int),
  )
  costs = []
  for keep in (lambda embedding, features: embedding, lambda *both: both):
    program: Any = Programs(golden_model.CONFIG, "float32", select_image=keep).encode
    compiled = program.lower(golden_model.parameters(), *rows).compile(compiler_options=QUICK)
    costs.append([compiled.cost_analysis()[name] for name in ("flops", "bytes accessed")])
  (flops, read), (kept_flops, kept_read) = costs
  assert kept_flops == flops > 1e9
  assert 0 <= kept_read - read <= 8  # one more pointer in the result


def model_on(mesh, tokenizer, rules=sharding.REPLICATED):
  parameters = golden_model.parameters()
  return quick(
    Sam3(golden_model.CONFIG, parameters, tokenizer, dtype="float32", mesh=mesh, rules=rules)
  )


@pytest.fixture(scope="module")
def four(mesh, tokenizer):
  """On four devices."""
  return model_on(mesh, tokenizer)


@pytest.mark.slow
def test_mesh_equals_one_device(four, images, alone):
  """Three images and five prompts, which four devices do not divide."""
  model, before = four, four.compilations
  embedding = model.encode(images)
  assert len(embedding) == 3
  found = model.decode(embedding, PROMPTS, INDEX, max_detections=4)
  assert_close(jax.device_get(embedding), alone[0], rel=CLOSE)
  assert_close(jax.device_get(found), alone[1], rel=CLOSE)
  one = model.decode(embedding, "cat", 1, max_detections=4)
  np.testing.assert_allclose(one.scores, alone[1].scores[3:4], atol=CLOSE)
  # Batches of 4 prompts; filled up, those of 5 are two.
  assert model.compilations == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("masked", [0, 3, 5])
def test_masks_above_min_score(four, alone, masked):
  """Prompts above a score are sharded again: none, fewer than devices, and more."""
  best = alone[1].scores.max(axis=1)
  limit = (
    float(np.append(np.sort(best)[::-1], 1e-9)[masked - 1 : masked + 1].mean()) if masked else 1.0
  )
  found = four.decode(alone[0], PROMPTS, INDEX, max_detections=4, min_score=limit)
  assert (best > limit).sum() == masked
  hidden = (best <= limit)[:, None, None]
  want = alone[1].replace(
    mask_logits=np.where(hidden[..., None], 0, alone[1].mask_logits),
    semantic_logits=np.where(hidden, 0, alone[1].semantic_logits),
    mask_min_score=np.where(best <= limit, limit, 0).astype(np.float32),
  )
  assert_close(jax.device_get(found), want, rel=CLOSE)


@pytest.fixture(scope="module")
def pairs(tokenizer):
  """On two groups of two devices, each with one copy of the kernels."""
  mesh = sharding.make_mesh(jax.devices()[:4], model=2)
  return model_on(mesh, tokenizer, sharding.BY_OUTPUTS)


@pytest.mark.slow
def test_sharded_parameters_equal_replicated_ones(pairs, images, alone):
  model = pairs
  kernels = {path: x for path, x in flatten(model.params).items() if path.endswith("fc1/kernel")}
  cut = [x.sharding.shard_shape(x.shape)[-1] * 2 == x.shape[-1] for x in kernels.values()]
  assert any(cut)
  assert not all(cut)
  embedding = model.encode(images)
  found = model.decode(embedding, PROMPTS, INDEX, max_detections=4)
  assert_close(jax.device_get(embedding), alone[0], rel=CLOSE)
  assert_close(jax.device_get(found), alone[1], rel=CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(("min_score", "programs"), [(0.0, 1), (1e-9, 2)])
def test_two_devices_share_a_prompt(pairs, alone, min_score, programs):
  """Two prompts for two groups, and one prompt, for which the second group computes nothing."""
  before = pairs.compilations
  for rows in ([3, 1], [3]):
    request = [PROMPTS[i] for i in rows], [INDEX[i] for i in rows]
    found = pairs.decode(alone[0], *request, max_detections=4, min_score=min_score)
    found, want = jax.device_get(found), alone[1][np.array(rows)]
    for name in ("scores", "boxes", "mask_logits", "semantic_logits"):
      assert_close(getattr(found, name), getattr(want, name), rel=CLOSE)
  assert pairs.compilations == before + programs


@pytest.mark.slow
def test_visual_prompts(tokenizer_path, images):
  """Of one image, which each device then has, and of several; with cut parameters. 17 prompts,
  which four devices do not divide."""
  params = nest(training_model.parameters() | training_model.visual_parameters())
  tokenizer = Tokenizer(tokenizer_path, context=training_model.CONFIG.text.context)
  mesh = sharding.make_mesh(jax.devices()[:4], model=2)
  rules = ((r"visual/.*/fc1/kernel", P(None, "model")), *sharding.REPLICATED)
  alone, shared = (
    quick(Sam3(training_model.CONFIG, params, tokenizer, dtype="float32", mesh=mesh, rules=rules))
    for mesh in (None, mesh)
  )
  cut = shared.params["visual"]["decoder"]["two_way"]["layer0"]["mlp"]["fc1"]["kernel"]
  assert cut.sharding.shard_shape(cut.shape)[1] * 2 == cut.shape[1]
  want, got = (model.encode(images, visual=True) for model in (alone, shared))
  assert_close(jax.device_get(got), jax.device_get(want), rel=CLOSE)
  prompts = [VisualPrompt(points=[[n, n]]) for n in range(1, 18)]
  for index in ([1] * 17, [n % 3 for n in range(17)]):
    one, four = (
      jax.device_get(model.decode_visual(embedding, prompts, index))
      for model, embedding in ((alone, want), (shared, got))
    )
    assert_close(four, one, rel=CLOSE)
  assert shared.visual_compilations == 3  # 16 of one image and of several; 4, filled up


def text_of(lowered) -> str:
  return lowered.compile(QUICK).as_text()


@pytest.mark.slow
def test_no_collective(mesh):
  encode, embedding = lower_encoder(golden_model.CONFIG, np.float32, mesh, images=2)
  decode = lower_decoder(golden_model.CONFIG, np.float32, mesh, embedding, prompts=3, most=4)
  for lowered in (encode, decode):
    listing = hlo.read(text_of(lowered))
    assert len(listing.ops) > 10
    assert listing.collectives == []


@pytest.mark.slow
def test_sharded_parameters_are_gathered(mesh):
  """Also shows that the test above would find a collective."""
  pair = sharding.make_mesh(mesh.devices.ravel(), model=2)
  encode, _ = lower_encoder(golden_model.CONFIG, np.float32, pair, 1, sharding.BY_OUTPUTS)
  assert {one.kind for one in hlo.read(text_of(encode)).collectives} == {"all-gather"}


@pytest.mark.slow
def test_collectives_when_devices_share_a_prompt(mesh):
  """Gathers the tokens in each fusion layer but the first, and at the end; nothing else."""
  group, config = sharding.make_mesh(mesh.devices.ravel(), model=4), golden_model.CONFIG
  _, embedding = lower_encoder(config, np.float32, group, images=1)
  decode = lower_decoder(config, np.float32, group, embedding, prompts=3, most=4, split=True)
  found = hlo.read(text_of(decode)).collectives
  assert {one.kind for one in found} == {"all-gather"}
  assert {one.size for one in found} == {config.grid**2 * config.width * 4 * 3}
  assert len(found) == 2  # in the layers' loop, and behind it


def test_no_collective_on_a_tpu():
  """Compiled for four chips that are not attached; `benchmarks/tpu_batch.py` uses the full size."""
  pytest.importorskip("libtpu", reason="the TPU's compiler")
  program = f"""
    import sys
    sys.path += {[str(Path(module.__file__).parent) for module in (golden_model, tpu_batch)]}
    import chips
    chips.describe()
    import jax.numpy as jnp
    import golden_model
    from tpu_batch import lower_decoder, lower_encoder
    from sam3_jax.inference.sharding import make_mesh

    mesh = make_mesh(chips.devices("v6e", 4))
    encode, embedding = lower_encoder(golden_model.CONFIG, jnp.bfloat16, mesh, images=1)
    decode = lower_decoder(golden_model.CONFIG, jnp.bfloat16, mesh, embedding, prompts=1, most=4)
    for lowered in (encode, decode):
      listing = chips.report("v6e", lowered).listing
      print(len(listing.ops) > 10, listing.collectives)
  """
  command = [sys.executable, "-c", textwrap.dedent(program)]
  run = subprocess.run(command, capture_output=True, text=True, timeout=600)
  assert (run.returncode, run.stdout) == (0, "True []\n" * 2), run.stderr


def test_selected_results():
  programs = Programs(golden_model.CONFIG, "float32").selecting(
    image=lambda embedding, features: embedding,
    detections=lambda detections: (detections.scores, detections.ids),
  )
  text = TextEmbedding(
    np.zeros((1, 4, golden_model.CONFIG.width), np.float32), np.ones((1, 4), bool)
  )
  row = np.zeros(1, np.int32)
  prompts = pack([Prompt("a")], np.ones((1, 2)), image=row, first_id=row, text=text)
  pixels = np.zeros((1, *[golden_model.CONFIG.image_size] * 2, 3), np.uint8)
  embedding = jax.eval_shape(
    programs.encode, golden_model.parameters(), pixels, np.ones((1, 2), np.int32)
  )
  scores, ids = jax.eval_shape(
    lambda *given: programs.prompts.detect(*given, 3), golden_model.parameters(), embedding, prompts
  )
  assert scores.shape == ids.shape == (1, 3)


def test_invalid_meshes_and_rules():
  with pytest.raises(ValueError, match="model must divide the number of devices, 8; got 3"):
    sharding.make_mesh(model=3)
  mesh = sharding.make_mesh(model=8)
  assert dict(mesh.shape) == {"data": 1, "model": 8}
  with pytest.raises(ValueError, match="no rule matches the parameter b"):
    sharding.parameter_sharding(mesh, [("a", P())])("b", (8,))
  for shape in ((4, 12), (8,)):
    with pytest.raises(ValueError, match=r"cannot shard the parameter a/b, .* over 8 devices"):
      sharding.parameter_sharding(mesh, [("a/.*", P(None, "model"))])("a/b", shape)
  assert sharding.parameter_sharding(mesh, [("a", P("model")), ("a", P())])("a", (8,)).spec == P(
    "model"
  )
