"""`llama batch --ray` on clusters of this machine: the answers of one process, whatever is killed meanwhile."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llama.batch import on_ray
from llama.batch.parquet import journal_of
from llama.cli import main
from tests.batch import helpers
from tests.batch.helpers import chat, completion, read_lines, responses, write_lines
from tests.ray.clusters import add_node, cluster, processes
from tests.tiny_checkpoint import make_adapter, make_model

FLAGS = ("--dtype", "float64", "--num-blocks", "256", "--max-num-seqs", "8", "--seed", "3")
PATIENCE = 300
FEW = ({}, {"logit_bias": {"7": -2.5}}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["a", "b"]}, {"n": 2})


@pytest.fixture(scope="module", autouse=True)
def nodes():
    with cluster(2) as made:
        yield made


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("ray") / "tiny"), make_adapter(tmp_path_factory.mktemp("adapter"))


def lines(count: int) -> list[dict]:
    """Contents as texts and as lists, fields that few lines have, requests that are refused."""
    made = []
    for i in range(count):
        content = [{"type": "text", "text": f"parts {i}"}] if i % 3 else f"text {i}"
        made.append(chat(f"line {i}", content, max_tokens=1 + i % 6, **FEW[i % len(FEW)]))
    made[1] = completion("text", [5, 6, 7], max_tokens=3, logit_bias={"5": 1})
    made[2] = chat("lora", "hello", model="tuned", max_tokens=4)
    made[3] = chat("refused", "x", temperature=7)
    made[5] = responses("item", "hello", max_output_tokens=4)
    made[4] = {**chat("url", "x"), "url": "/v1/images"}
    return made


@pytest.fixture(scope="module")
def asked(tmp_path_factory, folders):
    """(the input, what one process answers)"""
    folder = tmp_path_factory.mktemp("asked")
    source = write_lines(folder / "input.jsonl", lines(160))
    assert batch(folders, source, folder / "output.jsonl") == 0
    answers = by_custom_id(read_lines(folder / "output.jsonl"))
    assert len(answers) == 160
    return source, answers


def batch(folders, source, output, *more) -> int:
    return main(["batch", *map(str, (folders[0], source, output)), *FLAGS, "--lora", f"tuned={folders[1]}", *more])


def on_cluster(folders, source, output, replicas=2) -> int:
    return batch(folders, source, output, "--ray", "--replicas", str(replicas))


def by_custom_id(found: list[dict]) -> dict[str, dict]:
    return rounded(helpers.by_custom_id(found))


def rounded(value):
    """Log-probabilities depend in their last bits on what else was in the batch."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return round(value, 9) if isinstance(value, float) else value


def num_lines(path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def once_it_has(path, count: int, action) -> threading.Thread:
    def wait():
        deadline = time.monotonic() + PATIENCE
        while num_lines(path) < count and time.monotonic() < deadline:
            time.sleep(0.005)
        seen.append(num_lines(path))
        action()

    seen = []
    thread = threading.Thread(target=wait)
    thread.seen = seen
    thread.start()
    return thread


def test_answers_are_those_of_one_process(folders, asked, tmp_path):
    source, expected = asked
    assert on_cluster(folders, source, tmp_path / "output.jsonl") == 0
    assert by_custom_id(read_lines(tmp_path / "output.jsonl")) == expected
    # again: nothing is left to be computed but what was refused
    before = read_lines(tmp_path / "output.jsonl")
    assert on_cluster(folders, source, tmp_path / "output.jsonl", replicas=1) == 0
    after = read_lines(tmp_path / "output.jsonl")
    good = [line for line in before if line["response"] and line["response"]["status_code"] == 200]
    assert after[: len(good)] == good and by_custom_id(after) == expected


def test_a_node_is_lost(nodes, folders, asked, tmp_path):
    """There is no room for another engine: the one that is left answers all."""
    source, expected = asked
    output = tmp_path / "output.jsonl"
    node = next(iter(nodes.worker_nodes))
    killing = once_it_has(output, 30, lambda: nodes.remove_node(node, allow_graceful=False))
    try:
        assert on_cluster(folders, source, output) == 0
    finally:
        killing.join(PATIENCE)
        add_node(nodes)
    assert 30 <= killing.seen[0] < 160
    assert by_custom_id(read_lines(output)) == expected


def test_an_actor_is_killed(folders, asked, tmp_path):
    source, expected = asked
    output = tmp_path / "output.jsonl"
    killed = []

    def kill():
        killed.extend(processes("ray::_Actor"))
        killed[0].send_signal(signal.SIGKILL)

    killing = once_it_has(output, 30, kill)
    assert on_cluster(folders, source, output) == 0
    killing.join(PATIENCE)
    assert len(killed) == 2 and killing.seen[0] < 160
    assert by_custom_id(read_lines(output)) == expected


def test_ranks_go_with_their_actor(folders, asked, tmp_path):
    source, expected = asked
    output = tmp_path / "output.jsonl"
    ranks = []

    def kill():
        ranks.extend(processes("rank_process"))
        processes("ray::_Actor")[0].send_signal(signal.SIGKILL)

    killing = once_it_has(output, 30, kill)
    assert batch(folders, source, output, "--ray", "--tensor-parallel-size", "2") == 0
    killing.join(PATIENCE)
    assert len(ranks) == 1 and killing.seen[0] < 160
    psutil.wait_procs(ranks, PATIENCE)
    assert not any(rank.is_running() for rank in ranks)
    assert by_custom_id(read_lines(output)) == expected


def test_a_line_that_always_ends_its_process_fails_alone(folders, asked, tmp_path, monkeypatch):
    source, expected = asked
    output = tmp_path / "output.jsonl"

    class Poisoned(on_ray._Actor):
        async def answer(self, line):
            if line.custom_id == "line 20":
                os._exit(1)
            return await super().answer(line)

    monkeypatch.setattr(on_ray, "_Actor", Poisoned)
    assert on_cluster(folders, source, output) == 0
    answers = by_custom_id(read_lines(output))
    assert answers.pop("line 20")["error"]["code"] == "engine_lost"
    assert answers == {name: line for name, line in expected.items() if name != "line 20"}
    monkeypatch.undo()
    assert on_cluster(folders, source, output, replicas=1) == 0  # what failed is asked again
    assert by_custom_id(read_lines(output)) == expected


def test_the_command_is_killed_and_goes_on(nodes, folders, asked, tmp_path):
    source, expected = asked
    output = tmp_path / "output.jsonl"
    words = ["batch", folders[0], str(source), str(output), *FLAGS, "--lora", f"tuned={folders[1]}", "--ray"]
    program = "import sys; from llama.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", program, *words, "--ray-address", nodes.address])
    killing = once_it_has(output, 40, process.kill)
    assert process.wait(PATIENCE) == -signal.SIGKILL
    killing.join(PATIENCE)
    left = output.read_bytes()
    kept = left[: left.rfind(b"\n") + 1].splitlines()
    assert 40 <= len(kept) < 160
    with output.open("ab") as file:  # as a kill within a write leaves it
        file.write(b'{"id":"batch_req_01'[: 19 * left.endswith(b"\n")])
    assert on_cluster(folders, source, output) == 0
    good = [line for line in kept if b'"status_code":200' in line]
    assert [line for line in output.read_bytes().splitlines() if line in set(good)] == good
    assert by_custom_id(read_lines(output)) == expected


def test_parquet_in_and_out(folders, asked, tmp_path):
    source, expected = asked
    rows = [{**line, "body": json.dumps(line["body"])} for line in lines(160)]
    pq.write_table(pa.Table.from_pylist([{**row, "more": 1} for row in rows]), tmp_path / "input.parquet")
    output = tmp_path / "output.parquet"
    assert on_cluster(folders, tmp_path / "input.parquet", output) == 0
    assert not journal_of(output).exists()
    first = by_custom_id(of_parquet(output))
    refused = first.pop("url")  # whose id is that of its text, which is another here
    assert refused["error"] == expected["url"]["error"]
    assert first == {name: line for name, line in expected.items() if name != "url"}
    assert on_cluster(folders, source, output, replicas=1) == 0  # the same lines: they are answered already
    assert by_custom_id(of_parquet(output)) == expected


def of_parquet(path) -> list[dict]:
    found = pq.read_table(path).to_pylist()
    return [{**row, **{n: row[n] and json.loads(row[n]) for n in ("response", "error")}} for row in found]


def test_what_loading_raises_is_one_line(folders, asked, tmp_path, capfd):
    source, _ = asked
    model, weights = make_model(tmp_path / "broken"), tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert on_cluster((model, folders[1]), source, tmp_path / "output.jsonl") == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith(f"llama: {weights}: is truncated")
