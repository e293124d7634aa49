"""Files of records as inputs of batch inference: each format, and faulty files."""

import gzip
import io
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import record_files
from batches import MODEL, QUIET, Engine, load_images
from PIL import Image
from record_files import ALL, FORMATS, Scene, example, scene_example, write

from sam3_jax import Prompt
from sam3_jax.batch import pipeline
from sam3_jax.batch.image_bytes import read_image_bytes
from sam3_jax.batch.input_list import image_file
from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.merge import ANNOTATIONS, merge
from sam3_jax.batch.record_files import array_record
from sam3_jax.batch.record_files.columns import Columns
from sam3_jax.batch.record_files.listing import is_row_name, record_format
from sam3_jax.batch.run import run
from sam3_jax.cli.main import main
from sam3_jax.datasets.synthetic.scenes import compose
from sam3_jax.inference.predictor import Sam3

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
stub, scenes = record_files.stub, record_files.scenes


def merged(images: str, out: Path, columns: Columns, prompts: str | None = None, **settings):
  """The merged file of a job, and its errors."""
  inputs = list_inputs(images, prompts, columns=columns)
  given = {"part_size": 5, "batch_images": 2, "max_error_rate": 1.0, **settings}
  assert run(Job(inputs=inputs, out=out, **given), MODEL, QUIET, QUIET)
  merge(out)
  errors = (out / "errors.jsonl").read_text().replace(f"{out.parent}/", "")
  return (out / ANNOTATIONS).read_bytes(), errors


def listed(folder: Path, scenes: list[Scene]) -> str:
  """The scenes as files, and a list with their phrases."""
  lines = []
  for scene in scenes:
    path = folder / "reference" / scene.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(scene.data or b"")
    lines.append(json.dumps({"image": scene.name, "prompts": scene.phrases}))
  path = folder / "reference" / "list.jsonl"
  path.write_text("\n".join(lines))
  return str(path)


@pytest.mark.parametrize("kind", ["parquet", "cached", "array_record", "tfds tfrecord"])
def test_the_same_images_give_the_same_merged_file(tmp_path, scenes, kind, reference, monkeypatch):
  monkeypatch.chdir(tmp_path)
  images, columns = write(tmp_path, kind, scenes)
  assert merged(images, tmp_path / "out", columns) == reference
  assert len(reference[1].splitlines()) == 1


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
  """The merged file and the errors of the same images as files."""
  folder = tmp_path_factory.mktemp("reference")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "Engine", Engine)
    return merged(listed(folder, record_files.make_scenes(folder)), folder / "out", Columns())


@pytest.mark.slow
def test_two_hundred_scenes_in_each_format(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  made = []
  for number in range(200):
    file = io.BytesIO()
    composed = compose(np.random.default_rng(number), size=(240, 320))
    Image.fromarray(composed.image).save(file, "jpeg")
    made.append(Scene(f"scenes.tar/{number:03}.jpg", file.getvalue(), ("cat", "dog")))
  listed(tmp_path, made)
  settings = {"part_size": 64, "batch_images": 4}
  found = {}
  monkeypatch.chdir("reference")
  for images in ("list.jsonl", ".", "scenes.tar/*.jpg"):
    out = tmp_path / f"out-{len(found)}"
    found[images] = merged(images, out, Columns(), "cat, dog", **settings)
  monkeypatch.chdir(tmp_path)
  for kind in FORMATS:
    images, columns = write(tmp_path, kind, made)
    images = "scenes.tar" if kind == "tar" else images
    out = tmp_path / f"out-{len(found)}"
    found[kind] = merged(images, out, columns, **settings)
    shutil.rmtree(tmp_path / "tfds", ignore_errors=True)
  assert {kind for kind, one in found.items() if one != found["."]} == set()
  assert len(json.loads(found["."][0])["images"]) == 200


def test_default_names_and_prompts(tmp_path, scenes, monkeypatch):
  monkeypatch.chdir(tmp_path)
  folder = Path("shards")
  folder.mkdir()
  records = [scene_example(scene) for scene in scenes]
  record_files.write_array_record(folder / "a.array_record-00000-of-00002", records[:2])
  record_files.write_tf_record(folder / "b.tfrecord-00001-of-00002", records[2:4])
  found = list_inputs("shards/*", "cat")
  assert [item.name for item in found] == [
    "shards/a.array_record-00000-of-00002#0", "shards/a.array_record-00000-of-00002#1",
    "shards/b.tfrecord-00001-of-00002#0", "shards/b.tfrecord-00001-of-00002#1",
  ]  # fmt: skip
  assert {item.prompts for item in found} == {(Prompt("cat"),)}
  assert [read_image_bytes(image_file(item))[0] for item in found] == [
    scene.data for scene in scenes[:4]
  ]


def test_records_that_are_images(tmp_path, scenes):
  data = [scene.data or b"" for scene in scenes]
  paths = (
    record_files.write_array_record(tmp_path / "a.array_record", data, group_size=4),
    record_files.write_tf_record(tmp_path / "a.tfrecords", data),
  )
  for path in paths:
    found = list_inputs(str(path), "cat")
    assert [read_image_bytes(image_file(item))[0] for item in reversed(found)] == data[::-1]
    with pytest.raises(ValueError, match="so they have no columns; leave out --name-column"):
      list_inputs(str(path), "cat", columns=Columns(name="name"))


def test_prompts_of_a_table(tmp_path):
  """A phrase, a list of phrases, or a list of prompts as in JSON lines; null for --prompts."""
  pyarrow = pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  box = {"text": "dog", "boxes": [[1, 2, 3, 4]], "box_labels": [0]}
  columns = {"phrase": ["cat", None, ""], "phrases": [["cat", "dog"], [], None]}
  columns |= {"prompts": [[{"text": "cat"}, box], [box], None]}
  expected = {
    "phrase": [(Prompt("cat"),), (Prompt("bus"),), (Prompt("bus"),)],
    "phrases": [(Prompt("cat"), Prompt("dog")), (Prompt("bus"),), (Prompt("bus"),)],
    "prompts": [(Prompt("cat"), Prompt(**box)), (Prompt(**box),), (Prompt("bus"),)],
  }
  content = pyarrow.table({"image": [b"0", b"1", b"2"], **columns})
  path = str(record_files.write_arrow(tmp_path / "a.arrow", content))
  for name, prompts in expected.items():
    found = list_inputs(path, "bus", columns=Columns(prompts=name))
    assert [item.prompts for item in found] == prompts
  content = pyarrow.table({"image": [b"0", b"1"], "prompts": [{"texts": 1}, {"texts": 2}]})
  path = str(record_files.write_arrow(tmp_path / "b.arrow", content))
  with pytest.raises(ValueError, match=r"2 faults: .*b\.arrow#0: prompts must be a list"):
    list_inputs(path, columns=Columns(prompts="prompts"))


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_images_as_paths(tmp_path, scenes, kind):
  """Hugging Face tables may have paths in place of bytes, and so may any column of strings."""
  pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  paths = [f"made/{scene.name.partition('/')[2]}" for scene in scenes]

  def written(name, image):
    content = record_files.table(scenes, image)
    if kind == "arrow":
      return str(record_files.write_arrow(tmp_path / f"{name}.arrow", content))
    return str(record_files.write_parquet(tmp_path / f"{name}.parquet", content))

  by_name = dict(zip((scene.name for scene in scenes), paths, strict=True))
  for name, image in (
    ("structs", lambda scene: {"bytes": None, "path": by_name[scene.name]}),
    ("strings", lambda scene: by_name[scene.name]),
    ("absolute", lambda scene: str(tmp_path / by_name[scene.name])),
  ):
    found = list_inputs(written(name, image), "cat")
    assert [item.path for item in found] == [str(tmp_path / path) for path in paths]
  nothing = list_inputs(written("nothing", lambda _: {"bytes": None, "path": None}), "cat")
  assert len(nothing) == len(scenes)
  assert all("is empty (0 bytes)" in image.reason for image in load_images(nothing))


def test_records_without_an_image_fail(tmp_path, scenes):
  """Null in a table, and a feature without values."""
  empty = [Scene("none", None, ("cat",)), Scene("empty", b"", ("cat",))]
  scenes = [*scenes[:2], *empty, *scenes[2:4]]
  reasons = set()
  for kind in FORMATS:
    if kind != "tar":
      images, columns = write(tmp_path, kind, scenes)
      loaded = load_images(list_inputs(images, columns=columns))
      failed = [bool(image.reason) for image in loaded]
      assert failed == [False, False, True, True, False, False], kind
      reasons |= {image.reason.partition(" ")[2] for image in loaded[2:4]}
      shutil.rmtree(tmp_path / "tfds", ignore_errors=True)
      shutil.rmtree(tmp_path / "saved", ignore_errors=True)
  assert len(reasons) == 1, reasons
  assert reasons.pop().startswith("is empty (0 bytes)")


def test_faulty_tables(tmp_path, scenes, monkeypatch):
  """Each fault is one line that names the file and the columns."""
  pyarrow = pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  monkeypatch.chdir(tmp_path)
  two = {"a": [b"0"], "b": [b"1"], "n": [0.5], "image": [[0, 1]], "same": ["x"]}
  contents = {
    "no_image": pyarrow.table({"label": [1], "text": ["cat"]}),
    "two_images": pyarrow.table({**two, "n": [1]}),
    "other": pyarrow.table(two),
  }
  faults = [
    ("no_image", {}, "no column has images; the columns are label, text"),
    ("no_image", {"image": "label"}, "column 'label' has the type int64, but images are bytes"),
    ("two_images", {}, "several columns can have the images: a, b; choose one with --image-column"),
    ("other", {"image": "image"}, "column 'image' has the type list<"),
    (
      "other",
      {"image": "c"},
      "there is no column 'c'; the columns are a, b, n, image, same; check",
    ),
    ("other", {"image": "a", "name": "x"}, "there is no column 'x'; .* check --name-column"),
    ("other", {"image": "a", "name": "n"}, "column 'n' has the type double, but names are strings"),
    ("other", {"image": "a", "prompts": "x"}, "there is no column 'x'; .* check --prompts-column"),
    ("other", {"image": "a", "prompts": "n"}, "#0: prompts must be a list of phrases or prompts"),
  ]
  for kind in ("parquet", "arrow"):
    for name, columns, message in faults:
      path = f"{name}.{kind}"
      if kind == "parquet":
        record_files.write_parquet(Path(path), contents[name])
      else:
        record_files.write_arrow(Path(path), contents[name])
      with pytest.raises(ValueError, match=message) as error:
        list_inputs(path, "cat", columns=Columns(**columns))
      assert str(error.value).startswith(f"{path}, 1 fault: {path}")
      assert "\n" not in str(error.value)


DAMAGE = {
  "empty": lambda data: b"",
  "text": lambda data: b"no records",
  "cut": lambda data: data[: len(data) // 2],
  "zeros": lambda data: bytes(len(data)),
  "end": lambda data: data[:-8],
  "start": lambda data: bytes(64) + data[64:],
}


@pytest.mark.parametrize("kind", ["parquet", "arrow stream", "array_record", "tfrecord"])
def test_damaged_files(tmp_path, scenes, kind):
  """A file that is damaged as a whole is refused before any work, in one line."""
  path = Path(write(tmp_path, kind, scenes)[0])
  data = path.read_bytes()
  for name, damage in DAMAGE.items():
    path.write_bytes(damage(data))
    if name == "start" and kind in ("array_record", "parquet"):  # only its first records fail
      assert len(list_inputs(str(path), "cat")) == len(scenes)
      continue
    with pytest.raises(ValueError) as error:
      list_inputs(str(path), "cat")
    assert "\n" not in str(error.value)
    valid = name == "empty" and kind == "tfrecord"
    assert str(path) in str(error.value)
    assert ("1 file has no records" if valid else "copy or create it again") in str(error.value)


def test_compressed_files(tmp_path, scenes):
  pyarrow = pytest.importorskip("pyarrow", reason="tables need the extra `parquet`")
  path = tmp_path / "a.arrow"
  content = record_files.table(scenes)
  options = pyarrow.ipc.IpcWriteOptions(compression="zstd")
  with pyarrow.ipc.new_stream(path, content.schema, options=options) as writer:
    writer.write_table(content)
  with pytest.raises(ValueError, match=r"a\.arrow: it is compressed; write it without"):
    list_inputs(str(path), "cat")
  path = record_files.write_tf_record(tmp_path / "a.tfrecord", [scene_example(scenes[0])])
  path.write_bytes(gzip.compress(path.read_bytes()))
  with pytest.raises(ValueError, match=r"is not a TFRecord file \(.*\), but compressed \(gzip\)"):
    list_inputs(str(path), "cat")


def test_faulty_examples(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  path = record_files.write_tf_record(
    Path("a.tfrecord"), [example(a=[b"0"], b=[b"1"], n=3, two=[b"0", b"1"], bad=[b"\xff"])]
  )
  faults = [
    ({}, "several columns can have the images: a, b, bad, two; choose one"),
    ({"image": "n"}, "column 'n' has int64, not the bytes of image files"),
    ({"image": "c"}, "there is no column 'c'; the columns are a, b, bad, n, two; check"),
    ({"image": "a", "name": "two"}, "#0: 'two' has 2 values, not one name"),
    ({"image": "a", "name": "n"}, "#0: 'n' has values of type int64, not text"),
    ({"image": "a", "prompts": "bad"}, "#0: 'bad' is not UTF-8 text"),
  ]
  for columns, message in faults:
    with pytest.raises(ValueError, match=f"a.tfrecord, 1 fault: a.tfrecord.*{message}"):
      list_inputs(str(path), "cat", columns=Columns(**columns))
  (image,) = load_images(list_inputs(str(path), "cat", columns=Columns(image="two")))
  assert image.reason == "a.tfrecord#0: its feature 'two' has 2 values, not one image"
  assert not image.unreadable
  record_files.write_tf_record(path, [example(label=1)])
  with pytest.raises(ValueError, match="no column has images; the columns are label"):
    list_inputs(str(path), "cat")


def test_options_of_records_for_other_inputs(tmp_path, scenes):
  for images in (tmp_path / "made", tmp_path / "made" / "000.png", listed(tmp_path, scenes)):
    with pytest.raises(ValueError, match="--image-column is for Parquet, Arrow, ArrayRecord and"):
      list_inputs(str(images), "cat", columns=Columns(image="x"))
  with pytest.raises(ValueError, match="--split is for datasets by name"):
    list_inputs(str(tmp_path / "made"), "cat", columns=Columns(split="train"))


def test_repeated_names(tmp_path, scenes):
  examples = [scene_example(scene) for scene in [*scenes[:2], scenes[0]]]
  path = record_files.write_array_record(tmp_path / "a.array_record", examples)
  with pytest.raises(ValueError, match=r"several images the same name: 1 name \(scenes.tar/000"):
    list_inputs(str(path), columns=ALL)


def test_large_groups_are_refused(tmp_path, monkeypatch):
  path = record_files.write_array_record(tmp_path / "a.array_record", [b"x" * 9999] * 20, 100)
  monkeypatch.setattr(array_record, "MAX_GROUP", 1000)
  with pytest.raises(ValueError, match=r"has groups of 20 records .*'group_size:1'\)"):
    list_inputs(str(path), "cat")


def test_without_pyarrow(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  for name in ("a.parquet", "a.arrow"):
    (tmp_path / name).touch()
    with pytest.raises(ImportError, match=r"need pyarrow: pip install 'sam3-jax\[parquet\]'"):
      list_inputs(str(tmp_path / name), "cat")


@pytest.mark.parametrize("name", ["a.parquet#3", "x/b.tfrecord-00001-of-00002#0", "c.arrow#12"])
def test_row_names(name):
  assert is_row_name(name)
  assert record_format(name.partition("#")[0])
  assert not is_row_name(name.partition("#")[0])
  assert not is_row_name(f"{name}.png")
  assert not record_format("a.parquet.png")


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
  """Runs `sam3-jax batch` in a directory; returns its exit status and the last line of errors."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(Sam3, "from_checkpoint", lambda *_, **__: MODEL)

  def run(*typed: str) -> tuple[int, str]:
    status = main(["batch", "--out", "out", *typed])
    return status, (capsys.readouterr().err.splitlines() or [""])[-1]

  return run


def test_command(tmp_path, scenes, reference, command):
  images, _ = write(tmp_path, "tfds array_record", scenes)
  typed = ["--images", images, "--name-column", "name", "--prompts-column", "phrases"]
  status, line = command(*typed)
  assert status == 2
  assert line.endswith("tfds://scenes has several splits: train, test; choose one with --split.")
  typed += ["--split", "train", "--max-error-rate", "1", "--part-size", "5"]
  assert command(*typed, "--image-column", "label")[0] == 2
  assert command(*typed, "--image-column", "image")[0] == 0
  merge(Path("out"))
  found, expected = (
    json.loads(data) for data in (Path("out", ANNOTATIONS).read_bytes(), reference[0])
  )
  assert found["images"] == expected["images"]
  assert found["annotations"] == expected["annotations"]


def test_command_with_faults(tmp_path, scenes, command, monkeypatch):
  path = record_files.write_array_record(
    Path("a.array_record"), [scene_example(scene) for scene in scenes]
  )
  data = path.read_bytes()
  Path("a.arrow").touch()
  Path("cut.array_record").write_bytes(data[:100])
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  for images, message in (
    ("cut.array_record", "it is not an ArrayRecord file (100 bytes), or is damaged or truncated"),
    ("a.arrow", "Parquet and Arrow files need pyarrow: pip install 'sam3-jax[parquet]'."),
    ("tfds://none", f"tfds://none is not prepared in {tmp_path}/tfds; prepare it with"),
    ("datasets://some/None", f"datasets://some/None is not in {tmp_path}/cache; prepare it"),
    ("none.parquet", "there is no directory, file or pattern none.parquet; check"),
  ):
    status, line = command("--images", images, "--prompts", "cat")
    assert status == 2
    assert line.startswith("sam3-jax: error: ")
    assert message in line
  assert not Path("out").exists()
