"""Programs compiled ahead: calls find them, the compiler's figures, TPUs that are not here, and the
cache of the command."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from support import quick
from training_model import CONFIG, parameters

from sam3_jax import Prompt
from sam3_jax.checkpoint import bundle
from sam3_jax.cli import cache
from sam3_jax.cli.main import entry, main
from sam3_jax.inference import aot, predictor, sharding
from sam3_jax.inference.predictor import Sam3
from sam3_jax.inputs.tokenizer import Tokenizer
from sam3_jax.utils.param_tree import nest

PHOTO = np.zeros((40, 50, 3), np.uint8)
# Of all parameters a program takes those that it uses.
OF_AN_IMAGE = (
  "trunk/", "neck/", "masks/conv0/", "masks/conv1/",
  "fusion/layers/norm1/", "fusion/layers/self_attn/",
)  # fmt: skip


@pytest.fixture
def compiled(monkeypatch):
  """Names of the programs that XLA compiles."""
  names, compile_now = [], jax._src.compiler.backend_compile_and_load

  def note(backend, module, *args, **options):
    names.append(module.operation.attributes["sym_name"].value)
    return compile_now(backend, module, *args, **options)

  monkeypatch.setattr(jax._src.compiler, "backend_compile_and_load", note)
  monkeypatch.setattr(jax._src.compilation_cache, "is_cache_used", lambda _: False)
  return names


def make_model(tokenizer_path: Path, params) -> Sam3:
  model = Sam3(CONFIG, params, Tokenizer(tokenizer_path, context=CONFIG.text.context))
  return quick(model)


class TestCompile:
  @pytest.mark.slow
  @pytest.mark.parametrize("committed", [True, False])
  def test_calls_reuse_compiled_programs(self, tokenizer_path, compiled, committed):
    """With parameters restored from a checkpoint, and with those of `init`."""
    params = nest(parameters())
    if committed:
      params = jax.device_put(params, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    else:
      params = jax.tree.map(jax.numpy.asarray, params)
    model = make_model(tokenizer_path, params)
    done = model.compile(boxes=1, max_detections=2)
    assert [one.name for one in done] == ["encode 1 image", "encode 1 phrase", "decode 1 prompt"]
    wanted = {"jit_encode_image", "jit_encode_text", "jit_detect"}
    assert wanted <= {*compiled}
    compiled.clear()
    found = model.decode(model.encode(PHOTO), Prompt("cat", [[0, 0, 9, 9]]), max_detections=2)
    assert found.scores.shape == (1, 2)
    assert wanted & {*compiled} == set()

  @pytest.mark.slow
  def test_concepts(self, tokenizer_path, compiled):
    model = make_model(tokenizer_path, nest(parameters()))
    done = model.compile(images=1, prompts=0, exemplars=[2, 9], max_detections=2)
    assert [one.name for one in done][2:] == [
      "decode 1 concept of 8 exemplars", "decode 1 concept of 128 exemplars",
    ]  # fmt: skip
    embedding = model.encode(PHOTO)
    concept = model.concept(embedding, Prompt(boxes=[[0, 0, 9, 9]] * 9))
    model.encode_text(["cat"] * 2)
    compiled.clear()
    for one in (concept, concept[:3]):
      model.decode(embedding, one, max_detections=2)
    assert "jit_detect" not in compiled
    with pytest.raises(ValueError, match="at most 128 exemplars; got 129"):
      model.compile(exemplars=[129])

  @pytest.mark.slow
  @pytest.mark.parametrize(("count", "decode"), [(1, "1 prompt"), (3, "4 prompts")])
  def test_on_a_mesh(self, tokenizer_path, compiled, count, decode):
    """Four devices compute a prompt together, or several prompts separately."""
    mesh = sharding.make_mesh(jax.devices()[:4], model=4 if count == 1 else 1)
    params, tokenizer = nest(parameters()), Tokenizer(tokenizer_path, context=CONFIG.text.context)
    model = Sam3(CONFIG, params, tokenizer, mesh=mesh)
    done = model.compile(images=2, prompts=count, max_detections=2)
    assert [done[0].name, done[-1].name] == ["encode 4 images", f"decode {decode}"]
    compiled.clear()
    model.decode(model.encode([PHOTO] * 2), ["cat"] * count, 1, max_detections=2)
    assert {"jit_encode_image", "jit_encode_text", "jit_detect"} & {*compiled} == set()

  @pytest.mark.slow
  def test_while_reading(self, tmp_path, tokenizer_path, compiled):
    bundle.save(tmp_path / "toy", nest(parameters()), CONFIG, tokenizer_path.read_bytes())
    model = Sam3.from_checkpoint(tmp_path / "toy", ahead={"images": 1, "max_detections": 2})
    wanted = {"jit_encode_image", "jit_encode_text", "jit_detect"}
    assert wanted <= {*compiled}
    compiled.clear()
    model.decode(model.encode(PHOTO), "cat", max_detections=2)
    assert wanted & {*compiled} == set()

  def test_figures(self, tokenizer_path):
    model = make_model(tokenizer_path, nest(parameters()))
    [image] = model.compile(images=1, prompts=0)
    assert image.name == "encode 1 image"
    inputs = 3 * CONFIG.image_size**2 + 2 * 4
    used = sum(x.nbytes for path, x in parameters().items() if path.startswith(OF_AN_IMAGE))
    assert image.argument_bytes == pytest.approx(inputs + used, rel=1e-3)
    assert image.peak_bytes > image.argument_bytes
    assert image.flops > 0
    assert image.seconds > 0

  @pytest.mark.slow
  def test_batches(self, monkeypatch, tokenizer_path):
    """The programs, from shapes only."""
    monkeypatch.setattr(aot, "_compile", lambda name, lowered: name)
    monkeypatch.setattr(predictor, "prompts_at_once", lambda platform: (4, 1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), nest(parameters()))
    model = make_model(tokenizer_path, shapes)
    assert model.compile(images=0, prompts=0) == []
    assert model.compile(images=5, prompts=5) == [
      "encode 1 image", "encode 4 images", "encode 1 phrase", "encode 4 phrases",
      "decode 1 prompt", "decode 4 prompts",
    ]  # fmt: skip

  @pytest.mark.parametrize("given", [{"images": -1}, {"prompts": -1}, {"boxes": -1}], ids=str)
  def test_faults(self, tokenizer_path, given):
    model = make_model(tokenizer_path, nest(parameters()))
    with pytest.raises(ValueError, match=r"must be 0 or more; got .*-1.*\. Use 0"):
      model.compile(**given)


class TestCommand:
  @pytest.mark.slow
  def test_for_this_machine(self, tmp_path, tokenizer_path, capsys, monkeypatch):
    bundle.save(tmp_path / "toy", nest(parameters()), CONFIG, tokenizer_path.read_bytes())
    monkeypatch.chdir(tmp_path)
    typed = ["compile", "toy", "--device", "cpu", "--prompts", "0"]
    assert main(typed) == 0
    out = capsys.readouterr().out
    assert "toy, float32, for this machine" in out
    assert "encode 1 image" in out
    assert "decode" not in out

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--platform", "tpu", "--device", "cpu"], "give one of them"),
      (["nowhere"], "no checkpoint 'nowhere'"),
      (["--platform", "gpu"], "'gpu' is not"),
    ],
  )
  def test_faults(self, typed, message, capsys):
    assert main(["compile", *typed]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""

  def test_missing_tpu_compiler(self, capsys, monkeypatch):
    from jax.experimental import topologies

    def fail(**_):
      raise RuntimeError("JAX TPU support not installed\nand more")

    monkeypatch.setattr(topologies, "get_topology_desc", fail)
    assert main(["compile", "--platform", "tpu", "--topology", "v6e:1x1"]) == 2
    err = capsys.readouterr().err
    assert "no compiler for the TPU 'v6e:1x1' (JAX TPU support not installed)" in err
    assert "sam3-jax[tpu]" in err
    assert err.count("\n") == 1


class TestCache:
  def run(self, tmp_path: Path, command: str, **environment: str) -> str:
    """The output of a process whose user cache is `tmp_path`."""
    ours = ("JAX_COMPILATION_CACHE", "JAX_PERSISTENT_CACHE")  # set by conftest.py
    usual = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    usual |= {"XDG_CACHE_HOME": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
      [sys.executable, "-c", command],
      env=usual | environment,
      capture_output=True,
      text=True,
      check=True,
    )
    return done.stdout

  @pytest.mark.slow
  def test_command_enables_it_and_the_library_does_not(self, tmp_path):
    command = "import jax, sam3_jax; {}; jax.jit(lambda x: x + 1)(1.0); {}"
    print_folder = "print(jax.config.jax_compilation_cache_dir)"
    assert self.run(tmp_path, command.format("pass", print_folder)) == "None\n"
    assert list(tmp_path.iterdir()) == []
    use = "from sam3_jax.cli import cache; cache.use()"
    folder = tmp_path / "sam3-jax" / "programs"
    assert self.run(tmp_path, command.format(use, print_folder)) == f"{folder}\n"
    assert any(folder.iterdir())

  @pytest.mark.slow
  def test_other_folder_or_none(self, tmp_path):
    command = (
      "import jax; from sam3_jax.cli import cache; cache.use(); {}jax.jit(lambda x: x + 1)(1.0)"
    )
    other = tmp_path / "other"
    self.run(tmp_path, command.format(""), JAX_COMPILATION_CACHE_DIR=str(other))
    assert any(other.iterdir())
    self.run(tmp_path, command.format("cache.switch_off(); "))
    self.run(tmp_path, command.format(""), JAX_ENABLE_COMPILATION_CACHE="0")
    assert [path.name for path in tmp_path.iterdir()] == ["other"]

  def test_folder(self, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache.directory() == Path.home() / ".cache" / "sam3-jax" / "programs"

  def test_no_home_directory(self, monkeypatch):
    def fail():
      raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", raising=False)
    monkeypatch.setattr(Path, "home", fail)
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda name, _: changed.append(name))
    cache.use()
    assert changed == ["jax_persistent_cache_min_compile_time_secs"]

  def test_option_disables_it(self, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(cache, "use", lambda: called.append("use"))
    monkeypatch.setattr(cache, "switch_off", lambda: called.append("off"))
    monkeypatch.setattr(sys, "argv", ["sam3-jax", "--no-cache", "inspect", "nowhere"])
    monkeypatch.setattr("sam3_jax.cli.main.signal.signal", lambda *_: None)
    with pytest.raises(SystemExit):
      entry()
    assert called == ["use", "off"]
    assert "no checkpoint" in capsys.readouterr().err
