"""Assignments against SciPy and loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from scipy.special import expit
from support import QUICK, assert_close

from sam3_jax.training.matcher import assign, one_to_many, one_to_one, overlap

COSTS = {"class_weight": 2.0, "l1_weight": 5.0, "giou_weight": 2.0}
MANY = {"alpha": 0.3, "threshold": 0.4, "top_k": 4}

solve = jax.jit(assign, compiler_options=QUICK)
match_one = jax.jit(functools.partial(one_to_one, **COSTS), compiler_options=QUICK)
match_many = jax.jit(functools.partial(one_to_many, **MANY), compiler_options=QUICK)
overlaps = jax.jit(overlap, compiler_options=QUICK)


def random_boxes(rng, *shape):
  return rng.uniform(0.1, 0.6, (*shape, 4)).astype(np.float32)


@pytest.mark.parametrize(
  ("objects", "queries", "alike"),
  [(5, 9, False), (5, 9, True), (4, 4, True), (6, 3, False), (1, 1, False), (1, 5, False)],
)
def test_assignment_has_the_least_cost(objects, queries, alike):
  """`alike`: all objects have the lowest cost with the same queries."""
  rng = np.random.default_rng(objects * queries)
  cost = rng.uniform(-8, 20, (2, 20, objects, queries)).astype(np.float32)
  if alike:
    cost = 0.05 * cost + rng.uniform(0, 9, (2, 20, 1, queries)).astype(np.float32)
  valid = rng.random((2, 20, objects)) < 0.7
  query, matched = jax.device_get(solve(cost, valid))
  assert query.dtype == np.int32
  for row in np.ndindex(2, 20):
    got, want = cost[row][matched[row], query[row][matched[row]]], cost[row][valid[row]]
    assert not (matched[row] & ~valid[row]).any()
    assert len(set(query[row][matched[row]])) == len(got) == min(valid[row].sum(), queries)
    # Measured 0; float32 cannot tell sums apart that are nearer than this.
    assert abs(got.sum() - want[linear_sum_assignment(want)].sum()) <= 1e-5


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_to_assign(shape):
  query, matched = assign(jnp.zeros((2, *shape)), jnp.ones((2, shape[0]), bool))
  assert query.shape == matched.shape == (2, shape[0])
  assert not matched.any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_assignment_ends_with_costs_that_are_not_finite(value):
  cost = np.random.default_rng(0).random((1, 5, 9)).astype(np.float32)
  cost[0, 2] = value
  query, matched = jax.device_get(solve(cost, np.ones((1, 5), bool)))
  assert matched.all()
  assert len(set(query[0])) == 5


def test_overlap():
  """Boxes inside, next to, across, far from and equal to each other, and of zero size."""
  corners = np.array([
    [[0, 0, 4, 4], [1, 1, 3, 3]],
    [[0, 0, 2, 2], [2, 0, 4, 2]],
    [[0, 0, 2, 2], [1, 1, 3, 3]],
    [[0, 0, 1, 1], [3, 3, 4, 4]],
    [[0, 1, 2, 3], [0, 1, 2, 3]],
    [[1, 1, 1, 1], [1, 1, 1, 1]],
  ])  # fmt: skip
  boxes = np.concatenate(
    [(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], axis=-1
  ).astype(np.float32)
  iou, giou = overlaps(boxes[:, 0], boxes[:, 1])
  assert_close(iou, np.array([4 / 16, 0, 1 / 7, 0, 1, 0]), rel=6e-8)  # measured 6.4e-9
  assert_close(giou, np.array([4 / 16, 0, 1 / 7 - 2 / 9, 2 / 16 - 1, 1, 0]), rel=6e-8)
  both = jax.jit(jax.grad(lambda a, b: sum(x.sum() for x in overlap(a, b))))
  assert np.isfinite(both(boxes[:, 0], boxes[:, 1])).all()


def test_one_to_one_costs():
  """Two objects; the cost's formula in float64."""
  rng = np.random.default_rng(0)
  rows, queries, objects = 30, 6, 2
  logits = rng.normal(0, 3, (rows, queries)).astype(np.float32)
  boxes, wanted = random_boxes(rng, rows, queries), random_boxes(rng, rows, objects)
  pairs = jax.device_get(match_one(logits, boxes, wanted, np.ones((rows, objects), bool)))
  assert pairs.query.shape == (rows, objects, 1)
  p = expit(logits.astype(np.float64))[:, None]
  cost = 2 * (0.25 * (1 - p) ** 2 * -np.log(p + 1e-8) - 0.75 * p**2 * -np.log(1 - p + 1e-8))
  cost = cost + 5 * np.abs(boxes[:, None] - wanted[:, :, None]).sum(-1)
  cost = cost - 2 * np.asarray(overlaps(boxes[:, None], wanted[:, :, None])[1])
  for row in range(rows):
    assert pairs.query[row, :, 0].tolist() == linear_sum_assignment(cost[row])[1].tolist()


@pytest.mark.parametrize("queries", [1, 4, 5, 10, 200])
def test_one_to_many(queries):
  """Against NumPy's quantile; with at most 4 queries there is no quantile."""
  rng = np.random.default_rng(queries)
  rows, objects = 6, 3
  wanted = random_boxes(rng, rows, objects)
  logits = rng.normal(0, 2, (rows, queries)).astype(np.float32)
  boxes = wanted[:, rng.integers(0, objects, queries)]
  boxes = boxes + rng.normal(0, 0.05, boxes.shape).astype(np.float32)
  valid = np.arange(objects) < 2
  pairs = jax.device_get(match_many(logits, boxes, wanted, np.tile(valid, (rows, 1))))
  assert pairs.query.shape == (rows, objects, min(4, queries))
  iou = np.asarray(overlaps(boxes[:, None], wanted[:, :, None])[0])
  quality, found = 0.3 * expit(logits)[:, None] + 0.7 * iou, 0
  for row, number in np.ndindex(rows, objects):
    values = quality[row, number]
    bar = max(0.4, np.quantile(values, 1 - 4 / queries) if queries > 4 else 0)
    want = np.flatnonzero(values > bar).tolist() if valid[number] else []
    got = pairs.query[row, number][pairs.matched[row, number]].tolist()
    assert sorted(got) == want
    found += len(want)
  assert found > 2 * rows or queries == 1


def test_no_pairs_without_objects():
  empty = jnp.zeros((2, 0, 4)), jnp.zeros((2, 0), bool)
  logits, boxes = jnp.zeros((2, 6)), jnp.full((2, 6, 4), 0.5)
  assert match_one(logits, boxes, *empty).query.shape == (2, 0, 1)
  assert match_many(logits, boxes, *empty).query.shape == (2, 0, 4)
