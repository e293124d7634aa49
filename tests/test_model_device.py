"""The device of a model without a mesh: the given one, the default, or the first local one."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import training_model
from support import quick
from test_processes import environment

from sam3_jax import Sam3, VisualPrompt
from sam3_jax.checkpoint.bundle import load
from sam3_jax.inference import sharding
from sam3_jax.utils import devices

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
WORKER = """
import faulthandler, json, sys
faulthandler.dump_traceback_later(200, exit=True)
sys.path[:0] = {paths!r}
import jax
jax.distributed.initialize()
from sam3_jax import Sam3
from sam3_jax.inference.sharding import make_mesh
model = Sam3.from_checkpoint({folder!r})
found = {{"device": str(model.device), "local": str(jax.local_devices()[0])}}
found["on"] = sorted(str(x) for x in model.encode_text("ear").features.devices())
others = [one for one in jax.devices() if one not in jax.local_devices()]
given = {{"other": {{"device": others[0]}}, "mesh": {{"mesh": make_mesh(jax.devices())}}}}
for name, options in given.items():
  try:
    Sam3.from_checkpoint({folder!r}, **options)
    found[name] = "accepted"
  except ValueError as error:
    found[name] = str(error)
open({folder!r} + str(jax.process_index()) + ".json", "w").write(json.dumps(found))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return training_model.save(tmp_path_factory.mktemp("bundles") / "toy", visual=True)


def devices_of(tree):
  return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


@pytest.mark.slow
def test_all_arrays_are_on_the_given_device(folder):
  """Also with another default device; for a checkpoint and for bare parameters."""
  third, fifth = jax.devices()[3], jax.devices()[5]
  model = quick(Sam3.from_checkpoint(folder, device="cpu:3"))
  bare = Sam3(model.config, jax.device_get(model.params), model.tokenizer, device=third)
  assert model.device == bare.device == third
  assert devices_of(model.params) == devices_of(bare.params) == {third}
  with jax.default_device(fifth):
    embedding = model.encode([IMAGE, IMAGE], visual=True)
    text = model.encode_text(["ear", "cat"])
    found = [
      model.decode(embedding, ["ear", "cat"], [0, 1]),
      model.decode(jax.device_put(embedding, fifth), ["ear", "cat"], [0, 1], min_score=0.2),
      model.decode(embedding, ["ear", "cat"], 0, text=jax.device_get(text)),
      model.decode_visual(embedding, [VisualPrompt(points=[[1, 1]])] * 2, [0, 1]),
    ]
  assert devices_of((embedding, text, found)) == {third}


@pytest.mark.slow
def test_default_device(folder):
  params = load(folder).params
  first, second = jax.devices()[:2]
  assert devices.default_device() == first
  assert Sam3.from_checkpoint(folder).device == first
  with jax.default_device(second):
    model = Sam3.from_checkpoint(folder)
    assert model.device == second
    assert devices_of(model.params) == devices_of(load(folder).params) == {second}
    assert Sam3(model.config, params, model.tokenizer).device == first  # as they are committed
    assert Sam3(model.config, jax.device_get(params), model.tokenizer).device == second
  with jax.default_device("cpu"):
    assert devices.default_device() == first


@pytest.mark.parametrize(
  ("device", "error", "message"),
  [
    ("cpu:8", ValueError, r"there is no device 'cpu:8'; this process has cpu:0, .*cpu:7"),
    ("cpu:x", ValueError, r"there is no device 'cpu:x'"),
    ("gpus", ValueError, r"there is no device 'gpus'"),
    ("", ValueError, r"there is no device ''"),
    (0, TypeError, r'device must be a jax.Device or a platform such as "cpu"; got 0'),
  ],
)
def test_unknown_devices(folder, device, error, message):
  with pytest.raises(error, match=message) as caught:
    Sam3.from_checkpoint(folder, device=device)
  assert "\n" not in str(caught.value)


def test_device_and_mesh(folder):
  mesh = sharding.make_mesh(jax.devices()[:2])
  with pytest.raises(ValueError, match="device=cpu and a mesh exclude each other"):
    Sam3.from_checkpoint(folder, device="cpu", mesh=mesh)
  assert Sam3.from_checkpoint(folder, mesh=mesh).device is None


def test_default_dtype_of_a_platform():
  from sam3_jax.inference.predictor import default_dtype

  for platform, dtype in (("cpu", "float32"), ("tpu", "bfloat16")):
    assert default_dtype(platform) == dtype


@pytest.mark.slow
def test_each_of_two_processes_has_a_model(folder):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  code = WORKER.format(paths=[str(Path(__file__).parents[1])], folder=str(folder))
  workers = [
    subprocess.Popen(
      [sys.executable, "-c", code], env=environment(number, port), stderr=subprocess.PIPE
    )
    for number in range(2)
  ]
  try:
    errors = [worker.communicate(timeout=240)[1].decode() for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
      worker.wait()
  assert [worker.returncode for worker in workers] == [0, 0], "\n".join(errors)
  for number in range(2):
    found = json.loads(Path(f"{folder}{number}.json").read_text())
    assert found["device"] == found["local"] == found["on"][0]
    other = 1 - number
    assert f"of process {other}, and this is process {number}: choose one of" in found["other"]
    assert f"the mesh has devices of other processes ({other})" in found["mesh"]
    assert "sharding.make_mesh()" in found["mesh"]
