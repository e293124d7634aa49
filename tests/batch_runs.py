"""Images, and the results of a job that nothing disturbed."""

import batches
import pytest
from batches import MODEL, QUIET, files, job, write_images

from sam3_jax.batch import pipeline
from sam3_jax.batch.merge import merge
from sam3_jax.batch.run import run


@pytest.fixture(autouse=True)
def stub(monkeypatch):
  monkeypatch.setattr(pipeline, "Engine", batches.Engine)
  monkeypatch.setattr(pipeline, "BACKOFF", (0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A directory with 23 good images and three broken ones."""
  folder = write_images(tmp_path_factory.mktemp("images"), 23)
  (folder / "004-empty.png").write_bytes(b"")
  (folder / "011-text.jpg").write_text("no image")
  (folder / "022-cut.png").write_bytes((folder / "022.png").read_bytes()[:60])
  return folder


@pytest.fixture(scope="module")
def undisturbed(images, tmp_path_factory):
  """All files of a merged job that one process did without interruption."""
  out = tmp_path_factory.mktemp("undisturbed")
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pipeline, "Engine", batches.Engine)
    assert run(job(images, out), MODEL, QUIET, QUIET)
  merge(out)
  return files(out)
