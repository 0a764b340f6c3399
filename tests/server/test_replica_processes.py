"""Several engines behind one address as processes: how they fail, and how they end."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from llama.cli import main
from tests.batch.helpers import by_custom_id, chat, completion, read_lines, write_lines
from tests.parallel.test_rank_processes import children_of, is_gone, started, wait_until
from tests.tiny_checkpoint import make_adapter, make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


def llama(*arguments):
    command = [sys.executable, "-c", "import sys; from llama.cli import main; sys.exit(main())", *map(str, arguments)]
    return started(command, stderr=subprocess.PIPE, text=True)


def replicas_of(pid: int) -> list[int]:
    return children_of(pid, b"replica_process.py")


@pytest.mark.slow
def test_replicas_as_processes(model, tmp_path):
    """One is killed under load: its requests fail, the other's go on; adapters reach both; SIGTERM drains."""
    (tmp_path / "tuned").mkdir()
    make_adapter(tmp_path / "tuned")
    options = ("--port", "0", "--num-blocks", "200", "--replicas", "2", "--lora-dir", tmp_path)
    options += ("--served-model-name", "model")
    with llama("serve", model, *options) as process:
        lines = iter(process.stderr.readline, "")
        url = next(line for line in lines if "serving" in line).split()[-1]
        threading.Thread(target=lambda: [None for _ in lines], daemon=True).start()
        pids = replicas_of(process.pid)
        assert len(pids) == 2
        ended = []

        def ask(model_name, max_tokens=200):
            body = {
                "prompt": "Hello",
                "max_tokens": max_tokens,
                "ignore_eos": True,
                "stream": True,
                "model": model_name,
            }
            try:
                text = httpx.post(f"{url}/v1/completions", json=body, timeout=120).text
            except httpx.HTTPError:
                text = ""
            ended.append("error" not in text and text.endswith("data: [DONE]\n\n"))

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("model", "tuned") * 4]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert ended == [True] * 8
        ended.clear()
        threads = [threading.Thread(target=ask, args=("model",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: running(url) == 8, 60)
        os.kill(pids[0], signal.SIGKILL)
        for thread in threads:
            thread.join(60)
        assert sorted(ended) == [False] * 4 + [True] * 4
        health = httpx.get(f"{url}/health").json()
        assert health["status"] == "degraded" and "SIGKILL" in health["replicas"][0]["status"]
        ended.clear()
        threads = [threading.Thread(target=ask, args=(name,)) for name in ("model", "tuned") * 8]
        for thread in threads:
            thread.start()
        wait_until(lambda: running(url) == 16, 60)
        for pid in (pids[1], process.pid):  # systemd stops each process of a service
            os.kill(pid, signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert ended == [True] * 16
        assert process.wait(60) == 0
        wait_until(lambda: all(map(is_gone, pids)), 10)


def running(url: str) -> float:
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics", timeout=60).text)
    return sum(sample.value for f in families if f.name == "llama_num_requests_running" for sample in f.samples)


@pytest.mark.slow
@pytest.mark.parametrize("state", ["loading", "serving", "stopped"])
def test_no_replica_outlives_the_front(model, state):
    with llama("serve", model, "--port", "0", "--num-blocks", "50", "--replicas", "2", "-tp", "2") as process:
        wait_until(lambda: len(replicas_of(process.pid)) == 2, 60)
        if state != "loading":
            next(line for line in iter(process.stderr.readline, "") if "serving" in line)
        pids = replicas_of(process.pid)
        pids += [rank for pid in pids for rank in children_of(pid)]
        if state == "stopped":
            os.kill(pids[0], signal.SIGSTOP)
        process.kill()
        wait_until(lambda: all(map(is_gone, pids)), 15)


@pytest.mark.slow
def test_a_replica_that_cannot_start_is_named(model, capsys):
    assert main(["serve", str(Path(model) / "none"), "--port", "0", "--replicas", "2"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"llama: replica [01]: .*none: there is no such folder", said), said
    assert replicas_of(os.getpid()) == []


@pytest.mark.slow
def test_a_batch_over_replicas_is_that_of_one_engine(model, tmp_path, capsys):
    """Seeded; lines that are refused too; a killed replica's lines fail and are asked again by the next run."""
    lines = [chat(f"chat {i}", f"hello {i}", max_tokens=8) for i in range(12)]
    lines += [completion("text", ["ab", "cd"], max_tokens=3), chat("unknown", "x", model="none"), "{"]
    lines += [chat("stream", "x", stream=True), chat("wrong", "x", temperature=-1)]
    source = write_lines(tmp_path / "in.jsonl", lines)
    options = ("--seed", "1", "--dtype", "float64", "--num-blocks", "64", "--max-num-seqs", "4")
    found = {}
    for count in (1, 2):
        output = tmp_path / f"out{count}.jsonl"
        assert main(["batch", model, str(source), str(output), "--replicas", str(count), *options]) == 0
        found[count] = by_custom_id(read_lines(output))
    assert "17 lines: 13 answered, 3 rejected, 1 failed" in capsys.readouterr().err
    assert found[1] == found[2]
    source = write_lines(
        tmp_path / "long.jsonl", [chat(f"{i}", "hello", max_tokens=150, ignore_eos=True) for i in range(60)]
    )
    output = tmp_path / "out.jsonl"
    with llama("batch", model, source, output, "--replicas", "2", *options) as process:
        wait_until(lambda: output.exists() and output.stat().st_size > 0, 120)
        pids = replicas_of(process.pid)
        os.kill(pids[0], signal.SIGKILL)
        assert process.wait(300) == 0, process.stderr.read()
        said = process.stderr.read()
    failed = [line for line in read_lines(output) if line["error"] is not None]
    assert failed and all("SIGKILL" in line["error"]["message"] for line in failed), said
    wait_until(lambda: all(map(is_gone, pids)), 10)
    assert main(["batch", model, str(source), str(output), "--replicas", "2", *options]) == 0
    answers = {line["custom_id"]: line["error"] for line in read_lines(output)}
    assert answers == {str(i): None for i in range(60)}
