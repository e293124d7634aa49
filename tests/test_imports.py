"""Imports run one way: each layer of the package imports only the layers below it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def test_imports_run_one_way(tmp_path):
  """The contracts of pyproject.toml, on the package as it is installed: with converters/ inside."""
  package = tmp_path / "sam3_jax"
  package.mkdir()
  for child in (ROOT / "sam3_jax").iterdir():
    (package / child.name).symlink_to(child)
  if not (package / "converters").exists():
    (package / "converters").symlink_to(ROOT / "converters")
  done = subprocess.run(
    [sys.executable, "-c", LINT, "--no-cache", str(ROOT / "pyproject.toml")],
    cwd=tmp_path,
    env=os.environ | {"PYTHONPATH": str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stdout + done.stderr
