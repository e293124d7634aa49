"""A training step of the golden model against Meta's code: predictions, matches, all losses and all
gradients. goldens/train* have Meta's numbers in float32, without dropout.

Meta's three prompts are in a padded batch: two prompts per image, the last one padding; four slots
for objects, six for exemplar boxes; masks for the first prompt of each image only.
"""

import functools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_model import CONFIG, GOLDENS, parameters
from sam3_jax.converters.in_memory import export_arrays
from sam3_jax.converters.layouts.meta import TABLE
from support import QUICK, assert_close

from sam3_jax.model.sam3 import Detector
from sam3_jax.training.batch import Batch, Targets, flat_prompts, flatten
from sam3_jax.training.losses import LossConfig, loss, match

ROWS = (0, 1, 2)  # Meta's three prompts of the flat ones; row 3 is padding
NAMES = {
  "class": "loss_ce",
  "box": "loss_bbox",
  "giou": "loss_giou",
  "presence": "presence_loss",
  "mask": "loss_mask",
  "dice": "loss_dice",
  "semantic": "loss_semantic_seg",
  "semantic_dice": "loss_semantic_dice",
}
LOG = {"prompts", "objects", "matched_iou"}
# A softmax over all cells does not depend on these biases: their gradient is 0, and goldens and our
# gradients are rounding errors of sums of thousands of numbers of order 1.
UNSEEN = {f"detector.transformer.decoder.boxRPB_embed_{axis}.layers.1.bias" for axis in ("x", "y")}


@pytest.fixture(scope="module")
def golden():
  return dict(np.load(GOLDENS / "train.npz"))


@pytest.fixture(scope="module")
def batch(golden):
  objects, slots, side = 4, 6, CONFIG.image_size
  boxes, valid = np.full((2, 2, objects, 4), 7, np.float32), np.zeros((2, 2, objects), bool)
  masks = np.full((2, 2, objects, side, side), 99, np.uint8)
  tokens = np.zeros((2, 2, CONFIG.text.context), np.int32)
  tokens[1, 1, :3] = 49406, 320, 49407
  examples, labels = np.full((2, 2, slots, 4), 0.5, np.float32), np.zeros((2, 2, slots), bool)
  given = labels.copy()
  last = np.cumsum(golden["num_boxes"])
  for row, (image, prompt) in enumerate(((0, 0), (0, 1), (1, 0))):
    count = golden["num_boxes"][row]
    found = slice(last[row] - count, last[row])
    valid[image, prompt, 1 : count + 1] = True  # the first slot is padding
    boxes[image, prompt, 1 : count + 1] = golden["boxes"][found]
    masks[image, prompt, 1 : count + 1] = 255 * golden["masks"][found]
    tokens[image, prompt] = golden["input_ids"][row]
    examples[image, prompt, :2] = golden["input_boxes"][row]
    labels[image, prompt, :2] = golden["input_boxes_label"][row] == 1
    given[image, prompt, :2] = ~golden["input_boxes_padding"][row]
  # Meta's last object has the same center as a predicted box, up to 6e-8. The gradient of L1 is the
  # sign of this distance, so the distance is increased.
  boxes[1, 0, 1, 1] += 1e-6
  return Batch(
    images=np.zeros((2, side, side, 3), np.uint8),  # the goldens have normalized images
    sizes=np.full((2, 2), side, np.int32),
    ids=np.arange(2),
    tokens=tokens,
    boxes=examples,
    positive=labels,
    box_valid=given,
    prompt_valid=np.array([[True, True], [True, False]]),
    targets=Targets(boxes, masks, valid),
  )


@functools.partial(jax.jit, compiler_options=QUICK)
def _step(params, pixels, batch):
  def total(params):
    def part(method, *args, **options):
      return Detector(CONFIG).apply({"params": params}, *args, method=method, **options)

    embedding = part("encode_image", pixels, batch.sizes)
    flat = flatten(batch)
    prompts = flat_prompts(batch, part("encode_text", flat.tokens))
    predictions = part("detect_all_layers", embedding, prompts, duplicate=True, masked=1)
    total, terms = loss(
      predictions, CONFIG.queries, flat.targets, flat.prompt_valid, LossConfig(), images=2
    )
    return total, (terms, predictions)

  (total, (terms, predictions)), gradients = jax.value_and_grad(total, has_aux=True)(params)
  return total, terms, predictions, gradients


@pytest.fixture(scope="module")
def step(golden, batch):
  pixels = jnp.asarray(golden["pixel_values"].transpose(0, 2, 3, 1))
  result = jax.device_get(_step(parameters(), pixels, jax.tree.map(jnp.asarray, batch)))
  return types.SimpleNamespace(
    **dict(zip(("total", "terms", "predictions", "gradients"), result, strict=True))
  )


@pytest.mark.slow
def test_predictions(step, golden):
  found, queries = step.predictions, CONFIG.queries
  measured = {
    "logits": 1.6e-6, "boxes": 5.3e-7, "presence": 1.6e-6, "masks": 2.2e-6, "semantic": 1.5e-6,
  }  # fmt: skip
  rel = {name: 10 * off for name, off in measured.items()}
  for suffix, part in (("", slice(queries)), ("_o2m", slice(queries, None))):
    logits, boxes = found.logits[:, ROWS, part], found.boxes[:, ROWS, part]
    assert_close(logits[..., None], golden[f"pred_logits{suffix}"], rel=rel["logits"])
    assert_close(boxes, golden[f"pred_boxes{suffix}"], rel=rel["boxes"])
    masks = golden[f"pred_masks{suffix}"][[0, 2]]  # row 1 has no objects, so it has no masks
    assert_close(found.mask_logits[:, part], masks, rel=rel["masks"])
  assert_close(
    found.presence_logit[:, ROWS, None], golden["presence_logit_dec"], rel=rel["presence"]
  )
  semantic = golden["semantic_seg"][[0, 2], 0]
  assert_close(found.semantic_logits, semantic, rel=rel["semantic"])


@pytest.fixture(scope="module")
def matches(step, batch):
  """Triples (prompt, query, object) of each set of queries in each layer."""
  found, rows, queries = step.predictions, np.array(ROWS), CONFIG.queries
  targets = flatten(batch).targets
  logits, boxes = (
    jnp.stack([x[:, rows, :queries], x[:, rows, queries:]]) for x in (found.logits, found.boxes)
  )
  pairs = match(logits, boxes, targets.boxes[rows], targets.valid[rows], LossConfig())
  query, matched = np.asarray(pairs.query), np.asarray(pairs.matched)
  return {
    (kind, layer): {
      (p, int(query[kind, layer, p, o, m]), o - 1)
      for p, o, m in np.argwhere(matched[kind, layer]).tolist()
    }
    for kind in range(2)
    for layer in range(CONFIG.decoder_layers)
  }


@pytest.mark.slow
@pytest.mark.parametrize("layer", range(CONFIG.decoder_layers))
@pytest.mark.parametrize("kind", [0, 1])
def test_matches(matches, golden, kind, layer):
  name = f"match_{'o2m_' if kind else ''}{layer}"
  prompt, query, number = (golden[f"{name}_{x}"].astype(int).tolist() for x in "bqt")
  first = np.cumsum(golden["num_boxes"]) - golden["num_boxes"]
  number = number or list(range(len(query)))  # numbers continue over prompts
  want = {(p, q, t - first[p]) for p, q, t in zip(prompt, query, number, strict=True)}
  assert matches[kind, layer] == want
  assert len(want) > 0


def test_losses(step):
  golden = json.loads((GOLDENS / "train.json").read_text())
  want = {}
  for name in step.terms.keys() - LOG:
    base, *layer = name.removesuffix("_many").split("_aux_")
    parts = [NAMES[base], *(f"aux_{i}" for i in layer), *(["o2m"] if "_many" in name else [])]
    want[name] = golden["_".join(parts)]
  for name, value in want.items():
    assert_close(step.terms[name], value, rel=2e-5, what=name)  # measured 5.3e-6
  assert_close(step.total, golden["core_loss"], rel=3e-6)  # measured 3.5e-7

  mine = {"core_loss", "presence_loss_o2m"} | {f"presence_loss_aux_{i}_o2m" for i in range(2)}
  unused = {
    name for name in golden if not name.startswith(("loss_", "presence_loss")) or name in mine
  }
  unused |= {"loss_semantic_presence"}
  assert len(want) == len(golden.keys() - unused)
  assert [step.terms[x] for x in ("prompts", "objects")] == [3, 3]


def test_gradients(step):
  packed, want = np.load(GOLDENS / "train_grads.npz"), {}
  for name in packed.files:
    if not name.endswith((":scale", ".rows")):
      want[name] = packed[name].astype(np.float64) * packed[f"{name}:scale"]
  got = dict(export_arrays(TABLE, step.gradients, {}, CONFIG))
  embedding = next(name for name in got if name.endswith("token_embedding.weight"))
  rows = packed[f"{embedding}.rows"]
  want[embedding] = np.zeros(got[embedding].shape)
  want[embedding][rows] = want.pop(f"{embedding}.nonzero")
  assert got.keys() == want.keys()

  largest = {name: np.abs(x).max(initial=0) for name, x in want.items()}
  floor = 1e-5 * np.median(list(largest.values()))
  for name in got.keys() - UNSEEN:
    off = np.abs(got[name] - want[name]).max() / max(largest[name], floor)
    assert off <= 5e-5, f"{name}: off by {off:.1e}"  # measured 4.1e-6; packing adds up to 1.6e-5
  for name in UNSEEN:
    assert max(np.abs(got[name]).max(), largest[name]) < floor


def test_unused_point_parameters_have_zero_gradients(step):
  """Meta's code has exact zeros too."""
  geometry = step.gradients["geometry"]
  assert not any(
    x.any() for name, x in geometry.items() if name.startswith("point_") for x in x.values()
  )
