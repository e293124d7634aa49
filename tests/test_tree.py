"""Imports run one way, heavy packages are imported where they are used, and no stray statements."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
# A module imports, at its top, only modules of rows above its own; `ops` and `model` are packages,
# whose modules may import each other.
ROWS = (
  {"json_text"},
  {"config", "types", "trees", "rle", "colors", "places", "pieces", "ranges", "heap", "identity"},
  {"terminal", "image_file", "room", "rows", "masks", "snapshots", "workers"},
  {"ops"},
  {"model"},
  {"items", "preprocess", "tokenizer", "postprocess"},
  {"writer", "prompts", "results", "visualize", "annotations"},
  {"listing"},
  {"visual"},
  {"fingerprint"},
  {"checkpoint", "compiling", "parallel", "onnx"},
  {"converters"},
  {"everything", "mend", "plain", "placement"},
  {"inference"},
  {"hub", "segment", "phrases", "export"},
  {"evaluation", "batch"},
  {"training"},
  {"drawings"},  # imported by training as one of its own modules
  {"commands"},
  {"cli"},
)
RANK = {module: rank for rank, row in enumerate(ROWS) for module in row}
MODULES = {
  file.relative_to(ROOT): file.parent.name if file.parent.name != "sam3_jax" else file.stem
  for folder in ("sam3_jax", "converters")
  for file in sorted((ROOT / folder).rglob("*.py"))
  if file != ROOT / "sam3_jax" / "__init__.py"
}


def ours(nodes):
  """Modules and packages right under sam3_jax that these statements import."""
  for node in nodes:
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      names = [f"{node.module}.{alias.name}" for alias in node.names]
    else:
      continue
    for name in names:
      package, *module = name.split(".")
      if package == "sam3_jax":
        yield module[0] if module else "__init__"


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_imports_run_one_way(file):
  module = MODULES[file]
  imported = set(ours(ast.parse((ROOT / file).read_text()).body)) - {module}
  assert {name for name in imported if RANK[name] >= RANK[module]} == set()


def test_every_module_has_a_row():
  assert set(MODULES.values()) == set(RANK)


KNOWING = {"converters", "commands", "hub", "export"}


@pytest.mark.parametrize("file", [f for f in MODULES if MODULES[f] not in KNOWING], ids=str)
def test_only_what_reads_and_writes_files_knows_the_converters(file):
  """Inside functions too: the way from foreign layouts is no part of the model."""
  assert "converters" not in set(ours(ast.walk(ast.parse((ROOT / file).read_text()))))


@pytest.mark.parametrize("file", MODULES, ids=str)
def test_no_assert_and_no_print(file):
  for node in ast.walk(ast.parse((ROOT / file).read_text())):
    assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}"
    called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
    assert called != "print" or MODULES[file] in ("cli", "commands"), f"print in line {node.lineno}"


def test_test_files_have_names_of_their_own():
  """pytest takes two files of one name in folders that are no packages for one module."""
  names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
  assert sorted(names) == sorted(set(names))


def test_import_stays_light():
  heavy = {
    "torch", "tensorflow", "keras", "transformers", "orbax", "grain", "scipy", "pycocotools",
    "typer", "h5py", "optax", "matplotlib", "huggingface_hub",
  }  # fmt: skip
  command = "import sys, sam3_jax; print(*sorted({name.split('.')[0] for name in sys.modules}))"
  run = subprocess.run(
    [sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT
  )
  assert set(run.stdout.split()) & heavy == set()


def test_public_names_are_there():
  import sam3_jax

  assert sorted(sam3_jax.__all__) == sorted(set(sam3_jax.__all__))
  assert all(hasattr(sam3_jax, name) for name in sam3_jax.__all__)
