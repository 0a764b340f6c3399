"""/openapi.json: what FastAPI cannot see, because the routes read their bodies and paths themselves."""

import re
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from llama.server.cloudflare.schema import RunRequest
from llama.server.errors import Dialect, dialect_of
from llama.server.middleware import OPEN_PATHS
from llama.server.openai.responses_body import ResponsesRequest
from llama.server.openai.schema import ChatRequest, CompletionRequest
from llama.server.openai.tokens import DetokenizeRequest, TokenizeRequest

_BODIES = (RunRequest, ChatRequest, CompletionRequest, ResponsesRequest, TokenizeRequest, DetokenizeRequest)
_TEXT, _NULLABLE = {"type": "string"}, {"type": ["string", "null"]}
_ERRORS: dict[Dialect, dict[str, Any]] = {
    Dialect.OPENAI: {
        "error": {
            "type": "object",
            "properties": {"message": _TEXT, "type": _TEXT, "param": _NULLABLE, "code": _NULLABLE},
            "required": ["message", "type", "param", "code"],
        }
    },
    Dialect.CLOUDFLARE: {
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"message": _TEXT, "code": {"type": "integer"}},
                "required": ["message", "code"],
            },
        },
        "success": {"const": False},
        "result": {"type": "object"},
        "messages": {"type": "array"},
    },
}
_NAMES = {Dialect.OPENAI: "OpenAIError", Dialect.CLOUDFLARE: "CloudflareError"}
_OF_POSTS = {
    "400": "Something about the request is wrong; the message names the place.",
    "408": "The body did not arrive in time, or the request was aborted.",
    "413": "The body is too large; in Cloudflare's dialect also prompt and max_tokens together.",
    "415": "The body is compressed.",
    "429": "The queue is full; see Retry-After.",
    "503": "The server stops, or its engine is dead.",
}
_OF_ALL = {"401": "No API key, or a wrong one.", "500": "The server failed."}
_PATHS = {
    "account_id": "Any account of Cloudflare's; it is not looked at.",
    "model": "A served name or an adapter's name, slashes as they are; with or without @cf/meta/.",
}


def describe(app: FastAPI, needs_key: bool) -> None:
    """Replace the app's description; made when it is first asked for."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = get_openapi(title=app.title, version=app.version, routes=app.routes)
            template = "#/components/schemas/{model}"
            _, schemas = models_json_schema([(model, "validation") for model in _BODIES], ref_template=template)
            errors = {
                name: {"type": "object", "properties": _ERRORS[dialect], "required": list(_ERRORS[dialect])}
                for dialect, name in _NAMES.items()
            }
            described["components"] = {
                "schemas": schemas["$defs"] | errors,
                "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            }
            for path, operations in described["paths"].items():
                for method, operation in operations.items():
                    _complete(operation, method, path, needs_key)
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _complete(operation: dict[str, Any], method: str, path: str, needs_key: bool) -> None:
    named = re.findall(r"\{(\w+)\}", path)
    if named:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": _TEXT, "description": _PATHS[name]}
            for name in named
        ]
    if path not in OPEN_PATHS:
        operation["security"] = [{"bearer": []}] if needs_key else [{}, {"bearer": []}]
    responses = operation["responses"]
    if method == "post" and not path.endswith("tokenize"):
        responses["200"]["content"]["text/event-stream"] = {"schema": _TEXT}
    elif path == "/metrics":
        responses["200"]["content"] = {"text/plain": {"schema": _TEXT}}
    schema = {"$ref": f"#/components/schemas/{_NAMES[dialect_of(path)]}"}
    told = _OF_ALL | (_OF_POSTS if method == "post" else {})
    if "model" in named or method == "post":
        told |= {"404": "There is no such model."} if dialect_of(path) is Dialect.OPENAI else {}
    if path in ("/health", "/ready"):
        told, schema = {"503": "It is not."}, {"type": "object"}
    for status, description in sorted(told.items()):
        responses[status] = {"description": description, "content": {"application/json": {"schema": schema}}}
