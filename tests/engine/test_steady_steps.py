"""What consecutive steps of the same sequences share, and when it is made anew."""

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama import LLM, ModelConfig, SamplingParams, Transformer
from llama.engine import runner
from tests.model.models import tiny_model


def steps(params, count=9):
    """The batch and the sampler's rows of each decode step of two requests, blocks of 4 tokens."""
    llm = LLM(tiny_model(), num_blocks=40, block_size=4)
    seen, hidden, rows = [], llm.model.hidden, llm.engine.runner.sampler.rows

    def record_rows(*arguments):
        seen[-1].append(rows(*arguments))
        return seen[-1][1]

    llm.model.hidden = lambda batch, kv: (seen.append([batch]), hidden(batch, kv))[1]
    llm.engine.runner.sampler.rows = record_rows
    for name, length in (("a", 5), ("b", 7)):
        llm.engine.add(llm.engine.request(name, list(range(length)), params))
    for _ in range(count):
        llm.engine.step()
    return seen[1:]


def test_block_tables_are_looked_up_where_a_block_is_new():
    batches = [batch for batch, _ in steps(SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))]
    same = [a.block_tables is b.block_tables for a, b in pairwise(batches)]
    # Contexts are 6 and 8 at first: "b" needs a block from 9 on, "a" one, then each of them every four tokens.
    assert same == [False, True, False, True, False, True, False]
    assert [batch.block_tables.shape[1] for batch in batches] == [2, 3, 3, 3, 3, 4, 4, 4]
    for batch in batches:
        slots = batch.block_tables.gather(1, (batch.positions[:, None] // 4)).flatten() * 4 + batch.positions % 4
        assert torch.equal(slots, batch.slots)


def test_rows_of_the_sampler_are_the_same_while_nothing_is_drawn():
    greedy = [rows for _, rows in steps(SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))]
    assert all(rows is greedy[0] for rows in greedy)
    sampled = [rows for _, rows in steps(SamplingParams(seed=1, max_tokens=20, ignore_eos=True))]
    assert len({tuple(rows.keys.flatten().tolist()) for rows in sampled}) == len(sampled)
    banned = [rows for _, rows in steps(SamplingParams(temperature=0, max_tokens=20, min_tokens=4, stop_token_ids=[3]))]
    assert [rows.bias_ids is not None for rows in banned] == [True] * 3 + [False] * 5


@pytest.mark.parametrize("is_small", [True, False])
def test_small_steps_take_one_thread_and_leave_the_number_as_it_was(is_small, monkeypatch):
    model, seen = tiny_model(), []
    if not is_small:
        monkeypatch.setattr(runner, "ALONE", model.config.num_parameters - 1)
    llm, hidden = LLM(model, num_blocks=16), model.hidden

    def watched(batch, kv):
        seen.append(torch.get_num_threads())
        if len(seen) == 3:
            raise ValueError("breaks off")
        return hidden(batch, kv)

    model.hidden = watched
    torch.set_num_threads(2)
    try:
        llm.generate([1, 2], SamplingParams(max_tokens=5, ignore_eos=True), use_tqdm=False)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert seen == [1 if is_small else 2] * 3


class Calls(TorchDispatchMode):
    """Counts what is called of PyTorch."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.counts[str(function)] += 1
        return function(*arguments, **(keywords or {}))


@pytest.mark.parametrize(("batch", "most"), [(1, 109), (4, 128)])
def test_a_step_of_a_tiny_model_makes_few_calls(batch, most):
    """What such a step costs is their number. It is raised for a reason alone."""
    llm = LLM(Transformer(ModelConfig.preset("tiny")), num_blocks=64)
    for i in range(batch):
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
        llm.engine.add(llm.engine.request(str(i), [5] * (17 + i), params))
    for _ in range(4):
        llm.engine.step()
    with Calls() as calls:
        assert len(llm.engine.step()) == batch
    assert calls.counts.total() <= most, calls.counts
