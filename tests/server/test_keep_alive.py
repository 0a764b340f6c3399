"""Comments in a stream that says nothing for a while: off by default, harmless to OpenAI's client."""

import time

import openai
import pytest

from tests.server.helpers import NAME, RUN, begin, events_of, running, scripted_llm, until, user

BODIES = {
    RUN: {"prompt": "ab", "stream": True},
    "/v1/chat/completions": {"messages": [user("ab")], "stream": True},
    "/v1/completions": {"prompt": ["ab", "c"], "stream": True},
}


@pytest.fixture(scope="module")
def slow():
    llm, engine = scripted_llm()
    engine.before_step = lambda: time.sleep(0.2)
    with running(llm, keep_alive=0.05) as server:
        yield server, engine


@pytest.mark.parametrize("path", BODIES)
def test_a_silent_stream_gets_comments_where_they_are_asked_for(slow, path):
    server, _ = slow
    text = server.run(BODIES[path], path=path).text
    assert text.count(": keep-alive\n") >= 3 and ": keep-alive\n\n" not in text
    spoken = "".join(line for line in text.splitlines(keepends=True) if not line.startswith(":"))
    assert events_of(spoken)[-1] == "[DONE]"


def test_openai_s_client_reads_over_them(slow):
    server, _ = slow
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(model=NAME, messages=[user("ab")], stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ab"


def test_who_leaves_between_two_comments_is_noticed(slow):
    server, engine = slow
    with begin(server, {"prompt": "forever", "stream": True, "max_tokens": 999}, RUN) as connection:
        until(lambda: b": keep-alive" in connection.recv(65536))
    until(lambda: not engine.running)


def test_an_error_ends_the_stream(slow):
    server, _ = slow
    assert '"error"' in server.run({"messages": [user("fail")], "stream": True}, path="/v1/chat/completions").text


def test_by_default_a_silent_stream_is_silent(scripted):
    assert scripted.server.service.config.keep_alive is None
