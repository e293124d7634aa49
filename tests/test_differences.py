"""docs/differences.md: each entry names a test that exists; and tests of entries that had none."""

import ast
import functools
import re
from pathlib import Path

import golden_model
import jax
import numpy as np

from sam3_jax.model.sam3 import Detector
from sam3_jax.outputs.instances import fill_holes
from sam3_jax.types import ImageMaps

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "differences.md"
NAMED = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def functions(file):
  return {node.name for node in ast.walk(ast.parse(file.read_text())) if hasattr(node, "name")}


def test_every_difference_names_a_test_that_exists():
  rows = [row for row in PAGE.read_text().splitlines() if row.startswith("| ")]
  entries = [row for row in rows if not row.startswith(("| Meta |", "| difference from"))]
  entries = [row for row in entries if not re.match(r"\| [\w ,-]+ \| [\d.e+-]+ \|", row)]
  assert len(entries) > 30
  lacking = [row for row in entries if not NAMED.search(row)]
  assert lacking == []
  named = NAMED.findall(PAGE.read_text())
  known = {file: functions(ROOT / "tests" / file) for file in {file for file, _ in named}}
  assert [f"{file}::{name}" for file, name in named if name not in known[file]] == []


def test_other_paths_on_the_page_exist():
  paths = re.findall(r"`((?:tests|benchmarks|docs)/[\w/.-]+\.\w+)`", PAGE.read_text())
  assert paths
  assert [path for path in paths if not (ROOT / path).exists()] == []


def test_islands_stay():
  grid = np.full((12, 12), -2.0, np.float32)
  grid[2, 2], grid[6:11, 6:11] = 1.0, 1.0
  np.testing.assert_array_equal(fill_holes(grid, 100) > 0, grid > 0)


def test_the_first_self_attention_is_computed_once_an_image():
  """In training too, where it has dropout: before any prompt is known."""
  detector = Detector(golden_model.CONFIG, train=True)
  side, width = (
    golden_model.CONFIG.image_size // golden_model.CONFIG.patch,
    golden_model.CONFIG.width,
  )
  shapes = [(2, n * side, n * side, width) for n in (4, 2, 1)]
  maps = ImageMaps(*(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes), None)
  prepare = functools.partial(
    detector.apply, method=Detector.prepare, rngs={"dropout": jax.random.key(0)}
  )
  found = jax.eval_shape(prepare, {"params": golden_model.parameters()}, maps)
  assert found.attended.shape == (2, side, side, width)
