"""/v1/responses with OpenAI's own client, which checks order and ids of the events, and with bare requests."""

import json
import re
import typing

import pytest
from openai.types.responses import ResponseIncludable

from tests.server.helpers import NAME, user

WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": None,
    "strict": None,
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '{"name": "get_weather", "parameters": {"city": "Rome"}}'
INCLUDES = [*typing.get_args(ResponseIncludable)]
ASKED = {"role": "user", "content": "Weather?"}


def post(scripted, path="/v1/responses", **body):
    return scripted.server.client.post(path, json={"model": NAME, "input": "Hello", **body})


def prompt_of(scripted, **body):
    """The token ids that a request of /v1/responses became."""
    response = post(scripted, **body)
    assert response.status_code == 200, response.text
    return scripted.engine.asked[-1].prompt


def chat_prompt_of(scripted, messages, **body):
    response = scripted.server.client.post("/v1/chat/completions", json={"model": NAME, "messages": messages, **body})
    assert response.status_code == 200, response.text
    return scripted.engine.asked[-1].prompt


def plain(response):
    """What does not differ between two answers to the same request."""

    def of(value):
        """Without ids, and without what OpenAI's accumulator adds of its own."""
        if isinstance(value, list):
            return list(map(of, value))
        if not isinstance(value, dict):
            return value
        hidden = ("id", "call_id", "created_at", "parsed", "parsed_arguments", "output_parsed")
        return {k: of(v) for k, v in value.items() if k not in hidden}

    return of(response if isinstance(response, dict) else response.to_dict())


def streamed(client, **body):
    """(the events, the final response of OpenAI's own accumulator); it raises for events out of order and other ids."""
    with client.responses.stream(model=NAME, **body) as stream:
        events = list(stream)
        final = stream.get_final_response() if events[-1].type == "response.completed" else events[-1].response
    assert [event.sequence_number for event in events] == list(range(len(events)))
    return events, final


@pytest.mark.parametrize(
    ("text", "more", "kinds"),
    [
        ("Grüße 👍", {}, ["message"]),
        ("empty", {}, []),
        (CALL, {"tools": [WEATHER]}, ["function_call"]),
        (f"{CALL}; {CALL}", {"tools": [WEATHER]}, ["function_call", "function_call"]),
        (f"{CALL} and {CALL}", {"tools": [WEATHER]}, ["function_call", "message"]),
        (
            f"See <tool_call>{CALL}</tool_call> and <tool_call>{CALL}</tool_call>",
            {"tools": [WEATHER]},
            ["message", "function_call", "message", "function_call"],
        ),
        (f"{CALL}; {CALL}", {"tools": [WEATHER], "parallel_tool_calls": False}, ["function_call"]),
        (CALL, {"tools": [{"type": "web_search"}], "include": []}, ["message"]),
        ("Hello", {"max_output_tokens": 1}, ["message"]),
    ],
)
def test_a_stream_says_what_the_whole_answer_says(client, text, more, kinds):
    # The built-in format tells tools in the first user message, and the last one is what the engine repeats.
    asked = {"input": [user("I say:"), user(text)], **more}
    whole = client.responses.create(model=NAME, **asked)
    events, final = streamed(client, **asked)
    assert [item.type for item in whole.output] == kinds
    assert plain(final) == plain(whole)
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text
    is_cut = "max_output_tokens" in more
    assert whole.status == ("incomplete" if is_cut else "completed")
    assert all(item.status == whole.status for item in whole.output)
    assert (whole.incomplete_details and whole.incomplete_details.reason) == ("max_output_tokens" if is_cut else None)
    added = [event.item for event in events if event.type == "response.output_item.added"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [i.id for i in added] == [i.id for i in done] == [i.id for i in final.output]
    for before, after, item in zip(added, done, final.output, strict=True):
        if item.type == "function_call":
            assert before.call_id == after.call_id == item.call_id and before.name == item.name == "get_weather"
            assert before.arguments == "" and json.loads(item.arguments) == {"city": "Rome"}


def test_the_events_of_a_text_in_their_order(scripted):
    lines = post(scripted, stream=True).text.split("\n\n")[:-1]
    names = [line.split("\n")[0].removeprefix("event: response.") for line in lines]
    events = [json.loads(line.split("\n")[1].removeprefix("data: ")) for line in lines]
    assert [f"response.{name}" for name in names] == [event["type"] for event in events]
    deltas = names.count("output_text.delta")
    assert names == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * deltas,
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert deltas and events[2]["item"]["content"] == [] and events[0]["response"]["usage"] is None
    assert events[-1]["response"]["usage"]["output_tokens"] == 6


def test_an_answer_that_breaks_off(scripted, client):
    response = post(scripted, input="fail", stream=True)
    last = json.loads(response.text.split("\n\n")[-2].split("data: ")[1])
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "server_error" and last["response"]["error"]["message"]
    assert last["response"]["output"][0]["content"][0]["text"] == "half"
    events = list(client.responses.create(model=NAME, input="fail", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert post(scripted, input="fail").json()["error"]["code"] == "internal_error"


CALLED = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "21"}
AS_CHAT = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}
ANSWERED = {"role": "tool", "tool_call_id": "c1", "content": "21"}


@pytest.mark.parametrize(
    ("items", "messages"),
    [
        ("Hello", [user("Hello")]),
        ([{"type": "message", **ASKED}], [ASKED]),
        (
            [{"role": "user", "content": [{"type": "input_text", "text": "We"}, {"type": "text", "text": "!"}]}],
            [user("We!")],
        ),
        (
            [ASKED, {"role": "assistant", "content": [{"type": "output_text", "text": "Yes"}]}, ASKED],
            [ASKED, {"role": "assistant", "content": "Yes"}, ASKED],
        ),
        ([ASKED, CALLED, RESULT], [ASKED, {"role": "assistant", "content": None, "tool_calls": [AS_CHAT]}, ANSWERED]),
        (
            [ASKED, CALLED, {"role": "assistant", "content": "Let me see"}, RESULT],
            [ASKED, {"role": "assistant", "content": "Let me see", "tool_calls": [AS_CHAT]}, ANSWERED],
        ),
        (
            [ASKED, CALLED, CALLED | {"call_id": "c2"}, RESULT, RESULT | {"call_id": "c2"}],
            [
                ASKED,
                {"role": "assistant", "content": None, "tool_calls": [AS_CHAT, AS_CHAT | {"id": "c2"}]},
                *(ANSWERED, ANSWERED | {"tool_call_id": "c2"}),
            ],
        ),
        (
            [ASKED, CALLED, RESULT | {"output": [{"type": "output_text", "text": "21", "annotations": None}]}],
            [ASKED, {"role": "assistant", "content": None, "tool_calls": [AS_CHAT]}, ANSWERED],
        ),
        (
            [ASKED, {"type": "reasoning", "id": None, "summary": [], "encrypted_content": "x", "status": None}, ASKED],
            [ASKED, ASKED],
        ),
    ],
)
def test_items_are_the_messages_that_chat_would_be_given(scripted, items, messages):
    ids = prompt_of(scripted, input=items, tools=[WEATHER])
    tool = {"type": "function", "function": {k: v for k, v in WEATHER.items() if k != "type" and v is not None}}
    assert ids == chat_prompt_of(scripted, messages, tools=[tool])
    assert ids.count(ids[0]) == 1, "BOS once"
    ids = prompt_of(scripted, input=items, instructions="Be brief")
    assert ids == chat_prompt_of(scripted, [{"role": "system", "content": "Be brief"}, *messages])


def test_the_items_of_an_answer_are_taken_back_as_they_came(scripted, client):
    first = client.responses.create(model=NAME, input=[user("I say:"), user(CALL)], tools=[WEATHER])
    items = [user("I say:"), user(CALL), *(item.model_dump() for item in first.output)]
    call = first.output[0]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "21"}
    second = client.responses.create(model=NAME, input=[*items, result, user("Thanks")], tools=[WEATHER])
    assert second.output_text == "Thanks"
    third = [user("Thanks"), *(item.model_dump() for item in second.output), user("Bye")]
    assert client.responses.create(model=NAME, input=third).output_text == "Bye"


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "this server keeps no conversations"),
        ({"conversation": {"id": "x"}}, "conversation", "this server keeps no conversations"),
        ({"background": True}, "background", "is not supported"),
        ({"background": 0}, "background", "is not supported"),
        ({"background": -0.0}, "background", "is not supported"),
        ({"previous_response_id": 0}, "previous_response_id", "this server keeps no conversations"),
        ({"include": ["foo"]}, "include", "'/include/0' must be one of code_interpreter_call.outputs, .*"),
        ({"include": [INCLUDES[0], None]}, "include", "'/include/1', 'string' not in 'null'"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input", r"input\[0\] refers to an item"),
        ({"input": [ASKED, {"type": "web_search_call"}]}, "input", r"input\[1\] is of type 'web_search_call'"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input",
            r"input\[0\]\.content\[0\] is of",
        ),
        ({"input": [{"role": "tool", "content": "x"}]}, "input", r"input\[0\]\.role must be one of"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input", r"input\[0\] must have a name and a call_id"),
        ({"input": [{"type": "reasoning", "content": True}]}, "input", r"input\[0\].content must be a list of parts"),
        ({"input": [{"type": "reasoning", "summary": "x"}]}, "input", r"input\[0\].summary must be a list of parts"),
        ({"input": []}, "input", "at least one item"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice", "of type 'file_search' is not supported"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice needs tools"),
        ({"truncation": "auto"}, "truncation", "disabled"),
        ({"max_output_tokens": 0}, "max_output_tokens", "must be >= 1"),
        ({"text": {"format": {"type": "xml"}}}, "text", r'^text.format\["type"\] must be one of'),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "^text.format has no schema beside"),
        ({"text": {"format": {"type": "json_schema", "schema": {"not": {}}}}}, "text", "^text.format: nothing"),
        (
            {"text": {"format": {"type": "json_object"}}, "structured_outputs": {"regex": "a"}},
            "structured_outputs",
            "^structured_outputs and text.format both",
        ),
        ({"input": "x" * 4096}, "input", "the prompt has"),
        ({"input": [{"role": "user", "content": "x" * 4096}]}, "input", "the prompt has"),
        ({"thing": 1}, "thing", "is not a parameter of this server"),
    ],
)
def test_what_is_refused(scripted, body, param, message):
    response = post(scripted, **body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param
    assert re.search(message, error["message"]), error["message"]


def test_what_changes_nothing(scripted):
    body = {"store": True, "metadata": {"a": "b"}, "include": INCLUDES, "truncation": "disabled"}
    body |= {"reasoning": {"effort": "low"}, "background": False, "previous_response_id": None, "tools": None}
    body |= {"text": {"verbosity": "low"}, "stream_options": {"include_obfuscation": False}, "service_tier": "auto"}
    answer = post(scripted, "/client/v4/accounts/1/ai/v1/responses", **body).json()
    assert answer["output"][0]["content"][0]["text"] == "Hello"
    assert (answer["store"], answer["metadata"], answer["object"]) == (False, {"a": "b"}, "response")


def test_a_schema_and_a_choice_of_tools_are_kept(tiny_client):
    form = {"type": "json_schema", "name": "n", "schema": {"enum": ["ja", "nein"]}, "strict": True}
    answer = tiny_client.responses.create(model=NAME, input="x", text={"format": form}, max_output_tokens=60)
    assert answer.output_text in ('"ja"', '"nein"')
    choices = ["required", {"type": "function", "name": "get_time"}]
    choices.append({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_time"}]})
    time = {"type": "function", "name": "get_time", "parameters": None}
    for choice, tools in zip(choices, ([time], [WEATHER, time], [WEATHER, time]), strict=True):
        events, final = streamed(tiny_client, input="x", tools=tools, tool_choice=choice, max_output_tokens=90)
        assert [item.name for item in final.output] == ["get_time"] and events[-1].type == "response.completed"


def test_an_allowed_tool_that_is_not_there_is_named(scripted):
    listed = [{"type": "function", "name": name} for name in ("get_weather", "get_tide")]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": listed}
    error = post(scripted, input="x", tools=[WEATHER], tool_choice=choice).json()["error"]
    assert error["param"] == "tool_choice"
    assert error["message"] == "tool_choice: allowed_tools names 'get_tide', which is none of tools (get_weather)"


def test_log_probabilities_of_each_token(tiny_client):
    asked = {"input": "x", "max_output_tokens": 4, "top_logprobs": 2, "temperature": 0}
    events, final = streamed(tiny_client, **asked, include=["message.output_text.logprobs"])
    entries = final.output[0].content[0].logprobs
    told = [entry for event in events if event.type == "response.output_text.delta" for entry in event.logprobs]
    assert [e.logprob for e in entries] == [e.logprob for e in told] and len(entries) == 4
    assert all(len(e.top_logprobs) == 2 and e.logprob == e.top_logprobs[0].logprob for e in entries)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('{"a": 1} is JSON', '{"a": 1} is JSON<|eot_id|>'),
        ("<tool_call>x", "<tool_call>x<|eot_id|>"),
        ("Hi {", "Hi {<|eot_id|>"),
        ("Hi <|python_tag|>" + CALL, "Hi "),
        ('Hi\n<function=get_weather>{"city": "Rome"}</function>', "Hi\n"),
        (CALL, ""),
        (CALL + " and {x", " and {x<|eot_id|>"),
    ],
)
def test_log_probabilities_are_those_of_the_text(scripted, said, told):
    """Whatever was held back because it might have become a call, and however the pieces were merged."""
    asked = [user("I say:"), user(said)]
    body = {"input": asked, "tools": [WEATHER], "include": ["message.output_text.logprobs"]}
    whole = post(scripted, **body).json()
    text = post(scripted, **body, stream=True).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    deltas = [entry for event in events for entry in event.get("logprobs", []) if event["type"].endswith("text.delta")]
    for output in (whole["output"], events[-1]["response"]["output"]):
        parts = [part for item in output if item["type"] == "message" for part in item["content"]]
        assert "".join(entry["token"] for part in parts for entry in part["logprobs"]) == told
    assert "".join(entry["token"] for entry in deltas) == told
