"""Cloudflare's dialect over a real socket: every row of the parameter table, the envelope, streams, errors."""

import json
import sys

import pytest

from llama.server.cloudflare.schema import RunRequest
from llama.text.grammar import GrammarError, Matcher
from tests.server.helpers import NAME, RUN, events_of, user

MESSAGES = [user("Hello")]
IMAGE = {"type": "image_url", "image_url": "x"}
PART = '{"type": "text", "text": string}'
NO_TEXT_PARTS = f"'/messages/0/content' must be a string or an array of {PART}"
ROLES = "a name such as user, system or assistant"
NO_TEMPLATE = "'/tools' is not supported with raw: there is no template that could show them"


def error_of(response, status, code):
    body = response.json()
    assert response.status_code == status, body
    assert (body["success"], body["result"], body["messages"]) == (False, {}, [])
    (error,) = body["errors"]
    assert error["code"] == code
    return error["message"]


def bad_input(scripted, **body):
    message = error_of(scripted.run(body), 400, 5006)
    assert message.startswith("AiError: Bad input: Error: ")
    return message.removeprefix("AiError: Bad input: Error: ")


@pytest.mark.parametrize(
    "path",
    [
        f"/ai/run/{NAME}",
        f"/ai/run/@cf/meta/{NAME}",
        "/ai/run/llama-3.1-70b-instruct",
        "/ai/run/@cf/meta/llama-3.1-70b-instruct",
        "/client/v4/accounts/me/ai/run/llama-3.1-70b-instruct",
        "/client/v4/accounts/me/ai/run/@cf%2Fmeta%2Fllama-3.1-70b-instruct",
    ],
)
def test_the_envelope_under_every_route(scripted, path):
    response = scripted.run({"messages": MESSAGES}, path=path, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    (asked,) = scripted.engine.asked[-1:]
    usage = {"prompt_tokens": len(asked.prompt), "completion_tokens": 6, "total_tokens": len(asked.prompt) + 6}
    result = {"response": "Hello", "tool_calls": [], "usage": usage, "finish_reason": "stop"}
    assert response.json() == {"result": result, "success": True, "errors": [], "messages": []}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"max_tokens": 256, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "seed": None}),
        ({}, {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0}),
        ({"max_tokens": 1}, {"max_tokens": 1}),
        ({"max_tokens": 2.0}, {"max_tokens": 2}),
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 5}, {"temperature": 5.0}),
        ({"top_p": 0}, {"top_p": 0.0}),
        ({"top_p": 0.5}, {"top_p": 0.5}),
        ({"top_p": 2}, {"top_p": 1.0}),
        ({"top_k": 1}, {"top_k": 1}),
        ({"top_k": 50}, {"top_k": 50}),
        ({"seed": 1}, {"seed": 1}),
        ({"seed": 9999999999}, {"seed": 9999999999}),
        ({"repetition_penalty": 0}, {"repetition_penalty": 1.0}),
        ({"repetition_penalty": 2}, {"repetition_penalty": 2.0}),
        ({"frequency_penalty": -2, "presence_penalty": 2}, {"frequency_penalty": -2.0, "presence_penalty": 2.0}),
        ({"an_unknown_field": None}, {"max_tokens": 256}),
    ],
)
def test_parameters_reach_the_engine(scripted, given, expected):
    assert scripted.run({"messages": MESSAGES, **given}).status_code == 200
    params = scripted.engine.asked[-1].params
    assert {name: getattr(params, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": 5.1}, "'/temperature' must be <= 5"),
        ({"temperature": -0.1}, "'/temperature' must be >= 0"),
        ({"temperature": "1"}, "Type mismatch of '/temperature', 'number' not in 'string'"),
        ({"temperature": None}, "Type mismatch of '/temperature', 'number' not in 'null'"),
        ({"temperature": True}, "Type mismatch of '/temperature', 'number' not in 'boolean'"),
        ({"temperature": 10**400}, "'/temperature' must be <= 5"),
        ({"max_tokens": 0}, "'/max_tokens' must be >= 1"),
        ({"max_tokens": 1.5}, "Type mismatch of '/max_tokens', 'integer' not in 'number'"),
        ({"max_tokens": True}, "Type mismatch of '/max_tokens', 'integer' not in 'boolean'"),
        ({"max_tokens": 10**30}, "'/max_tokens' must be <= 9223372036854775807"),
        ({"top_p": 2.1}, "'/top_p' must be <= 2"),
        ({"top_k": 0}, "'/top_k' must be >= 1"),
        ({"top_k": 51}, "'/top_k' must be <= 50"),
        ({"seed": 0}, "'/seed' must be >= 1"),
        ({"seed": 10**10}, "'/seed' must be <= 9999999999"),
        ({"repetition_penalty": -1}, "'/repetition_penalty' must be >= 0"),
        ({"repetition_penalty": 3}, "'/repetition_penalty' must be <= 2"),
        ({"frequency_penalty": 3}, "'/frequency_penalty' must be <= 2"),
        ({"presence_penalty": -3}, "'/presence_penalty' must be >= -2"),
        ({"stream": 1}, "Type mismatch of '/stream', 'boolean' not in 'number','integer'"),
        ({"raw": "yes"}, "Type mismatch of '/raw', 'boolean' not in 'string'"),
        ({"lora": 3}, "Type mismatch of '/lora', 'string' not in 'number','integer'"),
        ({"tools": {}}, "Type mismatch of '/tools', 'array' not in 'object'"),
        ({"tools": [3]}, "Type mismatch of '/tools/0', 'object' not in 'number','integer'"),
        ({"tools": [{"name": "f"}] * 129}, "Length of '/tools' must be <= 128"),
        ({"tools": [{}]}, "tools[0] must name its function"),
        ({"tools": [{"name": "f", "strict": "yes"}]}, "tools[0]: strict must be true or false, got str"),
        ({"functions": {}}, "Type mismatch of '/functions', 'array' not in 'object'"),
        ({"image": [1, 2]}, "'/image' is not supported: this model takes text only"),
        ({"image": None}, "'/image' is not supported: this model takes text only"),
        ({"response_format": {"type": "xml"}}, "enum not in json_object or json_schema at '/response_format/type'"),
        ({"response_format": None}, "Type mismatch of '/response_format', 'object' not in 'null'"),
        (
            {"response_format": {"type": "json_object"}, "guided_json": {}},
            "'/guided_json' and '/response_format' both constrain the answer",
        ),
        ({"guided_json": {"type": "nope"}}, "guided_json: Invalid type: nope"),
        ({"guided_json": {"type": "nope"}, "raw": True}, "guided_json: Invalid type: nope"),
        ({"response_format": {"type": "json_schema"}}, "required properties at '/response_format' are 'json_schema'"),
        (
            {"response_format": {"type": "json_object"}, "stream": True},
            "'/response_format' is not supported with stream",
        ),
        ({"prompt": "x"}, "oneOf at '/' not met, 2 matches"),
        ({"messages": None}, "Type mismatch of '/messages', 'array' not in 'null'"),
        ({"messages": []}, "Length of '/messages' must be >= 1 not met"),
        ({"messages": ["x"]}, "Type mismatch of '/messages/0', 'object' not in 'string'"),
        ({"messages": [{"content": "x"}]}, "required properties at '/messages/0' are 'role'"),
        ({"messages": [{"role": [], "content": "x"}]}, "Type mismatch of '/messages/0/role', 'string' not in 'array'"),
        ({"messages": [{"role": "user"}]}, "Type mismatch of '/messages/0/content', 'string' not in 'null'"),
        ({"messages": [user(3)]}, f"'/messages/0/content' must be a string or an array of {PART}"),
        ({"messages": [user("x" * 131073)]}, "'/messages/0/content' must have <= 131072 characters"),
        ({"messages": [user([IMAGE])]}, NO_TEXT_PARTS),
        ({"messages": [user([IMAGE])], "raw": True}, NO_TEXT_PARTS),
        ({"messages": [user([{"type": "text"}])], "raw": True}, NO_TEXT_PARTS),
        ({"messages": [{"role": "<|x|>", "content": ""}]}, f"messages[0].role must be {ROLES}, got '<|x|>'"),
        ({"messages": [user("x")] * 4097}, "Length of '/messages' must be <= 4096"),
        ({"raw": True, "tools": [{"name": "f"}]}, NO_TEMPLATE),
    ],
)
def test_what_is_refused(scripted, given, message):
    assert bad_input(scripted, **({"messages": MESSAGES} | given)) == message


@pytest.mark.parametrize("name", RunRequest.model_fields)
def test_null_is_no_value_of_any_field(scripted, name):
    fine = {} if name == "prompt" else {"prompt": "x"} if name != "messages" else {"messages": MESSAGES}
    message = bad_input(scripted, **(fine | {name: None}))
    assert f"'/{name}'" in message and ("'null'" in message or name == "image")


def test_a_prompt_is_needed(scripted):
    assert bad_input(scripted) == "required properties at '/' are 'prompt'"
    assert bad_input(scripted, prompt="") == "Length of '/prompt' must be >= 1 not met"
    assert bad_input(scripted, prompt=None) == "Type mismatch of '/prompt', 'string' not in 'null'"
    assert bad_input(scripted, prompt="x" * 131073) == "Length of '/prompt' must be <= 131072"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'"x"', b'{"prompt": NaN}', b'{"prompt": "\\ud800"}', b"\xff", b"[" * 5000, b"9" * 5000]
)
def test_bodies_that_are_no_json_objects(scripted, body):
    error_of(scripted.run(body), 400, 5006)


def test_a_prompt_becomes_one_user_message(scripted):
    assert scripted.run({"prompt": "Say <|eot_id|> this"}).json()["result"]["response"] == "Say <|eot_id|> this"
    header = "<|start_header_id|>%s<|end_header_id|>\n\n"
    text = "<|begin_of_text|>" + header % "user" + "Say <|eot_id|> this<|eot_id|>" + header % "assistant"
    asked = scripted.engine.asked[-1]
    assert asked.text == text
    assert asked.prompt.count(261) == 1, "the user's text must not become a control token"


def test_raw_text_is_parsed(scripted):
    assert scripted.run({"prompt": "one<|eot_id|>two", "raw": True}).status_code == 200
    assert scripted.engine.asked[-1].prompt == [*b"one", 261, *b"two"]
    parts = [
        {"role": "system", "content": "a<|eot_id|>"},
        user([{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]),
    ]
    assert scripted.run({"messages": parts, "raw": True}).status_code == 200
    assert scripted.engine.asked[-1].prompt == [*b"a", 261, *b"bc"]


def test_content_parts_and_tool_history(scripted):
    messages = [
        user([{"type": "text", "text": "What is "}, {"type": "text", "text": "1+1?"}]),
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {"a": 1, "b": 1}}]},
        {"role": "tool", "content": "2 <|eot_id|>", "name": "add"},
    ]
    assert scripted.run({"messages": messages}).json()["result"]["response"] == "What is 1+1?"
    asked = scripted.engine.asked[-1]
    assert '"name": "add", "parameters": {"a": 1, "b": 1}' in asked.text
    assert "ipython<|end_header_id|>\n\n2 <|eot_id|><|eot_id|>" in asked.text
    assert asked.prompt.count(261) == 2


CALL = '{"name": "get_weather", "parameters": {"location": "Paris"}}'
TOOLS = [{"name": "get_weather", "description": "d", "parameters": {"type": "object", "properties": {}}}]


def test_tool_calls_are_flat_and_null_the_response(scripted):
    for tools in (TOOLS, [{"type": "function", "function": TOOLS[0]}]):
        result = scripted.run({"messages": [user("x"), user(CALL)], "tools": tools}).json()["result"]
        assert (result["response"], result["tool_calls"]) == (
            None,
            [{"name": "get_weather", "arguments": {"location": "Paris"}}],
        )
        assert '"description": "d"' in scripted.engine.asked[-1].text
    result = scripted.run({"messages": [user(CALL)]}).json()["result"]
    assert (result["response"], result["tool_calls"]) == (CALL, [])


def test_streams(scripted):
    response = scripted.run({"messages": [user("Grüße 🙂")], "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *texts, usage, done = events_of(response.text)
    assert done == "[DONE]"
    assert "".join(event["response"] for event in texts) == "Grüße 🙂"
    assert all(event.keys() == {"response", "p"} and event["p"] for event in texts)
    count = len("Grüße 🙂".encode()) + 1
    prompt = len(scripted.engine.asked[-1].prompt)
    assert usage == {
        "response": "",
        "usage": {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count},
        "finish_reason": "stop",
    }


def test_streamed_tool_calls(scripted):
    body = {"messages": [user("x"), user(CALL)], "tools": TOOLS, "stream": True}
    call, usage, done = events_of(scripted.run(body).text)
    assert call == {"response": "", "tool_calls": [{"name": "get_weather", "arguments": {"location": "Paris"}}]}
    assert "usage" in usage and done == "[DONE]"


def test_an_error_inside_a_stream_ends_it(scripted):
    *texts, error = events_of(scripted.run({"prompt": "fail", "stream": True}).text)
    assert "".join(event["response"] for event in texts) == "half"
    assert error["errors"][0]["code"] == 3043


def test_a_failed_answer_is_an_internal_error(scripted):
    response = scripted.run({"prompt": "fail"}, headers={"X-Request-Id": "my-id"})
    assert error_of(response, 500, 3043) == "Internal server error (request id my-id)"


def test_an_invalid_request_is_never_a_stream(scripted):
    response = scripted.run({"prompt": "x", "stream": True, "temperature": 9})
    assert response.headers["content-type"] == "application/json"
    error_of(response, 400, 5006)


def test_functions_are_ignored_and_that_is_said(scripted):
    body = scripted.run({"prompt": "x", "functions": [{"name": "f", "code": "g"}]}).json()
    assert body["success"] and "'functions' is deprecated" in body["messages"][0]["message"]


def test_the_error_table(scripted):
    server = scripted.server
    assert error_of(scripted.run({"prompt": "x"}, path="/ai/run/other"), 400, 5007).startswith("No such model other")
    assert "LoRA unsupported" in error_of(scripted.run({"prompt": "x", "lora": "mine"}), 405, 5005)
    message = error_of(scripted.run({"prompt": "x" * 300, "max_tokens": 4000}), 413, 5021)
    count = 4000 + 300 + len("user\n\nassistant\n\n") + 6  # six control tokens
    assert message == (
        f"The estimated number of input and maximum output tokens ({count}) exceeded this model context window "
        "limit (4096)."
    )
    too_long = error_of(scripted.run({"prompt": "x" * 5000, "max_tokens": 1}), 413, 5021)
    assert "exceeded this model context window limit (4096)" in too_long
    error_of(server.client.post(RUN, content=b" " * (8 * 2**20 + 1)), 413, 3006)
    error_of(server.client.post(RUN, content=iter([b" " * 2**20] * 9)), 413, 3006)
    assert server.client.get(RUN).headers["allow"] == "POST"
    error_of(server.client.get(RUN), 405, 7001)
    assert "/nowhere" in error_of(server.client.get("/nowhere"), 404, 7003)


def test_json_mode(tiny):
    """Greedy text of random weights is no JSON unless it is constrained."""
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "yy"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    for wanted in ({"type": kind, "json_schema": schema} for kind in ("json_schema", "json_object")):
        response = tiny.run({"prompt": "x", "response_format": wanted, "temperature": 0, "max_tokens": 100})
        assert response.status_code == 200, response.text
        assert response.json()["result"]["response"]["a"] in ("x", "yy")
    cut = tiny.run({"prompt": "x", "response_format": {"type": "json_schema", "json_schema": schema}, "max_tokens": 2})
    assert error_of(cut, 400, 5024) == "JSON Mode couldn't be met"
    assert json.loads(cut.text)["success"] is False


def test_a_grammar_that_breaks_while_it_runs_is_the_request_s_fault(tiny, monkeypatch):
    def broken(self, row):
        raise GrammarError("too many items")

    monkeypatch.setattr(Matcher, "fill_mask", broken)
    wanted = {"type": "json_schema", "json_schema": {"type": "object"}}
    response = tiny.run({"prompt": "x", "response_format": wanted})
    assert error_of(response, 400, 5024) == "JSON Mode couldn't be met"
    body = {"messages": [user("x")], "response_format": {"type": "json_object"}}
    response = tiny.run(body, path="/v1/chat/completions")
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "response_format"
    assert "exceeded a limit" in error["message"]
    *_, failure = events_of(tiny.run(body | {"stream": True}, path="/v1/chat/completions").text)
    assert failure["error"] == error
    call = body | {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"}
    del call["response_format"]
    assert tiny.run(call, path="/v1/chat/completions").json()["error"]["param"] == "tools"


def test_the_widest_schema_that_is_let_in_can_be_followed(tiny):
    """Forty alternatives of forty properties each may all stand at the same place."""
    names = [[f"k{i}_{j}" for j in range(40)] for i in range(40)]
    schema = {"anyOf": [{"properties": {name: {"type": "string"} for name in group}} for group in names]}
    schema["anyOf"] = [{"type": "object", **each} for each in schema["anyOf"]]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": [user("x")], "response_format": wanted, "max_tokens": 8}
    assert tiny.run(body, path="/v1/chat/completions").status_code == 200


NAMED = {"type": "function", "function": {"name": "get_time"}}
CHOICES = [
    {"name": "get_weather", "parameters": {"type": "object", "properties": {"at": {"enum": ["Paris", "Rome"]}}}},
    {"type": "function", "function": {"name": "get_time", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("choice", "names"), [("required", 2), ("get_time", 1), (NAMED, 1)])
def test_a_call_that_is_asked_for_is_made(tiny, choice, names, stream):
    """By a model of random weights, which can say nothing else."""
    called = set()
    for seed in range(1, 7):
        body = {"prompt": "x", "tools": CHOICES, "tool_choice": choice, "seed": seed, "stream": stream}
        response = tiny.run({**body, "max_tokens": 100, "temperature": 1})
        if stream:
            calls = [call for event in events_of(response.text)[:-1] for call in event.get("tool_calls", ())]
        else:
            calls = response.json()["result"]["tool_calls"]
        (call,) = calls
        called.add(call["name"])
    assert called == ({"get_weather", "get_time"} if names == 2 else {"get_time"})


def test_none_hides_the_tools_and_auto_does_not(scripted):
    body = {"messages": [user("x"), user(CALL)], "tools": TOOLS}
    result = scripted.run({**body, "tool_choice": "none"}).json()["result"]
    assert (result["response"], result["tool_calls"]) == (CALL, [])
    assert (
        "Weather" not in scripted.engine.asked[-1].text and '"description": "d"' not in scripted.engine.asked[-1].text
    )
    for choice in ({}, {"tool_choice": "auto"}):
        assert scripted.run({**body, **choice}).json()["result"]["tool_calls"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tool_choice": "other", "tools": TOOLS}, "'other'"),
        ({"tool_choice": {"type": "tool"}, "tools": TOOLS}, "{'type': 'tool'}"),
        ({"tool_choice": 5, "tools": TOOLS}, "'/tool_choice' must be a string or an object, not 'number','integer'"),
        ({"tool_choice": "required", "raw": True}, NO_TEMPLATE),
    ],
)
def test_choices_that_are_none(scripted, given, message):
    legal = '"auto", "none", "required" or {"type": "function", "function": {"name": ...}} with the name of a tool'
    told = f"tool_choice must be {legal} (get_weather), got {message}"
    assert bad_input(scripted, **{"messages": MESSAGES} | given) in (message, told)


def test_numbers_too_large_for_a_float_in_json_mode(scripted):
    """A grammar lets them through; JSON has no infinity."""
    wanted = {"response_format": {"type": "json_object"}}
    for said, value in (("[1e400]", [sys.float_info.max]), ("[-1e999, 2]", [-sys.float_info.max, 2])):
        response = scripted.run({"messages": [user(said)], **wanted})
        assert response.status_code == 200 and response.json()["result"]["response"] == value
    assert scripted.run({"messages": [user("[NaN]")], **wanted}).json()["errors"][0]["code"] == 5024
