"""PyTorch's files are read as written; damaged and hostile ones are refused in one line."""

import collections
import os
import pickle
import struct
import tracemalloc
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from conversions import assert_tree, converted, refused
from golden_model import CONFIG, meta_weights
from layouts import TOKENIZER, layout
from sam3_jax.converters import convert
from sam3_jax.converters.layouts import meta
from sam3_jax.converters.readers.pickles import MAX_BYTES, read_pickle
from sam3_jax.converters.readers.torch_files import open_torch
from sam3_jax.converters.selection import select
from sam3_jax.converters.sources import find_weights
from sam3_jax.converters.wrappers import find_candidates
from torch_archive import View, all_views, pickled, save, save_arrays, views, write

SCALE = "detector.backbone.vision_backbone.trunk.ln_pre.weight"


@pytest.fixture(scope="module")
def sam3(tmp_path_factory):
  """sam3.pt of the tiny model, with RoPE tables."""
  arrays = layout("meta") | meta.rope_tables(CONFIG)
  return save_arrays(tmp_path_factory.mktemp("torch") / "sam3.pt", arrays)


def test_tensors_are_read_as_written(tmp_path):
  arrays = {
    "zero": np.zeros((0, 3), np.float32),
    "scalar": np.float32(2.5).reshape(()),
    "half": np.arange(5, dtype=np.float16),
    "brain": np.arange(6).reshape(2, 3).astype(jnp.bfloat16),
    "int": np.arange(3),
    "complex": np.arange(4).astype(np.complex64) * 1j,
    "double": np.eye(2),
  }
  for protocol in (2, 4, 5):
    path = save(tmp_path / f"{protocol}.pt", views(arrays), protocol)
    found = open_torch(path)
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      assert (found[name].shape, found[name].dtype) == (array.shape, str(array.dtype))
      np.testing.assert_array_equal(found[name].read(), array)


def test_views_of_a_storage(tmp_path):
  base = np.arange(24, dtype=np.float32)
  content = {
    "rows": View(base, "0", (2, 3), (3, 1), 6),
    "columns": View(base, "0", (3, 2), (1, 3), 12),  # transposed
    "tied": View(base, "0", (2, 3), (3, 1), 6),
    "sparse": View(base, "0", (3,), (2,), 18),
    "kept": View(base, "0", (1, 2), (99, 1), 0),  # the stride of an axis of size 1 is ignored
  }
  found = open_torch(save(tmp_path / "x.pt", content))
  np.testing.assert_array_equal(found["rows"].read(), base[6:12].reshape(2, 3))
  np.testing.assert_array_equal(found["columns"].read(), base[12:18].reshape(2, 3).T)
  np.testing.assert_array_equal(found["tied"].read(), found["rows"].read())
  np.testing.assert_array_equal(found["sparse"].read(), base[[18, 20, 22]])
  np.testing.assert_array_equal(found["kept"].read(), base[None, :2])
  assert not found["rows"].read().flags.writeable


@pytest.mark.slow
def test_sam3_pt_gives_the_expected_tree(sam3, tmp_path):
  bundle = converted(sam3, tmp_path / "out", config=CONFIG)
  assert_tree(bundle.params, points=True)
  assert bundle.info["source"] == "sam3.pt, 623 tensors in the layout meta"
  assert find_weights(sam3.parent) == sam3
  assert bundle.info["lacks"] == []


@pytest.mark.parametrize(
  "wrap",
  [
    lambda content: content,
    lambda content: {"state_dict": content, "epoch": 3},
    lambda content: {
      "model": content,
      "optimizer": {"state": {0: {"step": View(np.ones(1), "s")}}, "param_groups": [{"lr": 1e-4}]},
      "epoch": 3,
      "steps": {"train": 40},
      "loss": collections.OrderedDict(),
      "scaler": None,
      "best": (1.5, True, [-3, 2**40, 300]),
    },
  ],
)
def test_state_dicts_and_training_checkpoints(tmp_path, wrap):
  path = save(tmp_path / "x.pt", wrap(views(meta_weights())))
  found = select(open_torch(path), "auto", None, str(path))
  assert found.tensors.keys() == meta_weights().keys()


def test_prefixes_of_image_models_and_ddp():
  for prefix in ("module.detector.", "module.", ""):
    names = {prefix + name.removeprefix("detector.") for name in meta_weights()}
    (found,) = find_candidates("meta", names)
    assert {meta.canonical(name) for name in found.names.values()} == meta_weights().keys()


@pytest.mark.slow
def test_huggingface_names_without_configuration(tmp_path):
  path = save(tmp_path / "pytorch_model.bin", views(layout("detector")))
  with pytest.raises(ValueError, match="trunk 64 wide with 4 blocks do not determine its heads"):
    convert(path, tmp_path / "out", tokenizer=TOKENIZER)


def test_attributes_of_dictionaries_are_ignored(tmp_path):
  content = views({"a": np.ones(3, np.float32)})
  content._metadata = collections.OrderedDict(version=1)  # as state_dict() has it
  assert list(open_torch(save(tmp_path / "x.pt", content))) == ["a"]


# --- hostile


class Calls:
  """Pickles as a function call."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("bare", [False, True])
def test_function_calls_are_refused_by_name(tmp_path, protocol, bare):
  victim = tmp_path / "victim"
  content = {"model": {"a": Calls(os.system, f"touch {victim}")}}
  path = tmp_path / "sam3.pt"
  if bare:
    path.write_bytes(pickle.dumps(content, protocol))
  else:
    write(path, {"data.pkl": pickle.dumps(content, protocol)})
  named = protocol >= 2
  refused(path, tmp_path, "posix.system" if named else "cannot be used|not a safetensors")
  assert not victim.exists()


@pytest.mark.parametrize(
  ("function", "name"),
  [
    (eval, "builtins.eval|__builtin__.eval"),
    (getattr, "getattr"),
    (np.load, "numpy.load"),
    (pickle.loads, "loads"),
    (bytearray, "bytearray"),
  ],
)
def test_unknown_globals_are_refused(tmp_path, function, name):
  for protocol in (2, 4):
    write(tmp_path / "x.pt", {"data.pkl": pickle.dumps(Calls(function, "1"), protocol)})
    with pytest.raises(ValueError, match=f"asks for .*({name}).*it was not called"):
      open_torch(tmp_path / "x.pt")


DOUBLED = b")" + b"".join(b"\x94h%c\x86" % i for i in range(100))  # its repr has 2**100 parts
STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0aN%stQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE % b"K\x01" + b"K\0%s)tR."


@pytest.mark.parametrize(
  ("data", "match"),
  [
    (b"", "is truncated"),
    (b"\x80\x02}q\x00", "is truncated"),
    (b"\x80\x02.", "damaged"),
    (b"\x80\x02h\x07.", "damaged"),
    (b"\x80\x02X\xff\xff\xff\xffabc.", "is truncated"),
    (b"\x80\x02X\x01\x00\x00\x00\xff.", "damaged"),
    (b"\x80\x02(lp0\n.", "opcode b'l'"),
    (b"\x80\x02cos\nsystem\n(S'id'\ntR.", "asks for 'os.system'"),
    (b"\x80\x02(ios\nsystem\n.", "asks for 'os.system'"),
    (b"\x80\x02c" + b"a" * 2000 + b"\nb\n.", "is truncated"),
    (b"\x80\x02ctorch\nFloatStorage\n)R.", "calls torch.FloatStorage, which is not a function"),
    (b"\x80\x02ccollections\nOrderedDict\n]\x85R.", "fills an OrderedDict"),
    (b"\x80\x02ccollections\nOrderedDict\n}b.", "sets attributes of a Global"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "damaged"),
    (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01))K\x01K\x01tR.", "not a storage"),
    (b"\x80\x02ctorch._utils\n_rebuild_parameter\nK\x01\x85R.", "not a tensor"),
    (b"\x80\x02K\x01Q.", "refers to 1 where a storage"),
    (b"\x80\x02(K\x01K\x01K\x01K\x01K\x01tQ.", "refers to 1 where a storage"),
    (b"\x80\x02})K\x01s.", "has a key of type tuple"),
    (b"\x80\x02}(K\x01NK\x01Nu.", "1 is there twice"),
    (b"\x80\x02}(K\x01u.", "damaged"),
    (b"\x80\x02)K\x01a.", "damaged"),
    (b"\x80\x02K\x01r\xff\xff\xff\x7f.", "it holds an int"),  # a memo index of 2**31
    (DOUBLED + b"Q.", r"refers to \(\(\(.* where a storage"),
    (b"(" + DOUBLED + b"K\x01K\x01K\x01K\x01tQ.", r"refers to \(\(\(.* where a storage"),
    (DOUBLED + b"\x8c\x01a\x93.", "damaged"),
    (b"\x8c\x05torch" + DOUBLED + b"\x93.", "damaged"),
    (STORAGE % DOUBLED + b".", r"has the size \(\(\("),
    (TENSOR % (DOUBLED + b"\x85"), r"has the size \(\(\("),
    (TENSOR % DOUBLED, r"has the size \(\(\("),
  ],
)
def test_damaged_and_hostile_pickles(tmp_path, data, match):
  write(tmp_path / "x.pt", {"data.pkl": data})
  tracemalloc.start()
  with pytest.raises(ValueError, match=match) as caught:
    open_torch(tmp_path / "x.pt")
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert "\n" not in str(caught.value)
  assert peak < 1_000_000  # measured 0.1 million: a pickle cannot ask for memory


@pytest.mark.slow
def test_deeply_nested_pickle(tmp_path):
  """hash and repr of such a tuple would exceed the recursion limit."""
  for end, match in (
    (b".", "it holds a tuple, not a dictionary"),
    (b"Q.", r"refers to \(\(\(\(\(\(\(\.\.\.\),"),
    (b"\x8c\x01a\x93.", "damaged"),
  ):
    write(tmp_path / "x.pt", {"data.pkl": b"\x80\x02)" + b"\x85" * 1_000_000 + end})
    with pytest.raises(ValueError, match=match):
      open_torch(tmp_path / "x.pt")


def test_a_pickle_over_the_size_limit():
  with pytest.raises(ValueError, match="larger than"):
    read_pickle(b"N" * (MAX_BYTES + 1))


@pytest.mark.parametrize("size", [-1, 1.5, 2**63, None, "3"])
def test_invalid_sizes(tmp_path, size):
  for view in (
    View(np.ones(3, np.float32), "0", (size,), (1,)),
    View(np.ones(3, np.float32), "0", (3,), (size,)),
    View(np.ones(3, np.float32), "0", (3,), (1,), size),
  ):
    with pytest.raises(ValueError, match=r"has the size .*; expected an integer of 0 or more"):
      open_torch(save(tmp_path / "x.pt", {"a": view}))


@pytest.mark.parametrize(
  ("views_of_0", "match"),
  [
    ({"a": ((4,), (1,), 0)}, r"a \[4\] ends at element 3 of a storage of 3"),
    ({"a": ((3,), (1,), 1)}, "ends at element 3 of a storage of 3"),
    ({"a": ((2, 2**40), (2**40, 1), 0)}, "ends at element"),
    ({"a": ((2**40,), (0,), 0)}, r"a has strides \[0\]: its elements overlap"),
    ({"a": ((2, 2), (1, 1), 0)}, "its elements overlap"),
    ({"a": ((2,), (1,), 0), "b": ((2,), (1,), 1)}, "a and b overlap in storage 0"),
    ({"a": ((3,), (1,), 0), "b": ((2,), (1,), 0)}, "overlap in storage 0"),
  ],
)
def test_views_that_overlap_or_exceed_their_storage(tmp_path, views_of_0, match):
  base = np.ones(3, np.float32)
  content = {name: View(base, "0", *view) for name, view in views_of_0.items()}
  with pytest.raises(ValueError, match=match):
    open_torch(save(tmp_path / "x.pt", content))


@pytest.mark.parametrize(
  ("content", "match"),
  [
    (3, "it holds an int, not a dictionary"),
    ({}, "it holds no model"),
    ({"weights": {}, "x": 1}, "it holds no model: it has no tensors, but 'weights', 'x'"),
    ({"model": {"a": {"b": 1}}}, "it holds no model: it has no tensors, but 'model'"),
    ({"optimizer": {"a": View(np.ones(1, np.float32), "0")}}, "state of an optimizer and no mode"),
    ({"a\nb": View(np.ones(1, np.float32), "0")}, r"'a\\nb' is not a valid tensor name"),
  ],
)
def test_contents_without_a_model(tmp_path, content, match):
  with pytest.raises(ValueError, match=match) as caught:
    open_torch(save(tmp_path / "x.pt", content))
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"data/0": b"123"}, "the storage of a takes 3 bytes; expected 12 for 3 of float32"),
    ({"byteorder": b"big"}, "not little-endian"),
    ({"constants.pkl": b""}, "TorchScript"),
    ({"../../escape": b"x"}, "would be outside of its directory"),
    ({"..\\escape": b"x"}, "would be outside of its directory"),
    ({"a\nb": b"x"}, "is not a valid tensor name"),
    ({"more/data.pkl": b"x"}, "a zip archive without PyTorch's data.pkl"),
  ],
)
def test_invalid_archives(tmp_path, changes, match):
  path = save(tmp_path / "x.pt", views({"a": np.ones(3, np.float32)}), **changes)
  refused(path, tmp_path, match)


def test_archives_of_other_programs(tmp_path):
  np.savez(tmp_path / "x.npz", a=np.ones(3))
  refused(tmp_path / "x.npz", tmp_path, "an archive of NumPy arrays")
  write(tmp_path / "x.zip", {"readme": b"x"})
  refused(tmp_path / "x.zip", tmp_path, "a zip archive without PyTorch's data.pkl")


def test_a_missing_storage(tmp_path):
  write(tmp_path / "x.pt", {"data.pkl": pickled(views({"a": np.ones(3, np.float32)}))})
  refused(tmp_path / "x.pt", tmp_path, "the storage '0' of a is missing")


def test_a_zip_bomb(tmp_path):
  for name in ("archive/data.pkl", "archive/data/0"):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
      archive.writestr(
        "archive/data.pkl" if name != "archive/data.pkl" else "archive/x", b"\x80\x02}."
      )
      archive.writestr(name, bytes(50_000_000))
    tracemalloc.start()
    refused(tmp_path / "x.pt", tmp_path, r"is compressed \(.* bytes to")
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_storages_that_share_bytes(tmp_path):
  arrays = {"a": np.ones(3, np.float32), "b": np.ones(3, np.float32)}
  path = save(tmp_path / "x.pt", views(arrays))
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    first, second = (archive.getinfo(f"archive/data/{i}").header_offset for i in (0, 1))
  position = content.rindex(struct.pack("<I", second))  # in the directory at the end
  content[position : position + 4] = struct.pack("<I", first)
  path.write_bytes(content)
  refused(path, tmp_path, "overlaps what follows it")


@pytest.mark.slow
def test_checksum_mismatch_is_found(tmp_path):
  path = save_arrays(tmp_path / "x.pt", meta_weights())
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    (position,) = (i for i, name in enumerate(meta_weights()) if name == SCALE)
    content[archive.getinfo(f"archive/data/{position}").header_offset + 200] ^= 4
  path.write_bytes(content)
  refused(path, tmp_path, f"{SCALE} in .* differs from its checksum", config=CONFIG)


def test_truncation_at_any_length_is_refused(sam3, tmp_path):
  path = tmp_path / "sam3.pt"
  path.write_bytes(sam3.read_bytes())
  lengths = [0, 3, 4, 30, *np.random.default_rng(0).integers(31, path.stat().st_size, 100)]
  for length in sorted(lengths, reverse=True):
    os.truncate(path, int(length))
    refused(path, tmp_path, "is truncated or damaged|is not a safetensors")


def test_torch_archive_writes_the_opcodes_of_torch_save():
  """Checked by hand against torch.save({"a": torch.ones(2)}) of torch 2.14."""
  data = pickled({"a": View(np.ones(2, np.float32), "0")})
  for part in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cpuq"):
    assert part in data
  assert data.count(b"Q") == 1
  assert len(list(all_views({"a": {"b": View(np.ones(1), "0")}}))) == 1
