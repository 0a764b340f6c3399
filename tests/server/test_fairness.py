"""What strangers send holds up their own kind alone: other requests, and those who watch the server, do not wait."""

import asyncio
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from llama.async_llm.async_llm import AsyncLLM
from llama.server.bodies import parse_body
from llama.server.cloudflare.schema import RunRequest
from llama.server.errors import ApiError
from llama.server.openai.schema import ChatRequest
from llama.server.run import read_vocabulary
from llama.text.sandbox import LOW_PRIORITY, Worker, WorkerError
from tests.model.models import tiny_model
from tests.server.helpers import PATIENCE, RUN, begin, read_all, real_llm, running, scripted_llm, until, user

CHAT = "/v1/chat/completions"
FINE = {"type": "json_schema", "json_schema": {"schema": {"enum": [1, 2]}}}


def schema_format(schema) -> dict:
    return {"type": "json_schema", "json_schema": {"schema": schema}}


@pytest.fixture
def server():
    with running(real_llm(num_blocks=512, max_num_seqs=4)) as made:
        yield made


def assert_others_are_served(server) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models"):
        assert server.client.get(path).status_code == 200
    for path, body in (
        (RUN, {"prompt": "x", "max_tokens": 1}),
        (RUN, {"prompt": "x", "max_tokens": 1, "raw": True, "stream": True}),
        (CHAT, {"messages": [user("x")], "max_tokens": 1}),
        ("/v1/completions", {"prompt": "x" * 2000, "max_tokens": 1}),
    ):
        assert server.run(body, path=path).status_code == 200


def test_grammars_hold_up_neither_others_nor_those_that_are_known(server, monkeypatch):
    compiler = server.llm.llm.inputs._grammars
    asked = {"messages": [user("x")], "max_tokens": 40, "response_format": FINE}
    assert server.run(asked, path=CHAT).status_code == 200
    released, compile_it = threading.Event(), compiler.compile

    def slowly(constraint, *rest):
        if "title" in json.dumps(constraint):
            assert released.wait(PATIENCE)
        return compile_it(constraint, *rest)

    monkeypatch.setattr(compiler, "compile", slowly)
    hostile = [
        begin(server, asked | {"response_format": schema_format({"title": f"{i}", "enum": [1]})}, CHAT)
        for i in range(40)
    ]
    until(lambda: server.llm._preparation.num_pending == 40)
    assert_others_are_served(server)
    assert server.run(asked, path=CHAT).status_code == 200
    until(lambda: server.llm.num_requests == 40)  # an answer may be read before its permit has been released
    released.set()
    assert all(read_all(connection).startswith("HTTP/1.1 200") for connection in hostile)


def test_schemas_that_take_for_ever(server, monkeypatch):
    """The same with real ones: each takes all the time it may have, and all are refused."""
    monkeypatch.setattr("llama.text.sandbox.worker._PATIENCE", 1000)  # the machine may be busy with other tests
    server.llm.llm.inputs._grammars._worker._deadline_seconds = 1.0
    schemas = [{"type": "integer", "multipleOf": 7919 * prime} for prime in (7907, 7901, 7883, 7879)]
    hostile = [
        begin(server, {"messages": [user("x")], "response_format": schema_format(schema)}, CHAT) for schema in schemas
    ]
    until(lambda: server.llm.num_requests == 4)
    assert_others_are_served(server)
    assert server.llm.num_requests >= 2
    for connection in hostile:
        answer = read_all(connection)
        assert answer.startswith("HTTP/1.1 400") and "response_format.json_schema: it " in answer


def test_long_prompts_hold_up_no_short_ones(server, monkeypatch):
    inputs, released = server.llm.llm.inputs, threading.Event()

    def slowly(messages, *arguments, really=inputs.chat_request, **names):
        if len(str(messages)) > 1 << 16:
            assert released.wait(PATIENCE)
        return really(messages, *arguments, **names)

    monkeypatch.setattr(inputs, "chat_request", slowly)
    hostile = [begin(server, {"messages": [user("x " * 50_000)], "max_tokens": 1}, CHAT) for _ in range(20)]
    until(lambda: server.llm._preparation.num_pending == 20)
    assert_others_are_served(server)
    until(lambda: server.llm.num_requests == 20)
    released.set()
    assert all("context_length_exceeded" in read_all(connection) for connection in hostile)


def test_large_renderings_have_a_process_of_their_own():
    slow = "{% for a in range(n) %}{% for b in range(99999) %}{% endfor %}{% endfor %}done"
    setup = {"templates": {"slow": slow}, "max_characters": 100}
    worker = Worker("llama.text.sandbox.chat_templates", setup, deadline_seconds=3.0)
    large = {"template": "slow", "variables": {"n": 99999, "x": "x" * 200_000}}
    with ThreadPoolExecutor(1) as pool:
        late = pool.submit(worker.ask, large)
        until(lambda: worker._for_large is not None and worker._for_large._lock.locked())
        assert worker.ask({"template": "slow", "variables": {"n": 0}}) == "done"
        assert not late.done()
        with pytest.raises(WorkerError, match="did not finish within 3 s"):
            late.result()
    assert worker.ask(large | {"variables": large["variables"] | {"n": 0}}) == "done"
    processes = [worker._process, worker._for_large._process]
    here = os.nice(0)  # 19 is the lowest priority there is
    assert [os.getpriority(os.PRIO_PROCESS, p.pid) for p in processes] == [here, min(here + LOW_PRIORITY, 19)]
    # In one session, where niceness counts, but out of reach of the terminal's interrupts.
    assert {os.getsid(p.pid) for p in processes} == {os.getsid(0)}
    assert not {os.getpgid(p.pid) for p in processes} & {os.getpgid(0)}
    worker.close()
    assert all(process.poll() is not None for process in processes)


def test_a_drain_does_not_wait_for_what_is_being_prepared(server, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(server.llm.llm.inputs, "chat_request", lambda *_, **__: released.wait(PATIENCE))
    object.__setattr__(server.service.config, "shutdown_timeout", 0.1)
    try:
        connections = [begin(server, {"messages": [user("x")], "stream": i % 2 == 0}, CHAT) for i in range(8)]
        until(lambda: server.llm.num_requests == 8)
        server.stop()
        for connection in connections:
            answer = read_all(connection)
            assert answer.startswith("HTTP/1.1 503") and "shutting down" in answer
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive()
    finally:
        released.set()


def test_bodies_that_are_too_large_together():
    """Five may hold what they do at once; the sixth hears so, and room comes back with the answers."""
    llm, engine = scripted_llm()
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE)
    with running(llm, max_body_bytes=100_000, max_bodies_bytes=500_000) as server:
        body = {"messages": [user("x")], "user": "x" * 90_000}
        connections = [begin(server, body, CHAT) for _ in range(5)]
        until(lambda: llm.num_requests == 5)
        refused = server.run(body, path=CHAT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"] == "1"
        assert server.run({"prompt": "x" * 90_000}).json()["errors"][0]["code"] == 3040
        small = begin(server, {"prompt": "x"})
        until(lambda: llm.num_requests == 6)
        connections.pop().close()  # who leaves makes room
        until(lambda: llm.num_requests == 5 and server.service.num_in_flight == 5)
        connections.append(begin(server, body, CHAT))
        until(lambda: llm.num_requests == 6)
        turn.set()
        assert all(read_all(connection).startswith("HTTP/1.1 200") for connection in [*connections, small])
        until(lambda: server.service.num_in_flight == 0)
        assert server.service.num_body_bytes == 0


def test_the_vocabulary_is_read_before_anyone_asks():
    llm = real_llm()
    read_vocabulary(llm)
    assert "_vocabulary" in vars(llm.llm.inputs._grammars)
    without = AsyncLLM(tiny_model(), num_blocks=4)
    read_vocabulary(without)  # without a tokenizer there is none, and that is no failure
    for made in (llm, without):
        asyncio.run(made.close())


# ---- bodies that would keep the interpreter to themselves


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('{"messages": [' + "[]," * (1 << 17) + "1]}", "the body has more than 131072 arrays, objects and fields"),
        ('{"metadata": {' + '"a":1,' * (1 << 17) + '"b":1}}', "the body has more than 131072 arrays, objects and"),
        (json.dumps({f"key{i}": 1 for i in range(256)}), "the body has 257 fields, more than 256"),
        (json.dumps({"logit_bias": {str(i): "x" for i in range(1025)}}), "Length of '/logit_bias' must be <= 1024"),
        (json.dumps({"modalities": ["x"] * 2}), "Length of '/modalities' must be <= 1"),
    ],
)
def test_bodies_of_too_many_parts(body, message):
    body = body.replace("{", '{"messages": [{"role": "user", "content": "x"}], ', 1) if "messages" not in body else body
    with pytest.raises(ApiError) as refused:
        parse_body(body.encode(), ChatRequest)
    assert refused.value.message_openai.startswith(message)
    if "fields" in message:
        with pytest.raises(ApiError):
            parse_body(body.encode(), RunRequest)


def test_a_body_that_is_large_for_a_reason():
    messages = [user([{"type": "text", "text": "x" * 400}]) for _ in range(4096)]
    assert len(parse_body(json.dumps({"messages": messages}).encode(), ChatRequest).messages) == 4096
    text = "[1, 2], {3}, " * 9000
    assert parse_body(json.dumps({"prompt": text}).encode(), RunRequest).prompt == text


def test_large_bodies_are_read_one_at_a_time(server, monkeypatch):
    """While one is parsed the others wait, and nothing else does."""
    from llama.server import bodies

    at_once, most, released = [], [], threading.Event()

    def parse(body, schema, really=parse_body):
        if len(body) > 1 << 16:
            at_once.append(1)
            most.append(len(at_once))
            assert released.wait(PATIENCE)
            at_once.pop()
        return really(body, schema)

    monkeypatch.setattr(bodies, "parse_body", parse)
    connections = [begin(server, {"messages": [user("x" * 100_000)]}, CHAT) for _ in range(5)]
    until(lambda: server.service.num_in_flight == 5 and at_once)
    assert_others_are_served(server)
    released.set()
    assert all("context_length_exceeded" in read_all(connection) for connection in connections)
    assert set(most) == {1}
