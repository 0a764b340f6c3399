"""Scheduler: exact plans of small cases. Random use: test_scheduler_machine.py."""

import numpy as np
import pytest

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.adapters import NO_ADAPTER, Adapter
from llama.engine.blocks import PrefixPath, prefix_root
from llama.engine.plan import LAST_SAMPLED
from tests.engine.fakes import Driver, expected, sequences_of


def told(plan) -> list[tuple[int, int, int]]:
    """Row, tokens now, tokens after the step."""
    return list(zip(plan.rows.tolist(), plan.query_lens.tolist(), plan.context_lens.tolist(), strict=True))


def test_a_prompt_is_computed_in_chunks_and_decodes_go_first():
    driver = Driver(num_blocks=32, max_num_batched_tokens=8)
    driver.add(range(3), SamplingParams(max_tokens=4))
    driver.add(range(20), SamplingParams(max_tokens=2))
    plan = driver.step()
    assert told(plan) == [(0, 3, 3), (1, 5, 5)]
    assert plan.num_decodes == 0 and plan.sample_rows.tolist() == [0] and plan.sample_sources.tolist() == [2]
    plan = driver.step()
    assert told(plan) == [(0, 1, 4), (1, 7, 12)] and plan.num_decodes == 1
    assert plan.token_ids.tolist() == [LAST_SAMPLED, *range(5, 12)]
    assert told(driver.step()) == [(0, 1, 5), (1, 7, 19)]
    plan = driver.step()
    assert told(plan) == [(0, 1, 6), (1, 1, 20)]
    assert plan.num_decodes == 1 and plan.sample_rows.tolist() == [0, 1] and plan.sample_positions.tolist() == [6, 20]
    assert told(driver.step()) == [(1, 1, 21)]
    driver.drain()


def test_block_tables_are_told_as_they_grow():
    driver = Driver(num_blocks=8, block_size=2)
    driver.add(range(3), SamplingParams(max_tokens=4))
    assert driver.step().table_updates.tolist() == [[0, 0], [0, 1], [0, 1]]
    assert driver.step().table_updates.shape == (3, 0)  # position 3 still has a place
    assert driver.step().table_updates.tolist() == [[0], [2], [2]]
    driver.drain()


def test_a_row_that_changes_hands_within_a_step_tells_of_its_last_owner():
    driver = Driver(num_blocks=8, block_size=2)
    running = driver.scheduler.running
    first, second = (sequences_of(str(i), i, range(8))[0] for i in range(2))
    running.enter(first, driver.pool.allocate(3), 0, PrefixPath(b""))
    running.leave(first)
    running.enter(second, driver.pool.allocate(2), 0, PrefixPath(b""))
    assert running.take_updates().tolist() == [[0, 0], [0, 1], running.blocks(0)]


def test_first_come_first_served_within_max_num_seqs():
    driver = Driver(num_blocks=32, max_num_seqs=2)
    for _ in range(3):
        driver.add(range(4), SamplingParams(max_tokens=2))
    assert told(driver.step()) == [(0, 4, 4), (1, 4, 4)]
    assert driver.scheduler.waiting[0].request_id == "request 2"
    assert told(driver.step()) == [(0, 1, 5), (1, 1, 5)]
    assert len(told(driver.step())) == 1
    driver.drain()


def test_no_more_sequences_run_than_the_budget_can_serve_in_each_step():
    driver = Driver(num_blocks=32, max_num_seqs=8, max_num_batched_tokens=2)
    for _ in range(4):
        driver.add([1], SamplingParams(max_tokens=8))
    for _ in range(7):
        assert len(told(driver.step())) == 2
    driver.drain()


def test_requests_of_one_step_share_what_the_step_computes():
    driver = Driver(num_blocks=32)
    driver.add(range(10))
    driver.add(range(10))
    assert told(driver.step()) == [(0, 10, 10), (1, 2, 10)]
    assert [output.num_cached_tokens for output in driver.outputs] == [0, 8]
    assert driver.pool.num_used == 4
    driver.drain()


def test_when_all_blocks_hit_the_last_one_is_computed_into_a_block_of_its_own():
    driver = Driver(num_blocks=32)
    driver.add(range(8))
    driver.step()
    driver.add(range(8))
    assert told(driver.step()) == [(0, 1, 9), (1, 4, 8)]
    running = driver.scheduler.running
    assert running.blocks(0)[0] == running.blocks(1)[0] and running.blocks(0)[1] != running.blocks(1)[1]
    driver.drain()


def test_tokens_that_were_generated_are_found_by_the_next_turn():
    driver = Driver(num_blocks=32)
    first = driver.add(range(6), SamplingParams(max_tokens=7))
    driver.drain()
    answer = driver.got[first, 0]
    driver.add([*range(6), *answer, 1, 2], SamplingParams(max_tokens=1))
    driver.step()
    assert driver.outputs[0].num_cached_tokens == 12  # 6 + 7 tokens; the last one was never computed
    driver.drain()


def test_prompt_logprobs_do_not_read_the_cache_and_come_with_the_first_token():
    driver = Driver(num_blocks=32, max_num_batched_tokens=5)
    driver.add(range(12), SamplingParams(max_tokens=2))
    driver.drain()
    driver.add(range(12), SamplingParams(max_tokens=2, prompt_logprobs=1))
    plans = [driver.step() for _ in range(3)]
    assert [told(plan)[0] for plan in plans] == [(0, 5, 5), (0, 5, 10), (0, 2, 12)]
    assert [plan.prompt_targets.tolist() for plan in plans] == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [11]]
    assert plans[2].prompt_sources.tolist() == [0]
    (output,) = driver.outputs
    assert output.num_cached_tokens == 0
    assert [entry and next(iter(entry)) for entry in output.prompt_logprobs] == [None, *range(1, 12)]
    driver.step()
    assert driver.outputs[0].prompt_logprobs is None
    driver.drain()


def test_completions_of_one_prompt_share_it():
    driver = Driver(num_blocks=32)
    driver.add(range(10), SamplingParams(n=3, max_tokens=6), seed=4)
    plan = driver.step()
    assert told(plan) == [(0, 10, 10)]
    assert plan.sample_rows.tolist() == [0, 1, 2] and plan.sample_sources.tolist() == [9, 9, 9]
    assert plan.copies.tolist() == [[2, 3], [2, 4]]  # the partial block; the two full ones are shared
    assert [join.row for join in plan.joins] == [0, 1, 2] and [join.seed for join in plan.joins] == [4, 5, 6]
    assert driver.pool.num_used == 5
    assert told(driver.step()) == [(0, 1, 11), (1, 1, 11), (2, 1, 11)]
    driver.drain()
    assert len({tuple(tokens) for tokens in driver.got.values()}) == 3


def test_completions_that_find_no_row_wait_and_hit_the_prompt():
    driver = Driver(num_blocks=32, max_num_seqs=2)
    driver.add(range(9), SamplingParams(n=3, max_tokens=3))
    driver.step()
    (third,) = driver.scheduler.waiting
    assert third.index == 2
    driver.drain()
    assert third.num_cached_tokens == 8


def test_completions_outlive_the_one_that_computes_their_prompt():
    driver = Driver(num_blocks=32, max_num_batched_tokens=4)
    name = driver.add(range(9), SamplingParams(n=3, max_tokens=3))
    driver.step()
    driver.scheduler.finish(name, 0)
    driver.scheduler.check()
    driver.drain()
    assert set(driver.ended) == {(name, 1), (name, 2)}


def test_completions_publish_what_is_theirs_after_the_others_have_ended():
    driver = Driver(num_blocks=32)
    name = driver.add(range(8), SamplingParams(n=2, max_tokens=20))
    for _ in range(6):
        driver.step()
    driver.scheduler.finish(name, 0)
    driver.drain()
    driver.add([*range(8), *driver.got[name, 1]], SamplingParams(max_tokens=1))
    driver.step()
    assert driver.outputs[0].num_cached_tokens >= 16
    driver.drain()


def test_the_newest_is_preempted_and_gives_the_same_tokens():
    driver = Driver(num_blocks=6, max_model_len=24)
    first = driver.add(range(8), SamplingParams(max_tokens=12))
    second = driver.add(range(20, 28), SamplingParams(max_tokens=12))
    driver.step()
    while not driver.scheduler.waiting:
        driver.step()
    assert [s.request_id for s in driver.scheduler.waiting] == [second]
    assert driver.scheduler.num_preemptions == 1 and len(driver.got[second, 0]) == 5
    driver.drain()
    assert set(driver.ended) == {(first, 0), (second, 0)}


def test_the_newest_preempts_itself_when_nobody_newer_has_blocks():
    driver = Driver(num_blocks=6, max_model_len=24)
    first = driver.add(range(7), SamplingParams(max_tokens=12))
    second = driver.add(range(20, 28), SamplingParams(max_tokens=12))
    driver.step()
    while not driver.scheduler.waiting:
        driver.step()
    assert [s.request_id for s in driver.scheduler.waiting] == [second]
    assert len(driver.scheduler.running.blocks(0)) == 3  # the first one has got none: the second one needed it
    driver.drain()
    assert set(driver.ended) == {(first, 0), (second, 0)}


def test_a_resumed_sequence_brings_its_tokens_to_its_new_row():
    driver = Driver(num_blocks=6, max_model_len=24, enable_prefix_caching=False)
    driver.add(range(8), SamplingParams(max_tokens=12))
    second = driver.add(range(20, 28), SamplingParams(max_tokens=12), seed=3)
    joins = []
    while not driver.ended:
        joins += driver.step().joins
    joins += driver.step().joins
    before = expected(range(20, 28), 3, 5, 50)
    assert joins[-1].output_token_ids == before and joins[-1].seed == 3
    driver.drain()
    assert len(driver.got[second, 0]) == 12


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("steps", range(9))
def test_abort_frees_everything_at_once_in_any_state(steps, lag):
    driver = Driver(num_blocks=8, max_num_batched_tokens=4, max_model_len=32, lag=lag)
    name = driver.add(range(10), SamplingParams(n=3, max_tokens=8))
    other = driver.add(range(5), SamplingParams(max_tokens=8))
    for _ in range(steps):
        driver.step()
    driver.scheduler.abort(name)
    driver.scheduler.abort(name)
    driver.scheduler.abort("unknown")
    driver.scheduler.check()
    assert name not in driver.scheduler
    driver.drain()
    assert set(driver.ended) <= {(other, 0)} and len(driver.got[other, 0]) == 8


def test_ends():
    eos = 7
    tokens = expected(range(4), 0, 30, 50)
    driver = Driver(num_blocks=32, eos_token_ids={eos, tokens[3]})
    cases = {
        "eos": (SamplingParams(max_tokens=30), 4, FinishReason.STOP, None),
        "ignored eos": (SamplingParams(max_tokens=6, ignore_eos=True), 6, FinishReason.LENGTH, None),
        "stop id": (SamplingParams(max_tokens=30, stop_token_ids=[tokens[1]]), 2, FinishReason.STOP, tokens[1]),
        "length": (SamplingParams(max_tokens=3), 3, FinishReason.LENGTH, None),
        "stop at the limit": (SamplingParams(max_tokens=4), 4, FinishReason.STOP, None),
        "stop id that is the ignored eos": (
            SamplingParams(max_tokens=30, ignore_eos=True, stop_token_ids=[tokens[3]]),
            *(4, FinishReason.STOP, tokens[3]),
        ),
    }
    names = {case: driver.add(range(4), params) for case, (params, *_) in cases.items()}
    driver.drain()
    for case, (_, count, reason, stop_reason) in cases.items():
        output = driver.ended[names[case], 0]
        assert (len(driver.got[names[case], 0]), output.finish_reason, output.stop_reason) == (
            count,
            reason,
            stop_reason,
        )


def test_a_bad_row_ends_alone_and_nothing_of_it_is_found_again():
    driver = Driver(num_blocks=32)
    good, bad = driver.add(range(8)), driver.add(range(20, 28))
    driver.step()
    driver.runner.is_bad = lambda row: row == 1
    driver.step()
    driver.runner.is_bad = lambda row: False
    assert driver.ended[bad, 0].finish_reason is FinishReason.ERROR and driver.ended[bad, 0].token_ids == []
    driver.add(range(20, 28))
    driver.step()
    assert driver.outputs[-1].num_cached_tokens == 0
    driver.drain()
    assert driver.ended[good, 0].finish_reason is FinishReason.LENGTH


def test_a_step_that_fails_is_taken_back():
    driver = Driver(num_blocks=32)
    driver.add(range(8), SamplingParams(n=2, max_tokens=4))
    driver.add(range(8))
    plan = driver.scheduler.schedule()
    assert told(plan) == [(0, 8, 8), (2, 4, 8)]  # the second one counts on the first one's block
    assert [s.order for s in driver.scheduler.revert()] == [(0, 0, 0), (0, 0, 1), (0, 1, 0)]
    driver.scheduler.check()
    assert driver.pool.num_used == driver.pool.num_cached == 0
    assert told(driver.step())[0][1:] == (8, 8)
    driver.drain()
    assert len(driver.ended) == 3


def test_a_smaller_budget_for_one_step():
    driver = Driver(num_blocks=32)
    for _ in range(4):
        driver.add([1, 2], SamplingParams(max_tokens=4))
    driver.step()
    plan = driver.scheduler.schedule(3)
    assert told(plan) == [(0, 1, 3), (1, 1, 3), (2, 1, 3)]
    driver.take(driver.scheduler.update(plan, driver.runner.execute(plan)))
    driver.drain()


def test_a_lagging_update_wastes_one_row_and_publishes_nothing_of_it():
    tokens = expected(range(5), 0, 3, 50)
    driver = Driver(num_blocks=32, lag=1)
    name = driver.add(range(5), SamplingParams(max_tokens=20, stop_token_ids=[tokens[2]]))
    plans = [driver.step() for _ in range(4)]
    assert told(plans[3]) == [(0, 1, 8)]  # scheduled before the end was known; it fills a block
    assert (driver.got[name, 0], driver.step()) == (tokens, None)
    assert len(driver.pool.match(prefix_root(b"", b""), np.array([*range(5), *tokens], np.int32).tobytes(), 2)) == 1
    driver.drain()


def test_the_last_possible_token_is_known_beforehand_and_wastes_nothing():
    driver = Driver(num_blocks=32, lag=1)
    driver.add(range(5), SamplingParams(max_tokens=3))
    plans = [driver.step() for _ in range(4)]
    assert [plan is None for plan in plans] == [False, False, False, True]


def test_adapters_do_not_share_and_tell_their_index():
    driver = Driver(num_blocks=32)
    ours = Adapter("ours", b"its weights")
    for arrival, adapter in enumerate((NO_ADAPTER, ours, ours)):
        sequences = sequences_of(str(arrival), arrival, range(8), SamplingParams(max_tokens=2))
        sequences[0].adapter = adapter
        driver.scheduler.add(sequences)
    plan = driver.scheduler.schedule()
    assert told(plan) == [(0, 8, 8), (1, 8, 8), (2, 4, 8)]
    assert plan.adapter_indices.tolist() == [0, 1, 1] and plan.adapters == (ours,)


class EvenOrOdd:
    """Allows tokens of one parity, the one of the number of tokens taken."""

    def __init__(self, taken=()):
        self.taken = list(taken)

    def fill_mask(self, words):
        words[:] = 0x55555555 if len(self.taken) % 2 == 0 else ~0x55555555

    def advance(self, token_id):
        self.taken.append(token_id)

    def rollback(self, num_tokens):
        del self.taken[len(self.taken) - num_tokens :]

    def fork(self):
        return EvenOrOdd(self.taken)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_matcher_masks_each_sample_and_is_told_each_token(lag):
    driver = Driver(num_blocks=32, lag=lag)
    name = driver.add(range(8), SamplingParams(n=2, max_tokens=5))
    driver.add(range(8), SamplingParams(max_tokens=5))
    leader = driver.scheduler.waiting[0]
    leader.matcher = EvenOrOdd()
    leader.followers[0].matcher = leader.matcher.fork()
    masks = []
    while driver.scheduler.has_unfinished:
        plan = driver.step()
        if plan is not None and plan.masks is not None:
            masks.append(dict(zip(plan.sample_rows.tolist(), plan.masks[:, 0].tolist(), strict=True)))
    assert [mask[0] for mask in masks] == [0x55555555, ~0x55555555, 0x55555555, ~0x55555555, 0x55555555]
    assert all(mask[0] == mask[1] and mask.get(2, -1) == -1 for mask in masks)
    assert leader.matcher.taken == driver.got[name, 0]


class Broken(EvenOrOdd):
    """Fails when it is asked, or when it is told, after some tokens."""

    def __init__(self, asked_at=99, told_at=99):
        super().__init__()
        self.asked_at, self.told_at = asked_at, told_at

    def fill_mask(self, words):
        if len(self.taken) == self.asked_at:
            raise RuntimeError("out of fuel")
        super().fill_mask(words)

    def advance(self, token_id):
        if len(self.taken) == self.told_at:
            raise RuntimeError("no such token")
        super().advance(token_id)


@pytest.mark.parametrize("fault", [{"asked_at": 0}, {"asked_at": 2}, {"told_at": 0}, {"told_at": 2}])
def test_a_matcher_that_fails_ends_its_sequence_alone(fault):
    driver = Driver(num_blocks=32)
    name, other = driver.add(range(8)), driver.add(range(8))
    driver.scheduler.waiting[0].matcher = Broken(**fault)
    driver.drain()
    assert driver.ended[name, 0].finish_reason is FinishReason.ERROR
    assert len(driver.got[name, 0]) == next(iter(fault.values()))
    assert len(driver.got[other, 0]) == 5
