"""Cloudflare Workers AI's dialect: one route, one envelope."""

import json
import secrets
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import APIRouter
from pydantic_core import from_json
from starlette.requests import Request
from starlette.responses import Response

from llama.api.errors import ParameterError
from llama.api.outputs import CompletionOutput, Usage
from llama.api.params import SamplingParams
from llama.async_llm.async_llm import Stream
from llama.server.bodies import json_response, read_body
from llama.server.cloudflare.schema import RunRequest
from llama.server.errors import Dialect, bad_input, json_mode_failed, no_such_model
from llama.server.fields import mismatch
from llama.server.service import Answer, Service, Submit
from llama.server.streaming import DONE, EventStream, unless_gone
from llama.text.tool_calls.forms import nearest_float

_PADDING = "abcdefghijklmnopqrstuvwxyz0123456789"
_TASK = "c329a1f9-323d-4e91-b2aa-582dd4188d34"  # Cloudflare's id of text generation
_FUNCTIONS_IGNORED = {"code": 1000, "message": "'functions' is deprecated and was ignored: use 'tools'"}


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    async def run(request: Request) -> Response:
        """Run the model on a prompt or on messages."""
        model = request.path_params["model"]
        if not service.knows(model):
            raise no_such_model(model)
        body = await read_body(request, service, RunRequest)
        submit = await _submit(body, model, service)
        record = request.state.record
        if body.stream:
            answer = await unless_gone(request, service.answer(submit, record))
            return EventStream(_events(answer), [answer], Dialect.CLOUDFLARE)

        async def work() -> Any:
            async with await service.answer(submit, record) as answer:
                completion = (await answer.whole()).outputs[0]
                return _result(completion, answer.usage(), body)

        result = await unless_gone(request, work())
        messages = [_FUNCTIONS_IGNORED] if body.functions else []
        return json_response({"result": result, "success": True, "errors": [], "messages": messages})

    async def search(request: Request) -> Response:
        """The models that can be run, by a part of their name."""
        wanted = request.query_params.get("search", "").lower()
        found = [_described(name, service) for name in service.config.model_names if wanted in name.lower()]
        pages = {"count": len(found), "page": 1, "per_page": max(len(found), 1), "total_count": len(found)}
        listed = {"result": found, "result_info": pages, "success": True, "errors": [], "messages": []}
        return json_response(listed)

    extra = {
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": "#/components/schemas/RunRequest"}}},
        }
    }
    for prefix in ("/client/v4/accounts/{account_id}/ai/run", "/ai/run"):
        router.add_api_route(prefix + "/{model:path}", run, methods=["POST"], openapi_extra=extra, response_model=None)
    path = "/client/v4/accounts/{account_id}/ai/models/search"
    router.add_api_route(path, search, methods=["GET"], response_model=None)
    return router


def _described(name: str, service: Service) -> dict[str, Any]:
    context = service.llm.llm.engine.config.max_model_len
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, name)),
        "source": 1,
        "name": name,
        "description": "",
        "task": {"id": _TASK, "name": "Text Generation", "description": ""},
        "tags": [],
        "properties": [{"property_id": "context_window", "value": str(context)}],
    }


async def _submit(body: RunRequest, model: str, service: Service) -> Submit:
    """Also checks what concerns several fields. Raises ApiError."""
    named = body.model_fields_set
    if {"messages", "prompt"} <= named:
        raise bad_input("oneOf at '/' not met, 2 matches")
    if not {"messages", "prompt"} & named:
        raise bad_input("required properties at '/' are 'prompt'", "prompt")
    if "image" in named:
        raise bad_input("'/image' is not supported: this model takes text only", "image")
    if body.stream and "response_format" in named:
        raise bad_input("'/response_format' is not supported with stream", "response_format")
    lora = await service.adapter(model, body.lora if "lora" in named else None)
    messages, params, llm = _messages(body), _params(body), service.llm
    if not body.raw:
        more = {"tool_choice": body.tool_choice, "chat_template_kwargs": service.template_kwargs(None)}
        return _blamed_as_sent(
            partial(llm.submit_chat, messages, params, body.tools or None, lora, clip=False, **more), body
        )
    if body.tools or body.tool_choice not in ("auto", "none"):
        raise bad_input("'/tools' is not supported with raw: there is no template that could show them", "tools")
    prompt = "".join(_text(message["content"]) for message in messages)
    return _blamed_as_sent(partial(llm.submit, prompt, params, lora, clip=False), body)


def _blamed_as_sent(submit: Submit, body: RunRequest) -> Submit:
    """What is wrong with guided_json is told of it: a response_format is what we make of it."""

    async def submitted(**more: Any) -> Stream:
        try:
            return await submit(**more)
        except ParameterError as error:
            if error.param == "response_format":
                said = str(error).replace("response_format.json_schema", "guided_json", 1)
                error.args, error.param = (said,), "guided_json"
            raise

    return submitted if "guided_json" in body.model_fields_set else submit


def _messages(body: RunRequest) -> list[dict[str, Any]]:
    if "prompt" in body.model_fields_set:
        return [{"role": "user", "content": body.prompt}]
    for i, message in enumerate(body.messages):
        if message.content is None and not (message.model_extra or {}).get("tool_calls"):
            raise bad_input(mismatch(("messages", i, "content"), "string", None), "messages")
    return [message.model_dump() for message in body.messages]


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""


def _params(body: RunRequest) -> SamplingParams:
    return SamplingParams(
        temperature=body.temperature,
        top_p=min(body.top_p, 1.0),
        top_k=body.top_k,
        seed=body.seed or None,
        repetition_penalty=body.repetition_penalty or 1.0,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        max_tokens=body.max_tokens,
        response_format=_response_format(body),
    )


def _response_format(body: RunRequest) -> dict[str, Any] | None:
    wanted = body.response_format
    if "guided_json" in body.model_fields_set:
        if wanted is not None:
            raise bad_input("'/guided_json' and '/response_format' both constrain the answer", "guided_json")
        return {"type": "json_schema", "json_schema": {"schema": body.guided_json}}
    if wanted is None:
        return None
    if "json_schema" in wanted.model_fields_set:  # with either type
        return {"type": "json_schema", "json_schema": wanted.json_schema}
    if wanted.type == "json_object":
        return {"type": "json_object"}
    raise bad_input("required properties at '/response_format' are 'json_schema'", "response_format")


def _result(completion: CompletionOutput, usage: Usage, body: RunRequest) -> dict[str, Any]:
    response: Any = completion.text
    if completion.tool_calls:
        response = None
    elif body.response_format is not None:
        try:
            from_json(completion.text, allow_inf_nan=False)  # bounds the depth, and refuses NaN
            response = json.loads(completion.text, parse_float=nearest_float)
        except ValueError:
            raise json_mode_failed() from None
    thought = completion.reasoning_content
    return {
        "response": response,
        **({} if thought is None else {"reasoning_content": thought}),
        "tool_calls": _calls(completion.tool_calls),
        "usage": _usage(usage),
        "finish_reason": completion.finish_reason,
    }


async def _events(answer: Answer) -> AsyncGenerator[Any, None]:
    reason = None
    async for piece in answer.pieces():
        reason = piece.finish_reason or reason
        if piece.reasoning_content:
            yield {"response": "", "reasoning_content": piece.reasoning_content, "p": _padding()}
        if piece.text:
            yield {"response": piece.text, "p": _padding()}
        if piece.tool_calls:
            yield {"response": "", "tool_calls": _calls(piece.tool_calls)}
    yield {"response": "", "usage": _usage(answer.usage()), "finish_reason": reason}
    yield DONE


def _padding() -> str:
    """Of random length, so that the lengths of tokens cannot be read off the wire."""
    return _PADDING[: 1 + secrets.randbelow(len(_PADDING))]


def _calls(calls: Any) -> list[dict[str, Any]]:
    return [{"name": call.name, "arguments": call.arguments} for call in calls]


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
    }
