"""A checkpoint of the seeded model, and helpers to change it and to check what is loaded."""

import json
import shutil

import jax
import layouts
import numpy as np
import pytest
from golden_model import CONFIG, parameters

from sam3_jax.checkpoint import bundle, checksums
from sam3_jax.utils.param_tree import flatten

TOKENIZER = layouts.TOKENIZER.read_bytes()
INFO = {"name": "tiny", "source": "a seed", "licence": "Apache-2.0", "trained": False}
UNREAD = {
  "../tracker.x[:, :1]": np.arange(6, dtype=np.float16).reshape(2, 3),
  "tracker.scalar": np.float32([2.5]),
}
SCALE = "trunk/norm_pre/scale"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  path = tmp_path_factory.mktemp("saved") / "tiny"
  bundle.save(path, parameters(), CONFIG, TOKENIZER, info=INFO, unread=UNREAD)
  return path


@pytest.fixture
def copy(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "tiny")


def assert_params(got, want, dtype=None):
  got, want = flatten(got), flatten(want)
  assert got.keys() == want.keys()
  for name, array in want.items():
    assert isinstance(got[name], jax.Array)
    expected = np.asarray(array).astype(dtype or array.dtype)
    assert got[name].dtype == expected.dtype, name
    np.testing.assert_array_equal(np.asarray(got[name]), expected, err_msg=name)


def refused(path, match, error=ValueError, **options):
  for use in (bundle.load, bundle.inspect) if not options else (bundle.load,):
    with pytest.raises(error, match=match) as caught:
      use(path, **options)
    assert "\n" not in str(caught.value)
    assert type(caught.value) is error


def edit(path, name, change):
  """Changes a JSON file and updates the checksums."""
  values = json.loads((path / name).read_text())
  change(values)
  (path / name).write_text(json.dumps(values))
  checksums.write(path)
