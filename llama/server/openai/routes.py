"""OpenAI's dialect: chat, completions, responses and models, at /v1 and below an account of Cloudflare's."""

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from llama.server.bodies import json_response
from llama.server.config import CLOUDFLARE_PREFIX
from llama.server.errors import no_such_model
from llama.server.openai.chat import chat_endpoint
from llama.server.openai.completions import completions_endpoint
from llama.server.openai.responses import responses_endpoint
from llama.server.service import Service

_PREFIXES = ("/v1", "/client/v4/accounts/{account_id}/ai/v1")


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def models() -> Response:
        """The model's names, and the adapters."""
        return json_response({"object": "list", "data": _models(service)})

    async def model(request: Request) -> Response:
        name = request.path_params["model"]
        if not service.knows(name):
            raise no_such_model(name)
        own = service.config.name if service.config.serves(name) else name.removeprefix(CLOUDFLARE_PREFIX)
        found = next(entry for entry in _models(service) if entry["id"] == own)
        return json_response(found | {"id": name})

    posts = (
        ("/chat/completions", chat_endpoint(service), "ChatRequest"),
        ("/completions", completions_endpoint(service), "CompletionRequest"),
        ("/responses", responses_endpoint(service), "ResponsesRequest"),
    )
    for prefix in _PREFIXES:
        for path, endpoint, schema in posts:
            extra = {
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}},
                }
            }
            router.add_api_route(prefix + path, endpoint, methods=["POST"], openapi_extra=extra, response_model=None)
        router.add_api_route(prefix + "/models", models, methods=["GET"], response_model=None)
        router.add_api_route(prefix + "/models/{model:path}", model, methods=["GET"], response_model=None)
    return router


def _models(service: Service) -> list[dict[str, Any]]:
    config = service.config
    base = [
        {**_model(name), "max_model_len": service.llm.llm.engine.config.max_model_len} for name in config.model_names
    ]
    return [*base, *({**_model(name), "parent": config.name} for name in service.adapters.names())]


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llama-engine", "parent": None}
