"""The README and docs/: runnable blocks run, links lead to files, and no configuration field or
command is missing from the generated reference."""

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
RUNNABLE = re.compile(r"^<!-- run -->\n```(python|sh)\n(.*?)^```$", re.M | re.S)
sys.path.insert(0, str(ROOT / "docs" / "hooks"))


def blocks(pages):
  """The language and the code of each block below a line `<!-- run -->`."""
  return [
    pytest.param(language, code, id=f"{page.relative_to(ROOT).as_posix()}-{number}")
    for page in pages
    for number, (language, code) in enumerate(RUNNABLE.findall(page.read_text(encoding="utf-8")))
  ]


@pytest.fixture
def clone(tmp_path):
  """An empty directory in which the paths of the docs exist."""
  for name in ("docs", "tests", "examples"):
    (tmp_path / name).symlink_to(ROOT / name)
  return tmp_path


def run(language, code, folder, cache):
  command = [sys.executable, "-c", code] if language == "python" else ["bash", "-ec", code]
  binaries = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
  settings = {"PATH": binaries, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(cache)}
  done = subprocess.run(
    command, cwd=folder, env=os.environ | settings, capture_output=True, text=True, timeout=600
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp("programs")


@pytest.mark.slow
def test_readme_code(clone, cache):
  [(language, code)] = [block.values for block in blocks(PAGES[:1])]
  printed = run(language, code, clone, cache)
  assert re.match(r"\[0\.[5-9]", printed)


@pytest.mark.slow
@pytest.mark.parametrize(("language", "code"), blocks(PAGES[1:]))
def test_docs_code(language, code, clone, cache):
  assert run(language, code, clone, cache)


def test_readme_is_short_and_starts_with_the_two_commands():
  text = PAGES[0].read_text(encoding="utf-8")
  assert len(text.splitlines()) <= 150
  first, second = re.findall(r"^```sh\n(.*?)^```$", text, re.M | re.S)[:2]
  assert first.startswith("pip install -q -e . && sam3-jax segment docs/scene.jpg")
  assert second == 'pip install -q -e ".[test]" && pytest\n'


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
  """Relative links and images; generated pages of the site have none."""
  text = page.read_text(encoding="utf-8")
  links = re.findall(r"\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"", text)
  for link in [one or other for one, other in links]:
    if re.match(r"[a-z]+:", link):
      continue
    path, _, anchor = link.partition("#")
    target = page.parent / path if path else page
    assert target.exists(), link
    if anchor and target.suffix == ".md":
      assert anchor in anchors(target), link


def anchors(page):
  """GitHub's and MkDocs' anchors of a page's headings."""
  headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
  plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
  return {re.sub(r"\s+", "-", heading) for heading in plain}


def test_every_configuration_field_is_in_the_reference():
  import fields

  from sam3_jax import config
  from sam3_jax.inference.mask_generator import MaskGeneration
  from sam3_jax.training.config import TrainConfig

  page = fields.pages()
  tables = {cls for _, cls in fields._tables(TrainConfig)}
  classes = {cls for cls in vars(config).values() if isinstance(cls, type)}
  model = {cls for cls in classes if dataclasses.is_dataclass(cls)}
  assert config.Rules in model
  for cls in (MaskGeneration, *tables, *model):
    rows = fields.fields(cls)
    assert [row.name for row in rows] == [field.name for field in dataclasses.fields(cls)]
    for row in rows:
      assert row.type
      assert row.default
      assert f"| `{row.name}` |" in page
    assert [row.name for row in rows if not row.text] == [], cls


def test_fields_read_comments_and_docstrings():
  import fields

  rows = {row.name: row for row in fields.fields(Example)}
  assert rows["side"] == fields.Field("side", "int", "`3`", "pixels", "pixels a side")
  assert rows["above"].text == "Two lines of comment, above."
  assert rows["told"].text == "In the docstring."
  assert (rows["told"].type, rows["told"].default) == ("str or none", "none")


@dataclasses.dataclass(frozen=True)
class Example:
  """A configuration.

  Attributes:
    told: In the
      docstring.

  Raises:
    ValueError: not part of it.
  """

  side: int = 3  # pixels a side
  # Two lines of comment,
  # above.
  above: float = 0.5
  told: str | None = None


def test_every_command_and_option_is_in_the_reference():
  import commands

  from sam3_jax.cli.main import app

  page = commands.pages()
  for command in app.registered_commands:
    assert f"## `sam3-jax {(command.name or command.callback.__name__).replace('_', '-')}`" in page
  for option in ("`--text` | `PHRASE`", "`--quiet`, `-q`", "`--no-cache`", "`IMAGE`"):
    assert option in page


def test_layers_are_drawn_as_they_are_enforced():
  """After a change of the contract in pyproject.toml: `python docs/hooks/layers.py`."""
  import layers

  assert layers.SVG_FILE.read_text(encoding="utf-8") == layers.draw(layers.layers())


def test_bars_in_cells():
  from cells import cell

  assert cell("a | b") == "a &#124; b"
  assert cell("`x` and `X,Y[,0|1]`") == "`x` and <code>X,Y[,0&#124;1]</code>"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_options_in_commands_exist(page):
  import commands

  known = commands.options()
  for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
    for line in block.replace("\\\n", " ").splitlines():
      for name, rest in re.findall(r"sam3-jax ([a-z]+)([^&|#]*)", line):
        given = set(re.findall(r"(?<=\s)--[a-z][a-z-]*", rest))
        assert given <= known[name] | {"--help", "--version"}, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_training_files_in_the_docs_are_valid(page):
  from sam3_jax.training.config import TrainConfig

  for block in re.findall(r"^```toml\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S):
    TrainConfig.from_dict(tomllib.loads(block))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_names_in_code_spans_exist(page):
  """Files of the repository, and modules and attributes of the package."""
  spans = re.findall(r"`([\w./]+)`", page.read_text(encoding="utf-8"))
  for path in [span for span in spans if re.fullmatch(r"(\w+/)+\w+\.(py|md|toml|ipynb)", span)]:
    assert (ROOT / path).exists() or (ROOT / "sam3_jax" / path).exists(), path
  for name in [span for span in spans if span.startswith("sam3_jax.")]:
    assert resolves(name), name


def resolves(name):
  """Whether a dotted name is a module or an attribute of one."""
  parts = name.split(".")
  for i in range(len(parts), 0, -1):
    with contextlib.suppress(ImportError):
      found = importlib.import_module(".".join(parts[:i]))
      for attribute in parts[i:]:
        found = getattr(found, attribute, None)
      return found is not None
  return False


def test_outside_links_lead_to_copies():
  import outside

  found = outside.find(["performance.md"])
  assert "benchmarks/results/speed-large-float32.md" in found
  text = "[a](../benchmarks/README.md#b) [c](parity.md) [d](https://x.y/z)"
  changed = "[a](repository/benchmarks/README.md#b) [c](parity.md) [d](https://x.y/z)"
  assert outside.rewrite(text, "performance.md") == changed
  inner = outside.rewrite("[p](../docs/performance.md)", "repository/benchmarks/README.md")
  assert inner == "[p](../../performance.md)"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_small_and_free_of_errors(path):
  assert path.stat().st_size < 500_000
  for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
    assert not any(output["output_type"] == "error" for output in cell.get("outputs", []))
