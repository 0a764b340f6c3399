"""Tools on OpenAI's chat route, with OpenAI's own client."""

import json

import pytest

from tests.server.helpers import user
from tests.server.test_chat import CALL, TIME, WEATHER, chat


def test_tool_calls(client, scripted):
    answer = chat(client, CALL, tools=[WEATHER])
    (call,) = answer.choices[0].message.tool_calls
    assert (call.type, call.function.name, json.loads(call.function.arguments)) == (
        "function",
        "get_weather",
        {"city": "Rome"},
    )
    assert call.id.startswith("call") and answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content is None
    two = f"{CALL}; {CALL}"
    assert len(chat(client, two, tools=[WEATHER]).choices[0].message.tool_calls) == 2
    assert len(chat(client, two, tools=[WEATHER], parallel_tool_calls=False).choices[0].message.tool_calls) == 1
    history = [
        user("x"),
        answer.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
    ]
    assert chat(client, messages=history).choices[0].message.content == "x"
    assert "ipython<|end_header_id|>\n\nsunny<|eot_id|>" in scripted.engine.asked[-1].text
    assert '"name": "get_weather"' in scripted.engine.asked[-1].text


def test_streamed_tool_calls(client):
    deltas = [part.choices[0] for part in chat(client, f"{CALL}\n{CALL}", tools=[WEATHER], stream=True)]
    calls = [call for choice in deltas for call in choice.delta.tool_calls or ()]
    assert [(call.index, call.function.name) for call in calls] == [(0, "get_weather"), (1, "get_weather")]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Rome"}] * 2
    assert not "".join(choice.delta.content or "" for choice in deltas).strip()
    assert deltas[-1].finish_reason == "tool_calls"


def test_tool_choice_none_shows_no_tools(client, scripted):
    answer = chat(client, CALL, tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.content == CALL and answer.choices[0].message.tool_calls is None
    assert "Weather of a city" not in scripted.engine.asked[-1].text


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_calls_that_must_be_made(tiny_client, choice):
    """A model of random weights makes them, because it can say nothing else."""
    tools = [WEATHER] if choice == "required" else [TIME, WEATHER]
    for seed in range(3):
        answer = chat(tiny_client, "x", tools=tools, tool_choice=choice, seed=seed, max_tokens=100)
        (call,) = answer.choices[0].message.tool_calls
        assert call.function.name == "get_weather"
        assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_call_that_may_be_cut_is_looked_at_again(client):
    """What contradicts the tool's schema is no call, where a grammar alone does not see to it: beside stop strings."""
    wrong, asked = CALL.replace("Rome", "Oslo"), {"tools": [WEATHER], "tool_choice": "required", "stop": ["<end>"]}
    message = chat(client, wrong, **asked).choices[0].message
    assert (message.content, message.tool_calls) == (wrong, None)
    assert len(chat(client, CALL, **asked).choices[0].message.tool_calls) == 1
