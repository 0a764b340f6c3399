"""`llama serve --ray` on a cluster of this machine: clients unchanged, replicas that are killed, adapters, metrics."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from types import SimpleNamespace

import httpx
import openai
import psutil
import pytest
import ray
import yaml
from pydantic import ValidationError
from ray import serve

from llama import LLM, SamplingParams
from llama.cli.common import LoadOptions
from llama.engine.config import EngineConfig
from llama.serve_ray import APPLICATION, Arguments, Replica, _scale, build_app
from llama.server.config import ServerConfig
from tests.ray.clusters import REPOSITORY, Front, cluster, free_port, processes
from tests.tiny_checkpoint import make_adapter, make_model

FLAGS = ("--dtype", "float64", "--num-blocks", "256", "--max-num-seqs", "4", "--max-waiting-requests", "4")
PATIENCE = 240
SAY = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


def until(condition, patience=PATIENCE):
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def llama(*words, **options) -> subprocess.Popen:
    program = "import sys; from llama.cli import main; sys.exit(main())"
    return subprocess.Popen([sys.executable, "-c", program, *map(str, words)], **options)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("ray") / "tiny")
    adapters = tmp_path_factory.mktemp("adapters")
    port = free_port()
    with cluster(1, num_cpus=4) as made:
        words = ("serve", model, *FLAGS, "--lora-dir", adapters, "--ray", "--ray-address", made.address)
        process = llama(*words, "--replicas", 2, "--port", port, "--shutdown-timeout", 5)
        front = Front(f"http://127.0.0.1:{port}")
        with front.client as client:
            try:
                until(lambda: is_running() or process.poll() is not None)
                yield SimpleNamespace(
                    process=process,
                    front=front,
                    client=client,
                    url=front.url,
                    model=model,
                    adapters=adapters,
                    cluster=made,
                )
            finally:
                process.terminate()
                process.wait(PATIENCE)


def is_running() -> bool:
    application = serve.status().applications.get(APPLICATION)
    return application is not None and application.status == "RUNNING"


def is_ready(client) -> bool:
    try:
        return client.get("/ready").status_code == 200
    except httpx.TransportError:
        return False


def replicas() -> list:
    return processes("ray::ServeReplica")


def chat(served, **more) -> httpx.Response:
    return served.client.post("/v1/chat/completions", json={"messages": SAY, **GREEDY, **more})


@pytest.fixture(scope="module")
def expected(served) -> str:
    llm = LLM(served.model, dtype="float64", num_blocks=64)
    [output] = llm.chat([SAY], SamplingParams(**GREEDY), use_tqdm=False)
    return output.outputs[0].text


def test_both_dialects_say_what_the_library_says(served, expected):
    assert len(replicas()) == 2
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none")
    whole = client.chat.completions.create(model="tiny", messages=SAY, **GREEDY)
    assert whole.choices[0].message.content == expected and whole.usage.completion_tokens == 8
    chunks = client.chat.completions.create(model="tiny", messages=SAY, stream=True, **GREEDY)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    words = ["curl", "-sN", f"{served.url}/ai/run/@cf/meta/llama-3.1-70b-instruct", "-X", "POST"]
    for stream in (False, True):
        body = json.dumps({"messages": SAY, "stream": stream, **GREEDY})
        said = subprocess.run([*words, "-d", body], capture_output=True, text=True, check=True).stdout
        if stream:
            events = [event.removeprefix("data: ") for event in said.strip().split("\n\n")]
            assert events[-1] == "[DONE]"
            assert "".join(json.loads(event)["response"] for event in events[:-1]) == expected
        else:
            assert json.loads(said)["result"]["response"] == expected and json.loads(said)["success"]


def test_refusals_are_ours(served):
    """In the dialect that was asked; Serve's own are plain texts."""
    refused = chat(served, temperature=7)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "temperature"
    unknown = served.client.get("/nothing")
    assert unknown.status_code == 404 and unknown.json()["errors"][0]["code"] == 7003
    with ThreadPoolExecutor(60) as crowd:
        answers = list(crowd.map(lambda i: chat(served, max_tokens=120, min_tokens=120, seed=i), range(60)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 16  # two engines that run 4, and 4 wait
    told = next(answer for answer in answers if answer.status_code == 429)
    assert "error" in told.json() and told.headers["retry-after"]


def test_events_come_one_by_one_and_one_who_leaves_frees_the_blocks(served):
    body = {"messages": SAY, "stream": True, "max_tokens": 200, "min_tokens": 200}
    for _ in range(4):
        with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
            assert next(response.iter_lines()).startswith("data: ")
    until(lambda: served.front.num_requests == 0)
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert sum(line.startswith("data: ") for line in response.iter_lines()) > 100


def test_an_adapter_in_the_folder_is_one_of_every_replica(served, expected):
    (served.adapters / "tuned").mkdir()
    make_adapter(served.adapters / "tuned")
    with ThreadPoolExecutor(4) as crowd:
        answers = list(crowd.map(lambda _: chat(served, model="tuned").json(), range(24)))
    said = {answer["choices"][0]["message"]["content"] for answer in answers}
    assert len(said) == 1 and said != {expected}
    assert {model["id"] for model in served.client.get("/v1/models").json()["data"]} >= {"tiny", "tuned"}


def test_metrics_of_each_replica_are_among_rays(served):
    address = ray.nodes()[0]

    def reporting():
        text = httpx.get(f"http://{address['NodeManagerAddress']}:{address['MetricsExportPort']}/metrics").text
        lines = [line for line in text.splitlines() if line.startswith("ray_llama_generation_tokens_total{")]
        return {part for line in lines for part in line.split(",") if "replica=" in part}

    assert until(lambda: len(reporting()) == 2)


def test_a_replica_is_killed_under_load(served, expected):
    before = replicas()
    stop, killed_at = threading.Event(), []
    results = []  # (began, ended, is right)

    def ask(i):
        while not stop.is_set():
            began = time.monotonic()
            try:
                answer = chat(served, seed=i)
                right = answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == expected
            except httpx.TransportError:
                right = False
            results.append((began, time.monotonic(), right))

    with ThreadPoolExecutor(6) as crowd:
        for i in range(6):
            crowd.submit(ask, i)
        until(lambda: len(results) > 20)
        killed_at.append(time.monotonic())
        before[0].kill()
        until(lambda: sum(began > killed_at[0] and right for began, _, right in results) > 100)
        until(lambda: len(replicas()) == 2 and before[0].pid not in {each.pid for each in replicas()})
        stop.set()
    failed = [(began, ended) for began, ended, right in results if not right]
    assert len(failed) <= 6 and all(ended >= killed_at[0] for _, ended in failed)
    assert before[1].is_running()


def test_stopping_lets_streams_end(served):
    body = {"messages": SAY, "stream": True, "max_tokens": 200, "min_tokens": 200}
    with served.client.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: ")
        served.process.terminate()
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert served.process.wait(PATIENCE) == 0
    until(lambda: not replicas())


def test_a_model_that_no_replica_can_load_is_one_line(served, tmp_path):
    served.process.terminate()
    until(lambda: not replicas())
    model = make_model(tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    words = ("serve", model, *FLAGS, "--ray", "--ray-address", served.cluster.address)
    process = llama(*words, "--port", served.url.rpartition(":")[2], stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    [told] = [line for line in err.splitlines() if line.startswith("llama: ")]
    assert process.returncode == 1
    assert re.fullmatch(rf"llama: no replica starts: .*CheckpointError: {weights}: is truncated.*", told)
    assert APPLICATION not in serve.status().applications


def test_the_yaml_of_the_docs_serves_and_ranks_go_with_their_replica(served, expected, tmp_path):
    served.process.terminate()
    until(lambda: not replicas())
    text = (REPOSITORY / "docs" / "scaling.md").read_text(encoding="utf-8")
    config = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1])
    config["http_options"]["port"] = int(served.url.rpartition(":")[2])
    assert config["applications"][0]["args"].pop("model").startswith("/")
    config["applications"][0]["args"] |= {"model": served.model, "dtype": "float64", "num_blocks": 64}
    config["applications"][0]["args"]["tensor_parallel_size"] = 2
    (tmp_path / "llama.yaml").write_text(yaml.safe_dump(config))
    words = ["run", "--address", served.cluster.address, tmp_path / "llama.yaml"]
    program = "import sys; from ray.serve.scripts import cli; sys.exit(cli())"
    process = subprocess.Popen([sys.executable, "-c", program, *map(str, words)])
    try:
        until(lambda: is_ready(served.client) or process.poll() is not None)
        assert chat(served).json()["choices"][0]["message"]["content"] == expected
        killed, other = replicas()
        ranks = [each for each in processes("rank_process") if each.ppid() == killed.pid]
        assert len(ranks) == 1
        killed.kill()
        assert psutil.wait_procs(ranks, PATIENCE)[1] == []
        until(lambda: len(replicas()) == 2 and killed.pid not in {each.pid for each in replicas()})
        answers = [chat(served) for _ in range(8)]
        assert {answer.json()["choices"][0]["message"]["content"] for answer in answers} == {expected}
        assert other.is_running()
    finally:
        process.terminate()
        process.wait(PATIENCE)


def test_builder_reads_texts_and_refuses_what_it_does_not_know():
    arguments = Arguments(model="m", max_num_seqs="8", enforce_eager="false", access_log="true", loras={"a": "b"})
    assert arguments.llm["max_num_seqs"] == 8 and arguments.llm["enforce_eager"] is False
    assert arguments.server.access_log is True and "max_loras" not in arguments.llm
    for wrong in ({"max_num_seqs": "eight"}, {"max_seqs": "8"}, {"enforce_eager": "perhaps"}, {"replicas": "0"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            Arguments(model="m", **wrong)
    with pytest.raises(ValueError, match="max_num_seqs must be an integer from 1"):
        Arguments(model="m", max_num_seqs="0").engine  # noqa: B018


def test_builder_refuses_an_adapter_with_a_name_of_the_model():
    with pytest.raises(ValueError, match=r"lora must have a name that the model does not .*, got 'm'"):
        build_app(Arguments(model="m", loras={"a": "b", "m": "b"}))


def test_every_option_of_the_command_is_one_of_the_builder():
    taken = Arguments.model_fields.keys()
    shown = [field for config in (LoadOptions, EngineConfig, ServerConfig) for field in fields(config)]
    assert {field.name for field in shown if "help" in field.metadata} <= taken


def test_paths_hold_wherever_a_replica_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapters").mkdir()
    given = Arguments(model="m", lora_dir="adapters", loras={"a": "b"}, tokenizer="t", served_model_name=["name"])
    found = given.with_absolute_paths()
    assert (found.model, found.loras, found.llm["tokenizer"]) == (
        f"{tmp_path}/m",
        {"a": f"{tmp_path}/b"},
        f"{tmp_path}/t",
    )
    assert found.server.lora_dir == tmp_path / "adapters"
    assert Arguments(model="org/name").with_absolute_paths().server.name == "org/name"


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_replica_is_as_healthy_as_its_engine(is_ready):
    replica = SimpleNamespace(_service=SimpleNamespace(is_ready=is_ready))
    with contextlib.nullcontext() if is_ready else pytest.raises(RuntimeError, match="the engine is dead"):
        asyncio.run(Replica.check_health(replica))


def test_replicas_follow_the_load_within_their_bounds():
    assert _scale(Arguments(model="m", replicas=3), 8) == {"num_replicas": 3}
    bounds = {"min_replicas": 2, "max_replicas": 4}
    scaled = _scale(Arguments(model="m", **bounds), 8)
    assert scaled == {"autoscaling_config": {**bounds, "target_ongoing_requests": 8}}
    with pytest.raises(ValueError, match="max_replicas must be at least min_replicas, got 1"):
        _scale(Arguments(model="m", min_replicas=2, max_replicas=1), 8)
