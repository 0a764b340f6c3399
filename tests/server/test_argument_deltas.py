"""Streams tell a call that a grammar holds while it is written; the parts are those of the whole answer."""

import itertools
import json
import threading

import pytest

from tests.server.helpers import NAME, PATIENCE, RUN, begin, client_of, events_of, until, user
from tests.server.test_chat import CALL, WEATHER

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"
NAMED = {"type": "function", "function": {"name": "get_weather"}}
NOTE = {"type": "function", "function": {"name": "note", "parameters": {"type": "object"}, "strict": True}}
STRICT = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
ODD = '{"name": "note", "parameters": {"é": "😀 \\"}{\\\\", "n": [1.50, -0, {"a": []}], "x": 1e2}}'
ASKED = {
    "required": (CALL, {"tools": [WEATHER], "tool_choice": "required"}),
    "named": (CALL, {"tools": [WEATHER, NOTE], "tool_choice": NAMED}),
    "required, odd": (ODD, {"tools": [NOTE], "tool_choice": "required"}),
    "strict": (f"{CALL}; {ODD}; {CALL}", {"tools": [STRICT, NOTE]}),
    "strict, one": (f"{ODD}; {CALL}", {"tools": [STRICT, NOTE], "parallel_tool_calls": False}),
}


@pytest.fixture(autouse=True)
def room_for_tools(request, monkeypatch):
    if "scripted" in request.fixturenames:
        monkeypatch.setattr(request.getfixturevalue("scripted").engine, "longest_prompt", 4000)


def ask(scripted, text, path=CHAT, **more):
    said = [user("I say:"), user(text)]
    return scripted.run({"messages" if path == CHAT else "input": said, **more}, path=path)


def streamed(response, index=0):
    """(calls as OpenAI's clients put them together, the chunks' deltas, the last choice, the usage)"""
    *chunks, usage, _ = events_of(response.text)
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
    calls = []
    for delta in (call for choice in choices for call in choice["delta"].get("tool_calls", ())):
        if "id" in delta:
            assert delta["index"] == len(calls) and delta["type"] == "function" and delta["id"].startswith("call")
            calls.append({"id": delta["id"], "type": "function", "function": dict(delta["function"])})
        else:
            assert delta.keys() == {"index", "function"} and delta["function"].keys() == {"arguments"}
            calls[delta["index"]]["function"]["arguments"] += delta["function"]["arguments"]
    assert len({call["id"] for call in calls}) == len(calls)
    return calls, [choice["delta"] for choice in choices], choices[-1], usage["usage"]


@pytest.mark.parametrize("case", ASKED)
def test_the_parts_are_the_whole(scripted, case):
    text, more = ASKED[case]
    whole = ask(scripted, text, n=2, **more).json()
    response = ask(scripted, text, n=2, stream=True, stream_options={"include_usage": True}, **more)
    for choice in whole["choices"]:
        calls, deltas, last, usage = streamed(response, choice["index"])
        message = choice["message"]
        assert [call["function"] for call in calls] == [call["function"] for call in message["tool_calls"]]
        assert message["content"] is None and not any(delta.get("content") for delta in deltas)
        assert last["finish_reason"] == choice["finish_reason"] == "tool_calls"
        assert {k: v for k, v in usage.items() if "details" not in k} == {
            k: v for k, v in whole["usage"].items() if "details" not in k
        }
        first = [d["tool_calls"][0] for d in deltas if "tool_calls" in d and "id" in d["tool_calls"][0]]
        assert [call["function"]["arguments"] for call in first] == [""] * len(calls)


@pytest.mark.parametrize("path", [CHAT, RESPONSES])
def test_the_name_and_a_part_of_the_arguments_come_before_the_rest_is_written(scripted, path, monkeypatch):
    rest, steps, text = threading.Event(), itertools.count(), '{"name": "note", "parameters": {"a": "QZ"}}'
    monkeypatch.setattr(scripted.engine, "before_step", lambda: next(steps) <= text.index("Q") or rest.wait(PATIENCE))
    tool = NOTE if path == CHAT else {"type": "function", **NOTE["function"]}
    body = {"tools": [tool], "tool_choice": "required", "stream": True}
    said = [user("I say:"), user(text)]
    with begin(scripted.server, body | {"messages" if path == CHAT else "input": said}, path) as connection:
        seen = b""
        while b"Q" not in seen:
            part = connection.recv(4096)
            assert part, seen
            seen += part
        assert b"Z" not in seen and seen.rindex(b'"name":"note"') < seen.index(b"Q")
        rest.set()
        while part := connection.recv(4096):
            seen += part
    assert b"Z" in seen and b'"tool_calls"' if path == CHAT else b"response.completed" in seen


def test_calls_that_max_tokens_cut(scripted):
    """Text in a whole answer, and told in a stream as far as it came."""
    text, more = ASKED["required"]
    for count in range(1, len(text) + 2, 3):
        options = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": count}
        calls, deltas, last, _ = streamed(ask(scripted, text, **options, **more))
        whole = ask(scripted, text, max_tokens=count, **more).json()["choices"][0]
        assert last["finish_reason"] == whole["finish_reason"]
        content = "".join(delta.get("content", "") for delta in deltas)
        if count < len(text):
            assert whole["finish_reason"] == "length"
            assert (whole["message"]["content"], whole["message"].get("tool_calls")) == (text[:count], None)
            assert content == ("" if calls else text[:count])
        _, _, arguments = text[:count].partition('"parameters": ')
        assert [call["function"]["arguments"] for call in calls] == ([arguments[:16]] if arguments else [])


@pytest.mark.parametrize(
    ("text", "more"),
    [
        (CALL, {"tools": [WEATHER]}),
        (f"{CALL}; {CALL}", {"tools": [WEATHER, NOTE]}),
        (CALL, {"tools": [WEATHER], "tool_choice": "required", "stop": ["Oslo"]}),  # a stop string may cut it
        (CALL, {"tools": [STRICT], "response_format": {"type": "json_object"}}),  # the answer may begin so
        (CALL.replace("parameters", "arguments"), {"tools": [WEATHER], "tool_choice": "required"}),  # not our form
    ],
)
def test_what_is_certain_at_its_end_alone_comes_in_one_part(scripted, text, more):
    response = ask(scripted, text, stream=True, stream_options={"include_usage": True}, **more)
    calls, deltas, _, _ = streamed(response)
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Rome"}] * text.count("Rome")
    assert sum("tool_calls" in delta for delta in deltas) == len(calls)


def test_openai_puts_them_together(scripted):
    text, more = ASKED["strict"]
    with client_of(scripted.server) as client:
        asked = {"model": NAME, "messages": [user("I say:"), user(text)], **more}
        whole = client.chat.completions.create(**asked).choices[0].message
        with client.chat.completions.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_completion().choices[0].message
    told = [(call.function.name, call.function.arguments) for call in final.tool_calls]
    assert told == [(call.function.name, call.function.arguments) for call in whole.tool_calls]
    assert kinds.count("tool_calls.function.arguments.done") == 3
    assert kinds.count("tool_calls.function.arguments.delta") >= 3


def test_who_leaves_inside_a_call_leaves_nothing_behind(scripted, monkeypatch):
    text, more = ASKED["required, odd"]
    rest, steps, engine = threading.Event(), itertools.count(), scripted.engine
    monkeypatch.setattr(engine, "before_step", lambda: next(steps) < text.index("n") + 50 or rest.wait(PATIENCE))
    body = {"messages": [user("I say:"), user(text)], "stream": True, **more}
    with begin(scripted.server, body, CHAT) as connection:
        seen = b""
        while b'"name":"note"' not in seen:
            seen += connection.recv(4096)
    rest.set()
    until(lambda: not engine.running)
    assert ask(scripted, text, **more).json()["choices"][0]["finish_reason"] == "tool_calls"


def response_events(scripted, text, **more):
    flat = [{"type": "function", **tool["function"]} for tool in more.pop("tools")]
    choice = more.pop("tool_choice", None)
    more |= {"tool_choice": {"type": "function", "name": "get_weather"} if isinstance(choice, dict) else choice}
    text = ask(scripted, text, RESPONSES, tools=flat, stream=True, **more).text
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]


@pytest.mark.parametrize("case", ASKED)
def test_items_of_responses(scripted, case):
    text, more = ASKED[case]
    events = response_events(scripted, text, **more)
    output = events[-1]["response"]["output"]
    whole = ask(scripted, text, **more).json()["choices"][0]["message"]["tool_calls"]
    assert [(i["name"], i["arguments"]) for i in output] == [tuple(c["function"].values()) for c in whole]
    for i, item in enumerate(output):
        own = [event for event in events if event.get("output_index") == i]
        kinds = [event["type"].rpartition(".")[2] for event in own]
        assert kinds[0] == "added" and kinds[-2:] == ["done", "done"] and set(kinds[1:-2]) == {"delta"}
        assert own[0]["item"] == item | {"arguments": "", "status": "in_progress"}
        assert "".join(event["delta"] for event in own[1:-2]) == own[-2]["arguments"] == item["arguments"]
        assert own[-1]["item"] == item and item["status"] == "completed"


def test_a_call_that_is_cut_is_an_incomplete_item(scripted):
    text, more = ASKED["required"]
    events = response_events(scripted, text, max_output_tokens=50, **more)
    (item,) = events[-1]["response"]["output"]
    assert events[-1]["type"] == "response.incomplete"
    assert (item["status"], item["arguments"]) == ("incomplete", text[text.index('{"city') : 50])
    assert [event["type"] for event in events].count("response.output_item.done") == 1


def test_workers_ai_has_whole_calls_alone(scripted):
    body = {"messages": [user("I say:"), user(CALL)], "tools": [WEATHER], "tool_choice": "required", "stream": True}
    *events, last, _ = events_of(scripted.run(body, RUN).text)
    assert events == [{"response": "", "tool_calls": [{"name": "get_weather", "arguments": {"city": "Rome"}}]}]
    assert last["finish_reason"] == "tool_calls"


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_grammars_calls(tiny, choice):
    """Of random weights, so that the grammar alone makes them."""
    for seed in range(2):
        more = {"tools": [WEATHER, NOTE], "tool_choice": choice, "n": 2, "seed": seed, "max_tokens": 70}
        whole = ask(tiny, "x", temperature=2, **more).json()
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = ask(tiny, "x", temperature=2, **more, **options)
        for choice_ in whole["choices"]:
            calls, deltas, last, usage = streamed(response, choice_["index"])
            assert (usage["completion_tokens"], last["finish_reason"]) == (
                whole["usage"]["completion_tokens"],
                choice_["finish_reason"],
            )
            if choice_["finish_reason"] == "tool_calls":
                assert [call["function"] for call in calls] == [c["function"] for c in choice_["message"]["tool_calls"]]
            else:
                assert choice_["message"]["content"].endswith(calls[0]["function"]["arguments"])
            assert not any(delta.get("content") for delta in deltas)
