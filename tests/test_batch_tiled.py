"""Batch jobs in windows, with a model that finds the regions of a color."""

import dataclasses
import json

import pytest
from batches import QUIET, files
from color_model import SIDE, ColorModel, scene
from PIL import Image

from sam3_jax.batch.inputs import list_inputs
from sam3_jax.batch.job import Job
from sam3_jax.batch.merge import merge
from sam3_jax.batch.run import run
from sam3_jax.cli.main import main
from sam3_jax.inputs.tiling import Tiling
from sam3_jax.outputs.rle import encode

OBJECTS = (9, 4, 0)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """Three images with red objects, and one that is broken."""
  folder = tmp_path_factory.mktemp("images")
  for i, count in enumerate(OBJECTS):
    Image.fromarray(scene((100 + i, 150), count, seed=i)[0]).save(folder / f"{i}.png")
  (folder / "broken.png").write_bytes(b"no image")
  return folder


def job(images, out, **options):
  given = {"tiling": Tiling(SIDE, 0.4), "max_error_rate": 1.0, "part_size": 2, **options}
  return Job(inputs=list_inputs(str(images), "red"), out=out, **given)


def test_finds_each_object_once(images, tmp_path):
  assert run(job(images, tmp_path), ColorModel(), QUIET, QUIET)
  lines = [line for part in sorted((tmp_path / "parts").glob("*.jsonl"))
           for line in part.read_text().splitlines()]  # fmt: skip
  for i, record in enumerate(map(json.loads, lines)):
    expected = [encode(mask) for mask in scene((100 + i, 150), OBJECTS[i], seed=i)[1]]
    [prompt] = record["prompts"]
    masks = [one["segmentation"] for one in prompt["instances"]]
    assert sorted(masks, key=str) == sorted(expected, key=str)
  assert len(lines) == 3
  assert "is not an image" in (tmp_path / "errors.jsonl").read_text()
  assert merge(tmp_path)["images"] == 3


@pytest.mark.slow
def test_reader_processes_give_the_same_bytes(images, tmp_path):
  for workers in (0, 1):
    assert run(job(images, tmp_path / str(workers), workers=workers), ColorModel(), QUIET, QUIET)
  results = [
    {name: data for name, data in files(tmp_path / str(workers)).items() if "parts" in name}
    for workers in (0, 1)
  ]
  assert results[0] == results[1]
  assert len(results[0]) == 4


def test_a_job_with_other_windows_is_refused(images, tmp_path):
  assert run(job(images, tmp_path), ColorModel(), QUIET, QUIET)
  wanted = {"--tile: 64 then, None now": None, "--overlap: 0.4 then, 0.5 now": Tiling(SIDE, 0.5)}
  for message, tiling in wanted.items():
    changed = dataclasses.replace(job(images, tmp_path), tiling=tiling)
    with pytest.raises(ValueError, match=message):
      run(changed, ColorModel(), QUIET, QUIET)


def test_visual_prompts_are_refused(images, tmp_path):
  lists = tmp_path / "list.jsonl"
  point = {"points": [[5, 5]], "point_labels": [1]}
  lists.write_text(json.dumps({"image": str(images / "0.png"), "prompts": [point]}) + "\n")
  wanted = dataclasses.replace(job(images, tmp_path / "out"), inputs=list_inputs(str(lists), None))
  with pytest.raises(ValueError, match="--tile takes phrases, exemplar boxes and concepts, but"):
    run(wanted, ColorModel(), QUIET, QUIET)
  assert not (tmp_path / "out").exists()


def test_wrong_options(images, tmp_path, capsys):
  typed = ["batch", "--images", str(images), "--prompts", "red", "--out", str(tmp_path / "out")]
  assert main([*typed, "--tile", "0"]) == 2
  assert "error: --tile must be a whole number of pixels, at least 32; got 0." in (
    capsys.readouterr().err
  )
  assert main([*typed, "--overlap", "0.5"]) == 2
  assert "error: --overlap 0.5 needs --tile PIXELS" in capsys.readouterr().err
  assert not (tmp_path / "out").exists()
