"""The example for Ray Data, under a local Ray of two workers; needs the extra `ray`."""

import importlib.util
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
from batches import pictures

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
    patch.setenv("RAY_AUTH_MODE", "disabled")  # or it writes a token to the home folder
    ray.init(num_cpus=3, include_dashboard=False)
    yield
    ray.shutdown()


def test_two_workers(example, cluster, tmp_path):
  folder = pictures(tmp_path / "pictures", 20)
  (folder / "broken.png").write_bytes(b"broken")
  failed = example.segment(
    str(folder), str(tmp_path / "out"), workers=2, resources={}, prompts=["cat", "dog"],
    threshold=0.05, max_detections=3,
  )  # fmt: skip
  assert failed == 1
  rows = ray.data.read_parquet(str(tmp_path / "out")).take_all()
  assert len(rows) == 21
  for row in rows:
    if "broken" in row["path"]:
      assert "is not an image" in row["error"]
    else:
      record = json.loads(row["record"])
      assert record["image"] == row["path"]
      assert [one["text"] for one in record["prompts"]] == ["cat", "dog"]


def test_a_killed_worker_s_blocks_are_done_again(cluster, tmp_path):
  """With the settings of the example."""

  class Suicide:
    """A worker that is killed once, in the middle of its work."""

    def __init__(self, flag: str):
      self._flag = Path(flag)

    def __call__(self, batch):
      if not self._flag.exists() and 30 in batch["id"]:
        self._flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)
      return {"id": np.asarray(batch["id"]) * 2}

  done = ray.data.range(64).map_batches(
    Suicide, fn_constructor_args=[str(tmp_path / "killed")], batch_size=8, concurrency=2,
    max_restarts=-1, max_task_retries=-1,
  )  # fmt: skip
  assert sorted(row["id"] for row in done.take_all()) == [2 * i for i in range(64)]
  assert (tmp_path / "killed").exists()
