"""What is recorded and compiled before the first request, proven without a GPU as in test_graphs.py."""

import contextlib
import logging
from types import SimpleNamespace

import torch

from llama import SamplingParams
from llama.engine import graph_runner
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.graphs import Graphs
from llama.engine.memory import worst_step
from llama.llm.loras import read_lora
from tests.engine.fakes import add
from tests.engine.test_graphs import Stand, assert_as_the_oracle, graph_engine, keys, run, save_adapters
from tests.model.models import tiny_model
from tests.test_equivalence import ASKS, Case, model


def prepared(case: Case, **options) -> tuple[Engine, Stand]:
    stand = Stand()
    engine = graph_engine(case, stand, **options)
    engine.runner.prepare()
    return engine, stand


def sizes(engine: Engine, kind: str) -> list[int]:
    """Of the graphs of a kind, in the order in which they were recorded."""
    return [key[1] for key in engine.runner._graphs._graphs if key[0] == kind]


def test_what_is_recorded_at_the_start_leaves_no_trace():
    case = Case(lag=1)
    engine, _ = prepared(case)
    engine.runner.kv.data.zero_()
    last_tokens = engine.runner.last_tokens.clone()
    engine.runner.prepare()
    assert not engine.runner.kv.data.any() and torch.equal(engine.runner.last_tokens[:-1], last_tokens[:-1])
    assert_as_the_oracle(engine, case, ASKS)


def test_decodes_of_all_sizes_are_recorded_at_the_start_the_largest_first(caplog):
    with caplog.at_level(logging.INFO):
        engine, stand = prepared(Case(lag=1, max_num_seqs=11))
    assert sizes(engine, "model") == [11, 10, 8, 7, 6, 5, 4, 3, 2, 1]
    assert [record for record in caplog.records if "41 graphs recorded" in record.message]
    recorded = stand.num_recorded
    kinds = ({"temperature": 0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.9}, {"top_k": 3})
    for count in (1, 2, 4, 11):
        for i in range(count):
            add(engine, f"{i}", [i + 1, 2], SamplingParams(max_tokens=4, ignore_eos=True, **kinds[i % len(kinds)]))
        run(engine)
    assert stand.num_recorded == recorded == len(engine.runner._graphs) == 4 * 10 + 1
    assert stand.num_replays > recorded


def test_no_request_waits_for_the_recording_of_a_sampler():
    """What was not recorded at the start is drawn without a graph: penalties, log-probabilities, both in a crowd."""
    engine, stand = prepared(Case(lag=1))
    recorded = stand.num_recorded
    for _ in range(3):
        assert_as_the_oracle(engine, Case(lag=1), ASKS)
    assert any(asked.params.logprobs is not None for asked in ASKS)
    assert any(asked.params.frequency_penalty for asked in ASKS)
    assert stand.num_recorded == recorded


def test_steps_with_adapters_are_recorded_when_one_is_loaded_unless_requests_run(tmp_path):
    folder = save_adapters(tmp_path)
    engine, stand = prepared(Case(lag=1, max_num_seqs=3), max_loras=2)
    eager = graph_engine(Case(lag=1, max_num_seqs=3), None, max_loras=2)

    def load(name: str, path: str) -> int:
        """-> How many steps that records."""
        before = stand.num_recorded
        for each in (engine, eager):
            each.add_adapter(read_lora(each, model(), name, folder / path))
        return stand.num_recorded - before

    def ask(*loras: str | None) -> dict:
        told = []
        for each in (engine, eager):
            for i, lora in enumerate(loras):
                params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
                add(each, f"{i}", [7 + i, 8, 9], params, lora=lora)
            told.append(run(each))
        assert told[0] == told[1]
        return told[0]

    base = ask("small" if load("small", "small") else None, None)
    recorded = stand.num_recorded
    for loras in (["small"], ["small", None, "small"], [None]):
        ask(*loras)
    assert stand.num_recorded == recorded and base["0", 0] != base["1", 0]
    assert [load("again", "small"), load("large", "large")] == [0, 3]  # as wide as room is made for; wider
    add(engine, "runs", [1, 2], SamplingParams(max_tokens=3, ignore_eos=True))
    engine.runner.adapters.generation += 1
    assert load("late", "large") == 0
    run(engine)
    ask("large", "late", "again")


def test_nothing_is_recorded_while_there_are_hooks(tmp_path):
    """A graph would do for ever what a hook did once."""
    made = tiny_model(dtype=torch.float64)
    handle = made.norm.register_forward_hook(lambda module, args, output: output * 0)
    engine, stand = prepared(Case(), model_=made, max_loras=1)
    folder = save_adapters(tmp_path)
    engine.add_adapter(read_lora(engine, made, "small", folder / "small"))
    assert stand.num_recorded == 0
    handle.remove()
    for lora in (None, "small"):
        add(engine, "a", [1, 2, 3], SamplingParams(max_tokens=5, temperature=0, ignore_eos=True), lora=lora)
        run(engine)
    assert {key[2] for key in keys(engine) if key[0] == "model"} == {True, False}


def test_what_runs_before_a_step_knows_no_autocast_of_the_callers(tmp_path):
    """Half of a layer would be in another dtype, in graphs for ever."""
    made, folder = tiny_model(dtype=torch.float32), save_adapters(tmp_path)
    engine = graph_engine(Case(lag=1), Stand(), model_=made, max_loras=1)
    adapter = read_lora(engine, made, "small", folder / "small")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        engine.runner.prepare()
        engine.add_adapter(adapter)
        for is_decode in (False, True):
            worst_step(made, engine.config, is_decode=is_decode)
    assert {key[2] for key in keys(engine) if key[0] == "model"} == {True, False}


def test_recording_at_the_start_keeps_to_its_bytes():
    """A graph of the stand takes 1000; those of the largest steps make way."""
    stand = Stand()
    engine = graph_engine(Case(lag=1), stand)
    engine.runner._graphs = Graphs(stand, max_bytes=8500)
    engine.runner.prepare()
    assert engine.graph_bytes == 8000
    assert sizes(engine, "model") == [2, 1] and sizes(engine, "sampler") == [2, 2, 2, 1, 1, 1]


def test_with_drafts_steps_are_recorded_with_runs_and_without():
    config = {"method": "ngram", "num_speculative_tokens": 3, "disable_by_batch_size": 2}
    engine, _ = prepared(Case(lag=1, max_num_seqs=2, drafts="right"), speculative_config=config)
    assert {key[1:] for key in keys(engine) if key[0] == "model"} == {
        (size, False, has_runs) for size in range(1, 9) for has_runs in (True, False)
    }
    assert set(sizes(engine, "sampler")) == {1, 2}


def test_a_runner_on_cuda_whose_steps_were_not_measured_compiles_at_the_start(monkeypatch):
    made = []
    for name in ("Runner", "GraphRunner"):
        monkeypatch.setattr(graph_runner, name, lambda *a, name=name, **k: made.append(name))
    monkeypatch.setattr(graph_runner, "make_kv_cache", lambda *a: None)
    monkeypatch.setattr(graph_runner, "warm_up", lambda *a: made.append("warm"))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    for device in ("cuda", "cpu"):
        for num_blocks in (None, 7):
            model = SimpleNamespace(device=torch.device(device))
            graph_runner.make_runner(model, EngineConfig(num_blocks=num_blocks), 7, frozenset())
    assert made == ["GraphRunner", "GraphRunner", "warm", "Runner", "Runner"]
