"""The OpenAPI document: FastAPI's, with our errors, the token, and without the status 422."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_UNUSED = ("HTTPValidationError", "ValidationError")
_SCHEME = "token"


def document(app: FastAPI) -> dict[str, Any]:
  """The document of an application; computed once."""
  if app.openapi_schema:
    return app.openapi_schema
  schema = get_openapi(
    title=app.title, version=app.version, description=app.description, routes=app.routes
  )
  for path, methods in schema["paths"].items():
    for operation in methods.values():
      operation["responses"].pop("422", None)
      if path.startswith("/v1"):
        operation["security"] = [{_SCHEME: []}, {}]
  components = schema.setdefault("components", {})
  for name in _UNUSED:
    components.get("schemas", {}).pop(name, None)
  components["securitySchemes"] = {
    _SCHEME: {
      "type": "http",
      "scheme": "bearer",
      "description": "Needed if the server was started with --token.",
    }
  }
  app.openapi_schema = schema
  return schema
