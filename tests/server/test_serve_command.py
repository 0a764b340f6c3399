"""`llama serve` as a process: the port before the weights, signals, keys from a file."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from make_tiny import main as make_tiny

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_tiny(["--output", str(path), "--dtype", "float32"])
    return path


def llama(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main())", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env=environment)


def test_a_taken_port_fails_before_the_weights_load():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = llama("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.startswith("llama: cannot listen on 127.0.0.1:") and said.count("\n") == 1


def test_what_cannot_be_meant_is_told_in_one_line(tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("\n")
    cases = {
        ("--port", "70000"): 2,
        ("--lora", "name"): 2,
        ("--api-key-file", str(empty)): 1,
        ("--lora-dir", str(tmp_path / "none")): 1,
    }
    for arguments, code in cases.items():
        process = llama("serve", "no-such-model", *arguments)
        _, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said.count("\n")) == (code, 1), said


def test_serving_and_stopping(checkpoint, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("one-key\nanother-key\n")
    arguments = ("--port", "0", "--num-blocks", "64", "--max-model-len", "512", "--api-key-file", str(keys))
    process = llama("serve", str(checkpoint), "--served-model-name", "small", *arguments)
    try:
        lines = iter(process.stderr.readline, "")
        line = next(line for line in lines if line.startswith("llama: serving small on http://127.0.0.1:"))
        url = line.split()[-1]
        with httpx.Client(base_url=url, timeout=PATIENCE) as client:
            assert client.get("/ready").status_code == 200
            assert client.get("/v1/models").status_code == 401
            client.headers["Authorization"] = "Bearer another-key"
            answer = client.post("/ai/run/small", json={"prompt": "Hello", "max_tokens": 5}).json()
            assert answer["success"] and answer["result"]["usage"]["completion_tokens"] <= 5
            with client.stream(
                "POST", "/ai/run/small", json={"prompt": "Hi", "max_tokens": 400, "stream": True}
            ) as streamed:
                pieces = streamed.iter_text()
                text = next(pieces)
                process.send_signal(signal.SIGTERM)
                text += "".join(pieces)
            assert text.endswith("data: [DONE]\n\n")
        assert process.wait(PATIENCE) == 0
        assert '"status": 200' in process.stderr.read()
    finally:
        process.kill()
        process.wait()
