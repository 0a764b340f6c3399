"""Steps with few tokens of prompts as recorded graphs (`record_prompts`), proven as those of decodes are."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from llama import ParameterError, SamplingParams
from llama.engine import mixed_steps
from llama.engine.config import EngineConfig
from llama.engine.graph_runner import make_runner
from llama.engine.mixed_steps import MixedInputs, Shape, shapes_of
from llama.engine.plan import LAST_SAMPLED, NO_COPIES, NO_UPDATES, Plan
from llama.llm.loras import read_lora
from tests.engine.fakes import add
from tests.engine.test_graphs import OneToken, Stand, assert_as_the_oracle, graph_engine, keys, run, save_adapters
from tests.test_equivalence import ASKS, Case, ask, model

CASES = {
    "lag 1": {"lag": 1},
    "lag 0, blocks of one": {"block_size": 1},
    "lag 1, three at a time": {"lag": 1, "max_num_seqs": 3},
    "lag 1, small chunks": {"lag": 1, "budget": 20},
    "lag 1, preempted, warm cache": {"lag": 1, "preempt": True, "num_tokens": 128, "cache": "warm"},
    "lag 1, poisoned cache, neighbours aborted": {"lag": 1, "poison": True, "strangers": True},
}


@pytest.fixture
def small_shapes(monkeypatch):
    monkeypatch.setattr(mixed_steps, "DECODES", (0, 2, 9))
    monkeypatch.setattr(mixed_steps, "TOKENS", (6, 30))


def mixed_engine(case, **options):
    """All that steps are told lies in garbage before each of them."""
    engine = graph_engine(case, Stand(), record_prompts=True, **options)
    inputs, step = engine.runner._mixed._mirror, engine.step

    def poisoned():
        inputs._data.random_(0, 256)
        return step()

    engine.step = poisoned
    return engine


def shapes(engine) -> set:
    return {key[1] for key in keys(engine) if key[0] == "mixed"}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_tokens_are_the_oracles(changes, monkeypatch):
    monkeypatch.setattr(mixed_steps, "DECODES", (0, 2, 9, 15))
    monkeypatch.setattr(mixed_steps, "TOKENS", (4, 7, 11, 18, 30, 48, 64))
    case = replace(Case(), **changes)
    engine, taken = mixed_engine(case), []
    engine.runner.prepare()
    replay = engine.runner._run_mixed
    monkeypatch.setattr(engine.runner, "_run_mixed", lambda *told: taken.append(told) or replay(*told))
    if case.poison:
        engine.runner.kv.data.fill_(float("nan"))
    for _ in range(3):
        assert_as_the_oracle(engine, case, ASKS)
    assert len(taken) > 4 and len({shape for shape, _ in taken}) > 2
    assert {shape.decodes > 0 for shape, _ in taken} == {False, True}


def plan(*sequences: tuple[int, int], sources: list[int], num_decodes: int) -> Plan:
    """sequences: new tokens and context of each, in the rows 3, 4, ..."""
    lens, contexts = np.array(sequences, np.int32).T
    rows = np.arange(3, 3 + len(lens), dtype=np.int32)
    token_ids = np.arange(100, 100 + lens.sum(), dtype=np.int32)
    token_ids[:num_decodes] = LAST_SAMPLED
    return Plan(
        step=0,
        rows=rows,
        query_lens=lens,
        context_lens=contexts,
        num_decodes=num_decodes,
        token_ids=token_ids,
        sample_rows=np.zeros(len(sources), np.int32),
        sample_sources=np.array(sources, np.int32),
        sample_positions=np.zeros(len(sources), np.int32),
        table_updates=NO_UPDATES,
        copies=NO_COPIES,
    )


def test_places_by_hand():
    """Two decodes and two prompts, of which the last ends in this step, in places for four decodes and eight tokens."""
    shape = Shape(4, 8, 5)
    inputs = MixedInputs([Shape(0, 16, 3), shape], padding_row=9, device=torch.device("cpu"))
    given = plan((1, 7), (1, 3), (2, 2), (3, 8), sources=[0, 1, 6], num_decodes=2)
    numbers = {
        "row_ids": given.rows,
        "context_lens": given.context_lens,
        "positions": [6, 2, 0, 1, 5, 6, 7],
        "kv_slots": [60, 20, 40, 41, 85, 86, 87],
        "token_ids": given.token_ids[2:],
    }
    inputs.fill(shape, given, numbers)
    assert {name: tensor.tolist() for name, tensor in inputs.tensors(shape).items()} == {
        "row_ids": [3, 4, 9, 9, 5, 6, 9, 9],
        "context_lens": [7, 3, 0, 0, 2, 8, 0, 0],
        "query_starts": [0, 1, 2, 3, 4, 6, 9, 9, 9],
        "positions": [6, 2, 0, 0, 0, 1, 5, 6, 7, 0, 0, 0],
        "kv_slots": [60, 20, -1, -1, 40, 41, 85, 86, 87, -1, -1, -1],
        "adapter_indices": [0] * 12,
        "token_ids": [102, 103, 104, 105, 106, 0, 0, 0],
        "sources": [0, 1, 8, 0, 0],
    }
    inputs.fill(shape)
    told = inputs.tensors(shape)
    assert told["row_ids"].tolist() == [9] * 8 and told["query_starts"].tolist() == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert told["kv_slots"].tolist() == [-1] * 12 and not told["context_lens"].any() and not told["sources"].any()


def test_shapes_by_hand():
    config = EngineConfig(max_num_seqs=6, max_num_batched_tokens=70)
    assert shapes_of(config) == [
        *[(0, 32, 4), (4, 32, 6), (5, 32, 6), (0, 64, 4), (4, 64, 6), (5, 64, 6)],
        *[(0, 70, 4), (4, 66, 6), (5, 65, 6)],
    ]
    assert shapes_of(EngineConfig(max_num_seqs=1, max_num_batched_tokens=20)) == [(0, 20, 1)]
    wide = shapes_of(EngineConfig(max_num_batched_tokens=8192))
    assert len(wide) == 12 and wide[-1] == (16, 256, 20) and [shape.num_tokens for shape in wide[:3]] == [32, 36, 48]

    def first(given: Plan) -> Shape | None:
        return next((shape for shape in wide if shape.holds(given)), None)

    assert first(plan((32, 32), sources=[31], num_decodes=0)) == (0, 32, 4)
    assert first(plan((33, 40), sources=[], num_decodes=0)) == (0, 64, 4)
    assert first(plan((1, 9), (200, 200), sources=[0, 200], num_decodes=1)) == (4, 256, 8)
    assert first(plan(*[(1, 9)] * 16, (1, 1), sources=[*range(17)], num_decodes=16)) == (16, 32, 20)
    assert first(plan(*[(1, 9)] * 17, (1, 1), sources=[*range(18)], num_decodes=17)) is None
    assert first(plan((257, 257), sources=[256], num_decodes=0)) is None
    assert first(plan(*[(2, 2)] * 4, sources=[1, 3, 5, 7], num_decodes=0)) == (0, 32, 4)
    assert first(plan(*[(2, 2)] * 5, sources=[1], num_decodes=0)) is None
    assert first(plan((2, 2), sources=[1] * 5, num_decodes=0)) == (4, 32, 8)  # five completions of one prompt
    assert first(plan((2, 2), sources=[1] * 21, num_decodes=0)) is None


def test_what_is_not_told_to_a_graph_runs_without(small_shapes):
    """Scored prompts, copies for several completions, functions over logits, long prompts."""
    engine = mixed_engine(Case(lag=1, cache="off"))
    asks = {
        "scored": SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1),
        "several": SamplingParams(max_tokens=2, temperature=0, n=2),
        "changed": SamplingParams(max_tokens=2, temperature=0, logits_processors=[lambda *told: told[-1]]),
    }
    for _ in range(3):
        for name, params in asks.items():
            add(engine, name, [1, 2, 3], params)
            run(engine)
        add(engine, "long", list(range(1, 50)), SamplingParams(max_tokens=2, temperature=0))
        run(engine)
    assert not shapes(engine)
    answers = []
    for _ in range(3):  # two completions of a prompt whose blocks are full, which needs no copy
        add(engine, "usual", [1, 2, 3, 4], SamplingParams(max_tokens=2, temperature=0, n=2))
        answers.append(run(engine))
    assert shapes(engine) == {(0, 6, 4)}
    assert answers[0] == answers[2] and answers[0]["usual", 0] == answers[0]["usual", 1]


def test_biases_and_grammars_are_drawn_behind_a_graph(small_shapes):
    engine = mixed_engine(Case(lag=1))
    for _ in range(3):
        assert_as_the_oracle(engine, Case(lag=1), [ask(4, 9, temperature=1.0, logit_bias={3: 5.0}, ignore_eos=True)])
    assert shapes(engine) and not [key for key in keys(engine) if key[0] == "sampler"]

    params = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True, response_format={"type": "json_object"})
    add(engine, "grammar", [1, 2, 3], params, new_matcher=OneToken)
    assert run(engine)["grammar", 0] == [37] * 5


def test_adapters(tmp_path, small_shapes):
    folder, params = save_adapters(tmp_path), SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
    engine, eager = mixed_engine(Case(lag=1), max_loras=2), graph_engine(Case(lag=1), None, max_loras=2)
    for each in (engine, eager):
        for name in ("small", "large"):
            each.adapters.add(read_lora(each, model(), name, folder / name))
    told = []
    for loras in ([None, None], ["small", None], ["small", "small"], ["large", "small"], ["large", None]) * 2:
        for each in (engine, eager):
            for i, lora in enumerate(loras):
                add(each, f"{i}", [7 + i, 8, 9], params, lora=lora)
        told.append(run(engine))
        assert told[-1] == run(eager)
    assert told[:5] == told[5:] and len({tuple(tokens["0", 0]) for tokens in told}) == 3
    assert {key[2] for key in keys(engine) if key[0] == "mixed"} == {False, True}


def test_the_start_records_all_shapes_the_decodes_last(small_shapes):
    engine = mixed_engine(Case(max_num_seqs=12))
    engine.runner.prepare()
    recorded = list(engine.runner._graphs._graphs)
    mixed = [key for key in recorded if key[0] == "mixed"]
    assert [key[1][:2] for key in mixed] == [(9, 30), (2, 30), (0, 30), (9, 6), (2, 6), (0, 6)]
    assert recorded[: len(mixed)] == mixed  # where memory is short, those used least lately are dropped


@pytest.mark.parametrize(
    "beside", [{"deterministic": True}, {"enforce_eager": True}, {"speculative_config": {"method": "ngram"}}]
)
def test_it_is_refused_where_it_would_do_nothing(beside):
    config = EngineConfig(record_prompts=True, **beside)
    with pytest.raises(ParameterError, match="record_prompts must be False with deterministic, enforce_eager or"):
        config.resolved(model().config, "cuda")


def test_it_is_refused_on_the_cpu():
    with pytest.raises(ParameterError, match="record_prompts must be False on cpu, got True"):
        make_runner(model(), Case().config(record_prompts=True), 16, frozenset())
