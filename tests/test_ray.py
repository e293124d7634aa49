"""The Ray Data example with two local workers, one of which is killed; needs the extra `ray`."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
import training_model
from batches import write_images

from sam3_jax.batch.segmenter import Segmenter

EXAMPLE = Path(__file__).parents[1] / "examples" / "ray_batch.py"

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of all kinds


@pytest.fixture(scope="module")
def example():
  spec = importlib.util.spec_from_file_location("ray_batch", EXAMPLE)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


@pytest.fixture(scope="module")
def cluster():
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("RAY_AUTH_MODE", "disabled")  # else Ray writes a token to the home directory
    ray.init(num_cpus=3, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.slow
def test_killed_worker_is_replaced(example, cluster, tmp_path, monkeypatch):
  """Its block of images is done again."""
  killed = tmp_path / "killed"

  class Mortal(Segmenter):
    def __call__(self, batch):
      found = super().__call__(batch)
      if not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
      return found

  monkeypatch.setattr(example, "Segmenter", Mortal)
  folder = write_images(tmp_path / "images", 20)
  (folder / "broken.png").write_bytes(b"broken")
  failed = example.segment(
    str(folder), str(tmp_path / "out"), workers=2, resources={}, prompts=["cat", "dog"],
    checkpoint=str(training_model.save(tmp_path / "toy")), threshold=0.05, max_detections=3,
  )  # fmt: skip
  assert killed.exists()
  assert failed == 1
  rows = ray.data.read_parquet(str(tmp_path / "out")).take_all()
  assert len({row["path"] for row in rows}) == len(rows) == 21
  for row in rows:
    if "broken" in row["path"]:
      assert "is not an image" in row["error"]
    else:
      record = json.loads(row["record"])
      assert record["image"] == row["path"]
      assert [one["text"] for one in record["prompts"]] == ["cat", "dog"]
