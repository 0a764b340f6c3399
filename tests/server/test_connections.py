"""Connections that stand still are cut; those whose client only waits for the server are not."""

import contextlib
import errno
import socket
import threading
import time

import pytest

from llama.server.config import ServerConfig
from tests.server.helpers import (
    NAME,
    PATIENCE,
    RUN,
    begin,
    begin_slowly,
    events_of,
    read_all,
    running,
    scripted_llm,
    until,
    user,
)


def connect(server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)


def open_ones(server) -> set:
    return server.server.server_state.connections


@pytest.mark.parametrize("sent", [b"", b"POST / HT", b"POST / HTTP/1.1\r\nHost: x\r\nX-Slow: a"])
def test_a_head_that_never_ends(sent):
    llm, _ = scripted_llm()
    with running(llm, body_timeout=0.2) as server, connect(server) as connection:
        connection.sendall(sent)
        until(lambda: open_ones(server))
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(1) == b""
        until(lambda: not open_ones(server))


def test_a_head_that_comes_in_small_parts_has_no_more_time():
    llm, _ = scripted_llm()
    with running(llm, body_timeout=0.3) as server, connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        with pytest.raises(OSError):
            for _ in range(PATIENCE * 20):
                connection.sendall(b"X: a\r\n")
                time.sleep(0.05)


def test_a_second_request_s_head():
    llm, _ = scripted_llm()
    with running(llm, body_timeout=0.3) as server, connect(server) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /he")
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(1000):
                said += part
        assert said.count(b"HTTP/1.1 200") == 1 and said.count(b"HTTP/1.1") == 1
        until(lambda: not open_ones(server))


def test_an_answer_that_nobody_takes():
    llm, _ = scripted_llm()
    with running(llm, send_timeout=0.3) as server:
        body = {"messages": [user("x" * 900)], "n": 64, "logprobs": True, "max_tokens": 3000}
        connection = begin_slowly(server, body, "/v1/chat/completions")
        until(lambda: any(c.transport.get_write_buffer_size() for c in list(open_ones(server))))
        until(lambda: not open_ones(server))
        assert server.service.num_in_flight == llm.num_requests == 0
        connection.close()


def test_an_answer_that_is_taken_slowly_is_not_cut():
    llm, _ = scripted_llm()
    with running(llm, send_timeout=1.0) as server:
        body = {"messages": [user("x" * 300)], "n": 64, "logprobs": True, "max_tokens": 3000}
        connection = begin_slowly(server, body, "/v1/chat/completions")
        until(lambda: any(c.transport.get_write_buffer_size() for c in list(open_ones(server))))
        began, answer, length = time.monotonic(), b"", 1
        while len(answer) < length:
            part = connection.recv(1 << 12)
            assert part, "cut"
            answer += part
            if time.monotonic() - began < 3:  # three times what standing still is allowed
                time.sleep(0.02)
            head = answer.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
            length = len(head) + int(head.split(b"content-length: ")[1].split()[0])
        connection.close()


def test_those_that_wait_for_the_server_are_not_cut():
    llm, engine = scripted_llm()
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE)
    with running(llm, body_timeout=0.2, send_timeout=0.2) as server:
        connections = [begin(server, {"prompt": "text", "stream": stream}) for stream in (True, False)]
        until(lambda: llm.num_requests == 2)
        time.sleep(1.0)
        turn.set()
        streamed, plain = map(read_all, connections)
        assert "[DONE]" in streamed and '"response":"text"' in plain


def test_an_idle_connection_takes_its_next_request():
    llm, _ = scripted_llm()
    with running(llm, body_timeout=2.0) as server:
        for _ in range(3):
            assert events_of(server.run({"prompt": "x", "stream": True}).text)[-1] == "[DONE]"
            time.sleep(0.6)
        assert len(open_ones(server)) == 1


def test_no_event_waits_for_the_one_before_to_be_acknowledged():
    llm, _ = scripted_llm()
    with running(llm) as server:
        assert server.client.get("/health").status_code == 200
        (connection,) = open_ones(server)
        served = connection.transport.get_extra_info("socket")
        assert served.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize(
    "name", ["max_body_bytes", "max_bodies_bytes", "body_timeout", "send_timeout", "step_deadline", "shutdown_timeout"]
)
@pytest.mark.parametrize("value", [0, -1, "x", None, True, float("nan")])
def test_limits_are_numbers_above_0(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a number above 0, got {value!r}"):
        ServerConfig(model_names=(NAME,), **{name: value})


def test_a_target_with_its_scheme_and_host_is_the_path_in_it(scripted):
    """As proxies send it (RFC 9112, 3.2.2)."""
    for target in ("http://x/v1/models?a=b", "HTTP://x:80/v1/models", f"https://x/v1%2Fmodels/{NAME}", "http://x"):
        with connect(scripted.server) as connection:
            connection.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            assert read_all(connection).startswith("HTTP/1.1 200"), target


def test_the_server_itself_may_be_asked(scripted, caplog):
    with connect(scripted.server) as connection, caplog.at_level("INFO", "llama.access"):
        connection.sendall(b"OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith("HTTP/1.1 204")
    assert caplog.text == ""


def test_no_page_of_another_origin_is_let_in():
    llm, _ = scripted_llm()
    with running(llm) as server:
        headers = {"Origin": "http://elsewhere.example", "Access-Control-Request-Method": "POST"}
        for response in (
            server.client.options(RUN, headers=headers),
            server.run({"prompt": "x"}, headers=headers),
            server.client.get("/v1/models", headers=headers),
        ):
            assert not [name for name in response.headers if name.startswith("access-control")]
        assert server.client.options(RUN, headers=headers).status_code == 405


def test_stopping_does_not_wait_for_a_step_that_hangs():
    llm, engine = scripted_llm()
    turn = threading.Event()
    engine.before_step = lambda: turn.wait(PATIENCE)
    with running(llm, shutdown_timeout=0.1, step_deadline=0.3) as server:
        connection = begin(server, {"prompt": "x"})
        until(lambda: llm.num_requests == 1)
        server.stop()
        server.thread.join(PATIENCE)
        assert not server.thread.is_alive() and llm.seconds_in_step > 0.3
        turn.set()
        until(lambda: llm.num_requests == 0)
        connection.close()


def test_a_process_that_is_out_of_files_waits_for_some(monkeypatch, caplog):
    llm, _ = scripted_llm()
    with running(llm) as server:
        until(lambda: server.server.started)
        with monkeypatch.context() as patch:

            def no_file(self):
                raise OSError(errno.EMFILE, "Too many open files")

            patch.setattr(socket.socket, "accept", no_file)
            connection = connect(server)
            until(lambda: any("out of system resource" in each for each in caplog.messages))
            time.sleep(0.1)  # in which one that does not wait would fail some hundred times more
            assert sum("out of system resource" in each for each in caplog.messages) == 1
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(connection).startswith("HTTP/1.1 200")
