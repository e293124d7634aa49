"""Orbax items: written in chunks, inspected, restored and read."""

import jax
import numpy as np
import pytest
import tensorstore

from sam3_jax.checkpoint.orbax_items import read_item, restore_item, save_item, stored_arrays


@pytest.mark.parametrize(
  ("shape", "chunk"),
  [
    ((2, 3, 512, 1184), (2, 3, 512, 296)),
    ((2053, 513), (2053, 513)),  # of a prime Orbax alone would make as many chunks
    ((1024, 1024), (1024, 1024)),
  ],
)
def test_large_arrays_are_stored_in_chunks(tmp_path, shape, chunk):
  array = np.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
  save_item(tmp_path / "x", {"a": {"b": array}})
  store = {"driver": "ocdbt", "base": f"file://{tmp_path}/x/"}
  stored = tensorstore.open({"driver": "zarr", "kvstore": store, "path": "a.b"}).result()
  assert stored.chunk_layout.read_chunk.shape == chunk
  np.testing.assert_array_equal(read_item(tmp_path / "x")["a"]["b"], array)


def test_items(tmp_path):
  tree = {"a": {"b": np.ones((1, 2), np.float32), "c": np.float32([3])}}
  save_item(tmp_path / "item", tree)
  found = stored_arrays(tmp_path / "item")
  assert {name: (tuple(x.shape), str(x.dtype)) for name, x in found.items()} == {
    "a/b": ((1, 2), "float32"),
    "a/c": ((1,), "float32"),
  }
  device = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  restored = restore_item(
    tmp_path / "item",
    {name: jax.ShapeDtypeStruct(x.shape, "bfloat16", sharding=device) for name, x in found.items()},
  )
  assert restored["a"]["b"].devices() == {jax.devices()[3]}
  np.testing.assert_array_equal(read_item(tmp_path / "item")["a"]["c"], [3])
  with pytest.raises(ValueError, match="none cannot be read"):
    read_item(tmp_path / "none")
  (tmp_path / "file").write_text("")
  with pytest.raises(ValueError, match=r"x cannot be written .*disk full") as caught:
    save_item(tmp_path / "file" / "x", tree)
  assert "\n" not in str(caught.value)
