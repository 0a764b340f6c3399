"""/tokenize, /detokenize and /tokenizer_info, as vLLM has them: at the root."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from llama.api.errors import blamed_on
from llama.api.neutral import TOKENIZE
from llama.server.bodies import json_response, read_body
from llama.server.errors import bad_input, from_refusal, no_route, no_such_model
from llama.server.fields import MAX_MESSAGES, MAX_TOOLS, Integer
from llama.server.openai.schema import Body
from llama.server.service import Service
from llama.text.chat.prepare import prepare_tools
from llama.text.tokenizer import Tokenizer


class TokenizeRequest(Body):
    """A prompt, or a conversation as the chat route would render it."""

    neutral = TOKENIZE

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[dict[str, Any]] | None = Field(None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


# Fields that say how messages are rendered, with the defaults that clients write out beside a prompt too.
_OF_MESSAGES: Mapping[str, Any] = {
    "tools": [],
    "add_generation_prompt": True,
    "continue_final_message": False,
    "chat_template_kwargs": {},
}


class DetokenizeRequest(Body):
    tokens: list[Integer] = Field(max_length=1 << 20)


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def tokenize(request: Request) -> Response:
        """The token ids of a prompt or a conversation."""
        body = await read_body(request, service, TokenizeRequest)
        tokenizer = _tokenizer(service, body.model)
        ids = await _told(lambda: _encode(service, tokenizer, body))
        spelled = [tokenizer.id_to_token(token) for token in ids] if body.return_token_strs else None
        most = service.llm.llm.engine.config.max_model_len
        return json_response({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": spelled})

    async def detokenize(request: Request) -> Response:
        """The text of token ids; special tokens stay in it."""
        body = await read_body(request, service, DetokenizeRequest)
        tokenizer = _tokenizer(service, body.model)

        def decode() -> str:
            with blamed_on("tokens"):
                return tokenizer.decode(body.tokens, skip_special_tokens=False)

        return json_response({"prompt": await _told(decode)})

    async def tokenizer_info(request: Request) -> Response:
        """What tokenizer_config.json says; only with --enable-tokenizer-info-endpoint."""
        if not service.config.enable_tokenizer_info_endpoint:
            raise no_route(request.url.path)
        return json_response({"tokenizer_class": "llama.Tokenizer", **_tokenizer(service, None).config})

    posts = (("/tokenize", tokenize, "TokenizeRequest"), ("/detokenize", detokenize, "DetokenizeRequest"))
    for path, endpoint, schema in posts:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
        extra = {"requestBody": {"required": True, "content": content}}
        router.add_api_route(path, endpoint, methods=["POST"], openapi_extra=extra, response_model=None)
    router.add_api_route("/tokenizer_info", tokenizer_info, methods=["GET"], response_model=None)
    return router


def _tokenizer(service: Service, model: str | None) -> Tokenizer:
    if model is not None and not service.knows(model):
        raise no_such_model(model)
    tokenizer = service.llm.llm.tokenizer
    if tokenizer is None:
        raise bad_input("this model takes token ids only: it has no tokenizer", "model")
    return tokenizer


async def _told(work: Callable[[], Any]) -> Any:
    """The work's result, from another thread: a long text takes seconds. ApiError for what it refuses."""
    try:
        return await asyncio.to_thread(work)
    except Exception as error:
        refusal = from_refusal(error)
        if refusal is None:
            raise
        raise refusal from None


def _encode(service: Service, tokenizer: Tokenizer, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) is (body.messages is None):
        raise bad_input("give either prompt or messages", "prompt")
    if body.messages is None:
        for name, default in _OF_MESSAGES.items():
            if (value := getattr(body, name)) is not None and value != default:
                raise bad_input(f"{name} is for messages: a prompt is encoded as it stands", name)
        with blamed_on("prompt"):
            return tokenizer.encode(body.prompt or "", add_special_tokens=body.add_special_tokens is not False)
    if body.add_special_tokens:
        raise bad_input("add_special_tokens is for a prompt: a chat template writes its own", "add_special_tokens")
    _, ids = service.llm.llm.inputs.render(
        body.messages,
        prepare_tools(body.tools),
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=bool(body.continue_final_message),
        chat_template_kwargs=service.template_kwargs(body.chat_template_kwargs),
    )
    return list(ids)
