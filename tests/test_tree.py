"""Import cost, public names, and names of test files."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_names_of_test_files_are_unique():
  """pytest confuses files of the same name in different folders."""
  names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
  assert sorted(names) == sorted(set(names))


def test_import_loads_no_heavy_package():
  heavy = {
    "torch", "tensorflow", "keras", "transformers", "orbax", "grain", "scipy", "pycocotools",
    "typer", "h5py", "optax", "matplotlib", "huggingface_hub",
  }  # fmt: skip
  command = "import sys, sam3_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
  run = subprocess.run(
    [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert set(run.stdout.split()) & heavy == set()


def test_public_names():
  import sam3_jax

  assert sorted(sam3_jax.__all__) == sorted(set(sam3_jax.__all__))
  assert all(hasattr(sam3_jax, name) for name in sam3_jax.__all__)
  assert dir(sam3_jax) == sorted([*sam3_jax.__all__, "__version__"])
