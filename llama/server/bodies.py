"""From the bytes of a request to a checked model, and back to the bytes of an answer."""

import asyncio
import json
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from llama.server.errors import ApiError, bad_input, body_encoded, body_too_large, body_too_slow
from llama.server.fields import explain, mismatch
from llama.server.service import Service

_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
_HAS_LINE_END = re.compile("[\x85\u2028\u2029]")
_DISCARDED = 4  # times the limit: how much more of a body that is too large is read
_INLINE_BYTES = 1 << 16  # larger bodies are parsed off the event loop
# A body of nothing but brackets would keep the interpreter to itself for seconds; 4096 messages do with far less.
_MAX_NODES = 1 << 17
_MAX_FIELDS = 256

Model = TypeVar("Model", bound=BaseModel)


async def read_body(request: Request, service: Service, schema: type[Model]) -> Model:
    """The request's body as `schema`, whatever its Content-Type says. Raises ApiError."""
    body = await _bytes(request, service)
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() not in ("", "identity"):
        raise body_encoded(encoding)
    if len(body) < _INLINE_BYTES:
        return parse_body(body, schema)
    # One at a time: parsing does not let the event loop in before it is done.
    async with service.parsing:
        return await asyncio.to_thread(parse_body, body, schema)


def parse_body(body: bytes | bytearray, schema: type[Model]) -> Model:
    """Strict JSON: no NaN, no lone surrogates, bounded depth and a bounded number of values."""
    if len(body) > _MAX_NODES and sum(map(body.count, (b"[", b"{", b'":'))) > _MAX_NODES:
        raise bad_input(f"the body has more than {_MAX_NODES} arrays, objects and fields (those in texts count too)")
    try:
        value = from_json(bytes(body), allow_inf_nan=False)
    except ValueError as error:
        raise bad_input(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_input(mismatch((), "object", value))
    return validated(value, schema)


def validated(value: dict[str, Any], schema: type[Model]) -> Model:
    """A body that has been parsed as `schema`. Raises ApiError."""
    if len(value) > _MAX_FIELDS:
        raise bad_input(f"the body has {len(value)} fields, more than {_MAX_FIELDS}")
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # A union's branch is no place in the body.
        location = tuple(step for step in first["loc"] if isinstance(step, int) or _is_key(step))
        what = explain(first, location, getattr(schema, "neutral", {}))
        raise bad_input(what, str(location[0]) if location else None) from None


def _is_key(step: str) -> bool:
    return not (step in ("str", "[key]") or step.startswith(("dict[", "list[", "function-")))


async def _bytes(request: Request, service: Service) -> bytearray:
    config = service.config
    limit, length = config.max_body_bytes, 0
    body = bytearray()
    try:
        async with asyncio.timeout(config.body_timeout):
            async for chunk in request.stream():
                length += len(chunk)
                if length <= limit:
                    service.hold(len(chunk), request.state.record)
                    body += chunk
                elif length > _DISCARDED * limit:
                    break
                else:
                    # A client that is still sending when the connection closes does not see the answer.
                    body.clear()
    except TimeoutError:
        raise body_too_slow(config.body_timeout) from None
    except ClientDisconnect:
        raise ApiError(499, 3008, "Aborted: the client has gone") from None
    if length > limit:
        raise body_too_large(limit)
    return body


def dump(value: Any) -> bytes:
    """One line for every reader: str.splitlines, by which clients in Python cut event streams, knows more ends."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_LINE_ENDS).encode() if _HAS_LINE_END.search(text) else text.encode()


def json_response(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(dump(value), status, headers, media_type="application/json")
