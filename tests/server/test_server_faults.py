"""What happens around a server: an engine that dies, a log that nobody reads, descriptors that are closed."""

import contextlib
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from make_tiny import main as make_tiny

from tests.server.helpers import running, scripted_llm, until

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120
# A server whose engine dies in the first step after the file named first has come to be.
DYING = """
import sys
from pathlib import Path
from llama.engine.engine import Engine
def step(self, really=Engine.step, trigger=Path(sys.argv.pop(1))):
    if trigger.exists():
        raise ZeroDivisionError("the reason of this test")
    return really(self)
Engine.step = step
from llama.cli import main
sys.exit(main())
"""
SERVE = "import sys; from llama.cli import main; sys.exit(main())"
LONG = {"prompt": "x", "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults") / "tiny"
    make_tiny(["--output", str(path), "--dtype", "float32"])
    return path


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def serving(code: str, *arguments: str, **streams):
    """(the process, a client), once it answers."""
    port = free_port()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-c", code, *arguments, "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, **streams)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
            until(lambda: process.poll() is not None or answers(client))
            assert process.poll() is None
            yield process, client
    finally:
        process.kill()
        process.wait(PATIENCE)


def answers(client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/health", timeout=60).status_code == 200
    return False


def test_a_dead_engine_ends_every_stream_and_the_process(checkpoint, tmp_path):
    trigger = tmp_path / "die"
    with serving(DYING, str(trigger), "serve", str(checkpoint), stderr=subprocess.PIPE, text=True) as (process, client):
        with client.stream("POST", "/v1/completions", json=LONG) as stream:
            lines = stream.iter_lines()
            next(lines)
            trigger.touch()
            died = time.monotonic()
            rest = list(lines)
        _, said = process.communicate(timeout=PATIENCE)
        took = time.monotonic() - died
    assert process.returncode == 70
    assert '"code":"unavailable"' in rest[-2] and "[DONE]" not in rest[-2]
    assert said.count("Traceback") == said.count("ZeroDivisionError: the reason of this test") == 1
    assert took < 5


def test_a_server_may_outlive_its_engine(checkpoint, tmp_path):
    trigger = tmp_path / "die"
    arguments = ("serve", str(checkpoint), "--no-exit-on-engine-death")
    with serving(DYING, str(trigger), *arguments, stderr=subprocess.PIPE, text=True) as (process, client):
        trigger.touch()
        for _ in range(5):
            response = client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})
            assert response.status_code == 503 and response.json()["error"]["code"] == "unavailable"
        assert client.get("/health").json() == client.get("/ready").json() == {"status": "dead"}
        assert client.get("/health").status_code == client.get("/ready").status_code == 503
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert said.count("Traceback") == 1


def test_a_log_that_nobody_reads_stops_nothing(checkpoint):
    """The pipe holds one page: far less than the access log of these requests."""
    reading, writing = os.pipe()
    assert fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, 4096) == 4096
    with serving(SERVE, "serve", str(checkpoint), stderr=writing) as (process, client):
        os.close(writing)
        for _ in range(200):
            assert client.get("/version", headers={"x-request-id": "i" * 64}).status_code == 200
        assert client.get("/health", timeout=5).status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    assert len(os.read(reading, 1 << 16)) > 4096 - 512  # no room was left for another line
    os.close(reading)


def test_lines_that_are_dropped_are_counted_and_told():
    from logging import INFO, LogRecord

    from llama.server.logs import LogQueue

    reading, writing = os.pipe()
    log = LogQueue(writing, max_lines=10)
    for i in range(5000):
        log.emit(LogRecord("x", INFO, "", 0, f"{i} " + "x" * 100, None, None))
    assert log.num_dropped > 4000
    said, told = b"", 0
    while told < log.num_dropped:
        said += os.read(reading, 1 << 16)
        told = sum(map(int, re.findall(rb"\n(\d+) log lines were dropped", said)))
        log.emit(LogRecord("x", INFO, "", 0, "after", None, None))
    assert told == log.num_dropped
    log.stop(5)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("how", ["full", "closed"])
def test_standard_error_that_takes_nothing(checkpoint, how):
    script = "exec 0<&- 1>&- 2>&-; exec" if how == "closed" else "exec 2>/dev/full; exec"
    code = f"import os, sys; os.execv('/bin/sh', ['sh', '-c', '{script} \"$@\"', 'sh', sys.executable, '-c', {SERVE!r}]"
    code += " + sys.argv[1:])"
    with serving(code, "serve", str(checkpoint)) as (process, client):
        for _ in range(3):
            assert client.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200
        opened = {os.readlink(f"/proc/{process.pid}/fd/{i}") for i in range(3)}
        assert not any("socket" in path for path in opened)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_what_is_no_http_is_counted(caplog):
    llm, _ = scripted_llm()
    with running(llm) as server:
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(b"no http at all\r\n\r\n")
                while connection.recv(1024):
                    pass
        assert 'llama_invalid_http_requests_total{model_name="tiny"} 20.0' in server.client.get("/metrics").text
        assert 'llama_log_lines_dropped_total{model_name="tiny"} 0.0' in server.client.get("/metrics").text
    assert "Invalid HTTP request" not in caplog.text
