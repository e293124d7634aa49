"""Files of scenes, and `sam3-jax scenes`, which writes them."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO

from sam3_jax.cli import scenes as command
from sam3_jax.cli.main import main
from sam3_jax.datasets import annotations
from sam3_jax.datasets.synthetic import drawings, scene_files, scenes

# pycocotools' own, with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
FIXED = Path(__file__).parent / "scenes"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
  out = tmp_path_factory.mktemp("scenes") / "new" / "folder"
  done = scene_files.write(out, 12, 5)
  record = json.loads((out / "annotations.json").read_text())
  assert done == {
    "images": 12,
    "pairs": len(record["images"]),
    "objects": len(record["annotations"]),
  }
  return out


def contents(folder: Path) -> dict[str, bytes]:
  return {
    file.relative_to(folder).as_posix(): file.read_bytes()
    for file in sorted(folder.rglob("*"))
    if file.is_file()
  }


class TestWrite:
  def test_pycocotools_reads_the_masks(self, written, capsys):
    dataset = COCO(written / "annotations.json")
    capsys.readouterr()
    made = [scenes.compose(np.random.default_rng([5, number])) for number in range(12)]
    for annotation in dataset.dataset["annotations"]:
      pair = dataset.imgs[annotation["image_id"]]
      mask = dataset.annToMask(annotation).astype(bool)
      number = int(Path(pair["file_name"]).name[:6])
      assert any(np.array_equal(mask, item.mask) for item in made[number].objects)
      assert annotation["area"] == mask.sum()
      scale = np.array([pair["width"], pair["height"]] * 2)
      box = coco.toBbox(annotation["segmentation"])
      assert np.allclose(np.array(annotation["bbox"]) * scale, box, atol=1e-9)

  def test_layout_equals_that_of_the_fixed_scenes(self, written):
    ours, fixed = (
      json.loads((folder / "annotations.json").read_text()) for folder in (written, FIXED / "known")
    )
    assert set(ours) == set(fixed)
    assert ours["categories"] == fixed["categories"]
    for part in ("images", "annotations"):
      assert {key: type(value) for key, value in ours[part][0].items()} == {
        key: type(value) for key, value in fixed[part][0].items()
      }

  def test_annotations_have_no_faults(self, written):
    pairs = annotations.read(written / "annotations.json")
    assert len(annotations.check(pairs, written)) == 0
    assert np.mean([not pair.objects for pair in pairs]) > 0.5
    images = {pair.file_name for pair in pairs}
    assert images == {name for name in contents(written) if name.endswith(".jpg")}

  def test_images_equal_the_scenes(self, written):
    made = scenes.compose(np.random.default_rng([5, 0]))
    with Image.open(written / "images" / f"000000_{made.style}.jpg") as image:
      stored = np.asarray(image).astype(int)
    assert stored.shape == made.image.shape
    assert np.abs(stored - made.image).mean() < 6  # loss of JPEG

  def test_same_seed_gives_the_same_files(self, written, tmp_path):
    scene_files.write(tmp_path / "again", 12, 5)
    assert contents(tmp_path / "again") == contents(written)
    scene_files.write(tmp_path / "fewer", 3, 5)
    fewer, written_files = contents(tmp_path / "fewer"), contents(written)
    assert {name: fewer[name] for name in fewer if name.startswith("images/")}.items() <= (
      written_files.items()
    )
    scene_files.write(tmp_path / "other", 3, 6)
    assert not set(contents(tmp_path / "other").values()) & set(written_files.values())

  def test_new_concept_has_its_own_annotation_file(self, tmp_path):
    scene_files.write(tmp_path / "out", 10, 5, ("noto", "fluent", "noto"), new="crown")
    pairs = annotations.read(tmp_path / "out" / "annotations.json")
    own = annotations.read(tmp_path / "out" / "crown.json")
    assert len(own) == len({pair.file_name for pair in pairs}) == 10
    assert {pair.id: pair for pair in own}.items() <= {pair.id: pair for pair in pairs}.items()
    assert all("crown" in pair.phrase for pair in own)
    assert sum("crown" in pair.phrase for pair in pairs) == 10
    assert 1 < sum(bool(pair.objects) for pair in own) < 9
    styles = {name[14:-4] for name in contents(tmp_path / "out") if name.endswith(".jpg")}
    assert styles == {"noto", "fluent"}

  def test_augment_changes_images(self, written, tmp_path):
    scene_files.write(tmp_path / "out", 2, 5, augment=1.0)
    assert set(contents(tmp_path / "out").values()).isdisjoint(contents(written).values())
    with pytest.raises(ValueError, match=r"augment must be between 0 and 1; got 1\.5"):
      scene_files.write(tmp_path / "more", 2, 5, augment=1.5)

  def test_unknown_new_concept(self, tmp_path):
    with pytest.raises(ValueError, match=r"no new concept 'cat'; choose from avocado, crown, owl"):
      scene_files.write(tmp_path / "out", 1, 0, new="cat")
    assert not list(tmp_path.iterdir())

  def test_unseen_phrases(self, tmp_path):
    scene_files.write(tmp_path / "out", 8, 5, unseen=True)
    phrases = {pair.phrase for pair in annotations.read(tmp_path / "out" / "annotations.json")}
    trained = {text for one in drawings.concepts() for text in (*one.phrases, *one.synonyms)}
    assert phrases
    assert not phrases & trained

  def test_interrupted_run_is_repeated(self, written, tmp_path):
    out = tmp_path / "out"

    def stop(what: str, fraction: float) -> None:
      if fraction > 0.5:
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
      scene_files.write(out, 20, 9, progress=stop)
    assert not (out / "annotations.json").exists()
    assert len(list(out.glob("images/*.jpg"))) > 10
    scene_files.write(out, 12, 5)
    assert contents(out) == contents(written)

  def test_progress(self, tmp_path):
    fractions = []
    scene_files.write(tmp_path / "out", 4, 0, progress=lambda what, done: fractions.append(done))
    assert fractions == [0, 0.25, 0.5, 0.75]

  def test_full_disk(self, tmp_path, monkeypatch):
    def full(*_, **__):
      raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"cannot write to .*out: No space left on device; free"):
      scene_files.write(tmp_path / "out", 1, 0)

  def test_full_disk_at_the_end(self, tmp_path, monkeypatch):
    """Every JSON file is complete or missing, and the directory can be written again."""

    def full(*_):
      raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
      patch.setattr("os.replace", full)
      with pytest.raises(ValueError, match="No space left on device"):
        scene_files.write(tmp_path / "out", 2, 0, new="crown")
    assert not {"annotations.json", "crown.json"} & set(contents(tmp_path / "out"))
    scene_files.write(tmp_path / "out", 2, 0, new="crown")
    scene_files.write(tmp_path / "same", 2, 0, new="crown")
    assert contents(tmp_path / "out") == contents(tmp_path / "same")

  @pytest.mark.parametrize(("count", "seed"), [(0, 0), (-3, 0), (1, -1)])
  def test_invalid_count_or_seed(self, count, seed, tmp_path):
    with pytest.raises(ValueError, match=f"got {count} scenes of seed {seed}"):
      scene_files.write(tmp_path / "out", count, seed)
    assert not list(tmp_path.iterdir())

  def test_unknown_style(self, tmp_path):
    with pytest.raises(ValueError, match=r"no style 'crayon'; choose from noto, .*, train"):
      scene_files.write(tmp_path / "out", 1, 0, "crayon")
    assert not list(tmp_path.iterdir())


class TestCommand:
  def test_writes_files_and_prints_counts(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["scenes", "--out", "out", "--count", "3", "--seed", "2", "--style", "noto-v1"]
    assert main(typed) == 0
    out, err = capsys.readouterr()
    assert err == ""
    pairs = annotations.read("out/annotations.json")
    assert out.startswith(f"out/annotations.json: 3 images, {len(pairs)} pairs, ")
    assert out.count("\n") == 1
    assert len(list(Path("out/images").glob("*_noto-v1.jpg"))) == 3
    scene_files.write(Path("same"), 3, 2, "noto-v1")
    assert contents(Path("same")) == contents(Path("out"))

  def test_quiet(self, tmp_path, capsys):
    assert main(["scenes", f"--out={tmp_path}", "--count=1", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")

  def test_every_style_and_new_concept_is_offered(self):
    assert {style.value for style in command.Style} == {*drawings.STYLES, scene_files.TRAIN}
    assert [new.value for new in command.NewConcept] == [
      one.name for one in drawings.new_concepts()
    ]

  def test_several_styles_and_a_new_concept(self, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    typed = ["--count=4", "--style=noto", "--style=twemoji", "--new=owl", "--augment=0.5"]
    assert main(["scenes", "--out=out", *typed]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("out/annotations.json: 4 images, ")
    assert second.startswith("out/owl.json: ")
    scene_files.write(Path("same"), 4, 0, ["noto", "twemoji"], new="owl", augment=0.5)
    assert contents(Path("same")) == contents(Path("out"))

  @pytest.mark.parametrize(
    ("typed", "message"),
    [
      (["--out", "out", "--count", "0"], "--count"),
      (["--out", "out", "--count", "many"], "--count"),
      (["--out", "out", "--seed", "-1"], "--seed"),
      (["--out", "out", "--style", "crayon"], "crayon"),
      (["--out", "out", "--style", "noto", "--style", "crayon"], "crayon"),
      (["--out", "out", "--new", "cat"], "cat"),
      (["--out", "out", "--augment", "nan"], "got nan"),
      (["--count", "3"], "--out"),
      (["--out", "there"], "there is not empty; give another directory, or remove it first."),
      (["--out", "there/file"], "cannot write to there/file"),
      (["--out", "there/file/below"], "cannot write to there/file/below"),
    ],
  )
  def test_errors_are_one_line(self, typed, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("there/file").write_text("mine")
    assert main(["scenes", *typed]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sam3-jax: error: ")
    assert err.count("\n") == 1
    assert message in err
    assert contents(tmp_path) == {"there/file": b"mine"}
    assert not Path("out").exists()
