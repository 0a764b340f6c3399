"""What generation_config.json says holds for what an OpenAI request does not name, and stands in no request's way."""

import pytest

from llama import SamplingParams
from tests.server.helpers import NAME, running, scripted_llm, user

ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/responses")


@pytest.fixture(scope="module")
def scripted():
    """A server whose engine says what the user says, and that engine."""
    llm, engine = scripted_llm()
    with running(llm) as server:
        yield server, engine


@pytest.fixture
def ask(scripted):
    """Asks a route of a checkpoint with these defaults -> (the text of the answer, the params that the engine got)."""
    server, engine = scripted

    def ask(route, text, defaults, **more):
        server.llm.llm.inputs.defaults = defaults
        said = {"prompt": text} if route == ROUTES[0] else {"messages": [user(text)]}
        said = {"input": text} if route == ROUTES[2] else said
        response = server.run({"model": NAME, **said, **more}, path=route)
        assert response.status_code == 200, response.text
        answer = response.json()
        if route == ROUTES[2]:
            return answer["output"][0]["content"][0]["text"], engine.asked[-1].params
        choice = answer["choices"][0]
        return choice["text"] if route == ROUTES[0] else choice["message"]["content"], engine.asked[-1].params

    return ask


@pytest.mark.parametrize("route", ROUTES)
def test_the_checkpoint_s_stop_strings_end_an_answer(ask, route):
    defaults = SamplingParams(stop=["two"])
    assert ask(route, "one two three", defaults)[0] == "one "
    if route != ROUTES[2]:  # there is no such field
        assert ask(route, "one two three", defaults, stop=None)[0] == "one "
        assert ask(route, "one two three", defaults, stop=" three")[0] == "one two"
        assert ask(route, "one two three", defaults, stop=[])[0] == "one two three"


@pytest.mark.parametrize("route", ROUTES)
def test_fewer_tokens_may_be_asked_for_than_the_checkpoint_wants_at_least(ask, route):
    defaults = SamplingParams(min_tokens=4)
    name = "max_output_tokens" if route == ROUTES[2] else "max_tokens"
    for most, least in ((2, 2), (9, 4)):
        _, params = ask(route, "one two three", defaults, **{name: most})
        assert (params.max_tokens, params.min_tokens) == (most, least)
    if route != ROUTES[2]:
        assert ask(route, "one two three", defaults, max_tokens=2, min_tokens=1)[1].min_tokens == 1


def test_a_prompt_is_scored_whatever_the_checkpoint_wants_at_least(ask):
    text, params = ask(ROUTES[0], "ab", SamplingParams(min_tokens=4), max_tokens=0, echo=True)
    assert (text, params.min_tokens) == ("ab", 1)


def test_a_min_tokens_above_max_tokens_that_the_request_names_is_refused(scripted):
    server, _ = scripted
    server.llm.llm.inputs.defaults = SamplingParams(min_tokens=4)
    error = server.run({"prompt": "ab", "max_tokens": 2, "min_tokens": 3}, path=ROUTES[0]).json()["error"]
    assert (error["message"], error["param"]) == ("min_tokens must be at most max_tokens (2), got 3", "min_tokens")
