"""Engine: what it refuses, what it makes of what is left open, and what it reports."""

import logging

import numpy as np
import pytest

from llama.api.errors import ContextLengthError, ParameterError
from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine import budget, memory
from llama.engine.config import CPU_FRACTION
from llama.engine.engine import Engine
from tests.engine.fakes import VOCAB, add, config, make, right, run
from tests.model.models import tiny_model


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_model_len": 1}, "max_model_len must be an integer from 2 to 2147483647, got 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be an integer from 1 to 2147483647, got 0"),
        ({"max_num_seqs": True}, "max_num_seqs must be an integer from 1 to 65536, got True"),
        ({"num_blocks": 0}, "num_blocks must be an integer from 1 to 2147483647, got 0"),
        ({"block_size": 24}, "block_size must be a power of two, got 24"),
        ({"seed": -2}, r"seed must be an integer from 0 to 2\*\*64 - 1, or None, got -2"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\], got 1.5"),
    ],
)
def test_wrong_sizes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ([], "prompt is empty"),
        ([1.0, 2.0], r"integers in \[0, 96\], got 1.0"),
        ([1, True], r"integers in \[0, 96\], got True"),
        (["1"], "got '1'"),
        ([[1]], r"got \[1\]"),
        ([1, VOCAB], "got 97"),
        ([-1], "got -1"),
        ([2**70], "got 1180591620717411303424"),
        ([1] * 64, r"the prompt has 64 tokens and the context is 64 \(max_model_len\): no room is left for an answer"),
    ],
)
def test_wrong_prompts_are_refused(prompt, message):
    engine, _ = make()
    with pytest.raises(ParameterError, match=message):
        engine.request("a", prompt, SamplingParams())


def test_a_prompt_may_be_any_row_of_integers():
    engine, _ = make()
    for prompt in ([1, np.int64(2)], (1, 2), np.array([1, 2], np.uint8), range(1, 3)):
        ids = engine.request("a", prompt, SamplingParams()).prompt_token_ids
        assert ids.dtype == np.int32 and ids.tolist() == [1, 2]


def test_a_request_that_can_never_fit_is_refused_with_the_numbers():
    engine, _ = make(num_blocks=4)
    message = (
        r"a prompt of 10 tokens and up to 8 new ones can never run: the KV cache holds 16 tokens \(4 blocks of 4\)"
    )
    with pytest.raises(ValueError, match=message):
        add(engine, "a", [1] * 10, SamplingParams(max_tokens=8))
    with pytest.raises(ValueError, match="a prompt of 17 tokens"):
        add(engine, "a", [1] * 17, SamplingParams(max_tokens=None))
    add(engine, "a", [1] * 10, SamplingParams(max_tokens=7, seed=0))  # the last token is never computed
    add(engine, "b", [1] * 10, SamplingParams(max_tokens=None, seed=0))
    assert run(engine) == {(name, 0): right([1] * 10, 0, 7) for name in "ab"}


def test_max_tokens_is_clipped_to_the_context():
    engine, _ = make()
    add(engine, "a", [1] * 60, SamplingParams(max_tokens=50, seed=0))
    add(engine, "b", [2] * 63, SamplingParams(max_tokens=None, seed=0))
    ended = run(engine)
    assert (len(ended["a", 0][0]), len(ended["b", 0][0])) == (4, 1)


def test_an_id_is_used_by_one_request_at_a_time():
    engine, _ = make()
    add(engine, "a", [1], SamplingParams(max_tokens=1))
    with pytest.raises(ValueError, match="'a' is in use"):
        add(engine, "a", [1], SamplingParams(max_tokens=1))
    run(engine)
    add(engine, "a", [1], SamplingParams(max_tokens=1))


def test_what_nobody_can_serve_is_refused():
    engine, _ = make()
    with pytest.raises(ValueError, match="no adapter named 'x'"):
        add(engine, "a", [1], SamplingParams(), lora="x")
    with pytest.raises(ValueError, match="response_format"):
        add(engine, "a", [1], SamplingParams(response_format={"type": "json_object"}))
    with pytest.raises(ParameterError, match=r"logit_bias must hold token ids in \[0, 96\], got 97"):
        engine.request("a", [1], SamplingParams(logit_bias={1: 1.0, VOCAB: 1.0}))
    with pytest.raises(ParameterError, match=r"stop_token_ids must hold token ids in \[0, 96\], got 500"):
        engine.request("a", [1], SamplingParams(stop_token_ids=[500]))
    engine.request("a", [1], SamplingParams(logit_bias={VOCAB - 1: 1.0}, stop_token_ids=[VOCAB - 1]))
    with pytest.raises(ParameterError, match="request_id must be a string, got 5"):
        engine.request(5, [1], SamplingParams())
    with pytest.raises(ContextLengthError, match=r"context is 64 .*: no room is left for max_tokens=63") as caught:
        engine.request("a", [1, 2], SamplingParams(max_tokens=63), clip=False)
    assert (caught.value.num_tokens, caught.value.max_model_len) == (65, 64)
    assert not engine.has_unfinished


def test_seeds():
    engine, _ = make(seed=5)
    again, _ = make(seed=5)
    first = add(engine, "a", [1], SamplingParams(n=3)), add(engine, "b", [1], SamplingParams())
    assert first == (add(again, "a", [1], SamplingParams(n=3)), add(again, "b", [1], SamplingParams()))
    assert len({*first[0], *first[1]}) == 4
    assert add(engine, "c", [1], SamplingParams(seed=9, n=2))[0] == 9
    fresh, _ = make()
    assert add(fresh, "a", [1], SamplingParams()) != add(fresh, "b", [1], SamplingParams())


def test_metrics():
    engine, _ = make(max_num_seqs=2)
    for name in "abc":
        add(engine, name, [1, 2, 3, 4, 5], SamplingParams(max_tokens=3))
    engine.step()
    metrics = engine.metrics()
    assert (metrics.num_waiting, metrics.num_running, metrics.num_steps) == (1, 2, 1)
    assert (metrics.num_used_blocks, metrics.kv_usage) == (3, 3 / 64)
    assert (metrics.num_prefix_queries, metrics.num_prefix_hits) == (10, 4)
    run(engine)
    metrics = engine.metrics()
    assert (metrics.num_prompt_tokens, metrics.num_generated_tokens) == (15, 9)
    assert metrics.num_cached_blocks > 0 and metrics.num_preemptions == 0


def test_text_level_ends():
    engine, _ = make()
    add(engine, "a", [1], SamplingParams(n=2, max_tokens=5, seed=0))
    engine.step()
    engine.finish("a", 1, FinishReason.STOP, "a stop string")
    engine.finish("a", 1, FinishReason.STOP, "a stop string")
    engine.finish("unknown", 0, FinishReason.STOP)
    assert set(run(engine)) == {("a", 0)}


@pytest.mark.filterwarnings("ignore:the model of an engine has forward hooks")
def test_a_prompt_is_scored_in_pieces():
    model = tiny_model()
    engine = Engine(model, config(max_num_batched_tokens=64, max_model_len=64))
    engine.runner._scored_rows = 5
    sizes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: sizes.append(output.shape[0]))
    add(engine, "a", list(range(40)), SamplingParams(max_tokens=1, prompt_logprobs=0))
    (output,) = engine.step()
    handle.remove()
    assert len(output.prompt_logprobs) == 40 and max(sizes) == 5


def test_blocks_fit_into_free_memory(monkeypatch, caplog):
    model = tiny_model()
    per_token = 2 * 2 * 2 * 16 * 8  # layers, k and v, heads, head_dim, bytes
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: int(per_token * 4 * 10.5 / CPU_FRACTION / 0.75))
    with caplog.at_level(logging.INFO):
        assert Engine(model, config(num_blocks=None)).metrics().num_blocks == 10
    assert len([r for r in caplog.records if "KV cache: 10 blocks of 4 tokens" in r.message]) == 1
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 1 << 40)
    assert Engine(model, config(num_blocks=None)).metrics().num_blocks == 8 * 16  # all that eight sequences can fill
    monkeypatch.setattr(memory, "free_cpu_bytes", lambda: 100)
    with pytest.raises(MemoryError, match="one KV block takes 4096 bytes"):
        Engine(model, config(num_blocks=None))


def test_free_memory_is_read():
    assert 0 < memory.free_cpu_bytes() < 1 << 50


@pytest.mark.parametrize(
    ("told", "threads"),
    [("max 100000", 16), ("400000 100000", 2), ("250000 100000", 1), ("50000 100000", 1), ("", 16), (None, 16)],
)
def test_processes_share_the_threads_that_the_control_group_lets_run(tmp_path, monkeypatch, told, threads):
    """A container of 4 cores sees all 32 of its machine."""
    monkeypatch.setattr(budget, "_GROUP", tmp_path)
    if told is not None:
        (tmp_path / "cpu.max").write_text(f"{told}\n")
    assert budget.threads_of_each(2, 32) == threads
    assert budget.threads_of_each(64, 32) == 1


def test_two_engines_do_not_mix():
    engines = [Engine(tiny_model(seed=seed), config()) for seed in (0, 1)]
    params = SamplingParams(max_tokens=8, temperature=0)
    alone = []
    for engine in engines:
        add(engine, "a", [1, 2, 3], params)
        alone.append(run(engine))
    for engine in engines:
        add(engine, "a", [1, 2, 3], params)
    tokens = [[], []]
    while any(engine.has_unfinished for engine in engines):
        for i, engine in enumerate(engines):
            tokens[i] += [token for output in engine.step() for token in output.token_ids]
    assert tokens == [result["a", 0][0] for result in alone] and tokens[0] != tokens[1]
