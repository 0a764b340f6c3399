"""Thoughts over HTTP: in fields of their own, streamed as whole, in every dialect."""

import json

import openai
import pytest

from llama.text.chat import ChatTemplate
from tests.server.helpers import NAME, RUN, TOKENIZER, events_of, running, scripted_llm, user

TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.reasoning_content %}{{- '<think>' + message.reasoning_content + '</think>' }}{% endif %}
    {{- message.content + '<|eot_id|>' }}
{%- endfor %}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n<think>\\n' }}"""
SAID = "a\n<b\n</think>\n\nYes</think>"
THOUGHT, CONTENT = "a\n<b", "Yes</think>"


@pytest.fixture(scope="module")
def thinking():
    """A server that says what the user says, and begins in a thought."""
    llm, engine = scripted_llm()
    llm.llm.inputs.template = ChatTemplate(TOKENIZER, {"default": TEMPLATE})
    with running(llm) as server:
        server.engine = engine
        yield server


@pytest.fixture(scope="module")
def client(thinking):
    with openai.OpenAI(base_url=f"{thinking.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def chat(client, text=SAID, **more):
    """The tools are told in the first user message, and the last one is what the scripted engine repeats."""
    return client.chat.completions.create(model=NAME, messages=[user("I say:"), user(text)], **more)


def test_openai_s_dialect(client):
    answer = chat(client)
    assert answer.choices[0].message.reasoning_content == THOUGHT and answer.choices[0].message.content == CONTENT
    assert answer.usage.completion_tokens_details.reasoning_tokens == len("a\n<b\n</think>")
    chunks = list(chat(client, stream=True, n=2, logprobs=True, stream_options={"include_usage": True}))
    choices = [choice for chunk in chunks for choice in chunk.choices]
    for index in range(2):
        deltas = [choice.delta for choice in choices if choice.index == index]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == THOUGHT
        assert "".join(delta.content or "" for delta in deltas) == CONTENT
        assert not any(delta.content and hasattr(delta, "reasoning_content") for delta in deltas)
        logprobs = [c.logprobs.content for c in choices if c.index == index and c.logprobs is not None]
        assert sum(map(len, logprobs)) == len(SAID) + 1  # of thoughts too
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == 2 * len("a\n<b\n</think>")


def test_an_answer_that_is_cut_in_its_thought(client):
    choice = chat(client, max_tokens=2).choices[0]
    assert (choice.message.reasoning_content, choice.message.content) == ("a", None)
    assert choice.finish_reason == "length"


def test_stop_strings_begin_behind_the_thought(client):
    message = chat(client, "stop b</think>a b c", stop=["b", "<"]).choices[0].message
    assert (message.reasoning_content, message.content) == ("stop b", "a ")


def test_history_comes_back_as_it_was_given(client, thinking):
    given = chat(client).choices[0].message.model_dump(exclude_none=True)
    client.chat.completions.create(model=NAME, messages=[user("x"), given, user("y</think>z")])
    assert f"<think>{THOUGHT}</think>{CONTENT}<|eot_id|>" in thinking.engine.asked[-1].text


def test_cloudflare_s_dialect(thinking):
    body = {"messages": [user(SAID)]}
    result = thinking.run(body).json()["result"]
    assert (result["reasoning_content"], result["response"]) == (THOUGHT, CONTENT)
    events = events_of(thinking.run(body | {"stream": True}).text)[:-1]
    assert "".join(event.get("reasoning_content", "") for event in events) == THOUGHT
    assert "".join(event["response"] for event in events) == CONTENT
    cut = thinking.run(body | {"max_tokens": 2}).json()["result"]
    assert (cut["reasoning_content"], cut["response"]) == ("a", "")
    history = [user("x"), {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}, user("y</think>z")]
    assert thinking.run({"messages": history}).json()["result"]["response"] == "z"
    assert "<think>hm</think>Yes<|eot_id|>" in thinking.engine.asked[-1].text
    raw = thinking.run({"prompt": "x</think>y", "raw": True}, RUN).json()["result"]
    assert "reasoning_content" not in raw


def test_responses(client, thinking):
    body = {"model": NAME, "input": [user(SAID)]}
    answer = client.responses.create(**body)
    thought, message = answer.output
    assert (thought.type, thought.summary, thought.content[0].text) == ("reasoning", [], THOUGHT)
    assert thought.content[0].type == "reasoning_text" and message.content[0].text == CONTENT
    assert answer.usage.output_tokens_details.reasoning_tokens == len("a\n<b\n</think>")
    with client.responses.stream(**body) as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert [event.sequence_number for event in events] == list(range(len(events)))
    about = [event for event in events if getattr(event, "output_index", None) == 0]
    kinds = [event.type.removeprefix("response.") for event in about]
    assert [kind for i, kind in enumerate(kinds) if kinds[i - 1] != kind] == [
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
    ]
    assert "".join(event.delta for event in about if event.type.endswith("text.delta")) == THOUGHT
    assert final.output[0].content[0].text == THOUGHT and final.output[1].content[0].text == CONTENT
    assert about[0].item.id == about[-1].item.id == final.output[0].id
    given = [item.model_dump(exclude={"parsed"}) for item in answer.output]
    client.responses.create(model=NAME, input=[user("x"), *given, user("y")])
    assert f"<think>{THOUGHT}</think>{CONTENT}<|eot_id|>" in thinking.engine.asked[-1].text


def test_a_response_that_is_cut_in_its_thought(client):
    answer = client.responses.create(model=NAME, input=[user(SAID)], max_output_tokens=2)
    [thought] = answer.output
    assert (answer.status, thought.status, thought.content[0].text) == ("incomplete", "incomplete", "a")


def test_a_call_is_looked_for_behind_the_thought(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    call = json.dumps({"name": "f", "parameters": {}})
    choice = chat(client, f"{call}</think>{call}", tools=[tool]).choices[0]
    assert choice.message.reasoning_content == call and len(choice.message.tool_calls) == 1
    deltas = [chunk.choices[0].delta for chunk in chat(client, f"{call}</think>{call}", tools=[tool], stream=True)]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == call
    assert sum(len(delta.tool_calls or ()) for delta in deltas) == 1


def test_the_ids_of_a_thought_are_told_too(client):
    whole = chat(client, extra_body={"return_token_ids": True}).choices[0].token_ids
    parts = chat(client, stream=True, extra_body={"return_token_ids": True})
    assert (
        [token for part in parts for token in getattr(part.choices[0], "token_ids", [])]
        == whole
        == [*SAID.encode(), whole[-1]]
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("t\n</think>\n\nHi {", "Hi {<|eot_id|>"),
        ("</think>h", "h<|eot_id|>"),
        ('t</think>Hi <function=f>{"a": 1}</function> t', "Hi  t<|eot_id|>"),
        ("never", ""),
    ],
)
def test_log_probabilities_of_responses_are_those_of_the_content(thinking, said, told):
    """However the pieces were merged."""
    tool = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    body = {"model": NAME, "input": [user("I say:"), user(said)], "tools": [tool]}
    body["include"] = ["message.output_text.logprobs"]
    for _ in range(4):
        output = thinking.client.post("/v1/responses", json=body).json()["output"]
        parts = [part for item in output if item["type"] == "message" for part in item["content"]]
        assert "".join(entry["token"] for part in parts for entry in part["logprobs"]) == told
