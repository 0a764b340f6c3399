"""The runner on a GPU: graphs against kernel-by-kernel launches, lag, garbage in padding, adapters, long contexts."""

import random
from functools import partial

import pytest
import torch

from llama import SamplingParams
from llama.engine import graph_runner, memory
from llama.engine.config import EngineConfig
from llama.engine.graph_runner import GraphRunner
from llama.engine.graphs import Graphs
from llama.llm.loras import read_lora
from tests.engine import fakes
from tests.engine.test_graphs import save_adapters
from tests.gpu.engines import Unrecorded, check_tokens, engine, poison, run, small, tiny
from tests.test_equivalence import Case

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

KINDS = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0},
    "filtered": {"temperature": 0.8, "top_p": 0.9, "top_k": 50},
    "penalties": {"temperature": 0.9, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0.7, "top_p": 0.8, "logprobs": 5, "logprobs_mode": "processed"},
    "bias": {"temperature": 1.0, "logit_bias": {3: 2.0}},
}


def crowd(count: int, *, max_tokens: int = 12, kinds=tuple(KINDS)) -> list[tuple[list[int], SamplingParams]]:
    pick = random.Random(count)
    return [
        (
            [pick.randrange(90) for _ in range(1 + 7 * i % 40)],
            SamplingParams(max_tokens=max_tokens, seed=i, ignore_eos=True, **KINDS[kinds[i % len(kinds)]]),
        )
        for i in range(count)
    ]


def add(made, requests) -> None:
    for i, (prompt, params) in enumerate(requests):
        fakes.add(made, f"{i}", prompt, params)


@pytest.mark.parametrize("count", [1, 3, 9, 16])
@pytest.mark.parametrize("kind", ["all", *KINDS])
def test_graphs_are_the_same_launches_to_the_last_bit(kind, count):
    """Both run at the bucket's shape, on tensors that hold garbage before each step."""
    model, told = small(), []
    kinds = tuple(name for name in KINDS if name != "bias") if kind == "all" else (kind,)
    for record in (None, Unrecorded()):
        made = engine(model, Case(max_num_seqs=16, budget=512, lag=0), record=record)
        made.runner.kv.data.fill_(float("nan"))
        logits = []

        def keep(made=made, logits=logits) -> None:
            if made.metrics().num_generated_tokens > count:  # all have decoded, not only computed their prompts
                logits.append(made.runner._logits[:count].clone())
            poison(made)

        add(made, crowd(count, kinds=kinds))
        told.append((run(made, keep), logits))
        assert (record is None) == (type(made.runner._graphs._record).__name__ == "CudaRecord")
        assert len(made.runner._graphs) >= (1 if kind == "bias" else 2)
    (tokens, logits), (expected, expected_logits) = told
    assert tokens == expected
    assert len(logits) == len(expected_logits) > 5
    for ours, theirs in zip(logits, expected_logits, strict=True):
        assert not ours.isnan().any() and torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_lag_changes_no_token(kind):
    model, told = small(), []
    for lag in (0, 1):
        made = engine(model, Case(max_num_seqs=16, budget=512, lag=lag))
        add(made, crowd(11, max_tokens=20, kinds=(kind,)))
        told.append(run(made, lambda made=made: poison(made)))
    assert told[0] == told[1]


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_graphs_of_prompts_are_the_same_launches_to_the_last_bit(scheme):
    """Prompts that come while others decode, some of them in chunks."""
    model, told = small(), []
    if scheme is not None:
        model.quantise(scheme)
    for record in (None, Unrecorded()):
        made = engine(model, Case(max_num_seqs=24, budget=200, lag=0), record=record, record_prompts=True)
        made.runner.kv.data.fill_(float("nan"))
        waiting = crowd(20, max_tokens=20)
        waiting.insert(8, ([5] * 230, SamplingParams(max_tokens=9, temperature=0)))

        def join(made=made, waiting=waiting) -> None:
            for _ in range(min(2, len(waiting))):
                fakes.add(made, f"later {len(waiting)}", *waiting.pop())
            poison(made)

        add(made, crowd(1))
        told.append(run(made, join))
        mixed = {key[1] for key in made.runner._graphs._ready if key[0] == "mixed"}
        assert {shape.decodes for shape in mixed} == {0, 4, 16}
    assert told[0] == told[1]


CASES = {
    "lag 1": {"lag": 1},
    "lag 1, prompts recorded": {"lag": 1, "record_prompts": True},
    "lag 1, all rows padded": {"lag": 1, "bucket": 1000},
    "lag 1, preempted": {"lag": 1, "preempt": True, "num_tokens": 128},
    "lag 1, poisoned cache, neighbours aborted": {"lag": 1, "poison": True, "strangers": True, "bucket": 1000},
    "lag 0, blocks of one": {"block_size": 1},
    "eager": {"lag": 1, "enforce_eager": True, "poison": True},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_tokens_are_those_of_float64_without_a_cache(changes, monkeypatch):
    changes = dict(changes)
    if bucket := changes.pop("bucket", None):
        monkeypatch.setattr(graph_runner, "bucket_of", lambda count: bucket)
    options = {name: changes.pop(name, False) for name in ("enforce_eager", "record_prompts")}
    eager, case = options["enforce_eager"], Case(**changes)
    made = engine(tiny(), case, **options)
    assert isinstance(made.runner, GraphRunner) != eager
    if case.poison:
        made.runner.kv.data.fill_(float("nan"))
    check_tokens(made, case)
    assert made.metrics().num_used_blocks == 0


@pytest.mark.parametrize("setting", ["device", "autocast"])
def test_what_a_caller_sets_in_pytorch_changes_no_token(setting):
    def told():
        made = engine(model, Case(max_num_seqs=8, lag=1))
        add(made, crowd(6))
        return run(made)

    model = tiny()
    plain = told()
    with torch.device("cuda") if setting == "device" else torch.autocast("cuda", dtype=torch.bfloat16):
        assert told() == plain


def test_launching_waits_for_nothing():
    """Prefills, recordings aside, and decodes of every kind: no launch may synchronise with the device."""
    made = engine(small(), Case(max_num_seqs=8, budget=64, lag=1))
    launch = made.runner.launch

    def launch_under(mode, plan):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            return launch(plan)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    for mode in ("default", "default", "error"):  # at last every graph is recorded and every kernel compiled
        made.runner.launch = partial(launch_under, mode)
        add(made, crowd(6, max_tokens=40))
        run(made)


def test_graphs_with_adapters(tmp_path):
    folder, model, told = save_adapters(tmp_path), tiny(), []
    for record in (None, Unrecorded()):
        made = engine(model, Case(lag=1), record=record, max_loras=2)
        for name in ("small", "large"):
            made.adapters.add(read_lora(made, model, name, folder / name))
        answers = []
        for loras in ([None, None], ["small", None], ["small", "small"], ["large", "small"], ["large", None]):
            for i, lora in enumerate(loras):
                params = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)
                fakes.add(made, f"{i}", [7 + i, 8, 9], params, lora=lora)
            answers.append(run(made, lambda made=made: poison(made)))
        told.append(answers)
    assert told[0] == told[1]
    assert len({tuple(answer["0", 0][0]) for answer in told[0]}) == 3


def test_a_context_of_131072_tokens():
    model, told = small(num_hidden_layers=1), []
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randint(0, 4003, (131_072 - 40,), generator=generator).tolist()
    for eager in (False, True):
        options = {"max_model_len": 131_072, "max_num_batched_tokens": 8192, "block_size": 16, "num_blocks": 8192}
        made = engine(model, Case(max_num_seqs=2, lag=1), enforce_eager=eager, **options)
        made.runner.kv.data.fill_(float("nan"))
        fakes.add(made, "long", prompt, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=0))
        told.append(run(made, lambda made=made: poison(made))["long", 0])
    assert told[0] == told[1]
    tokens, logprobs = told[0]
    assert len(tokens) == 40
    assert all(-100 < entry[token].logprob <= 0 for token, entry in zip(tokens, logprobs, strict=True))


@pytest.mark.alone
@pytest.mark.parametrize("deterministic", [False, True])
def test_steps_stay_within_the_memory_that_was_measured_for_them(deterministic):
    model = small(vocab_size=128_256)
    free, total = torch.cuda.mem_get_info()
    utilization = (total - free + (6 << 30)) / total
    options = {"max_model_len": 131_072, "max_num_batched_tokens": 8192, "max_num_seqs": 64, "block_size": 16}
    options["deterministic"] = deterministic
    made = engine(model, Case(lag=1), num_blocks=None, gpu_memory_utilization=utilization, **options)
    assert made.pool.num_blocks > 1000
    greedy = [(p * 200, s) for p, s in crowd(64, max_tokens=6)]
    for _ in range(2):
        add(made, greedy)
        run(made)
    free, total = torch.cuda.mem_get_info()
    assert total - free < total * utilization + (256 << 20)  # graphs themselves, and a second handle's workspace


def test_no_memory_for_a_graph_costs_no_token(monkeypatch, caplog):
    class Full(Unrecorded):
        def __call__(self, function):
            raise torch.OutOfMemoryError("no memory for a graph")

    made = engine(small(), Case(max_num_seqs=4, lag=1))
    add(made, crowd(4))
    expected = run(made)
    made = engine(small(), Case(max_num_seqs=4, lag=1))
    monkeypatch.setattr(made.runner, "_graphs", Graphs(Full()))
    add(made, crowd(4))
    assert run(made) == expected
    assert "no memory for more than 0 graphs" in caplog.text


def test_steps_are_recorded_again_after_a_sleep():
    made, told = engine(small(), Case(max_num_seqs=4, lag=1)), []
    for _ in range(4):
        add(made, crowd(4))
        told.append(run(made))
        assert len(made.runner._graphs)
        made.sleep()
        assert not len(made.runner._graphs)
        made.wake_up()
    assert all(answers == told[0] for answers in told)


@pytest.mark.alone
@pytest.mark.parametrize("is_decode", [False, True])
def test_the_worst_step_is_measured(is_decode):
    model, config = small(), EngineConfig(max_model_len=4096, max_num_batched_tokens=4096, max_num_seqs=64)
    peak = memory.peak_cuda_bytes(model.device, lambda: memory.worst_step(model, config, is_decode=is_decode))
    assert peak > 64 * 4003 * 8  # the filters' scratch alone
