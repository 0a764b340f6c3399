"""What the demo model answers through the server: JSON that holds to its schema, calls that must be made."""

import json

import jsonschema
import pytest

from llama.async_llm.async_llm import AsyncLLM
from tests.server.helpers import client_of, running, user

pytestmark = pytest.mark.slow

SCHEMAS = {
    "colour": {"enum": ["red", "green", "blue"]},
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
        },
        "required": ["name", "age"],
    },
    "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "minItems": 1, "maxItems": 3},
    "nested": {
        "type": "object",
        "properties": {
            "place": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome", "Köln"]}, "is_large": {"type": "boolean"}},
                "required": ["city", "is_large"],
            }
        },
        "required": ["place"],
    },
    "choice": {
        "type": "object",
        "properties": {"answer": {"type": ["string", "null"], "maxLength": 10}, "score": {"enum": [1, 2, 3]}},
        "required": ["answer", "score"],
    },
}
BOOK = {
    "type": "function",
    "function": {
        "name": "book_table",
        "parameters": {
            "type": "object",
            "properties": {
                "guests": {"type": "integer", "minimum": 1, "maximum": 20},
                "name": {"type": "string", "maxLength": 10},
            },
            "required": ["guests", "name"],
        },
    },
}


@pytest.fixture(scope="module")
def server(demo_model_path):
    with running(AsyncLLM(demo_model_path, dtype="float32", num_blocks=512, max_num_seqs=10)) as made:
        yield made


@pytest.fixture(scope="module")
def client(server):
    with client_of(server) as made:
        yield made


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_schema_answers_are_valid(client, name):
    wanted = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMAS[name], "strict": True}}
    messages = [user(f"Tell me about a {name} as JSON.")]
    answer = client.chat.completions.create(
        model="tiny", messages=messages, response_format=wanted, temperature=1, n=10, seed=1, max_tokens=300
    )
    for choice in answer.choices:
        jsonschema.validate(json.loads(choice.message.content), SCHEMAS[name])
        assert choice.finish_reason == "stop"


@pytest.mark.parametrize("seed", [1, 2])
def test_a_named_call_is_always_made(client, seed):
    answer = client.chat.completions.create(
        model="tiny",
        messages=[user("Book a table for four, name Ann.")],
        tools=[BOOK],
        tool_choice={"type": "function", "function": {"name": "book_table"}},
        temperature=1,
        n=10,
        seed=seed,
        max_tokens=200,
    )
    for choice in answer.choices:
        (call,) = choice.message.tool_calls
        assert call.function.name == "book_table"
        jsonschema.validate(json.loads(call.function.arguments), BOOK["function"]["parameters"])


def test_json_mode_of_cloudflare(server):
    body = {"prompt": "Tell me about a person as JSON.", "seed": 5, "temperature": 1}
    response = server.run(body | {"response_format": {"type": "json_schema", "json_schema": SCHEMAS["person"]}})
    jsonschema.validate(response.json()["result"]["response"], SCHEMAS["person"])


def test_a_template_that_never_reads_tools_still_shows_them(server):
    body = {"messages": [user("Hello")], "tools": [BOOK], "max_tokens": 1}
    without = server.run(body | {"tools": []}, path="/v1/chat/completions").json()["usage"]["prompt_tokens"]
    assert server.run(body, path="/v1/chat/completions").json()["usage"]["prompt_tokens"] > without + 50
