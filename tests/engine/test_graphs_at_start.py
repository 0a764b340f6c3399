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
from tests.engine.fakes import add
from tests.engine.test_graphs import Stand, assert_as_the_oracle, graph_engine, keys, run
from tests.test_equivalence import ASKS, Case


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
