"""A step that a rank has no memory for is made again on all of them, and gives what it would have given."""

import itertools
from dataclasses import replace

import pytest
import torch

from llama.api.params import SamplingParams
from llama.engine.engine import Engine
from llama.engine.graph_runner import GraphRunner
from llama.engine.memory import make_kv_cache
from llama.llm import engines, rank
from tests.engine.test_graphs import Stand
from tests.parallel.ranks import engine_on_ranks
from tests.parallel.test_parallel_engine import CONFIG, IN_ONE, answers, assert_same
from tests.test_equivalence import model


def starve(model, place, calls):
    """Have no memory at these calls of a module."""
    module = {"embedding": model.embed_tokens, "layer": model.layers[1].mlp, "head": model.lm_head}[place]
    plain, numbers = module.forward, itertools.count()

    def forward(*arguments):
        if next(numbers) in calls:
            raise torch.OutOfMemoryError("none left")
        return plain(*arguments)

    module.forward = forward


def starve_ranks(runners, place, whose, calls):
    for runner in runners:
        if runner.model.shard.rank in whose:
            starve(runner.model, place, calls)


@pytest.mark.parametrize(
    ("place", "whose", "lag"),
    [("embedding", (1,), 0), ("layer", (0,), 0), ("layer", (1,), 1), ("head", (0,), 1), ("head", (0, 1), 0)],
)
def test_a_step_without_memory_is_made_again_on_all_ranks(folder, runners, caplog, place, whose, lag):
    """Whoever had none, and wherever: the same tokens and log-probabilities, of prompts and of decodes."""
    with engine_on_ranks(folder, CONFIG) as engine:
        starve_ranks(runners, place, whose, {0, 1, 5})
        for runner in (engine.runner, *runners):
            runner.lag = lag
        found = answers(engine)
        engine.check()
        assert engine.pool.num_used == 0
    assert_same(found, answers(Engine(model(), IN_ONE)))
    tried = [r.args[1] for r in caplog.records if "out of memory in a step of" in r.message and "trying" in r.message]
    assert tried[0] == 16 and len(tried) in (2, 3)


@pytest.mark.parametrize("record_prompts", [False, True])
@pytest.mark.parametrize(("whose", "calls"), [(0, (4,)), (1, (5, 9)), (1, (4, 5))])
def test_steps_without_memory_are_made_again_with_graphs_too(folder, monkeypatch, whose, calls, record_prompts):
    """The first time that a step of this size runs, as it is recorded, as it is replayed."""
    made, config = [], replace(CONFIG, record_prompts=record_prompts)

    def graphs(model, config, num_blocks, eos_token_ids):
        kv = make_kv_cache(model, config, num_blocks)
        made.append(GraphRunner(model, kv, config, eos_token_ids=eos_token_ids, record=Stand()))
        return made[-1]

    monkeypatch.setattr(rank, "make_runner", graphs)
    monkeypatch.setattr(engines, "make_runner", graphs)
    with engine_on_ranks(folder, config) as engine:
        starve_ranks(made, "layer", (whose,), calls)
        assert_same(answers(engine), answers(Engine(model(), IN_ONE)))
        kinds = {key[0] for runner in made for key in runner._graphs._ready}
        assert ("mixed" in kinds) == record_prompts
        assert all(runner._graphs._record.num_replays for runner in made)


def test_a_step_that_never_finds_memory_fails_alone(folder, runners):
    with engine_on_ranks(folder, CONFIG) as engine:
        starve_ranks(runners, "layer", (1,), range(3))
        engine.add(engine.request("0", [1, 2, 3], SamplingParams(max_tokens=5)))
        outputs = [output for _ in range(3) for output in engine.step()]
        assert [output.finish_reason for output in outputs] == ["error"] and not engine.has_unfinished
        assert_same(answers(engine), answers(Engine(model(), IN_ONE)))


@pytest.mark.parametrize(("place", "whose"), [("layer", ()), ("layer", (0,)), ("head", (1,))])
def test_guidance_and_functions_also_where_there_is_no_memory(folder, runners, place, whose):
    def favour(prompt_ids, output_ids, logits):
        logits[(len(prompt_ids) + 7 * len(output_ids)) % 97] += 5
        return logits

    def asked(engine):
        fields = {"temperature": 1.0, "seed": 4, "max_tokens": 9, "logprobs": 2, "ignore_eos": True}
        guided = SamplingParams(guidance_scale=1.7, **fields)
        engine.add(engine.request("guided", [1, 2, 3, 4, 5], guided, negative_token_ids=[9, 8, 7]))
        engine.add(engine.request("changed", [1, 2, 3], SamplingParams(logits_processors=[favour], **fields)))
        return answers(engine)

    with engine_on_ranks(folder, CONFIG) as engine:
        starve_ranks(runners, place, whose, {1, 2, 6})
        assert_same(asked(engine), asked(Engine(model(), IN_ONE)))
