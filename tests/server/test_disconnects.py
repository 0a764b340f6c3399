"""A client that goes away, in every state its request can be in: nothing of it runs, waits or holds a block after that.

A real tiny engine whose steps are taken one by one, and sockets that are cut.
"""

import random
import socket
import threading
import time

import pytest

from tests.server.helpers import NAME, PATIENCE, RUN, begin, begin_slowly, real_llm, running, until, user

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
TEXT = "x" * 600
BUDGET = 16  # tokens of a step
# Seeded: Cloudflare's dialect cannot forbid the model to end.
BODIES = {
    RUN: {"prompt": TEXT, "max_tokens": 1000, "seed": 1},
    CHAT: {"messages": [user(TEXT)], "max_tokens": 1000, "ignore_eos": True, "n": 3},
    COMPLETIONS: {"prompt": [TEXT, TEXT[:-1]], "max_tokens": 1000, "ignore_eos": True, "n": 2},
}
EVERY_WAY = [pytest.param(path, stream, id=f"{path[4:7]}-{stream}") for path in BODIES for stream in (True, False)]


class Turns:
    """The engine's steps, of which each waits for a turn while they are counted."""

    def __init__(self, engine) -> None:
        self.counted = self.slowly = False
        self._left = threading.Semaphore(0)
        self._step, engine.step = engine.step, self._take

    def _take(self):
        if self.slowly:
            time.sleep(0.002)
        if self.counted:
            assert self._left.acquire(timeout=PATIENCE)
        return self._step()

    def give(self, count: int = 1) -> None:
        for _ in range(count):
            self._left.release()

    def run_free(self) -> None:
        self.counted = False
        self.give()


@pytest.fixture
def server():
    """One sequence at a time, few tokens a step."""
    llm = real_llm(max_num_seqs=1, max_num_batched_tokens=BUDGET)
    with running(llm) as made:
        made.turns = Turns(llm.llm.engine)
        yield made
        made.turns.run_free()


def body_of(path: str, stream: bool) -> dict:
    return BODIES[path] | {"stream": stream}


def cut(server, connection) -> None:
    """Close the client's socket and wait until the server has let go of the request; the engine may be in a step."""
    in_flight = server.service.num_in_flight
    connection.close()
    until(lambda: server.service.num_in_flight == in_flight - 1)


def assert_nothing_left(server) -> None:
    llm, metrics = server.llm, server.llm.metrics
    until(lambda: llm.num_requests == 0)
    assert llm.num_waiting_tokens == 0
    until(lambda: not llm.llm.engine.has_unfinished)
    assert (metrics().num_running, metrics().num_waiting, metrics().num_used_blocks) == (0, 0, 0)
    llm.llm.engine.check()
    assert llm._preparation.num_pending == 0
    assert server.run({"prompt": "next", "max_tokens": 1}).status_code == 200


def step_until(server, condition) -> None:
    """Turns, one at a time, each taken before the next is given."""
    while not condition():
        before = server.llm.metrics().num_steps
        server.turns.give()
        until(lambda before=before: server.llm.metrics().num_steps > before)


@pytest.mark.parametrize(("path", "stream"), EVERY_WAY)
def test_while_the_prompt_is_computed(server, path, stream):
    server.turns.counted = True
    connection = begin(server, body_of(path, stream), path)
    until(lambda: server.llm.metrics().num_waiting)
    step_until(server, lambda: server.llm.metrics().num_used_blocks >= 5)
    cut(server, connection)
    server.turns.give()  # for the step that had begun
    until(lambda: not server.llm.llm.engine.has_unfinished)
    assert server.llm.metrics().num_generated_tokens == 0
    server.turns.run_free()
    assert_nothing_left(server)


@pytest.mark.parametrize(("path", "stream"), EVERY_WAY)
def test_while_it_is_answered(server, path, stream):
    server.turns.counted = True
    connection = begin(server, body_of(path, stream), path)
    until(lambda: server.llm.metrics().num_waiting)
    step_until(server, lambda: server.llm.metrics().num_generated_tokens >= 3)
    if stream:
        assert connection.recv(10)
    cut(server, connection)
    server.turns.give()
    until(lambda: not server.llm.llm.engine.has_unfinished)
    assert server.llm.metrics().num_generated_tokens < 10
    server.turns.run_free()
    assert_nothing_left(server)


@pytest.mark.parametrize(("path", "stream"), EVERY_WAY)
def test_while_it_waits_behind_another(server, path, stream):
    server.turns.counted = True
    first = begin(server, BODIES[RUN], RUN)
    until(lambda: server.llm.metrics().num_waiting)
    step_until(server, lambda: server.llm.metrics().num_running)
    waiting = begin(server, body_of(path, stream), path)
    until(lambda: server.llm.num_requests == 2)
    step_until(server, lambda: server.llm.metrics().num_waiting)
    cut(server, waiting)
    server.turns.give()
    until(lambda: server.llm.num_requests == 1)
    metrics = server.llm.metrics()
    assert (metrics.num_running, metrics.num_waiting) == (1, 0)
    assert metrics.num_used_blocks <= metrics.num_steps + 1  # a block each step, of the first one alone
    cut(server, first)
    server.turns.run_free()
    assert_nothing_left(server)


def test_while_it_has_been_put_back_for_want_of_memory():
    llm = real_llm(num_blocks=16, max_num_batched_tokens=64, enable_prefix_caching=False)
    with running(llm) as server:
        server.turns = Turns(llm.llm.engine)
        server.turns.counted = True
        body = {"messages": [user("y" * 80)], "ignore_eos": True, "max_tokens": 140}
        connections = [begin(server, body | {"stream": stream}, CHAT) for stream in (True, False)]
        until(lambda: llm.num_requests == 2 and llm.metrics().num_waiting)
        step_until(server, lambda: llm.metrics().num_preemptions and llm.metrics().num_waiting)
        for connection in connections:
            cut(server, connection)
        server.turns.run_free()
        assert_nothing_left(server)


def blocking(monkeypatch, owner, name: str) -> threading.Event:
    """Calls of the method wait for the event. Whatever waits at the end of a test goes on."""
    released, really = threading.Event(), getattr(owner, name)

    def wait(*arguments, **names):
        assert released.wait(PATIENCE)
        return really(*arguments, **names)

    monkeypatch.setattr(owner, name, wait)
    return released


def assert_gone_before(server, connections, released) -> None:
    """All are cut while what they wait for still goes on; the engine never hears of them."""
    try:
        for connection in connections:
            cut(server, connection)
        assert server.llm.num_requests == 0
        assert server.llm._preparation.num_pending == 0
    finally:
        released.set()
    assert server.llm.metrics().num_prompt_tokens == 0
    assert_nothing_left(server)


@pytest.mark.parametrize(("path", "stream"), EVERY_WAY)
def test_while_the_prompt_is_rendered_or_encoded(server, path, stream, monkeypatch):
    """More of them than there are threads, so that some wait for one."""
    inputs = server.llm.llm.inputs
    name = "_encode" if path == COMPLETIONS else "chat_request"
    released = blocking(monkeypatch, inputs, name)
    body = body_of(path, stream)
    if path == COMPLETIONS:
        body["prompt"] = "x" * 2000  # shorter ones are encoded at once
    connections = [begin(server, body, path) for _ in range(10)]
    until(lambda: server.llm.num_requests == 10)
    until(lambda: server.llm._preparation.num_pending == 10)
    assert_gone_before(server, connections, released)


# Cloudflare's dialect has no streams of JSON.
GRAMMARS = [pytest.param(RUN, False)] + [pytest.param(path, s) for path in (CHAT, COMPLETIONS) for s in (True, False)]


@pytest.mark.parametrize(("path", "stream"), GRAMMARS)
def test_while_a_grammar_is_compiled(server, path, stream, monkeypatch):
    released = blocking(monkeypatch, server.llm.llm.inputs._grammars, "compile")
    body = body_of(path, stream) | {"response_format": {"type": "json_object"}}
    connections = [begin(server, body, path) for _ in range(5)]
    until(lambda: server.llm.num_requests == 5)
    until(lambda: server.llm._preparation.num_pending == 5)
    assert_gone_before(server, connections, released)


def test_while_the_grammar_of_a_call_is_compiled(server, monkeypatch):
    released = blocking(monkeypatch, server.llm.llm.inputs._grammars, "compile_tool_choice")
    tool = {"type": "function", "function": {"name": "f"}}
    body = body_of(CHAT, True) | {"tools": [tool], "tool_choice": "required"}
    connections = [begin(server, body, CHAT) for _ in range(3)]
    until(lambda: server.llm.num_requests == 3)
    until(lambda: server.llm._preparation.num_pending == 3)
    assert_gone_before(server, connections, released)


@pytest.mark.parametrize("path", BODIES)
def test_while_the_body_is_on_its_way(server, path):
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    connection.sendall(head.encode() + b'{"prompt": "x')
    until(lambda: server.service.num_in_flight == 1)
    cut(server, connection)
    assert_nothing_left(server)


def is_stuck(server) -> bool:
    return any(c.flow.write_paused for c in list(server.server.server_state.connections))


@pytest.mark.parametrize("path", BODIES)
def test_while_pieces_wait_for_a_reader(path):
    with running(real_llm(max_num_seqs=4)) as server:
        turns = Turns(server.llm.llm.engine)
        turns.slowly = True
        connection = begin_slowly(server, BODIES[path] | {"stream": True}, path)
        until(lambda: is_stuck(server))
        assert server.llm.metrics().num_running
        cut(server, connection)
        turns.slowly = False
        assert_nothing_left(server)
        assert server.llm.metrics().num_generated_tokens < 4 * 1000


def test_when_all_has_been_said_and_waits_for_a_reader():
    with running(real_llm(max_num_seqs=4)) as server:
        body = BODIES[CHAT] | {"logprobs": True, "top_logprobs": 20, "max_tokens": 100, "stream": True}
        connection = begin_slowly(server, body, CHAT)
        until(lambda: is_stuck(server) and not server.llm.num_requests)
        assert server.service.num_in_flight == 1
        cut(server, connection)
        assert_nothing_left(server)


def storm(server, count: int, seed: int) -> None:
    """Requests of every kind, cut at random moments."""
    chance = random.Random(seed)
    for _ in range(count):
        path = chance.choice([*BODIES])
        body = body_of(path, chance.random() < 0.5)
        body |= {"max_tokens": chance.choice([1, 20, 1000])}
        if chance.random() < 0.3 and not (path == RUN and body["stream"]):
            body["response_format"] = {"type": "json_object"}
        connection = begin(server, body, path)
        if chance.random() < 0.5:
            time.sleep(chance.choice([0.0, 0.002, 0.01, 0.03]))
        if chance.random() < 0.5:  # a reset instead of an end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    until(lambda: server.service.num_in_flight == 0)


def test_at_random_moments():
    with running(real_llm(num_blocks=128, max_num_batched_tokens=BUDGET)) as server:
        storm(server, 150, seed=1)
        assert_nothing_left(server)
        assert server.run({"prompt": "x", "max_tokens": 2}, path=f"/ai/run/{NAME}").status_code == 200


@pytest.mark.slow
def test_at_many_random_moments():
    with running(real_llm(num_blocks=128, max_num_batched_tokens=BUDGET)) as server:
        for seed in range(20):
            storm(server, 250, seed=seed)
            assert_nothing_left(server)
