"""The OpenAPI document, and random requests made of it by schemathesis."""

import collections
import json
import re

import jsonschema
import pytest
from server_app import png, served, small_model, upload

from sam3_jax.server import schemas
from sam3_jax.server.errors import STATUS
from sam3_jax.server.video import schemas as video_schemas

MAX_EXAMPLES = 40  # of each operation


@pytest.fixture(scope="module")
def client():
  with served(small_model(), allow_hosts=("testserver",)) as client:
    yield client


def test_documents_every_operation(client):
  document = client.get("/openapi.json").json()
  assert document["openapi"].startswith("3.1")
  operations = {(method, path) for path, methods in document["paths"].items() for method in methods}
  assert operations >= {
    ("get", "/v1/model"),
    ("post", "/v1/images"),
    ("get", "/v1/images/{id}"),
    ("delete", "/v1/images/{id}"),
    ("post", "/v1/images/{id}/prompts"),
    ("post", "/v1/images/{id}/everything"),
    ("post", "/v1/videos"),
    ("get", "/v1/videos/{id}"),
    ("delete", "/v1/videos/{id}"),
    ("get", "/v1/videos/{id}/frames/{number}"),
    ("get", "/v1/videos/{id}/frames/{number}/objects"),
    ("post", "/v1/videos/{id}/prompts"),
    ("post", "/v1/videos/{id}/objects/{identity}/corrections"),
    ("delete", "/v1/videos/{id}/objects/{identity}"),
    ("post", "/v1/videos/{id}/track"),
    ("delete", "/v1/videos/{id}/track"),
    ("get", "/v1/videos/{id}/export/{form}"),
    ("get", "/healthz"),
    ("get", "/readyz"),
  }
  for path, methods in document["paths"].items():
    for operation in methods.values():
      assert operation["summary"]
      assert "422" not in operation["responses"]
      if path.startswith("/v1"):
        assert operation["description"]
        assert {"401", "403"} <= set(operation["responses"])
  refs = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(document)))
  assert refs <= set(document["components"]["schemas"])
  assert set(STATUS.values()) >= {400, 401, 403, 404, 405, 408, 413, 415, 429, 431}


@pytest.mark.parametrize(
  "model",
  [
    schemas.PromptsRequest, schemas.EverythingRequest, video_schemas.VideoPrompt,
    video_schemas.Correction, video_schemas.TrackRequest,
  ],
)  # fmt: skip
def test_examples_are_valid(client, model):
  schema = model.model_json_schema()
  assert schema["examples"]
  for example in schema["examples"]:
    jsonschema.validate(example, schema)
    model.model_validate(example)


def test_example_requests_are_answered(client):
  image = client.post("/v1/images", content=png(0, 480, 640)).json()["id"]
  for example in schemas.PromptsRequest.model_json_schema()["examples"]:
    assert client.post(f"/v1/images/{image}/prompts", json=example).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_schemathesis_finds_nothing(client, mode):
  """With requests as the document describes them, and with others."""
  import hypothesis
  import schemathesis
  from hypothesis.errors import Unsatisfiable
  from schemathesis import GenerationMode
  from schemathesis.checks import not_a_server_error
  from schemathesis.specs.openapi import checks

  image = upload(client)
  schema = schemathesis.openapi.from_asgi("/openapi.json", _without_lifespan(client.app))
  failures, statuses = [], collections.Counter()
  for result in schema.get_all_operations():
    operation = result.ok()

    @hypothesis.given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
    @hypothesis.settings(
      max_examples=MAX_EXAMPLES, deadline=None, database=None, derandomize=True,
      suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    def check(case):
      if "id" in (case.path_parameters or {}) and case.method != "DELETE":
        case.path_parameters["id"] = image
      response = case.call(timeout=300)  # some requests compile a program
      statuses[response.status_code] += 1
      case.validate_response(
        response,
        checks=[
          not_a_server_error,
          checks.status_code_conformance,
          checks.content_type_conformance,
          checks.response_schema_conformance,
        ],
      )

    try:
      check()
    except Unsatisfiable:
      assert mode == "negative"  # there is no wrong request without a parameter
    except Exception as error:
      failures.append(f"{operation.label}: {error} {getattr(error, 'exceptions', '')}")
  assert not failures, "\n".join(failures)
  assert statuses[200 if mode == "positive" else 400] > 10, statuses


def _without_lifespan(app):
  """An application that is running already; schemathesis would start and stop it."""

  async def called(scope, receive, send):
    if scope["type"] != "lifespan":
      await app(scope, receive, send)
      return
    for step in ("startup", "shutdown"):
      await receive()
      await send({"type": f"lifespan.{step}.complete"})

  return called
