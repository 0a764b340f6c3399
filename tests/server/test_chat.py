"""OpenAI's chat route with OpenAI's own client, over a real socket."""

import json
import math

import openai
import pytest

from tests.server.helpers import NAME, TOKENIZER, events_of, user

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "get_time"}}
CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}'


def chat(client, text="Hello", **more):
    """The tools are told in the first user message, and the last one is what the scripted engine repeats."""
    return client.chat.completions.create(**{"model": NAME, "messages": [user("I say:"), user(text)], **more})


def test_an_answer(client, scripted):
    answer = chat(client, "Grüße")
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Grüße", "stop")
    assert choice.message.tool_calls is None and choice.logprobs is None
    assert (answer.model, answer.object) == (NAME, "chat.completion") and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.completion_tokens == len("Grüße".encode()) + 1
    assert usage.prompt_tokens == len(scripted.engine.asked[-1].prompt)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert scripted.engine.asked[-1].params.max_tokens is None


def test_cloudflare_s_path_and_model_name(scripted):
    base = f"{scripted.server.url}/client/v4/accounts/me/ai/v1"
    with openai.OpenAI(base_url=base, api_key="none", max_retries=0) as client:
        answer = chat(client, model="@cf/meta/llama-3.1-70b-instruct")
    assert answer.choices[0].message.content == "Hello"


def test_streams(client):
    chunks = list(chat(client, "Grüße 🙂", stream=True, stream_options={"include_usage": True}))
    *parts, usage = chunks
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == "Grüße 🙂"
    assert [part.choices[0].finish_reason for part in parts][-1] == "stop"
    assert usage.choices == [] and usage.usage.completion_tokens == len("Grüße 🙂".encode()) + 1
    assert all(part.usage is None for part in parts)
    assert len({part.id for part in chunks}) == 1
    assert all(part.choices for part in chat(client, stream=True))


def test_several_answers(client, scripted):
    assert [choice.index for choice in chat(client, n=3).choices] == [0, 1, 2]
    texts = {0: "", 1: ""}
    for part in chat(client, n=2, stream=True):
        (choice,) = part.choices
        texts[choice.index] += choice.delta.content or ""
    assert texts == {0: "Hello", 1: "Hello"}
    assert scripted.engine.asked[-1].params.n == 2


def test_parameters_reach_the_engine(client, scripted):
    extra = {
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "ignore_eos": False,
        "stop_token_ids": [5],
        "min_tokens": 1,
    }
    chat(
        client,
        seed=5,
        temperature=0.5,
        top_p=0.9,
        stop=["x", "y"],
        logit_bias={"65": -100, "66": 1.5},
        frequency_penalty=1,
        presence_penalty=-1,
        max_completion_tokens=9,
        user="someone",
        extra_body=extra,
    )
    params = scripted.engine.asked[-1].params
    assert (params.seed, params.temperature, params.top_p, params.stop) == (5, 0.5, 0.9, ("x", "y"))
    assert (params.logit_bias, params.max_tokens) == ({65: -100.0, 66: 1.5}, 9)
    assert (params.frequency_penalty, params.presence_penalty) == (1.0, -1.0)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (7, 0.1, 1.5)
    assert (params.stop_token_ids, params.min_tokens) == ((5,), 1)


def test_stop_strings_and_lengths(client):
    choice = chat(client, "one STOP two", stop="STOP").choices[0]
    assert (choice.message.content, choice.finish_reason) == ("one ", "stop")
    choice = chat(client, "abcdef", max_tokens=3).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("abc", "length")
    assert chat(client, "empty").choices[0].message.content == ""


def test_logprobs(tiny_client):
    answer = chat(tiny_client, "x", logprobs=True, top_logprobs=3, max_tokens=4, temperature=0)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
        assert [top.logprob for top in entry.top_logprobs] == sorted(
            (t.logprob for t in entry.top_logprobs), reverse=True
        )
        assert entry.logprob <= 0 and bytes(entry.bytes).decode("utf-8", "replace") == entry.token
    streamed = chat(tiny_client, "x", logprobs=True, top_logprobs=3, max_tokens=4, temperature=0, stream=True)
    again = [entry for part in streamed if part.choices[0].logprobs for entry in part.choices[0].logprobs.content]
    assert [entry.token for entry in again] == [entry.token for entry in entries]
    assert [entry.logprob for entry in again] == pytest.approx([entry.logprob for entry in entries], rel=1e-12)
    assert chat(tiny_client, "x", logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []


def test_cached_tokens_are_told(tiny_client):
    text = "a prompt that is longer than one block of the cache"
    first, again = (chat(tiny_client, text, max_tokens=1).usage for _ in range(2))
    assert again.prompt_tokens_details.cached_tokens == (again.prompt_tokens - 1) // 16 * 16
    assert first.prompt_tokens_details.cached_tokens < again.prompt_tokens_details.cached_tokens


def test_a_seed_comes_back_and_repeats(tiny_client):
    first = chat(tiny_client, "x", max_tokens=8)
    seed = first.choices[0].seed
    assert chat(tiny_client, "x", max_tokens=8, seed=seed).choices[0].message == first.choices[0].message
    *_, last = chat(tiny_client, "x", max_tokens=8, seed=seed, stream=True)
    assert last.choices[0].seed == seed


def test_json_schema(tiny_client):
    schema = {
        "type": "object",
        "properties": {"size": {"enum": [1, 2]}},
        "required": ["size"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "size", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = chat(tiny_client, "x", response_format=wanted, seed=seed, max_tokens=60)
        assert json.loads(answer.choices[0].message.content)["size"] in (1, 2)
        assert answer.choices[0].finish_reason == "stop"
    assert chat(tiny_client, "x", response_format={"type": "text"}, max_tokens=1).choices


def test_a_seeded_neighbour_is_not_touched_by_a_grammar(tiny_client):
    """Greedy text is the same before and after constrained requests have come and gone."""
    plain = chat(tiny_client, "y", temperature=0, max_tokens=12).choices[0].message.content
    chat(tiny_client, "y", tools=[TIME], tool_choice="required", max_tokens=60)
    assert chat(tiny_client, "y", temperature=0, max_tokens=12).choices[0].message.content == plain


def regex(pattern: str) -> dict:
    return {"response_format": {"type": "regex", "regex": pattern}}


def schema(value) -> dict:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


OF_A = "the parameters of tool 'f' at /properties/a"


def called(parameters) -> dict:
    return {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        "tool_choice": "required",
    }


@pytest.mark.parametrize(
    ("given", "param", "message"),
    [
        ({"temperature": 6}, "temperature", "temperature must be a number from 0 to 5, got 6.0"),
        ({"temperature": "1"}, "temperature", "Type mismatch of '/temperature', 'number' not in 'string'"),
        ({"n": 65}, "n", "'/n' must be <= 64"),
        ({"stop": ["x"] * 17}, "stop", "'/stop' must hold <= 16 strings of 1 to 256 characters"),
        ({"stop": "x" * 257}, "stop", "'/stop' must hold <= 16 strings of 1 to 256 characters"),
        ({"stop": ""}, "stop", "'/stop' must hold <= 16 strings of 1 to 256 characters"),
        ({"stop": 5}, "stop", "'/stop' must be a string or an array of strings"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "logit_bias must map token ids to numbers, got the key 'x'"),
        ({"logit_bias": {"1": 101}}, "logit_bias", "logit_bias[1] must be a number from -100 to 100, got 101.0"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "logit_bias must hold token ids in [0, 263], got 99999"),
        ({"logit_bias": {str(i): 0 for i in range(1025)}}, "logit_bias", "Length of '/logit_bias' must be <= 1024"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "'/top_logprobs' must be <= 20"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs needs logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options needs stream"),
        (
            {"max_tokens": 1, "max_completion_tokens": 2},
            "max_tokens",
            "max_tokens=1 and max_completion_tokens=2 contradict each other",
        ),
        ({"max_tokens": 0}, "max_tokens", "'/max_tokens' must be >= 1"),
        ({"max_tokens": -1}, "max_tokens", "'/max_tokens' must be >= 1"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"tool_choice": {}}, "tool_choice", None),
        ({"tool_choice": ""}, "tool_choice", None),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
            "tools",
            "tools[0]: parameters must be a JSON schema, got int",
        ),
        (called({"type": "string"}), "tools", "the parameters of tool 'f' must be a JSON schema of an object"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}},
            "response_format",
            "response_format.json_schema has no schema beside its name",
        ),
        ({"tools": [{"type": "x", "function": {"name": "f"}}]}, "tools", "tools[0].type must be 'function', got 'x'"),
        ({"messages": []}, "messages", "Length of '/messages' must be >= 1 not met"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages", None),
        ({"response_format": {"type": "xml"}}, "response_format", None),
        (
            schema(3),
            "response_format",
            "response_format.json_schema must be a JSON schema, or an object with one in schema",
        ),
        (regex("a\n(b"), "response_format", "response_format.regex: invalid regex: unclosed group"),
        (regex("a" * 2000 + "["), "response_format", "response_format.regex: invalid regex: unclosed character class"),
        (
            regex("(?=a)b"),
            "response_format",
            "response_format.regex: invalid regex: look-around, including look-ahead and look-behind, is not supported",
        ),
        (
            regex(r"\b"),
            "response_format",
            r"response_format.regex: lookarounds not supported yet; WordUnicode in regex /\b/",
        ),
        (
            schema({"type": "string", "pattern": "("}),
            "response_format",
            "response_format.json_schema: invalid regex: unclosed group",
        ),
        (
            schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}),
            "response_format",
            "response_format.json_schema at /$defs/a: nothing satisfies it",
        ),
        (
            called({"properties": {"a": {"type": "nonsense"}}}),
            "tools",
            f"{OF_A}: Invalid type: nonsense",
        ),
        (
            called({"properties": {"a": {"pattern": "["}}}),
            "tools",
            f"{OF_A}: invalid regex: unclosed character class",
        ),
        ({"messages": [user("x")] * 4097}, "messages", "Length of '/messages' must be <= 4096"),
        ({"tools": [TIME] * 129}, "tools", "Length of '/tools' must be <= 128"),
        ({"extra_body": {"stop_token_ids": [1] * 129}}, "stop_token_ids", "Length of '/stop_token_ids' must be <= 128"),
        (
            {"extra_body": {"reasoning_effort": "high"}},
            "reasoning_effort",
            "'/reasoning_effort' is not a parameter of this server",
        ),
    ],
)
def test_what_is_refused(client, given, param, message):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **given)
    body = caught.value.body
    assert (body["type"], body["param"]) == ("invalid_request_error", param)
    assert message is None or body["message"] == message


def test_what_is_null_is_not_asked_for(client):
    given = {"prediction": None, "audio": None, "extra_thing": None, "seed": None}
    assert chat(client, extra_body=given).choices[0].message.content


def test_an_unknown_tool_is_refused(client):
    with pytest.raises(openai.BadRequestError, match=r"with the name of a tool \(get_weather\), got 'other'"):
        chat(client, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "other"}})


def test_other_errors(client, scripted):
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-4")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "x" * 5000)
    assert caught.value.code == "context_length_exceeded" and "4096" in caught.value.message
    with pytest.raises(openai.InternalServerError):
        chat(client, "fail")
    with pytest.raises(openai.APIStatusError) as caught:
        chat(client, user="x" * (8 * 2**20))
    assert caught.value.status_code == 413 and caught.value.body["message"].startswith("Request is too large")
    assert chat(client, "Hello" * 100, max_tokens=100_000).choices[0].finish_reason == "stop"  # clipped
    response = scripted.run({"model": NAME, "messages": [user("fail")], "stream": True}, path="/v1/chat/completions")
    *_, last = events_of(response.text)
    assert last["error"]["code"] == "internal_error"
    assert scripted.server.client.get("/v1/nothing").json()["error"]["message"].startswith("Could not route")


def test_nulls_count_as_absent(scripted):
    names = [
        "temperature",
        "n",
        "stop",
        "tools",
        "tool_choice",
        "logprobs",
        "response_format",
        "stream",
        "seed",
        "user",
    ]
    body = {"model": NAME, "messages": [user("x")], **dict.fromkeys(names)}
    assert scripted.run(body, path="/v1/chat/completions").status_code == 200


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object, model.parent) == (NAME, "model", None)
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_control_text_stays_text(client, scripted):
    eot = TOKENIZER.special_tokens["<|eot_id|>"]
    messages = [
        {"role": "system", "content": "<|eot_id|>"},
        user("<|eot_id|>"),
        {"role": "tool", "content": "<|eot_id|>"},
    ]
    chat(client, messages=messages)
    assert scripted.engine.asked[-1].prompt.count(eot) == 3
    assert math.isfinite(scripted.engine.asked[-1].params.temperature)
