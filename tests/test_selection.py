"""Finds the model among a file's tensors: wrappers, several models, training state, other files."""

import collections

import numpy as np
import pytest
from conversions import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from keras_preset import datasets
from layouts import TOKENIZER, layout, write_folder
from safetensors.numpy import save_file
from sam3_jax.converters import convert
from sam3_jax.converters.selection import select
from sam3_jax.converters.source import Source
from sam3_jax.converters.sources import files_of, find_weights, open_weights
from torch_archive import save, views

from sam3_jax.checkpoint import bundle

KINDS = ("meta", "hub", "doubled", "detector", "keras")
WRAPPERS = (
  "module", "_orig_mod", "model", "base_model.model", "state_dict", "ema_model", "student",
  "_fsdp_wrapped_module", "my_wrapper", "0",
)  # fmt: skip


def arrays(kind):
  return datasets() if kind == "keras" else layout(kind)


def sources(arrays, container=""):
  return {
    name: Source(a.shape, str(a.dtype), lambda a=a: a, container) for name, a in arrays.items()
  }


def chosen(arrays, **options):
  return select(sources(arrays), "auto", options.pop("key", None), "x.pt", **options)


class TestWrappers:
  @settings(max_examples=10, deadline=None)
  @given(st.sampled_from(KINDS), st.lists(st.sampled_from(WRAPPERS), min_size=1, max_size=4))
  def test_nested_prefixes_are_removed(self, kind, wrappers):
    whole = arrays(kind)
    mark = "/" if kind == "keras" else "."
    prefix = "".join(f"{part}{mark}" for part in wrappers)
    found = chosen({prefix + name: a for name, a in whole.items()})
    assert {name: source.read() is whole[name] for name, source in found.tensors.items()} == (
      dict.fromkeys(whole, True)
    )
    assert found.notes == []

  @settings(max_examples=10, deadline=None)
  @given(st.sampled_from(KINDS), st.data())
  def test_wrappers_inside_names_are_removed(self, kind, data):
    """All names below a wrapped module have the segment."""
    whole = arrays(kind)
    mark = "/" if kind == "keras" else "."
    name = data.draw(st.sampled_from(sorted(whole)))
    end = data.draw(st.integers(0, name.count(mark)))
    module = "".join(f"{part}{mark}" for part in name.split(mark)[:end])
    wrapper = data.draw(st.sampled_from(WRAPPERS[:4])).replace(".", mark) + mark
    wrapped = {
      module + wrapper + n.removeprefix(module) if n.startswith(module) else n: a
      for n, a in whole.items()
    }
    assert chosen(wrapped).tensors.keys() == whole.keys()

  def test_a_wrapper_of_meta_s_tracker_is_not_taken_for_sam_3_1(self):
    """SAM 3.1 has other tensors below `tracker.model`."""
    whole = arrays("meta")
    wrapped = {n.replace("tracker.", "tracker.model.", 1): a for n, a in whole.items()}
    found = chosen(wrapped)
    assert found.tensors.keys() == whole.keys()
    assert found.layout == chosen(whole).layout

  def test_wrappers_do_not_change_the_checkpoint(self, tmp_path):
    found = []
    prefix = "module._orig_mod.model."
    for wrap in (
      lambda n: n,
      lambda n: prefix + n.replace("detr_decoder.", "detr_decoder._orig_mod."),
    ):
      out = tmp_path / f"out{len(found)}"
      arrays = {wrap(name): array for name, array in layout("detector").items()}
      folder = write_folder(tmp_path / f"source{len(found)}", arrays)
      convert(folder, out, tokenizer=TOKENIZER, verify=False)
      found.append(bundle.begin(out)[0].identity)
    assert found[0] == found[1]

  def test_a_single_wrapped_tensor_is_named(self, tmp_path):
    whole = dict(layout("detector"))
    name = "vision_encoder.backbone.layer_norm.weight"
    whole[f"module.{name}"] = whole.pop(name)
    folder = write_folder(tmp_path / "source", whole)
    refused(folder, tmp_path, rf"module\.{name} .*not a name|{name} is missing")

  def test_a_model_split_over_two_prefixes_is_refused(self, tmp_path):
    whole = {
      ("module." if i % 2 else "") + name: array
      for i, (name, array) in enumerate(layout("detector").items())
    }
    folder = write_folder(tmp_path / "source", whole)
    refused(folder, tmp_path, "one model under several prefixes: .* under 'module'")


class TestSeveralModels:
  def two(self, first, second):
    return {f"{part}.{n}": a for part in (first, second) for n, a in layout("detector").items()}

  @pytest.mark.parametrize(
    ("first", "second", "prefix"),
    [
      ("model", "ema", "model"),
      ("ema_model", "model", "model"),
      ("state_dict", "model", "model"),
      ("net", "ema", "net"),
      ("anything", "model_ema", "anything"),
      ("student", "teacher", "student"),
    ],
  )
  def test_default_choice_is_noted(self, first, second, prefix):
    found = chosen(self.two(first, second))
    assert found.prefix == (prefix,)
    other = second if prefix == first else first
    assert found.notes == [f"took the model under '{prefix}'; another is under '{other}' (--key)"]
    assert chosen(self.two(first, second), key=other).tensors.keys() == layout("detector").keys()
    assert chosen(self.two(first, second), key=other).notes == []

  def test_equally_likely_models_need_a_key(self):
    with pytest.raises(ValueError, match=r"holds 2 models: 430 tensors under 'a'.* --key a"):
      chosen(self.two("a", "b"))

  def test_unknown_key(self):
    with pytest.raises(ValueError, match="has nothing under the key 'ema'; it has model, b"):
      chosen(self.two("model", "b"), key="ema")

  def test_a_single_model_needs_no_key(self):
    assert chosen({f"ema.{n}": a for n, a in layout("hub").items()}).prefix == ("ema",)

  def test_tensors_outside_the_prefix_are_refused_without_a_key(self):
    whole = {f"model.{n}": a for n, a in layout("detector").items()}
    whole["criterion.empty_weight"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"1 tensors .*criterion.empty_weight first; use --key mo"):
      chosen(whole)
    assert chosen(whole, key="model").tensors.keys() == layout("detector").keys()


class TestTrainingCheckpoints:
  @pytest.mark.slow
  @pytest.mark.parametrize(
    "wrap",
    [
      lambda state: {"ema": state},
      lambda state: {**state, "epoch": 3, "lr": 0.1, "name": "x"},
      lambda state: {"state_dict": state, "optimizer_states": [{}], "loops": {"a": {"b": 1}}},
      lambda state: {"module": state, "optimizer": {"state": {0: {"step": 1}}}},
      lambda state: {"checkpoint": {"model": state}, "args": ["x"]},
    ],
  )
  def test_the_model_is_found(self, tmp_path, wrap):
    path = save(tmp_path / "x.pt", wrap(views(layout("meta"))))
    found = select(open_weights(path), "auto", None, str(path))
    assert found.tensors.keys() == layout("meta").keys()

  def test_optimizer_state_alone_is_refused(self, tmp_path):
    state = {0: views({"exp_avg": np.ones(3, np.float32)})}
    path = save(tmp_path / "optimizer.pt", {"state": state, "param_groups": [{"lr": 1}]})
    refused(path, tmp_path, "holds the state of an optimizer and no model")
    whole = {f"optimizer.{n}": a for n, a in layout("detector").items()}
    with pytest.raises(ValueError, match="holds the state of an optimizer and no model"):
      chosen(whole)

  def test_objects_beside_a_model_are_ignored_and_not_imported(self, tmp_path):
    import argparse

    content = {
      "model": views({"a": np.ones(3, np.float32)}),
      "best": np.float64(0.5),
      "args": argparse.Namespace(lr=1),
      "steps": collections.defaultdict(int, {"train": 3}),
    }
    assert list(open_weights(save(tmp_path / "x.pt", content))) == ["model.a"]


class TestShardsWithoutIndex:
  @pytest.fixture
  def folder(self, tmp_path):
    folder = write_folder(tmp_path / "source", layout("detector"), shards=3)
    (folder / "model.safetensors.index.json").unlink()
    return folder

  def test_all_shards_are_read(self, folder):
    for path in (folder, folder / "model-00002-of-00003.safetensors"):
      weights = find_weights(path)
      assert open_weights(weights).keys() == layout("detector").keys()
      assert len(files_of(weights)) == 3

  def test_missing_shard_is_named(self, folder, tmp_path):
    (folder / "model-00001-of-00003.safetensors").unlink()
    match = "has 2 of the 3 shards of model; model-00001-of-00003.safetensors is missing"
    refused(folder, tmp_path, match, FileNotFoundError)
    refused(folder / "model-00002-of-00003.safetensors", tmp_path, match, FileNotFoundError)


class TestOtherFiles:
  @pytest.mark.parametrize(
    ("content", "match"),
    [
      (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "Git LFS pointer, not the fi"),
      (b"<!DOCTYPE html><html>not found</html>", "is a web page"),
      (b"  <html>", "is a web page"),
      (b'{"weight_map": 1}', "is a JSON file"),
      (b"hello there\n", "is a text file"),
      (b"", "is empty or all zero"),
      (bytes(4000), "is empty or all zero"),
      (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
      (b"\x1f\x8b\x08\x00", "a compressed archive; unpack it"),
      (b"\x89PNG\r\n\x1a\n", "is an image"),
      (b"\x93NUMPY\x01\x00", "is a NumPy array"),
      (b"\xde\xad\xbe\xef\x00\x01\x02", "is of an unknown kind"),
    ],
  )
  def test_files_that_are_not_weights(self, tmp_path, content, match):
    (tmp_path / "x.pt").write_bytes(content)
    refused(tmp_path / "x.pt", tmp_path, rf"is not a safetensors, PyTorch or Keras file: .*{match}")

  def test_safetensors_header_without_tensors(self, tmp_path):
    save_file({}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "x.safetensors", tmp_path, "holds no tensors, only a header")

  def test_distributed_checkpoints(self, tmp_path):
    folder = tmp_path / "pytorch_model_fsdp_0"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(b"x")
    refused(folder, tmp_path, r"distributed checkpoint of PyTorch \(.distcp\).*dcp_to_torch")
    (folder / "__0_0.distcp").rename(folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    refused(folder, tmp_path, "checkpoint of DeepSpeed, .*zero_to_fp32.py")

  def test_weights_in_subdirectories(self, tmp_path):
    (tmp_path / "run").mkdir()
    write_folder(tmp_path / "run" / "checkpoint-500", {"x": np.ones(1)})
    refused(
      tmp_path / "run", tmp_path, r"its subdirectories do \(checkpoint-500\); give one of them"
    )

  @pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
      ("weight.absmax", np.float32, "bitsandbytes"),
      ("weight.quant_state.bitsandbytes__nf4", np.uint8, "bitsandbytes"),
      ("SCB", np.float32, "bitsandbytes"),
      ("qweight", np.int32, "GPTQ or AWQ"),
      ("weight_scale_inv", np.float32, "float8"),
    ],
  )
  def test_quantized_weights(self, name, dtype, kind):
    whole = layout("detector") | {f"detr_decoder.box_head.layer1.{name}": np.ones(3, dtype)}
    with pytest.raises(ValueError, match=rf"is quantized by .*{kind}.*float32, bfloat16"):
      chosen(whole)

  @pytest.mark.parametrize(
    ("stem", "kind"),
    [("features.0.0", "RepViT"), ("layers.0", "TinyViT"), ("stages.0", "EfficientViT")],
  )
  def test_other_image_encoders(self, stem, kind):
    trunk = "detector.backbone.vision_backbone.trunk."
    whole = {n: a for n, a in layout("meta").items() if not n.startswith(trunk)}
    whole[f"{trunk}model.backbone.model.{stem}.conv.weight"] = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=rf"EfficientSAM3 with an? {kind} .* cannot be converted"):
      chosen(whole)

  def test_missing_tensors_are_summarized_by_part(self, tmp_path):
    whole = {n: a for i, (n, a) in enumerate(layout("detector").items()) if i % 3 == 0}
    folder = write_folder(tmp_path / "source", whole)
    refused(
      folder, tmp_path, r"has few of the tensors .*the image encoder \d+ of \d+, .* give|Give"
    )

  def test_float16_source_is_noted(self, tmp_path):
    whole = {n: a.astype(np.float16) for n, a in layout("detector").items()}
    notes = []
    convert(
      write_folder(tmp_path / "source", whole),
      tmp_path / "out",
      tokenizer=TOKENIZER,
      note=notes.append,
      verify=False,
    )
    assert notes == [
      "430 tensors of the source are float16; their values are kept exactly in float32"
    ]
    assert bundle.inspect(tmp_path / "out").info["notes"] == notes
