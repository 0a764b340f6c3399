"""Benchmarks of the host's time run, and count what a step launches; a device's time begins behind the host's. Those of
decodes in codes run anywhere, and know what a step reads."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import decode_gpu, host, quantised_speed
from benchmarks.decode_gpu import DeviceClock
from benchmarks.random_models import KINDS, num_bytes, random_weight
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.kernels.cpu.matmul import widen
from llama.model.config import ModelConfig
from llama.model.packing import linear_shapes
from llama.model.transformer import Transformer
from llama.model.weights.quantised import SCHEMES
from tests.model.models import tiny_config

GREEDY = {"temperature": 0.0}


def test_it_counts_the_launches_of_a_step(capsys):
    host.main(["--layers", "2", "--batches", "1", "3", "--steps", "2"])
    *lines, last = capsys.readouterr().out.splitlines()
    results = json.loads(last)["results"]
    assert len(lines) == len(results) == 5
    prompt = results.pop("prompt of 64 beside 8")
    # Attention of the prompt comes to that of the decodes.
    assert (prompt["launched"]["launches"], prompt["replayed"]["launches"]) == (1 + 2 * 7 + 1 + 2, 0)
    # Two norms, rope, attention, its merge and the activation in each layer; cosines and sines before them, one norm
    # behind, and the sampler.
    assert {results[f"greedy {batch}"]["launches"] for batch in (1, 3)} == {1 + 2 * 6 + 1 + 2}
    assert {results[f"filtered {batch}"]["launches"] for batch in (1, 3)} == {1 + 2 * 6 + 1 + 5}
    assert all(found["median"] > 0 and found["n"] == 2 for found in results.values())


def test_it_counts_the_launches_of_fused_steps(capsys):
    """As benchmarks/LOG.md counts them, and how many are launched before the one in front has ended: all but norms of
    codes. Without the flag dense products are the library's, which nobody counts here."""
    for flags, layer, early in (
        (["--fused"], 5, 5),
        (["--quantization", "int8"], 13, 0),
        (["--quantization", "int8", "--fused"], 10, 8),
    ):
        host.main(["--layers", "2", "--batches", "1", "65", "--steps", "1", *flags])
        results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
        assert results["greedy 1"]["launches"] == 1 + 2 * layer + 1 + 2
        assert results["greedy 1"]["early"] == 2 * early and results["greedy 65"]["early"] == 0
        above_64 = 6 if flags == ["--fused"] else 10  # without splits
        assert results["greedy 65"]["launches"] == 1 + 2 * above_64 + 1 + 2


def test_the_clock_of_a_recorded_step_starts_with_its_copy(monkeypatch):
    told = []

    class Event:
        def __init__(self, enable_timing):
            self.recorded = None

        def record(self):
            self.recorded = len(told)

    class Inputs:
        def send(self):
            told.append("send")

    def launch(plan):
        told.append("host")
        runner._inputs.send()
        told.append("replay")
        return plan

    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = SimpleNamespace(device=torch.device("cuda"))
    runner = SimpleNamespace(model=model, launch=launch, _inputs=Inputs())
    with DeviceClock(SimpleNamespace(runner=runner)) as clock:
        assert runner.launch("plan") == "plan"
    assert told == ["host", "send", "replay"]
    assert [(start.recorded, end.recorded) for start, end in clock.marks] == [(1, 3)]
    assert runner.launch is launch and "send" not in vars(runner._inputs)


@pytest.mark.parametrize("kind", KINDS)
def test_random_codes_are_numbers_of_the_usual_size(kind):
    weight = random_weight(KINDS[kind], (96, 256), device="cpu", dtype=torch.bfloat16, seed=0)
    assert sum(tensor.nbytes for tensor in weight.tensors) == num_bytes(KINDS[kind], (96, 256), torch.bfloat16)
    dense = widen(weight)
    assert dense.shape == (96, 256) and 0.003 < dense.std() < 0.05 and dense.abs().max() < 0.2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_in_codes_reads_codes(scheme, capsys):
    flags = ["--preset", "tiny", "--device", "cpu", "--quantization", scheme, "--kv-cache-dtype", "fp8"]
    decode_gpu.main([*flags, "--contexts", "16", "--prefill", "20", "--rounds", "4"])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert set(rows) == {"decode batch 1 context 16", "prefill 20"} and "peer" not in rows["prefill 20"]
    config, row = ModelConfig.preset("tiny"), rows["decode batch 1 context 16"]
    shapes = linear_shapes(config)
    dense = shapes["lm_head"][0] * config.hidden_size + (2 * config.num_hidden_layers + 1) * config.hidden_size
    codes = sum(num_bytes(KINDS[scheme], shape, torch.float32) for name, shape in shapes.items() if name != "lm_head")
    cache = row["context"] * config.kv_values_per_token
    assert row["bytes"] == 4 * dense + config.num_hidden_layers * codes + cache


def test_forms_of_weights_in_turn(capsys):
    flags = ["--preset", "tiny", "--layers", "1", "--forms", "int8 fast", "int4 balanced", "fp8"]
    quantised_speed.main([*flags, "--batches", "1", "3", "--prompt", "20", "--rounds", "2", "--prompt-rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found["results"]) == {"decode batch 1", "decode batch 3", "prompt of 20"}
    assert found["forms"]["bfloat16"]["forms"] == "dense" and "codes" in found["forms"]["int4 balanced"]["forms"]
    for rows in found["results"].values():
        assert list(rows) == ["bfloat16", "int8 fast", "int4 balanced", "fp8"]
        assert all(row["times_bfloat16"] > 0 for name, row in rows.items() if name != "bfloat16")


@pytest.fixture
def engine():
    model = Transformer(tiny_config(), device="cpu", dtype=torch.float32)
    return Engine(model, EngineConfig(max_model_len=64, num_blocks=32, max_num_seqs=2))


def test_a_measurement_that_fails_leaves_nothing_for_the_next_one(engine):
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no profiler"), decode_gpu.decoding(engine, 2, 20, 5, GREEDY):
            raise RuntimeError("no profiler")
        assert not engine.has_unfinished


def test_prompts_of_many_steps_leave_all_that_is_asked_for():
    """The first sequences decode while the others' prompts are computed."""
    model = Transformer(tiny_config(), device="cpu", dtype=torch.float32)
    config = EngineConfig(max_model_len=64, num_blocks=32, max_num_seqs=6, max_num_batched_tokens=16)
    with decode_gpu.decoding(engine := Engine(model, config), 6, 20, 5, GREEDY):
        for _ in range(5):
            assert len(engine.step()) == 6


@pytest.mark.parametrize("from_step", [0, 3, 12])
def test_steps_that_fail_are_no_measurement(engine, from_step, monkeypatch):
    """An engine ends the requests of such a step, logs why, and goes on; without requests its steps take no time."""
    launch, count = engine.runner.launch, itertools.count()

    def breaks(plan):
        if next(count) >= from_step:
            raise RuntimeError("an illegal memory access")
        return launch(plan)

    monkeypatch.setattr(engine.runner, "launch", breaks)
    with pytest.raises(RuntimeError, match="a step failed"):
        decode_gpu.decode(engine, 2, 20, 10, GREEDY)
    with pytest.raises(RuntimeError, match="a step failed"):
        decode_gpu.prefill(engine, 20)
