"""Reads datasets that TFDS and Hugging Face datasets have prepared with their own code."""

import io
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import record_files
from batches import load_images

from sam3_jax.batch.image_bytes import read_image_bytes
from sam3_jax.batch.input_list import image_file
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.record_files.columns import Columns

pytestmark = pytest.mark.foreign
scenes = record_files.scenes
PHRASES = {"name": "name", "prompts": "phrases"}


def contents(images: str, **columns) -> dict[str, tuple[bytes, list[str]]]:
  """The bytes and the phrases of the images, by name."""
  found = list_inputs(images, "cat", columns=Columns(**columns))
  assert len({item.name for item in found}) == len(found)
  return {
    item.name: (read_image_bytes(image_file(item))[0], [prompt.text for prompt in item.prompts])
    for item in found
  }


def expected(scenes) -> dict[str, tuple[bytes, list[str]]]:
  return {scene.name: (scene.data, list(scene.phrases)) for scene in scenes}


def run(code: str, **environment: str) -> None:
  """Runs a program in a process of its own: these packages change the state of a process."""
  environment = os.environ | {"PYTHONPATH": "tests", "HF_HUB_OFFLINE": "1"} | environment
  subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


def test_tfds(tmp_path, scenes, monkeypatch):
  tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra `foreign`")

  class Scenes(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = [  # noqa: RUF012
      tfds.core.BuilderConfig(name="small"),
      tfds.core.BuilderConfig(name="large"),
    ]

    def _info(self):
      text = tfds.features.Text()
      features = {
        "image": tfds.features.Image(),
        "name": text,
        "phrases": tfds.features.Sequence(text),
      }
      features["nested"] = {"other": tfds.features.Image(), "label": tfds.features.Scalar(np.int32)}
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
      return {"train": self._examples(scenes), "test": self._examples(scenes[:2])}

    def _generate_examples(self):
      raise NotImplementedError

    def _examples(self, scenes):
      for number, scene in enumerate(scenes):
        image = {"image": io.BytesIO(scene.data), "name": scene.name, "phrases": scene.phrases}
        yield number, {**image, "nested": {"other": io.BytesIO(scenes[0].data), "label": number}}

  Scenes(data_dir=tmp_path, config="small", file_format="array_record").download_and_prepare()
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  found = contents("tfds://scenes", split="train", **PHRASES)
  assert found == expected(scenes)  # TFDS shuffles the examples
  assert contents("tfds://scenes/small:1.2.0", split="test", **PHRASES) == expected(scenes[:2])
  others = contents("tfds://scenes", split="train", image="nested/other")
  assert {data for data, _ in others.values()} == {scenes[0].data}


@pytest.fixture
def hugging_face(tmp_path, scenes, monkeypatch):
  """Datasets in the cache, on the disk and as Parquet, all made by the package `datasets`."""
  pytest.importorskip("datasets", reason="needs the extra `foreign`")
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
  record_files.write_parquet(tmp_path / "source.parquet", record_files.table(scenes))
  run(
    f"""
    import datasets

    features = {{"image": datasets.Image(), "name": datasets.Value("string")}}
    features["phrases"] = datasets.List(datasets.Value("string"))
    files = {{"train": "{tmp_path}/source.parquet", "test": "{tmp_path}/source.parquet"}}
    loaded = datasets.load_dataset("parquet", data_files=files)
    loaded = loaded.remove_columns("label").cast(datasets.Features(features))
    loaded["test"] = loaded["test"].select([2, 0])
    loaded.save_to_disk("{tmp_path}/saved", num_shards={{"train": 3, "test": 1}})
    loaded["test"].save_to_disk("{tmp_path}/one")
    loaded["train"].to_parquet("{tmp_path}/a.parquet", batch_size=4)
    datasets.load_dataset("imagefolder", data_dir="{tmp_path}/made")
    """,
    HF_DATASETS_CACHE=str(tmp_path / "cache"),
  )
  return tmp_path


def test_hugging_face_datasets(hugging_face, scenes):
  two = [scenes[2], scenes[0]]
  for images, columns, made in (
    ("datasets://parquet", {"split": "train"}, scenes),
    (f"datasets://{hugging_face}/saved", {"split": "train"}, scenes),
    (f"datasets://{hugging_face}/saved", {"split": "test"}, two),
    (f"datasets://{hugging_face}/one", {}, two),
    (f"{hugging_face}/a.parquet", {}, scenes),
  ):
    found = contents(images, **columns, **PHRASES)
    assert list(found.items()) == list(expected(made).items())


def test_hugging_face_images_outside_of_the_cache(hugging_face, scenes):
  found = list_inputs("datasets://imagefolder", "cat")
  assert sorted(item.path for item in found) == sorted(
    str(path) for path in (hugging_face / "made").iterdir()
  )
  assert not any(image.unreadable for image in load_images(found))
