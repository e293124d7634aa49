"""Datasets by name: those that TFDS and Hugging Face datasets have prepared."""

import json
import shutil
from pathlib import Path

import pytest
import record_files

from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.record_files.columns import Columns

stub, scenes = record_files.stub, record_files.scenes

TFDS = {"name": "scenes", "fileFormat": "array_record", "splits": []}


def test_faulty_tfds(tmp_path, scenes):
  top = tmp_path / "tfds"

  def fault(images: str, **columns) -> str:
    with pytest.raises((FileNotFoundError, ValueError)) as error:
      list_inputs(images, "cat", columns=Columns(**columns))
    assert "\n" not in str(error.value)
    return str(error.value)

  assert f"tfds://scenes is not prepared in {top}; prepare it with tfds." in fault("tfds://scenes")
  for version in ("1.10.0", "1.9.0"):
    folder = record_files.write_tfds(top / "scenes" / version, scenes[:4])
  found = list_inputs("tfds://scenes", "cat", columns=Columns(split="test"))
  assert Path(found[0].path).parent.name == "1.10.0"
  assert "is not prepared in" in fault("tfds://scenes:2.0.0", split="test")
  assert "has several splits: train, test; choose one with --split" in fault("tfds://scenes:1.9.0")
  assert "no split 'val', but train, test; check --split" in fault("tfds://scenes", split="val")
  assert "there is no column 'x'" in fault("tfds://scenes", split="test", image="x")

  with_configs = top / "other"
  for config in ("a", "b"):
    record_files.write_tfds(with_configs / config / "1.0.0", scenes[:4])
  assert "several configurations: a, b; choose one with tfds://other/NAME" in fault("tfds://other")
  (with_configs / ".config").mkdir()
  (with_configs / ".config" / "metadata.json").write_text('{"default_config_name": "b"}')
  for name, config in (("other", "b"), ("other/a", "a"), ("other/a:1.0.0", "a")):
    found = list_inputs(f"tfds://{name}", "cat", columns=Columns(split="test"))
    assert Path(found[0].path).parts[-3] == config
  assert "is not prepared in" in fault("tfds://other/c")

  images = f"tfds://{folder}"
  assert len(list_inputs(images, "cat", columns=Columns(split="train"))) == 4
  shard = folder / "scenes-test.array_record-00000-of-00001"
  record_files.write_array_record(shard, [record_files.scene_example(scenes[0])])
  assert "it has 1 record, but the description of its dataset says 2" in fault(images, split="test")
  shard.unlink()
  assert "cannot be read (No such file or directory)" in fault(images, split="test")
  info = folder / "dataset_info.json"
  for values, message in (
    (TFDS | {"fileFormat": "riegeli"}, "is stored in the format 'riegeli'; prepare it with"),
    (TFDS, "has no split 'test', but (none)"),
    (TFDS | {"splits": [{"x": 1}]}, "its description is damaged ('name'); prepare it again"),
    ([], "its description is damaged ("),
  ):
    info.write_text(json.dumps(values))
    assert message in fault(images, split="test")
  info.write_text("{")
  assert "is not valid JSON" in fault(images)
  assert "has no dataset_info.json" in fault(f"tfds://{tmp_path}")


def test_faulty_tfds_features(tmp_path, scenes):
  folder = record_files.write_tfds(tmp_path / "tfds" / "scenes" / "1.0.0", scenes[:4])

  def describe(**features):
    values = {"pythonClassName": "FeaturesDict", "featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(values))

  text, image = record_files.TEXT, record_files.IMAGE
  describe(name=text, label={"pythonClassName": "x.ClassLabel"})
  with pytest.raises(ValueError, match=r"no feature with images; .* label \(ClassLabel\), name"):
    list_inputs("tfds://scenes", "cat", columns=Columns(split="test"))
  describe(b=image, a={"pythonClassName": "x", "featuresDict": {"features": {"c": image}}})
  with pytest.raises(ValueError, match="several image features: a/c, b; choose one with"):
    list_inputs("tfds://scenes", "cat", columns=Columns(split="test"))


def test_faulty_hugging_face_datasets(tmp_path, scenes):
  pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")

  def fault(images: str, **columns) -> str:
    with pytest.raises((FileNotFoundError, ValueError)) as error:
      list_inputs(images, "cat", columns=Columns(**columns))
    assert "\n" not in str(error.value)
    return str(error.value)

  name, cache = "datasets://some/MyScenes", tmp_path / "cache"
  expected = f"{name} is not in {cache}; prepare it with datasets.load_dataset('some/MyScenes')"
  assert expected in fault(name)
  folder = record_files.write_cache(cache, scenes)
  assert len(list_inputs(name, "cat")) == len(list_inputs(f"{name}:default", "cat")) == 13
  assert "load_dataset('some/MyScenes', 'x')" in fault(f"{name}:x")
  assert "has no split 'test', but train; check --split" in fault(name, split="test")
  shutil.copytree(folder.parents[1], folder.parents[1].with_name("second"))
  assert "has several configurations: default, second; choose one with" in fault(name)
  record_files.write_arrow(
    folder / "my_scenes-train-00000-of-00002.arrow", record_files.table(scenes[:1])
  )
  assert "it has 1 record, but the description of its dataset says 6" in fault(f"{name}:default")
  (folder / "dataset_info.json").write_text("{}")
  assert "its description is damaged ('splits')" in fault(f"{name}:default")
  assert "has no state.json or dataset_dict.json" in fault(f"datasets://{tmp_path}")
