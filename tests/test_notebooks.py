"""The notebooks in examples/ run from the first cell to the last; needs the extra `examples`."""

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `examples`")
nbclient = pytest.importorskip("nbclient", reason="needs the extra `examples`")

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
  """Cells tagged `skip-execution` install packages on Colab and are left out."""
  monkeypatch.setenv("JAX_PLATFORMS", "cpu")
  monkeypatch.delenv("XLA_FLAGS")  # the tests' eight devices: a user of a notebook has one
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "programs"))
  monkeypatch.setenv("HOME", str(tmp_path))  # of the kernel's files and caches
  notebook = nbformat.read(path, as_version=4)
  stored = [cell.get("outputs") for cell in notebook.cells]
  client = nbclient.NotebookClient(
    notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
  )
  client.execute(env=dict(os.environ))
  for cell, outputs in zip(notebook.cells, stored, strict=True):
    if outputs:  # what the stored notebook shows is shown again
      kinds = {output["output_type"] for output in outputs}
      assert kinds <= {output["output_type"] for output in cell["outputs"]}
