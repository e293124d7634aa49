"""Training by several processes: what each does, and what only the first writes."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tensorstore
import training_model
from jax.sharding import NamedSharding, PartitionSpec
from training_runs import PATTERN, assert_same, parameters, stand_in

from sam3_jax.checkpoint import bundle
from sam3_jax.checkpoint.orbax_items import restore_item, save_item
from sam3_jax.cli.main import main
from sam3_jax.training import data, log, loop, run, sharding, trainer
from sam3_jax.utils.param_tree import flatten

ROOT = Path(__file__).parents[1]
BIG = (2, 4096, 1024)
WORKER = """
import faulthandler, pathlib, sys
faulthandler.dump_traceback_later(200, exit=True)
sys.path[:0] = {paths!r}
import test_processes
test_processes.work(pathlib.Path({folder!r}))
"""


def score(model):
  """Replaces the evaluation; the model must be on devices of this process."""
  scale = flatten(model.params)["decoder/norm/scale"]
  assert scale.devices() <= set(jax.local_devices())
  return {"cgf1": float(np.asarray(scale).sum()), "pairs": 3}


def replace(patch):
  """Replaces step and evaluation, and shards every parameter."""
  patch.setattr(trainer, "make_step", stand_in)
  patch.setattr(sharding, "SMALL", 0)
  patch.setattr(run, "_make_evaluate", lambda *_: score)


def typed(folder, out, *more):
  return ["train", str(folder / "run.json"), "--out", str(folder / out), "--quiet", *more]


def work(folder):
  """The work of each process: a run that fails after its third step, and is resumed."""
  with pytest.MonkeyPatch.context() as patch:
    replace(patch)
    following = data.Batches.__next__

    def break_off(batches):
      if batches.get_state()["batch"] == 3:
        raise ValueError("broken off")
      return following(batches)

    patch.setattr(data.Batches, "__next__", break_off)
    assert main(typed(folder, "two", "--distributed")) == 2
    assert jax.process_count() == 2
    assert jax.device_count() == 4
    patch.setattr(data.Batches, "__next__", following)
    assert main(typed(folder, "two")) == 0
    assert (folder / "two" / "final").exists()
    restore_shards(folder)


def restore_shards(folder):
  """Restores the shards of this process, and records how many bytes that reads."""
  shards = NamedSharding(sharding.make_mesh(fsdp=4), PartitionSpec(None, "fsdp"))
  read = bytes_read()
  found = restore_item(folder / "item", {"x": jax.ShapeDtypeStruct(BIG, np.int32, sharding=shards)})
  read = bytes_read() - read
  for shard in found["x"].addressable_shards:
    np.testing.assert_array_equal(shard.data, big()[shard.index])
  (folder / f"read-{jax.process_index()}.json").write_text(str(read))


def big():
  return np.arange(np.prod(BIG), dtype=np.int32).reshape(BIG)


def bytes_read():
  name = "/tensorstore/kvstore/file/bytes_read"
  return tensorstore.experimental_collect_matching_metrics(name)[0]["values"][0]["value"]


def environment(number, port):
  """The environment of Open MPI for one of two processes, each with two CPU devices."""
  return os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:0",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": str(number),
    "OMPI_COMM_WORLD_LOCAL_RANK": str(number),
  }


@pytest.fixture
def folder(tmp_path):
  """A directory with a checkpoint of the small model, and a training file."""
  values = {
    "checkpoint": str(training_model.save(tmp_path / "toy")), "name": "run",
    "steps": 4, "save_every": 2, "evaluate_every": 2, "ema_decay": 0.5,
    "fsdp": 4, "trainable": PATTERN, "scenes": {"count": 6, "size": [64, 64]},
    "data": {
      "batch_size": 4, "prompts_per_image": 2, "present_prompts": 1, "max_objects": 2,
      "prefetch": 0,
    },
  }  # fmt: skip
  (tmp_path / "run.json").write_text(json.dumps(values))
  return tmp_path


@pytest.mark.slow
def test_two_processes_equal_one(folder, monkeypatch):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  paths = [str(ROOT / name) for name in ("tests", "benchmarks", ".")]
  save_item(folder / "item", {"x": big()})
  code = WORKER.format(paths=paths, folder=str(folder))
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", code], env=environment(number, port), stderr=subprocess.PIPE
    )
    for number in range(2)
  ]
  try:
    replace(monkeypatch)
    monkeypatch.setattr(
      trainer, "make_mesh", lambda fsdp: sharding.make_mesh(jax.devices()[:4], fsdp)
    )
    assert main(typed(folder, "one")) == 0
    errors = [worker.communicate(timeout=240)[1].decode() for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
  one, two = folder / "one", folder / "two"
  for name in ("best", "final"):
    assert_same(parameters(two / name), parameters(one / name))
    assert bundle.load(two / name).info == bundle.load(one / name).info
  losses = [
    [(x["step"], x.get("loss"), x.get("evaluation/cgf1")) for x in log.read_metrics(file)]
    for file in (one / "metrics.jsonl", two / "metrics.jsonl")
  ]
  assert losses[0] == losses[1]
  left = [{path.name for path in out.iterdir()} for out in (one, two)]
  assert left[0] == left[1]
  for number in range(2):
    read = int((folder / f"read-{number}.json").read_text())
    assert read < 0.6 * big().nbytes  # measured 0.5001


@pytest.mark.slow
def test_failing_jax_distributed_is_one_line(folder, monkeypatch, capsys):
  def fail():
    raise ValueError("coordinator_address should be defined.")

  monkeypatch.setattr(jax.distributed, "initialize", fail)
  monkeypatch.setattr(run, "run", lambda *_: pytest.fail("it began"))
  assert main(typed(folder, "out", "--distributed")) == 2
  error = capsys.readouterr().err
  assert "--distributed: JAX cannot connect to the other processes (coordinator_address" in error
  assert error.count("\n") == 1


@pytest.mark.parametrize("alike", [True, False])
def test_processes_must_have_the_same_settings(monkeypatch, alike):
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  gathered = lambda x: np.stack([x, x if alike else x[::-1]])  # noqa: E731
  monkeypatch.setattr(loop.multihost_utils, "process_allgather", gathered)
  expected = (
    contextlib.nullcontext()
    if alike
    else pytest.raises(ValueError, match="the 2 processes have different settings, data or")
  )
  with expected:
    loop._check_same_run({"config": {}, "start": "a"})
