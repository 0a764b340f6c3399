"""benchmarks/peers.py without its engines, and the chart of what it finds."""

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import chart, peers

# Answers as peers_worker.py does: a second for ours, two for the others, three for prompts of ten tokens.
WORKER = """
import json, sys
kind = sys.argv[1]
print(json.dumps({"version": "1", "start_s": 0.0}), flush=True)
for line in sys.stdin:
    job = json.loads(line)
    seconds = (1 if kind == "ours" else 2) * max(job["tokens"]) + (3 if len(job["prompts"][0]) == 10 else 0)
    print(seconds, flush=True)
"""


# llama-cpp-python's face, as far as the worker uses it: the best token is the number of those it has seen.
LLAMA_CPP = """
import ctypes
class Llama:
    def __init__(self, model, **options):
        self.ctx = (ctypes.c_float * 60)()
    def n_vocab(self):
        return 60
    def reset(self):
        self.count = 0
        ctypes.memset(self.ctx, 0, 240)
    def eval(self, tokens):
        assert len(tokens) > 1 or tokens == [self.count]
        self.count += len(tokens)
        self.ctx[self.count] = self.count
def llama_get_logits(ctx):
    return ctypes.cast(ctx, ctypes.POINTER(ctypes.c_float))
"""


def last_line(out):
    return json.loads(out.strip().splitlines()[-1])


@pytest.fixture
def document(monkeypatch, tmp_path, capsys):
    (tmp_path / "worker.py").write_text(WORKER)
    peers.Transformer(peers.ModelConfig.preset("tiny")).save_pretrained(tmp_path / "tiny")
    monkeypatch.setattr(peers, "WORKER", tmp_path / "worker.py")
    monkeypatch.setattr(peers, "STARTS", dict.fromkeys(peers.STARTS, "pass"))
    flags = ["--model", str(tmp_path / "tiny"), "--vllm", sys.executable, "--gguf", "some/x-Q8_0.gguf"]
    flags += ["--forms", "int8", "--batches", "1", "8", "--prompts", "10", "--steps", "4", "--rounds", "3"]
    peers.main([*flags, "--starts", "2", "--requests", "5"])
    return last_line(capsys.readouterr().out)


def test_a_run_over_all_engines(document):
    tiny, model = document["results"]["tiny"], document["results"]["model"]
    assert set(tiny) == {"decode batch 1", "decode batch 4", "decode batch 32"}
    assert tiny["decode batch 4"]["ours"]["seconds"] == {"median": 1.0, "p10": 1.0, "p90": 1.0, "n": 3}
    assert tiny["decode batch 4"]["transformers"]["by_ours"] == 2.0
    assert document["results"]["starts"]["start to first tokens"]["transformers"]["seconds"]["n"] == 2
    assert set(model["engines"]) == {"ours", "transformers", "vllm", "ours int8", "llama.cpp x-Q8_0"}
    workloads = model["workloads"]
    assert set(workloads) == {"decode batch 1", "decode batch 8", "prompt of 10", "5 unequal requests"}
    assert (
        workloads["decode batch 8"]["vllm"]["by_ours"] == 2.0 and "llama.cpp x-Q8_0" not in workloads["decode batch 8"]
    )
    assert workloads["prompt of 10"]["llama.cpp x-Q8_0"]["by_ours"] == 5 / 4
    assert workloads["prompt of 10"]["llama.cpp x-Q8_0"]["by_ours int8"] == 5 / 4
    assert workloads["prompt of 10"]["ours int8"]["by_ours"] == 1.0


def test_what_is_slow_is_measured_once_and_the_time_is_kept(monkeypatch):
    clock = iter(range(0, 10**6, 7))  # each look at the clock takes seven seconds
    monkeypatch.setattr(peers.time, "monotonic", lambda: next(clock))
    asked = []

    class Worker:
        kind = "ours"

        def generate(self, prompts, tokens):
            asked.append(len(prompts))
            return 1.0

    given = peers.argparse.Namespace(rounds=50, minutes=10, longest=5)
    found = peers.rounds(peers.decodes([1, 2], 4, 100), {"ours": Worker()}, given)
    assert {name: len(times["ours"]) for name, times in found.items()} == {"decode batch 1": 1, "decode batch 2": 1}
    given.longest = 20
    found = peers.rounds(peers.decodes([1], 4, 100), {"ours": Worker()}, given)
    assert 10 < len(found["decode batch 1"]["ours"]) < 30


def test_llama_cpp_is_fed_its_own_best_token(tmp_path):
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    command = [sys.executable, "-P", str(peers.WORKER), "llama.cpp", "model.gguf", "gguf"]
    job = json.dumps({"prompts": [list(range(10))], "tokens": [5]})
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ran = subprocess.run(command, input=f"{job}\n{job}\n", env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    hello, *seconds = ran.stdout.splitlines()
    assert "start_s" in json.loads(hello) and len(seconds) == 2 and all(float(each) > 0 for each in seconds)


def test_an_engine_that_ends_is_told(tmp_path):
    (tmp_path / "worker.py").write_text("raise SystemExit(3)")
    peers_worker, peers.WORKER = peers.WORKER, tmp_path / "worker.py"
    try:
        with pytest.raises(RuntimeError, match="vllm has ended with 3"):
            peers.Worker("vllm", sys.executable, "model", "bfloat16")
    finally:
        peers.WORKER = peers_worker


def test_the_chart_has_a_bar_for_each_ratio_and_two_sets_of_colours(document, tmp_path):
    (tmp_path / "peers.json").write_text(json.dumps(document, indent=1))
    chart.main([str(tmp_path / "peers.json"), "--out", str(tmp_path / "peers.svg")])
    svg = ElementTree.parse(tmp_path / "peers.svg").getroot()
    bars = svg.findall("{*}rect")
    ratios = [row.ratio for _, rows in chart.panels(document) for row in rows]
    assert len(bars) == len(ratios) == 4 + 10
    for bar, ratio in zip(bars, ratios, strict=True):
        assert float(bar.get("width")) == pytest.approx(abs(chart.place(ratio) - chart.place(1)), abs=0.1)
    beside_int8 = [row for _, rows in chart.panels(document) for row in rows if "Q8_0" in row.engine]
    workloads = document["results"]["model"]["workloads"]
    assert beside_int8[0].engine.endswith("Q8_0 by ours int8")
    assert [row.ratio for row in beside_int8] == [
        found["by_ours int8"] for engines in workloads.values() for name, found in engines.items() if "Q8_0" in name
    ]
    style = svg.find("{*}style").text
    assert "prefers-color-scheme:dark" in style and all(
        colour in style for pair in chart.COLOURS.values() for colour in pair
    )


@pytest.mark.slow
def test_the_engines_themselves(tmp_path, capsys):
    flags = ["--parts", "starts", "tiny", "--steps", "2", "--rounds", "1", "--starts", "1"]
    peers.main(flags)
    results = last_line(capsys.readouterr().out)["results"]
    workloads = [*results["starts"].values(), *results["tiny"].values()]
    assert len(workloads) == 4
    # Seconds of two steps are a difference, which on a busy machine has any sign.
    assert all(math.isfinite(found["transformers"]["by_ours"]) for found in workloads)
