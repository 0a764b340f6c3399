"""Across ranks activations are read and changed as in one process: points come back whole, to 1e-10."""

from dataclasses import replace

import pytest
import torch

from llama import Add, Apply, Capture, ParameterError, Project, Replace, SamplingParams, Scale
from llama.api.errors import EngineDeadError
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.llm.taps import tapped
from llama.llm.weights import update_weights
from llama.model.kv_cache import KVCache
from llama.model.taps import all_points
from tests.llm.test_capture import close, prompt, vector
from tests.model.models import hugging_face_weights, tiny_model
from tests.parallel.ranks import engine_on_ranks
from tests.parallel.test_parallel_memory import starve_ranks
from tests.test_equivalence import model

ALONE = EngineConfig(max_model_len=256, max_num_batched_tokens=32, max_num_seqs=8, block_size=4, num_blocks=200)
CONFIG = replace(ALONE, tensor_parallel_size=2)
MANY = pytest.param(4, marks=pytest.mark.slow)  # each KV head on two of them
READ = Capture(all_points(2), positions="last")
CHANGES = [
    None,
    [Add("layers.0.resid_post", vector(1), scale=2), Add("layers.1.z", vector(2, 16))],
    [Scale("layers.*.z", 0.0, heads=[0, 3]), Scale("layers.0.k", 1.5, heads=[1])],
    [Replace("layers.1.q", torch.stack([vector(i, 64).view(4, 16) for i in range(2)]), positions=[3, 20])],
    [Project("layers.0.mlp_act", torch.stack([vector(i, 80) for i in range(3)])), Project("embed", vector(6), "keep")],
    [Apply("layers.0.mlp_act", torch.neg), Apply("layers.1.v", lambda x: x * 2), Apply("resid", torch.neg)],
    [Add("layers.1.attn_out", vector(3), norm_match=True, positions="generated"), Add("logits", vector(4, 97))],
]
CHANGES[5][2] = Apply("layers.1.resid_mid", torch.tanh, positions=[0, 5])


def answers(engine, asks):
    """(token ids, captured of the prompt, captured of the completion) of each of (params, capture, interventions)."""
    requests = {}
    for i, (params, capture, changes) in enumerate(asks):
        request = engine.request(str(i), prompt(40, 3 + i, i), params)
        [requests[str(i)]] = tapped(engine, [request], capture, changes)
        engine.add(requests[str(i)])
    tokens = {name: [] for name in requests}
    while engine.has_unfinished:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids or [output.finish_reason]
    engine.check()
    found = []
    for name, request in requests.items():
        captured = ({}, [{}]) if request.taps is None else request.taps.finish(name, [len(tokens[name])])
        found.append((tokens[name], captured[0], captured[1][0]))
    return found


def assert_same(found, expected):
    for (tokens, prompts, completion), (their_tokens, theirs, their_completion) in zip(found, expected, strict=True):
        assert tokens == their_tokens
        close(prompts, theirs)
        close(completion, their_completion)


def params(seed, **fields):
    return SamplingParams(**{"max_tokens": 7, "seed": seed, "temperature": 1.0, "ignore_eos": True, **fields})


@pytest.mark.parametrize("size", [2, MANY])
def test_points_come_back_whole_and_changes_are_those_of_one_process(folder, size):
    read = [None, READ, Capture(["layers.1.k", "layers.0.mlp_act", "layers.*.z"], positions="all")]
    asks = [(params(i), read[i % 3], changes) for i, changes in enumerate(CHANGES * 2)]
    with engine_on_ranks(folder, replace(CONFIG, tensor_parallel_size=size)) as engine:
        for _ in range(2):  # the second time with a warm prefix cache
            found = answers(engine, asks)
            assert_same(found, answers(Engine(model(), ALONE), asks))
        assert len({tuple(tokens) for tokens, _, _ in found}) > len(CHANGES)
        del asks, found
        answers(engine, [(params(0), None, None)])
        assert not engine.runner._numbers


def test_a_function_that_fails_ends_its_own_request_alone(folder, caplog):
    def fails(x):
        raise RuntimeError("a bug")

    asks = [(params(1), None, None), (params(2), None, [Apply("layers.1.z", fails)]), (params(3), READ, CHANGES[1])]
    with engine_on_ranks(folder, CONFIG) as engine:
        found = answers(engine, asks)
        assert found[1][0] == ["error"] and "a function of Apply at layers.1.z failed" in caplog.text
        assert_same(found[::2], answers(Engine(model(), ALONE), asks)[::2])
        assert answers(engine, asks[:1])[0][0] == found[0][0]


def test_a_step_with_taps_that_has_no_memory_ends_the_engine(folder, runners):
    with engine_on_ranks(folder, CONFIG) as engine:
        starve_ranks(runners, "layer", (0, 1), {0})
        with pytest.raises(EngineDeadError, match="OutOfMemoryError"):
            answers(engine, [(params(1), READ, None)])


def test_logits_processors_run_on_rank_0(folder):
    def favour(prompt_ids, output_ids, logits):
        logits[(len(prompt_ids) + 7 * len(output_ids)) % 97] += 5
        return logits

    def fails(prompt_ids, output_ids, logits):
        if len(output_ids) == 3:
            raise RuntimeError("a bug")
        return logits

    asks = [
        (params(1, logits_processors=[favour], frequency_penalty=0.5, logprobs=2), None, None),
        (params(2), None, None),
        (params(3, logits_processors=[fails]), None, None),
        (params(4, logits_processors=[favour]), READ, CHANGES[1]),
    ]
    expected = answers(Engine(model(), ALONE), asks)
    with engine_on_ranks(folder, CONFIG) as engine:
        assert_same(answers(engine, asks), expected)
    assert expected[2][0][3:] == ["error"]


@pytest.mark.parametrize("size", [2, MANY])
@pytest.mark.parametrize("kind", ["float64", "packed bfloat16, tied", "odd vocabulary, biases"])
def test_weights_are_updated_on_every_rank(tmp_path, kind, size):
    """Part of them, in two calls, also where the first one breaks off."""
    changes = {
        "float64": {},
        "packed bfloat16, tied": {"tie_word_embeddings": True},
        "odd vocabulary, biases": {"vocab_size": 99, "attention_bias": True},
    }[kind]
    dtype = torch.bfloat16 if "bfloat16" in kind else torch.float64
    old, new = (tiny_model(dtype=dtype, seed=seed, **changes) for seed in (0, 5))
    old.save_pretrained(tmp_path / "old")
    asks = [(params(i, logprobs=2), READ, None) for i in range(3)]
    config = replace(CONFIG, tensor_parallel_size=size, deterministic=dtype == torch.bfloat16 and size == 2)
    with engine_on_ranks(tmp_path / "old", config, dtype=str(dtype).removeprefix("torch.")) as engine:
        before = answers(engine, asks)
        engine.sleep()
        with pytest.raises(ParameterError, match="the engine sleeps"):
            answers(engine, asks)
        weights = list(hugging_face_weights(new).items())
        with pytest.raises(ParameterError, match="the model has no tensor 'nothing'"):
            update_weights(engine.model, [*weights[:5], ("nothing", torch.zeros(1))], engine.runner.ask)
        assert update_weights(engine.model, (pair for pair in weights[5:]), engine.runner.ask) == len(weights) - 5
        engine.wake_up()
        found = answers(engine, asks)
        assert found[0][0] != before[0][0]
        if dtype == torch.float64:
            assert_same(found, answers(Engine(new, ALONE), asks))
    if dtype == torch.bfloat16:  # sums over ranks round differently from those of one process
        new.save_pretrained(tmp_path / "new")
        with engine_on_ranks(tmp_path / "new", config, dtype="bfloat16") as engine:
            assert_same(found, answers(engine, asks))


def test_a_rank_without_memory_to_wake_up_leaves_all_asleep(folder, monkeypatch):
    with engine_on_ranks(folder, CONFIG) as engine:
        expected = answers(engine, [(params(1), None, None)])
        engine.sleep()
        take_back, calls = KVCache.take_back, []

        def refuse(kv):
            calls.append(kv)
            if len(calls) == 2:
                raise MemoryError("the KV cache takes too much")
            take_back(kv)

        monkeypatch.setattr(KVCache, "take_back", refuse)
        with pytest.raises(MemoryError, match="rank 1: the KV cache takes too much"):
            engine.wake_up()
        assert engine.is_sleeping and calls[0].data.untyped_storage().nbytes() == 0
        engine.wake_up()
        assert answers(engine, [(params(1), None, None)]) == expected
