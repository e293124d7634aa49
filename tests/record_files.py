"""Writes images as files of records in each format, and as TFDS and Hugging Face datasets do."""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import batches
import google_crc32c
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from batches import MODEL, QUIET

from sam3_jax.batch import pipeline
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.record_files.columns import Columns
from sam3_jax.batch.run import run


class Scene(NamedTuple):
  """An image to write: its name, the bytes of its file, and its phrases."""

  name: str
  data: bytes | None
  phrases: tuple[str, ...] = ()


def varint(value: int) -> bytes:
  """An integer in protobuf's encoding."""
  low, rest = value & 0x7F, value >> 7
  return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, value: bytes) -> bytes:
  return varint(number << 3 | 2) + varint(len(value)) + value


def example(**features: Any) -> bytes:
  """A serialized `tf.train.Example`; features are lists of bytes, or a whole number."""
  entries = b""
  for name, values in features.items():
    if isinstance(values, int):
      feature = field(3, field(1, varint(values)))
    else:
      feature = field(1, b"".join(field(1, value) for value in values))
    entries += field(1, field(1, name.encode()) + field(2, feature))
  return field(1, entries)


def scene_example(scene: Scene) -> bytes:
  return example(
    label=7,
    image=[] if scene.data is None else [scene.data],
    name=[scene.name.encode()],
    phrases=[phrase.encode() for phrase in scene.phrases],
  )


def masked_crc(data: bytes) -> bytes:
  """The checksum of TFRecord files."""
  crc = google_crc32c.value(data)
  return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def write_tf_record(path: Path, records: Sequence[bytes]) -> Path:
  with path.open("wb") as file:
    for record in records:
      length = struct.pack("<Q", len(record))
      file.write(length + masked_crc(length) + record + masked_crc(record))
  return path


def write_array_record(path: Path, records: Sequence[bytes], group_size: int = 1) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  writer = ArrayRecordWriter(str(path), f"group_size:{group_size}")
  for record in records:
    writer.write(record)
  writer.close()
  return path


def table(scenes: Sequence[Scene], image: Callable[[Scene], Any] | None = None) -> Any:
  """A `pyarrow.Table` with images as Hugging Face datasets write them, or as `image` returns."""
  import pyarrow

  def struct(scene: Scene) -> dict[str, Any]:
    path = scene.data and scene.name.rpartition("/")[2]
    return {"bytes": scene.data, "path": path}

  images = [(image or struct)(scene) for scene in scenes]
  kind = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
  return pyarrow.table(
    {
      "label": list(range(len(scenes))),
      "image": pyarrow.array(images, None if isinstance(images[0], str) else kind),
      "name": [scene.name for scene in scenes],
      "phrases": [list(scene.phrases) for scene in scenes],
    }
  )


def write_parquet(path: Path, content: Any, rows: int = 5) -> Path:
  from pyarrow import parquet

  parquet.write_table(content, path, row_group_size=rows)
  return path


def write_arrow(path: Path, content: Any, *, stream: bool = True, rows: int = 4) -> Path:
  import pyarrow

  path.parent.mkdir(parents=True, exist_ok=True)
  new = pyarrow.ipc.new_stream if stream else pyarrow.ipc.new_file
  with path.open("wb") as file, new(file, content.schema) as writer:
    writer.write_table(content, max_chunksize=rows)
  return path


def write_tar(path: Path, scenes: Sequence[Scene]) -> Path:
  """A WebDataset file; the names of scenes begin with its name."""
  with tarfile.open(path, "w") as tar:
    for scene in scenes:
      name = scene.name.removeprefix(f"{path.name}/")
      prompts = json.dumps({"prompts": scene.phrases}).encode()
      for member, data in ((name, scene.data), (f"{name.partition('.')[0]}.json", prompts)):
        if data is not None:
          header = tarfile.TarInfo(member)
          header.size = len(data)
          tar.addfile(header, io.BytesIO(data))
  return path


IMAGE, TEXT = (
  {"pythonClassName": f"tensorflow_datasets.core.features.{name}"}
  for name in ("image_feature.Image", "text_feature.Text")
)


def write_tfds(folder: Path, scenes: Sequence[Scene], format: str = "array_record") -> Path:
  """A dataset as TFDS prepares it: a split of two shards, one of one shard, and an empty shard."""
  folder.mkdir(parents=True)
  features = {"image": IMAGE, "name": TEXT, "phrases": TEXT}
  values = {"pythonClassName": "FeaturesDict", "featuresDict": {"features": features}}
  (folder / "features.json").write_text(json.dumps(values))
  half = len(scenes) // 2
  shards = {"train": [scenes[:half], [], scenes[half:]], "test": [scenes[:2]]}
  splits = [
    {
      "name": split,
      "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      "shardLengths": [str(len(shard)) for shard in parts],
    }
    for split, parts in shards.items()
  ]
  info = {"name": "scenes", "fileFormat": format, "splits": splits}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  write = write_array_record if format == "array_record" else write_tf_record
  for split, parts in shards.items():
    for number, shard in enumerate(parts):
      if shard:
        name = f"scenes-{split}.{format}-{number:05}-of-{len(parts):05}"
        write(folder / name, [scene_example(scene) for scene in shard])
  return folder


def write_cache(cache: Path, scenes: Sequence[Scene]) -> Path:
  """A dataset in the cache of Hugging Face datasets: `some/MyScenes`, two shards and one split."""
  folder = cache / "some___my_scenes" / "default" / "0.0.0" / "0123abc"
  half, prefix = len(scenes) // 2, "my_scenes-train"
  write_arrow(folder / f"{prefix}-00000-of-00002.arrow", table(scenes[:half]))
  write_arrow(folder / f"{prefix}-00001-of-00002.arrow", table(scenes[half:]))
  split = {
    "name": "train", "num_examples": len(scenes), "shard_lengths": [half, len(scenes) - half],
    "dataset_name": "my_scenes",
  }  # fmt: skip
  info = {"builder_name": "parquet", "splits": {"train": split}}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return folder


def write_saved(folder: Path, scenes: Sequence[Scene]) -> Path:
  """A dataset as `DatasetDict.save_to_disk` of Hugging Face datasets writes it."""
  (folder / "train").mkdir(parents=True)
  (folder / "dataset_dict.json").write_text('{"splits": ["train"]}')
  files = [{"filename": "data-00000-of-00001.arrow"}]
  (folder / "train" / "state.json").write_text(json.dumps({"_data_files": files}))
  write_arrow(folder / "train" / files[0]["filename"], table(scenes))
  return folder


ALL = Columns(name="name", prompts="phrases")
TABLES = ("parquet", "arrow stream", "arrow file", "saved", "cached")
FILES = ("parquet", "arrow stream", "arrow file", "array_record", "tfrecord")
FORMATS = (*TABLES, "tar", "array_record", "tfrecord", "tfds array_record", "tfds tfrecord")


@pytest.fixture(autouse=True)
def stub(monkeypatch, tmp_path):
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
  monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def scenes(tmp_path) -> list[Scene]:
  return make_scenes(tmp_path)


def make_scenes(folder: Path, count: int = 13) -> list[Scene]:
  """Images of several sizes, one of which is damaged, and one or two phrases for each."""
  made = sorted(batches.write_images(folder / "made", count).iterdir())
  phrases = [("cat", "dog")[: 1 + i % 2] for i in range(count)]
  data = [path.read_bytes() for path in made]
  data[count // 2] = data[count // 2][:70]
  names = [f"scenes.tar/{path.name}" for path in made]
  return list(map(Scene, names, data, phrases))


def write(folder: Path, kind: str, scenes: list[Scene]) -> tuple[str, Columns]:
  """Writes scenes in a format; returns the values of the options that read them."""
  if kind in TABLES:
    pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  examples = [scene_example(scene) for scene in scenes]
  match kind:
    case "parquet":
      return str(write_parquet(folder / "a.parquet", table(scenes))), ALL
    case "arrow stream" | "arrow file":
      content, stream = table(scenes), kind == "arrow stream"
      return str(write_arrow(folder / "a.arrow", content, stream=stream)), ALL
    case "saved":
      return f"datasets://{write_saved(folder / 'saved', scenes)}", ALL
    case "cached":
      write_cache(folder / "cache", scenes)
      return "datasets://some/MyScenes", ALL
    case "tar":
      return str(write_tar(folder / "scenes.tar", scenes)), Columns()
    case "array_record":
      return str(write_array_record(folder / "a.array_record", examples)), ALL
    case "tfrecord":
      return str(write_tf_record(folder / "a.tfrecord", examples)), ALL
  write_tfds(folder / "tfds" / "scenes" / "1.0.0", scenes, kind.split()[1])
  return "tfds://scenes", Columns(name="name", prompts="phrases", split="train")


def start(images: str, out: Path, columns: Columns, **settings: Any) -> bool:
  """Runs a job; returns whether it is done."""
  inputs = list_inputs(images, "cat", columns=columns)
  given = {"part_size": 3, "batch_images": 2, "max_error_rate": 1.0, **settings}
  return run(Job(inputs=inputs, out=out, **given), MODEL, QUIET, QUIET)
