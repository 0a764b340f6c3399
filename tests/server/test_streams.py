"""Seeds, options of streams, and what is counted where a client leaves. What is taken of other libraries' fields is
tested from docs/fields.md."""

import json
import re
import threading

import pytest

from tests.server.helpers import PATIENCE, RUN, begin, events_of, read_all, until, user

BODIES = {"/v1/chat/completions": {"messages": [user("x")]}, "/v1/completions": {"prompt": "x"}}


def asked(scripted, path, **more):
    body = BODIES.get(path, {"prompt": "x"})
    response = scripted.run({**body, **more}, path=path)
    return response, (scripted.engine.asked or [None])[-1]


def test_the_value_that_is_taken_is_told(scripted):
    response, _ = asked(scripted, "/v1/completions", use_beam_search=True)
    message = response.json()["error"]["message"]
    assert message == "'/use_beam_search' is not a parameter of this server, but for false"


@pytest.mark.parametrize("path", BODIES)
def test_no_chunk_comes_before_the_first_token(scripted, path, monkeypatch):
    """By the first one clients measure the time to it."""
    computed = threading.Event()
    monkeypatch.setattr(scripted.engine, "before_step", lambda: computed.wait(PATIENCE))
    with begin(scripted.server, {**BODIES[path], "stream": True, "n": 2}, path) as connection:
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += connection.recv(1)
        connection.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(PATIENCE)
        computed.set()
        assert "[DONE]" in read_all(connection)


@pytest.mark.parametrize("path", [*BODIES, "/v1/responses", RUN])
def test_an_event_is_one_line_whatever_a_reader_takes_for_its_end(scripted, path):
    said = "a\u2028b\u2029c\x85d"
    body = {"input": said} if path == "/v1/responses" else {"messages": [user(said)]}
    body = {"prompt": said} if path == "/v1/completions" else body
    response = scripted.run({**body, "stream": True}, path=path)
    lines = [line for line in response.content.decode().splitlines() if line]
    assert all(line.startswith(("data: ", "event: ")) for line in lines)
    told = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert all(end in json.dumps(told, ensure_ascii=False) for end in "\u2028\u2029\x85")


def test_bad_words_have_a_length(scripted):
    response, _ = asked(scripted, "/v1/completions", bad_words=["x", "y" * 257])
    assert response.json()["error"]["message"] == "Length of '/bad_words/1' must be <= 256"


def test_seeds_of_any_sign(scripted):
    for given, used in ((-1, None), (-2, 2**64 - 2), (2**64 - 1, 2**64 - 1), (0, 0)):
        response, request = asked(scripted, "/v1/completions", seed=given)
        assert response.status_code == 200 and request.params.seed == used
    for wrong in (2**64, -(2**63) - 1):
        assert asked(scripted, "/v1/completions", seed=wrong)[0].json()["error"]["param"] == "seed"
    assert asked(scripted, RUN, seed=-1)[0].status_code == 400, "Workers AI publishes 1 to 9999999999"


def test_a_seed_that_comes_back_gives_its_completion_again(tiny):
    def choices(**more):
        body = {"prompt": "x", "max_tokens": 8, "temperature": 1, "ignore_eos": True, **more}
        return tiny.run(body, path="/v1/completions").json()["choices"]

    for seed in (None, -7, 2**64 - 1, 5):
        for choice in choices(n=3, seed=seed):
            assert choice["seed"] < 2**53, "JavaScript holds it"
            (again,) = choices(seed=choice["seed"])
            assert (again["text"], again["seed"]) == (choice["text"], choice["seed"])


@pytest.mark.parametrize("path", BODIES)
def test_stream_options(scripted, path):
    def refused(**options):
        response, _ = asked(scripted, path, stream=True, stream_options=options)
        return response.json()["error"]

    wrong = [("include_usages", True), ("x", None), ("include_usage", 1)]
    for name, value in (*wrong, ("include_obfuscation", True), ("include_obfuscation", 0)):
        error = refused(**{name: value})
        assert error["param"] == "stream_options" and f"/stream_options/{name}" in error["message"]

    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    response, request = asked(scripted, path, stream=True, stream_options=options, max_tokens=1, n=2)
    *chunks, last, done = events_of(response.text)
    assert done == "[DONE]" and last["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == last["usage"]["completion_tokens"] == 2
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {len(request.prompt)}


def ends(server):
    """Completions that ended by their reason, and tokens of answers, as /metrics counts them."""
    text = server.client.get("/metrics").text
    counts = {m[1]: float(m[2]) for m in re.finditer(r'request_success_total\{finished_reason="(\w+)".*\} (\S+)', text)}
    return counts.get("abort", 0.0), float(re.search(r"request_generation_tokens_sum\{.*\} (\S+)", text)[1])


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [user("forever")], "stream": True, "n": 2}),
        ("/v1/completions", {"prompt": ["forever", "forever"], "max_tokens": 3000, "stream": True}),
        (RUN, {"prompt": "forever", "stream": True, "max_tokens": 3000}),
        (RUN, {"prompt": "forever", "max_tokens": 3000}),
    ],
)
def test_who_leaves_is_counted_as_aborted_with_the_tokens_so_far(scripted, caplog, path, body):
    server, engine = scripted.server, scripted.engine
    caplog.set_level("INFO", "llama.access")
    aborts, tokens = ends(server)
    num_completions = 1 if path == RUN else 2
    with begin(server, body, path) as connection:
        until(lambda: len(engine.running) == num_completions and engine.num_steps)
        if body.get("stream"):
            connection.recv(1)
        steps = engine.num_steps
        until(lambda: engine.num_steps > steps + 3)
    until(lambda: not engine.running and ends(server)[0] == aborts + num_completions)

    def told():  # asyncio may have logged too, that nobody reads any more
        accesses = [json.loads(record.message) for record in caplog.records if record.name == "llama.access"]
        return [access for access in accesses if access["path"] == path]

    until(told)
    [line] = told()
    assert line["finish_reasons"] == ["abort"] * num_completions
    assert line["completion_tokens"] == ends(server)[1] - tokens > 0
