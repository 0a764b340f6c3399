"""`llama serve` as a process: the port before the weights, signals, keys from a file."""

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

from llama.cli import main, parse
from llama.cli.common import llm_options
from llama.cli.flags import given
from llama.server.config import ServerConfig

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATIENCE = 120


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_tiny(["--output", str(path), "--dtype", "float32"])
    return path


def llama(*arguments: str) -> subprocess.Popen:
    """Told of a closed terminal as in one, whatever runs the tests: under nohup that is ignored."""
    command = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main())", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )


def wait_until_refusing(client: httpx.Client) -> None:
    deadline = time.monotonic() + PATIENCE
    while client.get("/ready", headers={"Connection": "close"}).status_code != 503:
        assert time.monotonic() < deadline, "it does not stop"


def test_a_taken_port_fails_before_the_weights_load():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = llama("serve", "no-such-model", "--port", str(taken.getsockname()[1]))
        _, said = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.startswith("llama: cannot listen on 127.0.0.1:") and said.count("\n") == 1


def test_what_cannot_be_meant_is_told_in_one_line(tmp_path):
    empty = tmp_path / "keys"
    empty.write_text("\n")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    cases = {
        ("--port", "70000"): (2, ""),
        ("--lora", "name"): (2, "--lora: takes NAME=PATH, got 'name'"),
        ("--api-key-file", str(empty)): (1, f"{empty} holds no key"),
        ("--api-key-file", str(tmp_path / "none")): (1, f"--api-key-file: {tmp_path / 'none'}: there is no such"),
        ("--api-key-file", str(fifo)): (1, f"--api-key-file: {fifo}: cannot be read: it is not a regular file"),
        ("--api-key-file", "/dev/zero"): (1, "--api-key-file: /dev/zero: cannot be read: it is not a regular file"),
        ("--lora-dir", str(tmp_path / "none")): (1, f"the folder of adapters does not exist: {tmp_path / 'none'}"),
    }
    for arguments, (code, words) in cases.items():
        process = llama("serve", "no-such-model", *arguments)
        _, said = process.communicate(timeout=PATIENCE)
        assert (process.returncode, said.count("\n")) == (code, 1) and words in said, said


@pytest.mark.parametrize(
    ("flag", "value", "legal"),
    [
        ("--port", "abc", "an integer from 0 to 65535"),
        ("--port", "65536", "an integer from 0 to 65535"),
        ("--port", "-1", "an integer from 0 to 65535"),
        ("--port", "80.5", "an integer from 0 to 65535"),
        ("--max-num-seqs", "0", "an integer from 1 to 65536"),
        ("--max-num-seqs", "many", "an integer from 1 to 65536"),
        ("--max-waiting-requests", "-1", "an integer from 0 to 2147483647"),
        ("--max-loras", "x", "an integer from 0 to 2147483647"),
        ("--max-lora-rank", "0", "an integer from 1 to 2147483647"),
        ("--num-blocks", "1" * 40, "an integer from 1 to 2147483647"),
        ("--num-blocks", "None", "an integer from 1 to 2147483647"),
        ("--shutdown-timeout", "soon", "a number above 0"),
        ("--shutdown-timeout", "0", "a number above 0"),
        ("--shutdown-timeout", "nan", "a number above 0"),
        ("--shutdown-timeout", "inf", "a number above 0"),
    ],
)
def test_numbers_are_refused_with_the_flag_the_value_and_what_is_legal(capsys, flag, value, legal):
    assert main(["serve", "no-such-model", flag, value]) == 2
    said = capsys.readouterr().err
    assert re.match(rf"llama: {flag}:? must be {legal}, got '?{value}(\.0)?'?;", said) and said.count("\n") == 1, said


def test_an_empty_host_is_not_every_address(capsys):
    assert main(["serve", "no-such-model", "--host", ""]) == 2
    assert "--host must be an address to listen on, got ''" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--lora", "other=x", "model=x"), "(model, llama-3.1-70b-instruct), got 'model'"),
        (("--lora", "b=x", "--served-model-name", "a", "b"), "(a, b, llama-3.1-70b-instruct), got 'b'"),
        (("--lora", "llama-3.1-70b-instruct=x"), "got 'llama-3.1-70b-instruct'"),
        (("--lora", "@cf/meta/model=x", "--replicas", "2"), "got '@cf/meta/model'"),
    ],
)
@pytest.mark.parametrize("command", [("serve", "no/such/model"), ("batch", "no/such/model", "in.jsonl", "out.jsonl")])
def test_no_adapter_has_a_name_of_the_model(capsys, command, words, told):
    assert main([*command, *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("llama: --lora must have a name that the model does not (") and told in said, said
    assert said.count("\n") == 1


@pytest.mark.parametrize("command", [("serve", "no/such/model"), ("batch", "no/such/model", "in.jsonl", "out.jsonl")])
def test_no_two_adapters_have_one_name(capsys, command):
    assert main([*command, "--lora", "a=x", "--lora", "a=y"]) == 2
    assert "llama: --lora names 'a' twice;" in capsys.readouterr().err


def test_numbers_that_are_legal():
    flags = ["--port", "0", "--max-num-seqs", "1", "--num-blocks", "7", "--shutdown-timeout", "0.5", "--max-loras", "0"]
    options = parse(["serve", "model", *flags])
    assert (options.port, given(options, ServerConfig)) == (0, {"shutdown_timeout": 0.5})
    assert llm_options(options) == {"max_num_seqs": 1, "num_blocks": 7, "max_loras": 0}
    defaults = parse(["serve", "model"])
    assert (defaults.host, defaults.port) == ("127.0.0.1", 8000)
    assert llm_options(defaults) == given(defaults, ServerConfig) == {}


@pytest.mark.parametrize("sent", [[signal.SIGTERM], [signal.SIGHUP] * 2], ids=["asked", "terminal closed"])
def test_serving_and_stopping(checkpoint, tmp_path, sent):
    """Where a terminal closes, the kernel sends SIGHUP and many shells do it once more."""
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
                for number in sent:
                    process.send_signal(number)
                    wait_until_refusing(client)
                text += "".join(pieces)
            assert text.endswith("data: [DONE]\n\n")
        assert process.wait(PATIENCE) == 0
        assert '"status": 200' in process.stderr.read()
    finally:
        process.kill()
        process.wait()


def test_a_second_signal_ends_at_once(checkpoint):
    arguments = ("--port", "0", "--num-blocks", "64", "--max-model-len", "512", "--shutdown-timeout", str(PATIENCE))
    process = llama("serve", str(checkpoint), "--served-model-name", "small", *arguments)
    try:
        line = next(line for line in iter(process.stderr.readline, "") if line.startswith("llama: serving small"))
        with httpx.Client(base_url=line.split()[-1], timeout=PATIENCE) as client:
            body = {"prompt": "Hi", "max_tokens": 400, "n": 64, "ignore_eos": True, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as streamed:
                pieces = streamed.iter_text()
                next(pieces)
                process.send_signal(signal.SIGTERM)
                wait_until_refusing(client)
                process.send_signal(signal.SIGTERM)
                with pytest.raises(httpx.RemoteProtocolError):
                    assert "[DONE]" not in "".join(pieces)
        process.wait(PATIENCE / 2)
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
