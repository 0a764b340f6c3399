"""Bad requests at random: never a 5xx, never a hanging request, the engine as good as before.

In process, without a socket: what is sent to the parser of HTTP itself is the parser's business.
"""

import asyncio
import json
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llama.server.app import create_app
from llama.server.cloudflare.schema import RunRequest
from llama.server.config import ServerConfig
from llama.server.openai.responses_body import ResponsesRequest
from llama.server.openai.schema import ChatRequest, CompletionRequest
from llama.server.openai.tokens import DetokenizeRequest, TokenizeRequest
from llama.server.service import Service
from tests.server.helpers import NAME, RUN, real_llm

ROUTES = {
    RUN: RunRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
FINE = {
    RUN: {"prompt": "x", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/completions": {"prompt": "x", "max_tokens": 1},
    "/v1/responses": {"input": "x", "max_output_tokens": 1},
    "/tokenize": {"prompt": "x"},
    "/detokenize": {"tokens": [65]},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 3}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "parameters": SCHEMA}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DIALOGUE = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "x"}]},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "x"},
]
COMMON = {"max_tokens": 1, "seed": 1, "top_p": 0.5, "frequency_penalty": 0.1, "presence_penalty": 0.1}
OPENAI = COMMON | {"stop": ["x"], "logit_bias": {"5": 1.0}, "n": 1}
OPENAI |= {"min_tokens": 1, "top_k": 9, "min_p": 0.1, "repetition_penalty": 1.1, "stop_token_ids": [9]}
OPENAI |= {"stream": True, "stream_options": {"include_usage": True}}
# Requests that use everything, to be damaged anywhere inside.
RICH = {
    RUN: COMMON
    | {
        "messages": [*DIALOGUE[:2], {"role": "assistant", "content": "x"}, {"role": "user", "content": "x"}],
        "tools": [FUNCTION, {"type": "function", "function": FUNCTION}],
        "response_format": {"type": "json_schema", "json_schema": SCHEMA},
        "top_k": 5,
        "repetition_penalty": 1.1,
        "max_tokens": 60,  # a whole answer in JSON
    },
    "/v1/chat/completions": OPENAI
    | {
        "model": NAME,
        "messages": DIALOGUE,
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "auto",
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
        "logprobs": True,
        "top_logprobs": 2,
    },
    "/v1/completions": OPENAI | {"prompt": ["x", "y"], "echo": True, "logprobs": 1},
    "/v1/responses": {
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "x"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "x"}]},
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "x"}]},
        ],
        "instructions": "x",
        "tools": [{"type": "function", **FUNCTION}, {"type": "web_search"}],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "f"}]},
        "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}},
        "include": ["message.output_text.logprobs"],
        "top_logprobs": 2,
        "max_output_tokens": 1,
        "stream": True,
    },
    "/tokenize": {"messages": DIALOGUE, "tools": [FUNCTION], "return_token_strs": True, "add_generation_prompt": True},
    "/detokenize": {"tokens": [65, 260]},
}
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, -(2**63), 10**30, 10**400, 1e308, -1e308, 0.5, 5e-324]),
    st.floats(allow_nan=False, allow_infinity=False),
)
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "user", "assistant", "tool", "system", "auto", "required", "json_object", "text", "function"]),
    st.sampled_from(["<|eot_id|>", "\x00", "\ud7ff", "🙂", "{{ 1 }}", "../..", NAME]),
)
KEYS = st.one_of(
    st.sampled_from(["role", "content", "type", "text", "name", "function", "parameters", "arguments", "tool_calls"]),
    st.sampled_from(["json_schema", "schema", "regex", "properties", "items", "enum", "$ref", "anyOf", "65", "-1"]),
    st.text(max_size=5),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)


@st.composite
def damaged(draw, value):
    """The value with something inside it replaced, taken away or put in."""
    if not value or not isinstance(value, dict | list) or draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    if isinstance(value, dict):
        key = draw(st.sampled_from(sorted(value)))
        kind = draw(st.integers(0, 9))
        if kind == 0:
            return {name: inner for name, inner in value.items() if name != key}
        if kind == 1:
            return value | {draw(KEYS): draw(VALUES)}
        return value | {key: draw(damaged(value[key]))}
    at = draw(st.integers(0, len(value) - 1))
    return [*value[:at], draw(damaged(value[at])), *value[at + 1 :]]


@st.composite
def requests(draw):
    """(path, bytes): a fine request with some of its fields replaced, one that uses everything with something inside
    it damaged, or bytes that are no request at all."""
    path = draw(st.sampled_from(sorted(ROUTES)))
    kind = draw(st.integers(0, 19))
    if kind < 9:
        return path, json.dumps(draw(damaged(RICH[path]))).encode()
    if kind == 9:
        return path, draw(st.one_of(st.binary(max_size=40), VALUES.map(lambda value: json.dumps(value).encode())))
    fields = st.one_of(st.sampled_from(sorted(ROUTES[path].model_fields)), KEYS)
    return path, json.dumps(FINE[path] | draw(st.dictionaries(fields, VALUES, min_size=1, max_size=3))).encode()


class Process:
    """The application with an engine of its own, called without a socket."""

    def __init__(self) -> None:
        self.llm = real_llm(max_num_seqs=64)
        self.app = create_app(Service(self.llm, ServerConfig(model_names=(NAME,))))
        self.loop = asyncio.new_event_loop()

    def post(self, path: str, body: bytes) -> int:
        return self.loop.run_until_complete(asyncio.wait_for(self._post(path, body), 60))

    async def _post(self, path: str, body: bytes) -> int:
        sent, status = False, 0
        done = asyncio.Event()

        async def receive():
            nonlocal sent
            if sent:
                await done.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]

        headers = [(b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
        scope |= {"headers": headers, "scheme": "http", "http_version": "1.1", "server": ("x", 80), "root_path": ""}
        await self.app(scope, receive, send)
        done.set()
        return status

    def close(self) -> None:
        self.loop.run_until_complete(self.llm.close())
        self.loop.close()


@pytest.fixture(scope="module")
def process():
    made = Process()
    yield made
    for path, body in FINE.items():
        assert made.post(path, json.dumps(body).encode()) == 200
    # An answer may be read before the engine's thread has put its seat back.
    deadline = time.monotonic() + 60
    while made.llm.num_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    assert made.llm.num_requests == 0 and made.llm.num_waiting_tokens == 0
    assert made.llm.metrics().num_used_blocks == 0
    made.llm.llm.engine.check()
    made.close()


def check(process, request):
    path, body = request
    status = process.post(path, body)
    assert status in (200, 400, 404, 405, 413), (status, path, body)


CHECKS = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@settings(max_examples=500, suppress_health_check=CHECKS)
@given(requests())
def test_bad_requests(process, request_):
    check(process, request_)


@pytest.mark.slow
@settings(max_examples=20_000, suppress_health_check=CHECKS)
@given(requests())
def test_many_bad_requests(process, request_):
    check(process, request_)


@pytest.mark.parametrize("path", RICH)
def test_what_is_damaged_is_fine(process, path):
    assert process.post(path, json.dumps(RICH[path]).encode()) == 200
