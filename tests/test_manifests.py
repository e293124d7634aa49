"""The manifests for Kubernetes: valid fields, and options that the command has.

Core kinds and the templates in custom resources are checked by kubernetes-validate, custom
resources by the schemas in `schemas/`. Nothing here has run on a cluster.
"""

import json
from pathlib import Path

import jsonschema
import pytest
import typer

from sam3_jax.cli.main import app

yaml = pytest.importorskip("yaml", reason="reads the manifests")
ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "deploy" / "kubernetes"
CORE = sorted(FOLDER.glob("*.yaml"))
CUSTOM = sorted((FOLDER / "custom").glob("*.yaml"))


def read(path: Path) -> list[dict]:
  return list(yaml.safe_load_all(path.read_text()))


def schema(values: dict) -> dict:
  return json.loads(
    (Path(__file__).parent / "schemas" / f"{values['kind'].lower()}.json").read_text()
  )


def parts(values: dict) -> list[dict]:
  """The core resources that the controller of a custom resource makes."""
  spec = values["spec"]
  if values["kind"] == "JobSet":
    return [
      {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "a"}, **one["template"]}
      for one in spec["replicatedJobs"]
    ]
  cluster = spec["rayClusterSpec"]
  groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
  return [
    {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **one["template"]}
    for one in groups
  ]


def containers(values: dict) -> list[dict]:
  spec = values["spec"]
  return spec["containers"] if values["kind"] == "Pod" else spec["template"]["spec"]["containers"]


def test_all_manifests_are_found():
  assert {path.name for path in CORE} == {"batch.yaml", "gpu.yaml", "tpu.yaml"}
  assert {path.name for path in CUSTOM} == {"jobset.yaml", "rayjob.yaml"}


@pytest.mark.slow
@pytest.mark.parametrize("path", [*CORE, *CUSTOM], ids=lambda path: path.name)
def test_core_kinds(path):
  validate = pytest.importorskip("kubernetes_validate", reason="in the extra dev").validate
  for values in read(path):
    for one in parts(values) if path in CUSTOM else [values]:
      validate(one, "1.35", strict=True)
      broken = one | {"spec": one["spec"] | {"imagee": "x"}}
      with pytest.raises(Exception, match="imagee"):
        validate(broken, "1.35", strict=True)


@pytest.mark.parametrize("path", CUSTOM, ids=lambda path: path.name)
def test_custom_resources(path):
  (values,) = read(path)
  jsonschema.validate(values, schema(values))
  for change in (
    {"apiVersion": "v1"},
    {"spec": values["spec"] | {"unknown": 1}},
    {"spec": {}},
  ):
    with pytest.raises(jsonschema.ValidationError):
      jsonschema.validate(values | change, schema(values))


@pytest.mark.parametrize("name", ["batch.yaml", "custom/jobset.yaml"])
def test_the_command_has_the_options(name):
  (values,) = read(FOLDER / name)
  (job,) = parts(values) if values["kind"] == "JobSet" else [values]
  (container,) = containers(job)
  assert container["command"] == ["sam3-jax", "batch"]
  command = typer.main.get_command(app).commands["batch"]
  args = [arg.replace("$(INDEX)", "7") for arg in container["args"]]
  given = command.make_context("batch", args, resilient_parsing=False).params
  assert Path(given["out"]) == Path("gs://BUCKET/out")  # Typer 0.26 gives a string
  assert given["images"] == "gs://BUCKET/images"
  count = job["spec"]["completions"]
  assert job["spec"]["parallelism"] == count
  if given["processes"] is not None:
    assert (given["processes"], given["process"]) == (count, count - 1)
  else:
    assert given["distributed"]
