"""vLLM's fields for ids beside texts, scores of a prompt, a part of the prefix cache of one's own, priorities."""

import pytest

from tests.server.helpers import NAME, VOCAB_SIZE, user
from tests.server.test_chat import CALL, WEATHER, chat
from tests.server.test_completions import complete

IDS = {"return_token_ids": True}
TEXTS = ["Grüße an alle", "one STOP two", f"now {CALL} done", "empty"]


def joined(parts):
    """index -> all ids of a stream's chunks."""
    ids = {}
    for part in parts:
        for choice in part.choices:
            ids.setdefault(choice.index, []).extend(getattr(choice, "token_ids", []))
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_has_the_ids_of_the_whole_answer(client, scripted, text):
    asked = {"tools": [WEATHER], "stop": "STOP", "n": 2, "extra_body": IDS}
    answer = chat(client, text, **asked)
    assert answer.prompt_token_ids == scripted.engine.asked[-1].prompt
    whole = {choice.index: choice.token_ids for choice in answer.choices}
    assert sum(map(len, whole.values())) == answer.usage.completion_tokens
    first, *others = chat(client, text, stream=True, **asked)
    assert first.prompt_token_ids == answer.prompt_token_ids
    assert not any(hasattr(part, "prompt_token_ids") for part in others)
    assert joined([first, *others]) == whole


def test_ids_of_several_prompts(client):
    asked = {"n": 2, "echo": True, "extra_body": IDS}
    answer = complete(client, ["ab", "c"], **asked)
    assert [choice.prompt_token_ids for choice in answer.choices] == [[97, 98], [97, 98], [99], [99]]
    assert [choice.token_ids[:-1] for choice in answer.choices] == [[97, 98], [97, 98], [99], [99]]
    parts = [*complete(client, ["ab", "c"], stream=True, **asked)]
    assert joined(parts) == {choice.index: choice.token_ids for choice in answer.choices}
    told = [(c.index, c.prompt_token_ids) for part in parts for c in part.choices if hasattr(c, "prompt_token_ids")]
    assert sorted(told) == [(0, [97, 98]), (1, [97, 98]), (2, [99]), (3, [99])]


def test_no_ids_unless_asked(client):
    assert not hasattr(chat(client), "prompt_token_ids") and not hasattr(chat(client).choices[0], "token_ids")
    for extra in ({}, {"return_token_ids": False}):
        choice = complete(client, "ab", extra_body=extra).choices[0]
        assert not hasattr(choice, "token_ids") and not hasattr(choice, "prompt_token_ids")


def test_no_ids_of_an_answer_that_nobody_sees(client):
    choice = complete(client, "ab", echo=True, max_tokens=0, extra_body=IDS).choices[0]
    assert (choice.text, choice.prompt_token_ids, choice.token_ids) == ("ab", [97, 98], [])


def test_tokens_named_by_their_ids(tiny_client):
    asked = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3, "temperature": 0}
    answer = chat(tiny_client, "x", extra_body=IDS | {"return_tokens_as_token_ids": True}, **asked)
    plain, choice = chat(tiny_client, "x", **asked).choices[0], answer.choices[0]
    assert [entry.token for entry in choice.logprobs.content] == [f"token_id:{token}" for token in choice.token_ids]
    assert [entry.top_logprobs[0].token for entry in choice.logprobs.content] == [
        f"token_id:{token}" for token in choice.token_ids
    ]
    assert [entry.bytes for entry in choice.logprobs.content] == [entry.bytes for entry in plain.logprobs.content]
    scored = complete(
        tiny_client, [97, 98], echo=True, logprobs=0, max_tokens=0, extra_body={"return_tokens_as_token_ids": True}
    )
    assert scored.choices[0].logprobs.tokens == ["token_id:97", "token_id:98"]
    assert [*scored.choices[0].logprobs.top_logprobs[1]] == ["token_id:98"]


def test_scores_of_a_prompt(tiny_client):
    prompt = [97, 98, 99]
    echoed = complete(tiny_client, prompt, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs
    for more in ({}, {"echo": True, "logprobs": 0}, {"echo": True, "logprobs": 3}):
        (choice,) = complete(tiny_client, prompt, max_tokens=1, extra_body={"prompt_logprobs": 2}, **more).choices
        first, *others = choice.prompt_logprobs
        assert first is None and len(others) == 2
        for token, entries, value in zip(prompt[1:], others, echoed.token_logprobs[1:], strict=True):
            own = entries[str(token)]
            assert own["logprob"] == pytest.approx(value, rel=1e-9) and own["decoded_token"] == chr(token)
            ranks = sorted(entry["rank"] for entry in entries.values())
            assert ranks == sorted({1, 2, own["rank"]})
    (entries,) = complete(tiny_client, [97, 98], extra_body={"prompt_logprobs": 0}).choices[0].prompt_logprobs[1:]
    assert [*entries] == ["98"]


def test_scores_of_a_conversation(tiny_client):
    answer = chat(tiny_client, "x", max_tokens=1, extra_body=IDS | {"prompt_logprobs": 1})
    ids, (first, *others) = answer.prompt_token_ids, answer.prompt_logprobs
    assert first is None and len(others) == len(ids) - 1
    echoed = complete(tiny_client, ids, echo=True, logprobs=0, max_tokens=0).choices[0].logprobs.token_logprobs
    told = [entries[str(token)]["logprob"] for token, entries in zip(ids[1:], others, strict=True)]
    assert told == pytest.approx(echoed[1:], rel=1e-9)
    assert not hasattr(chat(tiny_client, "x", max_tokens=1), "prompt_logprobs")


ROUTES = {
    "/v1/chat/completions": {"messages": [user("x")]},
    "/v1/completions": {"prompt": "x"},
    "/v1/responses": {"input": "x"},
}
NO_RESPONSES = [*ROUTES][:2]


@pytest.mark.parametrize("route", NO_RESPONSES)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prompt_logprobs": 21}, "prompt_logprobs must be an integer from 0 to 20 (max_logprobs), got 21"),
        ({"prompt_logprobs": -2}, "'/prompt_logprobs' must be >= -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs must be an integer from 0 to 20 (max_logprobs), got -1"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs needs stream=false: a stream has no place for them"),
        ({"return_token_ids": 1}, "Type mismatch of '/return_token_ids', 'boolean' not in 'number','integer'"),
        ({"cache_salt": ""}, "cache_salt must be a text that is not empty, or None, got ''"),
        ({"priority": -1}, "priority must be 0 where scheduling_policy is fcfs, got -1"),
        ({"cache_salt": 5}, "Type mismatch of '/cache_salt', 'string' not in 'number','integer'"),
    ],
)
def test_refusals(tiny, route, given, message):
    response = tiny.client.post(route, json={"model": NAME, "max_tokens": 1, **ROUTES[route], **given})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["message"]) == (400, next(iter(given)), message)


@pytest.mark.parametrize("route", ROUTES)
def test_a_salt_is_another_cache(tiny, route):
    """What one tenant has asked, another one cannot find out by the time that an answer takes."""
    text = f"a prompt of {route} that is longer than a few blocks of the cache of prefixes"
    body = {"model": NAME, "temperature": 0}
    body |= {"input": text} if "responses" in route else {"prompt": text} if "chat" not in route else {}
    body |= {"messages": [user(text)]} if "chat" in route else {}
    body |= {"max_output_tokens" if "responses" in route else "max_tokens": 1}

    def cached(**more):
        usage = tiny.client.post(route, json=body | more).json()["usage"]
        return (usage.get("prompt_tokens_details") or usage["input_tokens_details"])["cached_tokens"]

    whole = cached() * 0 + cached()
    assert whole > 0
    for salt in (f"{route} a", f"{route} b"):
        assert cached(cache_salt=salt) == 0
        assert cached(cache_salt=salt) == whole
    assert cached(cache_salt=None) == cached() == whole


def test_all_ids_are_of_the_vocabulary(tiny_client):
    answer = chat(tiny_client, "x", max_tokens=5, extra_body=IDS)
    ids = [*answer.prompt_token_ids, *answer.choices[0].token_ids]
    assert all(type(token) is int and 0 <= token < VOCAB_SIZE for token in ids)
