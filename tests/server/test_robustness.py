"""Keys, limits, disconnects, the queue, draining, the watchdog, logs: what a server owes to those who run it."""

import asyncio
import gc
import gzip
import json
import logging
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

import pytest

from tests.server.helpers import (
    NAME,
    PATIENCE,
    RUN,
    begin,
    events_of,
    read_all,
    running,
    scripted_llm,
    until,
    user,
)

FOREVER = {"prompt": "forever", "max_tokens": 3000}


def test_health_readiness_version_metrics(scripted):
    client = scripted.server.client
    assert (client.get("/health").status_code, client.get("/ready").status_code) == (200, 200)
    for path in ("/health", "/ready", "/"):
        head = client.head(path)
        assert (head.status_code, head.content) == (200, b"")
    assert client.get("/version").json()["version"]
    scripted.run({"prompt": "Hello"})
    scripted.run({"prompt": "Hello", "temperature": 9})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    label = f'{{model_name="{NAME}"}}'
    assert float(lines[f"llama_num_requests_running{label}"]) == 0
    assert float(lines[f"llama_time_to_first_token_seconds_count{label}"]) > 0
    assert float(lines[f'llama_request_success_total{{finished_reason="stop",model_name="{NAME}"}}']) > 0
    assert float(lines[f'llama_http_errors_total{{code="5006",model_name="{NAME}",status="400"}}']) > 0
    names = {line.split("{")[0] for line in lines}
    for name in (
        "adapter_bytes",
        "grammar_bytes",
        "graph_bytes",
        "kv_cache_usage_perc",
        "num_requests_waiting",
        "prompt_tokens_total",
        "prefix_cache_hits_total",
    ):
        assert f"llama_{name}" in names
    for name in ("inter_token_latency_seconds", "e2e_request_latency_seconds", "request_generation_tokens"):
        assert f"llama_{name}_bucket" in names


def test_openapi_names_every_route_and_schema(scripted):
    described = scripted.server.client.get("/openapi.json").json()
    assert {"/ai/run/{model}", "/v1/chat/completions", "/v1/completions", "/v1/models"} <= described["paths"].keys()
    schema = described["paths"]["/ai/run/{model}"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert schema["$ref"].removeprefix("#/components/schemas/") in described["components"]["schemas"]


def test_request_ids(scripted):
    given = scripted.run({"prompt": "x"}, headers={"X-Request-Id": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    made = {scripted.run({"prompt": "x"}, headers={"X-Request-Id": "not\tlegal"}).headers["x-request-id"] for _ in "12"}
    assert len(made) == 2 and all(len(name) == 32 for name in made)


def test_keys():
    llm, _ = scripted_llm()
    with running(llm, api_keys=("first", "second")) as server:
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "Basic first"},
            {"Authorization": "first"},
        ):
            response = server.run({"prompt": "x"}, headers=headers)
            assert response.status_code == 401 and response.headers["www-authenticate"] == "Bearer"
            assert response.json()["errors"] == [{"message": "Authentication error", "code": 10000}]
            for path in ("/v1/models", "/metrics", "/openapi.json", "/version"):
                assert server.client.get(path, headers=headers).status_code == 401
        assert server.client.get("/v1/models").json()["error"]["code"] == "invalid_api_key"
        for key in ("first", "second"):
            assert server.run({"prompt": "x"}, headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert server.client.get("/health").status_code == server.client.get("/ready").status_code == 200


def test_the_access_log_has_no_texts(scripted, caplog):
    secret = "a very private text"
    with caplog.at_level(logging.INFO):
        scripted.run({"prompt": secret}, headers={"X-Request-Id": "logged"})
        scripted.run({"prompt": "fail", "stream": True})
        scripted.run({"messages": [user(secret), {"role": secret, "content": secret}]})
        until(lambda: len([r for r in caplog.records if r.name == "llama.access"]) >= 3)
    assert secret not in caplog.text
    lines = [json.loads(record.message) for record in caplog.records if record.name == "llama.access"]
    (line,) = [line for line in lines if line["request_id"] == "logged"]
    assert (line["method"], line["path"], line["status"]) == ("POST", RUN, 200)
    assert line["completion_tokens"] == len(secret) + 1 and line["finish_reasons"] == ["stop"]


@pytest.mark.parametrize("body", [FOREVER, FOREVER | {"stream": True}])
def test_a_client_that_leaves_ends_its_request(scripted, body):
    scripted.engine.before_step = lambda: time.sleep(0.001)
    try:
        connection = begin(scripted.server, body)
        until(lambda: scripted.engine.running)
        if body.get("stream"):
            assert connection.recv(10)
        connection.close()
        until(lambda: not scripted.engine.running and scripted.server.llm.num_requests == 0)
    finally:
        scripted.engine.before_step = lambda: None
    assert scripted.run({"prompt": "next"}).json()["result"]["response"] == "next"


def test_a_full_queue_answers_at_once():
    llm, engine = scripted_llm(max_waiting_requests=0)
    engine.before_step = lambda: time.sleep(0.001)
    with running(llm) as server:
        connections = [begin(server, FOREVER) for _ in range(8)]
        until(lambda: len(engine.running) == 8)
        response = server.run({"prompt": "x"})
        assert response.status_code == 429 and int(response.headers["retry-after"]) >= 1
        assert response.json()["errors"][0]["code"] == 3040
        response = server.run({"messages": [user("x")]}, path="/v1/chat/completions")
        assert (response.status_code, response.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        for connection in connections:
            connection.close()
        until(lambda: llm.num_requests == 0)
        assert server.run({"prompt": "x"}).status_code == 200


def test_a_reader_that_stops_reading_is_given_up():
    llm, engine = scripted_llm(slow_reader_timeout=0.3)
    engine.before_step = lambda: time.sleep(0.0002)
    with running(llm, send_timeout=0.3) as server:
        body = {"messages": [user("x" * 900)], "stream": True, "n": 64, "logprobs": True, "max_tokens": 3000}
        connection = begin(server, body | {"ignore_eos": False}, "/v1/chat/completions")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        until(lambda: engine.running)
        until(lambda: llm.num_requests == 0)
        assert server.run({"prompt": "x"}).status_code == 200
        connection.close()


def test_a_slow_body_and_a_large_header(scripted):
    llm, _ = scripted_llm()
    with running(llm, body_timeout=0.2) as server:
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        connection.sendall(f"POST {RUN} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc".encode())
        answer = b""
        while b"3007" not in answer:
            part = connection.recv(65536)
            assert part
            answer += part
        assert b" 408 " in answer.splitlines()[0]
        connection.close()
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Large: " + b"a" * 100_000 + b"\r\n\r\n")
        # Refused by the gate, or by the HTTP parser if it came in parts.
        assert read_all(connection).split()[1] in ("431", "400")


@pytest.mark.parametrize("path", [RUN, "/v1/chat/completions", "/v1/responses", "/tokenize"])
def test_a_compressed_body_is_refused_as_such(scripted, path):
    body = json.dumps({"input" if path.endswith("responses") else "messages": [user("Hello")]}).encode()
    for encoding in ("gzip", "identity", "x, GZIP"):
        packed = gzip.compress(body) if "gzip" in encoding.lower() else body
        response = scripted.run(packed, path=path, headers={"Content-Encoding": encoding})
        if encoding == "identity":
            assert response.status_code == 200, response.text
        else:
            told = response.json()
            message = told["errors"][0]["message"] if "errors" in told else told["error"]["message"]
            assert response.status_code == 415 and f"Content-Encoding {encoding!r} is not supported" in message


def test_draining_finishes_what_runs_and_refuses_the_rest():
    llm, engine = scripted_llm()
    gate = threading.Event()
    engine.before_step = lambda: gate.wait(PATIENCE)
    with running(llm, shutdown_timeout=PATIENCE) as server:
        connections = [begin(server, {"prompt": f"text {i}", "stream": bool(i % 2)}) for i in range(6)]
        until(lambda: llm.num_requests == 6)
        server.stop()
        until(lambda: llm.is_draining)
        assert server.client.get("/ready").json() == {"status": "draining"}
        assert server.client.get("/health").status_code == 200
        refused = server.run({"prompt": "x"})
        assert refused.status_code == 503 and "retry-after" in refused.headers
        gate.set()
        for i, connection in enumerate(connections):
            answer = read_all(connection)
            assert answer.startswith("HTTP/1.1 200")
            body = answer.split("\r\n\r\n", 1)[1]
            assert body.rstrip().endswith("data: [DONE]\n\n\r\n0") if i % 2 else f'"response":"text {i}"' in body
        server.thread.join(PATIENCE)


def test_what_outlasts_the_shutdown_ends_with_an_error():
    llm, engine = scripted_llm()
    engine.before_step = lambda: time.sleep(0.001)
    with running(llm, shutdown_timeout=0.2) as server:
        streamed, plain = begin(server, FOREVER | {"stream": True}), begin(server, FOREVER)
        until(lambda: len(engine.running) == 2)
        server.stop()
        answer = read_all(plain)
        assert answer.startswith("HTTP/1.1 408") and '"code":3008' in answer
        answer = read_all(streamed)
        assert '"code":3008' in answer and "[DONE]" not in answer


def test_the_engine_s_death_is_told_without_its_reason():
    llm, engine = scripted_llm()

    def die():
        raise RuntimeError("secret internals")

    engine.before_step = die
    with running(llm, exit_on_engine_death=False) as server:
        for path, body in ((RUN, {"prompt": "x"}), ("/v1/chat/completions", {"messages": [user("x")]})):
            response = server.run(body, path=path)
            assert response.status_code == 503 and "secret" not in response.text
        for path in ("/health", "/ready"):
            response = server.client.get(path)
            assert (response.status_code, response.json()) == (503, {"status": "dead"})


def test_a_step_that_hangs_is_dumped_and_unready(caplog):
    llm, engine = scripted_llm()
    gate = threading.Event()
    engine.before_step = lambda: gate.wait(PATIENCE)
    with running(llm, step_deadline=0.1) as server:
        connection = begin(server, {"prompt": "x"})
        until(lambda: server.client.get("/ready").status_code == 503)
        until(lambda: "Thread 0x" in caplog.text)
        gate.set()
        assert "200 OK" in read_all(connection)
        until(lambda: server.client.get("/ready").status_code == 200)


def test_the_event_loop_turns_while_many_stream(scripted):
    async def main():
        loop = asyncio.get_running_loop()
        requests = [
            loop.run_in_executor(None, scripted.run, {"prompt": f"text {i}", "stream": True}) for i in range(24)
        ]
        return await asyncio.gather(*requests)

    for i, response in enumerate(asyncio.run(main())):
        *texts, _, done = events_of(response.text)
        assert done == "[DONE]" and "".join(event["response"] for event in texts) == f"text {i}"


def test_worker_processes_that_the_system_ends_are_nobodys_fault(scripted):
    """Chat uses no template here; a grammar is compiled in a worker."""
    worker = scripted.server.llm.llm.inputs._grammars._worker
    done = threading.Event()

    def kill_all():
        while not done.wait(0.002):
            process = worker._process
            if process is not None:
                process.kill()

    killer = threading.Thread(target=kill_all)
    body = {"messages": [user("yes")], "response_format": {"type": "regex", "regex": "yes|not kept yet"}}
    killer.start()
    try:
        response = scripted.run(body, "/v1/chat/completions")
    finally:
        done.set()
        killer.join()
    assert response.status_code == 503 and response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "unavailable"
    lost = re.search(r'llama_workers_lost_total{model_name="tiny"} (.*)', scripted.server.client.get("/metrics").text)
    assert float(lost[1]) >= 2
    assert scripted.run(body, "/v1/chat/completions").status_code == 200


def test_a_prompt_that_is_certain_to_be_too_long_is_not_encoded(tiny, monkeypatch):
    """Neither is it kept: the garbage collector may take minutes to come by."""

    def refuse(*arguments):
        raise AssertionError("it was encoded")

    text = "x" * 3_000_000
    bodies = [
        ({"prompt": text}, "/v1/completions"),
        ({"prompt": ["short", text]}, "/v1/completions"),
        ({"messages": [user("hi"), user(text)]}, "/v1/chat/completions"),
        ({"messages": [user("hi")], "tools": [{"name": "f", "description": text}]}, "/v1/chat/completions"),
    ]
    monkeypatch.setattr(tiny.llm.llm.tokenizer._parsing.__class__, "encode_batch_fast", refuse)
    gc.collect()
    gc.disable()
    before = frames_of_the_package()
    try:
        for body, path in bodies:
            error = tiny.run(body, path).json()["error"]
            assert error["code"] == "context_length_exceeded" and "at least" in error["message"]
        until(lambda: frames_of_the_package() == before)
    finally:
        gc.enable()


def frames_of_the_package() -> list[str]:
    alive = (each.tb_frame.f_code for each in gc.get_objects() if type(each) is TracebackType)
    return [code.co_qualname for code in alive if "/llama/" in code.co_filename]


class PanicException(BaseException):
    """As pyo3's: its name is all that tells it."""


@pytest.mark.parametrize("where", ["preparation", "before", "stream"])
def test_a_panic_of_a_native_library_is_one_requests_error(scripted, monkeypatch, caplog, where):
    def panic(*arguments, **keywords):
        raise PanicException("index out of bounds")

    service = scripted.server.service
    with monkeypatch.context() as patched, caplog.at_level(logging.ERROR):
        if where == "preparation":
            patched.setattr(service.llm.llm.inputs, "request", panic)
        elif where == "before":
            patched.setattr(service.adapters, "names", panic)
        else:
            patched.setattr(service.metrics, "ended", panic)
        body = {
            "model": "other" if where == "before" else NAME,
            "prompt": "x",
            "max_tokens": 3,
            "stream": where == "stream",
        }
        response = scripted.run(body, "/v1/completions", headers={"x-request-id": "mine"})
    assert response.headers["x-request-id"] == "mine"
    if where == "stream":
        assert events_of(response.text)[-1]["error"]["code"] == "internal_error"
    else:
        assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert 'status="500"' in scripted.server.client.get("/metrics").text
    assert "mine" in caplog.text
    assert scripted.run({"prompt": "x"}, "/v1/completions").status_code == 200


def test_a_failure_of_the_tool_call_parser_ends_that_request_alone(scripted, monkeypatch, caplog):
    from llama.text.tool_calls.parser import ToolCallParser

    really = ToolCallParser.feed

    def feed(self, text):
        if "B" in text:
            raise MemoryError
        return really(self, text)

    monkeypatch.setattr(ToolCallParser, "feed", feed)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    good, bad = ({"messages": [user(text)], "tools": tools} for text in ("good", "the B one"))
    with ThreadPoolExecutor(4) as pool, caplog.at_level(logging.ERROR):
        answers = list(pool.map(lambda body: scripted.run(body, "/v1/chat/completions"), [good, bad, good, bad]))
    assert [answer.status_code for answer in answers] == [200, 500] * 2
    assert answers[0].json()["choices"][0]["message"]["content"].endswith("\n\ngood")
    assert "its text could not be processed" in caplog.text
