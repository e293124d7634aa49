"""Merging of a job, and its export to LabelMe, YOLO and Parquet; polygons of masks."""

import importlib.util
import json
import os
import sys
from pathlib import Path

import batches
import numpy as np
import pytest
import yaml
from batches import MASK, MODEL, QUIET, instance, job, write_images, write_job
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from scipy import ndimage

from sam3_jax.batch import formats, pipeline
from sam3_jax.batch import run as runs
from sam3_jax.batch.formats import write_labelme, write_yolo
from sam3_jax.batch.merge import ANNOTATIONS, EMPTY, merge
from sam3_jax.batch.polygons import join_polygons, mask_to_polygons
from sam3_jax.datasets import annotations
from sam3_jax.inputs.tokenizer import clean
from sam3_jax.outputs.rle import decode
from sam3_jax.utils.notes import ListingNotes, Notes

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def filled(points, size) -> np.ndarray:
  """Oracle: the pixels whose center is inside a polygon, by the winding number."""
  y, x = (np.indices(size) + 0.5).reshape(2, -1)
  winding = np.zeros(len(x), int)
  for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
    if y0 != y1:
      crossing = (min(y0, y1) <= y) & (y < max(y0, y1))
      right = x0 + (y - y0) * (x1 - x0) / (y1 - y0) > x
      winding += (crossing & right) * int(np.sign(y1 - y0))
  return (winding != 0).reshape(size)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("smooth", [0, 1.5])
def test_filled_polygons_equal_the_mask_without_holes(seed, smooth):
  rng = np.random.default_rng(seed)
  noise = ndimage.gaussian_filter(rng.standard_normal((13, 17)), smooth)
  mask = noise > 0.3 * noise.std()
  polygons = mask_to_polygons(mask)
  components, count = ndimage.label(mask)  # connected by edges
  wanted = np.zeros_like(mask)
  for i in range(1, count + 1):
    # Background that is connected to the outside only by a corner is not a hole.
    wanted |= ndimage.binary_fill_holes(components == i, ndimage.generate_binary_structure(2, 2))
  got = np.zeros_like(mask)
  for polygon in polygons:
    got |= filled(polygon, mask.shape)
  np.testing.assert_array_equal(got, wanted)
  np.testing.assert_array_equal(filled(join_polygons(polygons), mask.shape), wanted)
  assert len(polygons) == count


def test_small_masks():
  assert mask_to_polygons(np.zeros((3, 4), bool)) == []
  assert mask_to_polygons(np.zeros((0, 4), bool)) == []
  assert join_polygons([]).shape == (0, 2)
  [square] = mask_to_polygons(np.ones((2, 3), bool))
  assert sorted(map(tuple, square.tolist())) == [(0, 0), (0, 2), (3, 0), (3, 2)]
  corner = mask_to_polygons(np.eye(2, dtype=bool))
  assert [len(polygon) for polygon in corner] == [4, 4]
  ring = np.ones((3, 3), bool)
  ring[1, 1] = False
  assert [len(polygon) for polygon in mask_to_polygons(ring)] == [4]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
  """A merged job of seven images, one of them broken: its directory, records and counts."""
  folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("out")
  write_images(folder, 6)
  (folder / "003-broken.png").write_bytes(b"")
  lines = [
    {"image": f"{folder}/{name}", "prompts": prompts}
    for name, prompts in (
      ("002.png", ["dog", "cat"]), ("000.png", [{"boxes": [[1, 1, 3, 3]]}, "cat"]),
      ("001.png", ["dog"]), ("003-broken.png", ["bus"]), ("003.png", ["bird", "dog"]),
      ("004.png", ["cat"]), ("005.png", ["cat"]),
    )
  ]  # fmt: skip
  (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "Engine", batches.Engine)
    assert runs.run(job(folder / "list.jsonl", out, None, part_size=2), MODEL, QUIET, QUIET)
  counts = merge(out)
  records = [
    json.loads(line)
    for path in sorted((out / "parts").glob("*.jsonl"))
    for line in path.read_text().splitlines()
  ]
  return out, records, counts


def instances(records):
  for record in records:
    for prompt in record["prompts"]:
      for one in prompt["instances"]:
        yield record, prompt, one


def test_coco(done, capsys):
  out, records, counts = done
  found = COCO(str(out / ANNOTATIONS))
  assert {key: len(found.dataset[key]) for key in ("images", "annotations", "categories")} == {
    key: counts[key] for key in ("images", "annotations", "categories")
  }
  assert counts["failed"] == 1
  assert [one["name"] for one in found.dataset["categories"]] == ["dog", "cat", "visual", "bird"]
  assert sorted(found.imgs) == [1, 2, 3, 5, 6, 7]
  wanted = list(instances(records))
  assert len(wanted) == counts["annotations"] > 5
  for annotation, (record, prompt, one) in zip(found.dataset["annotations"], wanted, strict=True):
    assert found.imgs[annotation["image_id"]]["file_name"] == record["image"]
    name = found.cats[annotation["category_id"]]["name"]
    assert name == (prompt["text"] or "visual")
    assert annotation["score"] == one["score"]
    mask = found.annToMask(annotation)
    assert mask.shape == (record["height"], record["width"])
    assert mask.sum() == annotation["area"] == coco.area(one["segmentation"])
    x, y, w, h = annotation["bbox"]
    assert min(x, y, w, h) >= 0
    assert x + w <= record["width"] + 0.011
    assert y + h <= record["height"] + 0.011
  assert found.dataset["info"]["threshold"] == 0.5


def test_labelme(done):
  out, records, _ = done
  folder = write_labelme(out)
  files = sorted(folder.rglob("*.json"))
  assert len(files) == len(records)
  by_name = {record["image"]: record for record in records}
  for path in files:
    values = json.loads(path.read_text())
    record = by_name[values["imagePath"]]
    size = values["imageHeight"], values["imageWidth"]
    assert size == (record["height"], record["width"])
    for _, prompt, one in instances([record]):
      shapes = [
        shape["points"]
        for shape in values["shapes"]
        if (shape["label"], shape["group_id"], shape["description"])
        == (prompt["text"] or "visual", one["id"], f"score {one['score']:.6f}")
      ]
      mask = decode(one["segmentation"]).astype(bool)
      got = np.zeros(size, bool)
      for points in shapes:
        got |= filled(np.array(points), size)
      assert (got & mask).sum() == mask.sum()  # the mask, and possibly its holes


def test_yolo(done):
  out, records, _ = done
  folder = write_yolo(out)
  names = [line.split(": ") for line in (folder / "data.yaml").read_text().splitlines()[3:]]
  assert [(number.strip(), json.loads(name)) for number, name in names] == [
    ("0", "dog"), ("1", "cat"), ("2", "visual"), ("3", "bird"),
  ]  # fmt: skip
  for record in records:
    path = next((folder / "labels").rglob(record["image"].rpartition("/")[2][:-4] + ".txt"))
    lines = path.read_text().splitlines()
    wanted = [one for *_, one in instances([record]) if one["area"]]
    assert len(lines) == len(wanted)
    for line, one in zip(lines, wanted, strict=True):
      points = np.array(line.split()[1:], float).reshape(-1, 2)
      assert ((points >= 0) & (points <= 1)).all()
      size = record["height"], record["width"]
      mask = decode(one["segmentation"]).astype(bool)
      got = filled(np.round(points * size[::-1]), size)
      assert (got & mask).sum() == mask.sum()


def test_parquet(done, monkeypatch):
  table = pytest.importorskip("pyarrow.parquet")
  out, records, counts = done
  monkeypatch.setattr(formats, "ROW_GROUP", 4)  # several groups
  found = table.read_table(formats.write_parquet(out))
  wanted = list(instances(records))
  assert found.num_rows == len(wanted) == counts["annotations"]
  for row, (record, prompt, one) in zip(found.to_pylist(), wanted, strict=True):
    assert {key: row[key] for key in ("input", "image", "width", "height")} == {
      key: record[key] for key in ("input", "image", "width", "height")
    }
    assert row["text"] == prompt["text"]
    assert row["counts"] == one["segmentation"]["counts"]
    assert (row["id"], row["area"]) == (one["id"], one["area"])
    np.testing.assert_allclose([row["score"], *row["bbox"]], [one["score"], *one["bbox"]], 1e-6)
  assert not list(out.glob(".*"))


def test_parquet_without_pyarrow(done, monkeypatch):
  monkeypatch.setitem(sys.modules, "pyarrow", None)
  with pytest.raises(ImportError, match=r"pip install 'sam3-jax\[parquet\]'"):
    formats.write_parquet(done[0])


def test_images_that_differ_only_in_their_suffix(tmp_path):
  """Each has its own file, and a note says what the format cannot express."""
  out = write_job(tmp_path, ["x/a.jpg", "x/a.png", "x/a.png.webp", "b.gif"])
  notes = ListingNotes()
  files = sorted(str(path) for path in write_labelme(out, notes).rglob("*.json"))
  folder = str(out / "labelme")
  wanted = ["b.json", "x/a.json", "x/a.png.json", "x/a.png.webp.json"]
  assert files == [f"{folder}/{name}" for name in wanted]
  assert json.loads((out / "labelme/x/a.png.json").read_text())["imagePath"] == "a.png"
  assert notes.line().startswith("2 images differ from others only in their suffix; open their")

  notes = ListingNotes()
  labels = sorted(str(path) for path in write_yolo(out, notes).rglob("*.txt"))
  names = ["b.txt", "x/a.png.txt", "x/a.png.webp.txt", "x/a.txt"]
  assert labels == [f"{out}/yolo/labels/{name}" for name in names]
  assert "such as copy x/a.png as images/x/a.png.png" in notes.line()
  assert "1 image has a suffix that Ultralytics does not read (b.gif)" in notes.line()


def test_merge_leaves_out_instances_without_a_pixel(tmp_path):
  """And counts them; replaces boxes without area; lists only prompted phrases as absent."""
  empty = instance(np.zeros((60, 80), bool))
  flat = {**instance(MASK), "bbox": [10, 10, 0, 20]}
  images = {
    "a.png": {"cat": [empty, instance(MASK)], "dog": [empty]},
    "b.png": {"bird": [flat], None: [], "Yellow_Bus": [instance(MASK)], "yellow bus": []},
    "c.png": {"bird": []},
  }
  out = write_job(tmp_path, images)
  counts = merge(out)
  assert counts == {
    "images": 3, "annotations": 3, "failed": 0, "categories": 6, EMPTY: 2,
  }  # fmt: skip
  found = json.loads((out / ANNOTATIONS).read_text())
  assert [one["bbox"] for one in found["annotations"]] == [[10, 10, 30, 20]] * 3
  names = {one["id"]: one["name"] for one in found["categories"]}
  absent = [[names[one] for one in image["neg_category_ids"]] for image in found["images"]]
  assert absent == [[], [], ["bird"]]  # a dog was found, though without a pixel
  unfinished = [[names[i] for i in one["not_exhaustive_category_ids"]] for one in found["images"]]
  assert unfinished == [["cat", "dog"], [], []]
  for name in images:
    Image.new("RGB", (80, 60)).save(tmp_path / name)
  pairs = annotations.read_checked(out / ANNOTATIONS, tmp_path, negatives=5, notes=Notes())
  assert [(one.file_name, one.phrase, len(one.objects)) for one in pairs] == [
    ("a.png", "cat", 1), ("b.png", "bird", 1), ("b.png", "Yellow Bus", 1), ("c.png", "bird", 0),
  ]  # fmt: skip
  shapes = [len(json.loads(one.read_text())["shapes"]) for one in write_labelme(out).rglob("*")]
  assert sorted(shapes) == [0, 1, 2]


def test_names_that_are_not_utf8(tmp_path, monkeypatch):
  """Bytes that are not UTF-8, and newlines, in the list, records, errors and exports."""
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  folder, out = write_images(tmp_path / "images", 1), tmp_path / "out"
  good, bad = os.fsdecode(b"caf\xe9\n.png"), os.fsdecode(b"\xff.png")
  (folder / "000.png").rename(folder / good)
  (folder / bad).write_bytes(b"no image")
  assert runs.run(job(folder, out), MODEL, QUIET, QUIET)
  assert merge(out)["images"] == 1
  assert json.loads((out / "errors.jsonl").read_text())["image"] == bad
  assert json.loads((out / ANNOTATIONS).read_text())["images"][0]["file_name"] == good
  name = good.removesuffix(".png")
  assert json.loads((write_labelme(out) / f"{name}.json").read_text())["imagePath"] == good
  assert (write_yolo(out) / "labels" / f"{name}.txt").is_file()
  if importlib.util.find_spec("pyarrow"):
    formats.write_parquet(out)


PART = st.text(
  st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8
).filter(lambda part: part not in (".", ".."))
IMAGES = st.lists(
  st.tuples(
    st.sampled_from(["", "", "/", "../", "images/"]),
    st.lists(PART | st.sampled_from(["a", "x.txt", "x.json", "images", "m.tar"]), max_size=2),
    PART | st.sampled_from(["a", "b"]),
    st.sampled_from([".jpg", ".png", "", ".PNG", ".tar.gif"]),
  ).map(lambda one: one[0] + "/".join([*one[1], one[2] + one[3]])),
  min_size=1, max_size=6, unique=True,
)  # fmt: skip
LABEL = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(clean)


@settings(
  max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(IMAGES, st.lists(LABEL | st.sampled_from(["no", "1", "a: b"]), min_size=1, unique=True))
def test_every_name_is_found_in_every_format(tmp_path, names, labels):
  """By the rules by which the tools look files up; names that they cannot find are noted."""
  out = write_job(
    tmp_path / str(len(list(tmp_path.iterdir()))),
    {name: {label: [instance(MASK)] for label in labels} for name in names},
  )
  merge(out)
  found = COCO(str(out / ANNOTATIONS))
  assert [one["file_name"] for one in found.dataset["images"]] == names
  assert [found.cats[one["category_id"]]["name"] for one in found.anns.values()] == [*labels] * len(
    names
  )

  files = list(write_labelme(out).rglob("*.json"))
  assert len(files) == len(names)
  paths = [json.loads(path.read_text())["imagePath"] for path in files]
  assert {path.rpartition("/")[2] for path in paths} == {name.rpartition("/")[2] for name in names}
  for path in files:
    shapes = json.loads(path.read_text())["shapes"]
    assert [shape["label"] for shape in shapes] == labels

  notes = ListingNotes()
  folder = write_yolo(out, notes)
  data = yaml.safe_load((folder / "data.yaml").read_text())
  assert data == {"train": "images", "val": "images", "names": dict(enumerate(labels))}
  files = {path for path in folder.rglob("*.txt") if path.is_file()}
  assert len(files) == len(names)
  kept = [name.removeprefix("../").removeprefix("/") for name in names]
  looked = {Path(ultralytics_label(f"{folder}/images/{name}")) for name in kept if "." in name}
  if not notes.line():
    assert looked == files
  for path in files:
    assert len(path.read_text().splitlines()) == len(labels)


def ultralytics_label(image):
  """As img2label_paths in ultralytics/data/utils.py."""
  return "/labels/".join(image.rsplit("/images/", 1)).rsplit(".", 1)[0] + ".txt"


def test_images_in_records_have_files_named_by_row(tmp_path):
  out, notes = write_job(tmp_path, ["/a.parquet#0", "/a.parquet#1"]), ListingNotes()
  found = sorted(write_labelme(out, notes).iterdir())
  assert [path.name for path in found] == ["a.parquet#0.json", "a.parquet#1.json"]
  assert json.loads(found[1].read_text())["imagePath"] == "a.parquet#1"  # no path of its own
  assert notes.line() == ""
