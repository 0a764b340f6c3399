"""Random use of the scheduler over a model whose tokens are hashes: whoever reads a wrong block gets wrong tokens.

The Driver checks on every step that outputs are what each sequence must give, that nothing comes after an end, that the
budget holds, that there is progress and that rows, queue and blocks are consistent.
"""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from tests.engine.fakes import Driver

MAX_MODEL_LEN = 40
EOS = 0
PREFIX = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        block_size=st.sampled_from([1, 2, 4, 16]),
        room=st.sampled_from([1, 1.2, 2, 3]),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from([1, 2, 5, 16, 64]),
        lag=st.integers(0, 1),
        caching=st.booleans(),
        vocab_size=st.sampled_from([10, 50]),
        drafts=st.sampled_from(["none", "right", "wrong", "mixed"]),
    )
    def start(self, block_size, room, max_num_seqs, budget, lag, caching, vocab_size, drafts):
        self.driver = Driver(
            num_blocks=int(-(-MAX_MODEL_LEN // block_size) * room),
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=MAX_MODEL_LEN,
            vocab_size=vocab_size,
            eos_token_ids={EOS},
            enable_prefix_caching=caching,
            lag=lag,
            drafts=drafts,
        )
        self.ended_outside: set[tuple[str, int]] = set()

    @property
    def names(self):
        return sorted({name for name, _ in self.driver.expected})

    @rule(
        shared=st.integers(0, len(PREFIX)),
        own=st.lists(st.integers(0, 9), min_size=1, max_size=10),
        n=st.sampled_from([1, 1, 2, 3]),
        max_tokens=st.integers(1, 15),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (7,)]),
        logprobs=st.sampled_from([None, None, 1]),
        prompt_logprobs=st.sampled_from([None, None, 1]),
        priority=st.sampled_from([0, 0, -1, 2]),
        seed=st.integers(0, 3),
    )
    def add(self, shared, own, seed, **fields):
        self.driver.add(PREFIX[:shared] + own, SamplingParams(**fields), seed=seed)

    @rule(numbers=st.lists(st.integers(0, 9), min_size=2, max_size=6, unique=True), max_tokens=st.integers(8, 15))
    def add_a_crowd(self, numbers, max_tokens):
        for number in numbers:
            self.driver.add([number] * (number + 4), SamplingParams(max_tokens=max_tokens))

    @precondition(lambda self: any(self.driver.got.values()))
    @rule(data=st.data(), own=st.lists(st.integers(0, 9), max_size=3), max_tokens=st.integers(1, 15))
    def go_on_with_an_answer(self, data, own, max_tokens):
        """What was generated is found by the next turn, and nothing else than what was generated."""
        key = data.draw(st.sampled_from(sorted(key for key, tokens in self.driver.got.items() if tokens)))
        prompt = [*self.driver.prompts[key[0]], *self.driver.got[key], *own]
        if len(prompt) < MAX_MODEL_LEN:
            self.driver.add(prompt, SamplingParams(n=1, max_tokens=max_tokens))

    @rule(count=st.integers(1, 5))
    def step(self, count):
        for _ in range(count):
            self.driver.step()

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def abort(self, data):
        name = data.draw(st.sampled_from(self.names))
        self.driver.scheduler.abort(name)
        self.driver.scheduler.check()
        self.ended_outside |= {key for key in self.driver.expected if key[0] == name}

    @precondition(lambda self: self.names)
    @rule(data=st.data())
    def finish(self, data):
        key = data.draw(st.sampled_from(sorted(self.driver.expected)))
        self.driver.scheduler.finish(*key)
        self.driver.scheduler.check()
        self.ended_outside.add(key)

    @rule(budget=st.integers(1, 8))
    def fail_a_step(self, budget):
        if self.driver.scheduler.schedule(budget) is not None:
            self.driver.scheduler.revert()
            self.driver.scheduler.check()

    @rule(budget=st.integers(1, 8))
    def fail_a_step_with_its_requests(self, budget):
        if self.driver.scheduler.schedule(budget) is not None:
            self.driver.take(self.driver.scheduler.fail(self.driver.scheduler.revert()))
            self.driver.scheduler.check()

    @rule(row=st.integers(0, 5))
    def compute_nan(self, row):
        self.driver.runner.is_bad = lambda some_row: some_row == row
        self.driver.step()
        self.driver.runner.is_bad = lambda some_row: False

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.drain()
        assert set(driver.ended) | self.ended_outside == set(driver.expected)
        for output in driver.ended.values():
            assert output.finish_reason in (FinishReason.STOP, FinishReason.LENGTH, FinishReason.ERROR)
        assert driver.pool.num_used == 0


class TestScheduler(SchedulerMachine.TestCase):
    settings = settings(max_examples=30, stateful_step_count=40, deadline=None)


@pytest.mark.slow
class TestSchedulerAtLength(SchedulerMachine.TestCase):
    settings = settings(max_examples=300, stateful_step_count=100, deadline=None)
