"""Drafts change no token: whatever they are, requests get what they get without, and nothing of a refused one is left.

The drafters of tests/drafters.py know the answer; the model is tiny and float64.
"""

import math

import numpy as np
import pytest
import torch

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.speculation import Speculation
from tests import drafters
from tests.drafters import Drafter, Mixed, right, wrong
from tests.engine.fakes import Driver, add
from tests.test_equivalence import EOS, Ask, Case, ask, model, oracle


def make_engine(most: int = 0, **options) -> Engine:
    """Without drafts where `most` is 0."""
    speculative = {"method": "ngram", "num_speculative_tokens": most, "disable_by_batch_size": 1000} if most else None
    config = Case().config(**options, speculative_config=speculative)
    return Engine(model(), config, eos_token_ids={EOS})


class Answer:
    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None


def run(engine: Engine, asks: list[Ask], matcher=None, after_step=lambda: None) -> list[Answer]:
    """The answers of all completions."""
    answers: dict[tuple[str, int], Answer] = {}
    for number, asked in enumerate(asks):
        add(engine, f"ask {number}", list(asked.prompt), asked.params, new_matcher=matcher)
        answers |= {(f"ask {number}", index): Answer() for index in range(asked.params.n)}
    while engine.has_unfinished:
        for output in engine.step():
            answer = answers[output.request_id, output.index]
            assert answer.finish_reason is None
            answer.token_ids += output.token_ids
            answer.logprobs += output.logprobs or []
            answer.finish_reason, answer.stop_reason = output.finish_reason, output.stop_reason
        engine.check()
        after_step()
    assert engine.metrics().num_used_blocks == 0
    return list(answers.values())


def drafting(most: int, draft, answers: dict[str, list[int]], **options) -> Engine:
    """An engine whose drafts are draft(what is still to come, count) of the answer to each request."""
    engine = make_engine(most, **options)
    drafters.use(engine, lambda request_id, index: Drafter(answers[f"{request_id}/{index}"], draft))
    return engine


def compared(asks: list[Ask], most: int, draft, matcher=None, **options) -> tuple[Engine, Engine, list[Answer]]:
    """Engines without and with drafts that have given the same answers, and these."""
    plain = make_engine(**options)
    expected = run(plain, asks, matcher)
    names = [f"ask {number}/{index}" for number, asked in enumerate(asks) for index in range(asked.params.n)]
    known = {name: answer.token_ids for name, answer in zip(names, expected, strict=True)}
    engine = drafting(most, draft, known, **options)
    answers = run(engine, asks, matcher)
    for ours, theirs in zip(answers, expected, strict=True):
        assert vars(ours) | {"logprobs": None} == vars(theirs) | {"logprobs": None}
        assert len(ours.logprobs) == len(theirs.logprobs)
        for entry, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert [(token, item.rank) for token, item in entry.items()] == [(t, i.rank) for t, i in other.items()]
            assert [item.logprob for item in entry.values()] == pytest.approx(
                [item.logprob for item in other.values()], abs=1e-12
            )
    return plain, engine, answers


@pytest.fixture
def ends_are_drafted(monkeypatch):
    """Drafts of tokens that end the answer are not cut off, so that verification meets them."""
    monkeypatch.setattr(Speculation, "_before_an_end", lambda self, sequence, drafts: drafts)


GREEDY = ask(6, 3, temperature=0, ignore_eos=True, max_tokens=19)
SEEDED = ask(9, 4, temperature=1.0, ignore_eos=True, max_tokens=19)


@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("most", [1, 2, 3, 5, 8])
def test_right_drafts_are_all_accepted_and_save_steps(asked, most):
    _, engine, _ = compared([asked], most, right)
    assert engine.metrics().num_steps == 1 + math.ceil((19 - 1) / (most + 1))
    counts = engine.metrics()
    assert counts.num_accepted_tokens == counts.num_draft_tokens == sum(counts.num_accepted_tokens_per_pos)


@pytest.mark.parametrize("asked", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_wrong_drafts_cost_no_step(asked):
    plain, engine, _ = compared([asked], 4, wrong)
    assert engine.metrics().num_steps == plain.metrics().num_steps == 19
    assert engine.metrics().num_accepted_tokens == 0 < engine.metrics().num_draft_tokens


@pytest.mark.parametrize("count", [1, 2, 5, 9])
def test_a_batch_of_ragged_runs_gives_each_what_it_gets_alone(count):
    asks = [ask(i, 5 + i, temperature=i % 3 / 2, max_tokens=6 + i, logprobs=i % 3) for i in range(count)]
    _, _, answers = compared(asks, 6, Mixed(count))
    assert [answer.token_ids for answer in answers] == [oracle(asked, 0).token_ids for asked in asks]


@pytest.mark.parametrize("draft", [right, wrong, Mixed(1)], ids=["right", "wrong", "mixed"])
def test_penalties_count_what_was_drawn_and_no_draft(draft):
    """Repeated tokens within a run, and a penalised request among plain ones; the counts hold after each step."""
    strong = {"repetition_penalty": 1.3, "frequency_penalty": -0.6, "presence_penalty": 0.2, "max_tokens": 24}
    asks = [
        ask(20, 9, temperature=0, ignore_eos=True, max_tokens=24, frequency_penalty=-2.0),  # it repeats itself
        ask(20, 10, temperature=1.0, ignore_eos=True, logprobs=2, logprobs_mode="processed", **strong),
        ask(3, 4, temperature=1.0),
        ask(20, 11, n=2, temperature=0.0, presence_penalty=1.5, frequency_penalty=0.5, logprobs=1),
    ]
    compared(asks, 5, draft)
    known = {f"ask {i}/{index}": oracle(asked, index).token_ids for i, asked in enumerate(asks)
             for index in range(asked.params.n)}  # fmt: skip
    assert any(len(set(tokens)) < len(tokens) / 2 for tokens in known.values())
    engine = drafting(5, draft, known)

    def check_counts() -> None:
        for sequence in (*engine.scheduler.running.decoding, *engine.scheduler.running.prefilling):
            if sequence.output_token_ids and sequence.params.presence_penalty + sequence.params.frequency_penalty:
                state = engine.runner.sampler.state
                counts = torch.bincount(torch.tensor(sequence.output_token_ids), minlength=97)
                assert torch.equal(state.counts[sequence.row], counts.int())

    run(engine, asks, after_step=check_counts)


RULES = {
    "bias": {"logit_bias": {3: 9.0, 7: -100.0, 11: 8.0}},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.3},
    "min_p": {"min_p": 0.5},
    "processed": {"top_p": 0.6, "logprobs": 5, "logprobs_mode": "processed"},
    "raw": {"temperature": 0.3, "logprobs": 5},
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_every_rule_holds_at_every_place_of_a_run(rule):
    asked = ask(7, 6, **{"temperature": 1.2, "ignore_eos": True, "max_tokens": 20} | rule)
    for draft in (right, Mixed(2)):
        compared([asked], 7, draft)


@pytest.mark.usefixtures("ends_are_drafted")
@pytest.mark.parametrize("min_tokens", range(1, 9))
def test_no_end_before_min_tokens_and_one_exactly_there(min_tokens):
    """The end is made likely and is drafted at each place."""
    asked = ask(7, 6, temperature=1.0, logit_bias={EOS: 100.0}, min_tokens=min_tokens)
    _, _, [answer] = compared([asked], 4, lambda future, count: [EOS] * count)
    assert answer.token_ids.index(EOS) == min_tokens == len(answer.token_ids) - 1
    compared([asked], 4, right)


@pytest.mark.parametrize("place", range(1, 8))
@pytest.mark.parametrize("cut", [False, True])
def test_nothing_comes_behind_an_end_inside_a_run(place, cut, request):
    if not cut:
        request.getfixturevalue("ends_are_drafted")
    tokens = oracle(ask(6, 8, temperature=1.0, ignore_eos=True, max_tokens=12), 0).token_ids
    first = next(i for i in range(place, 12) if tokens[i] not in tokens[:i])
    ends = ask(6, 8, temperature=1.0, ignore_eos=True, max_tokens=12, stop_token_ids=(tokens[first],), logprobs=1)
    for draft in (right, lambda future, count: (future + [5] * count)[:count]):
        _, _, [answer] = compared([ends], 7, draft)
        assert (answer.token_ids, answer.finish_reason) == (tokens[: first + 1], FinishReason.STOP)
        assert answer.stop_reason == tokens[first] and len(answer.logprobs) == first + 1


@pytest.mark.usefixtures("ends_are_drafted")
@pytest.mark.parametrize("max_tokens", [4, 5, 6, 7])
def test_a_stop_id_and_the_limit_in_one_run_end_it_at_whichever_comes_first(max_tokens):
    tokens = oracle(ask(6, 8, temperature=1.0, ignore_eos=True, max_tokens=12), 0).token_ids
    assert tokens[5] not in tokens[:5]
    asked = ask(6, 8, temperature=1.0, ignore_eos=True, max_tokens=max_tokens, stop_token_ids=(tokens[5],))
    _, _, [answer] = compared([asked], 8, lambda future, count: (tokens + [1] * 9)[12 - len(future) :][:count])
    assert answer.finish_reason is (FinishReason.STOP if max_tokens >= 6 else FinishReason.LENGTH)
    assert len(answer.token_ids) == min(max_tokens, 6)


@pytest.mark.parametrize("most", [1, 3, 4])
def test_the_limits_of_answer_and_context_are_kept_exactly(most):
    for max_tokens in range(1, most + 3):
        _, engine, [answer] = compared([ask(4, 9, temperature=0, ignore_eos=True, max_tokens=max_tokens)], most, right)
        assert len(answer.token_ids) == max_tokens
        assert engine.metrics().num_draft_tokens == max(0, min(most, max_tokens - 2))
    for room in range(1, most + 2):
        asked = ask(0, 32 - room, temperature=0, ignore_eos=True, max_tokens=None)
        _, _, [answer] = compared([asked], most, wrong, max_model_len=32, num_blocks=8)
        assert len(answer.token_ids) == room


class Toy:
    """A grammar whose mask depends on all tokens; it raises in `fill_mask` or `advance` at a given length."""

    def __init__(self, fails_at: int = 1000, fails_in: str = "", finished_at: int = 1000) -> None:
        self.options = fails_at, fails_in, finished_at
        self.tokens: list[int] = []

    def fill_mask(self, words) -> None:
        fails_at, fails_in, finished_at = self.options
        if fails_in == "fill_mask" and len(self.tokens) == fails_at:
            raise RuntimeError("no mask")
        allowed = {t for t in range(97) if (t + sum(self.tokens)) % 3 == 0 and t != EOS}
        if len(self.tokens) >= finished_at:
            allowed = {EOS}
        words[:] = 0
        for token in allowed:
            words.view(np.uint32)[token >> 5] |= np.uint32(1 << (token & 31))

    def advance(self, token_id: int) -> None:
        fails_at, fails_in, _ = self.options
        if fails_in == "advance" and len(self.tokens) == fails_at:
            raise RuntimeError("cannot go on")
        self.tokens.append(token_id)

    def rollback(self, num_tokens: int) -> None:
        if self.options[1] == "rollback" and num_tokens and len(self.tokens) >= self.options[0]:
            raise RuntimeError("cannot go back")
        if num_tokens:
            del self.tokens[-num_tokens:]

    def fork(self):
        other = Toy(*self.options)
        other.tokens = list(self.tokens)
        return other


@pytest.mark.parametrize("draft", [right, wrong, Mixed(3)], ids=["right", "wrong", "mixed"])
def test_a_grammar_holds_and_stands_where_the_answer_does(draft):
    asks = [ask(5, 8, n=2, temperature=1.0, max_tokens=15, min_tokens=3), ask(5, 9, temperature=0, logprobs=1)]
    compared(asks, 5, draft, Toy)
    known = {f"ask {i}/{j}": a.token_ids for (i, j), a in
             zip([(0, 0), (0, 1), (1, 0)], run(make_engine(), asks, Toy), strict=True)}  # fmt: skip
    engine = drafting(5, draft, known)

    def check_matchers() -> None:
        for sequence in engine.scheduler.running.decoding:
            assert sequence.matcher.tokens == sequence.output_token_ids

    run(engine, asks, Toy, check_matchers)


@pytest.mark.parametrize("finished_at", [3, 6])
def test_a_grammar_that_is_complete_inside_a_run_lets_nothing_but_the_end_follow(finished_at):
    def draft(future, count):
        return [*future, 4, 8, 15][:count]

    asked = ask(5, 8, n=2, temperature=1.0, max_tokens=15)
    _, _, answers = compared([asked], 6, draft, lambda: Toy(finished_at=finished_at))
    assert {(len(answer.token_ids), answer.token_ids[-1]) for answer in answers} == {(finished_at + 1, EOS)}


@pytest.mark.parametrize("fails_in", ["fill_mask", "advance"])
@pytest.mark.parametrize("fails_at", [1, 4, 6])
def test_a_grammar_that_breaks_ends_its_request_alone_and_only_where_the_answer_gets_there(fails_in, fails_at):
    asks = [ask(5, 8, temperature=1.0, max_tokens=12)]
    for draft in (right, Mixed(4)):
        _, _, [answer] = compared(asks, 5, draft, lambda: Toy(fails_at, fails_in))
        assert answer.finish_reason is FinishReason.ERROR and len(answer.token_ids) == fails_at
    asks = [ask(5, 8, temperature=1.0, max_tokens=fails_at)]  # the answer ends before
    _, _, [answer] = compared(
        asks, 9, lambda future, count: (future + [3] * 9)[:count], lambda: Toy(fails_at + 1, fails_in)
    )
    assert answer.finish_reason is FinishReason.LENGTH


def test_a_grammar_that_cannot_be_rolled_back_ends_its_request_alone(caplog):
    asks = [ask(5, 8, temperature=1.0, max_tokens=12), ask(5, 9, temperature=1.0, max_tokens=12)]
    expected = run(make_engine(), asks, Toy)
    known = {f"ask {i}/0": answer.token_ids for i, answer in enumerate(expected)}
    made = iter([Toy(5, "rollback"), Toy()])
    broken, whole = run(drafting(5, right, known), asks, lambda: next(made))
    assert broken.finish_reason is FinishReason.ERROR and broken.token_ids == expected[0].token_ids[:1]
    assert vars(whole) == vars(expected[1]) and "cannot go back" in caplog.text


def chains(engine: Engine) -> set[bytes]:
    pool = engine.pool
    return {pool._key_of(block) for block in range(pool.num_blocks) if pool._tokens[block] is not None}


@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("draft", [right, wrong, Mixed(5)], ids=["right", "wrong", "mixed"])
def test_the_prefix_cache_holds_what_it_holds_without_drafts(draft, block_size):
    asks = [ask(20, 5 + i, temperature=1.0, ignore_eos=True, max_tokens=21) for i in range(3)]
    plain, engine, answers = compared(asks, 7, draft, block_size=block_size)
    assert chains(engine) == chains(plain) and len(chains(engine)) > 10
    follow_up = Ask(
        (*asks[0].prompt, *answers[0].token_ids, 1), SamplingParams(temperature=0, max_tokens=4, logprobs=3)
    )
    hits = engine.metrics().num_prefix_hits
    ours, theirs = run(engine, [follow_up])[0], run(make_engine(), [follow_up])[0]
    assert ours.token_ids == theirs.token_ids and engine.metrics().num_prefix_hits > hits
    for entry, other in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert [i.logprob for i in entry.values()] == pytest.approx([i.logprob for i in other.values()], abs=1e-12)


@pytest.mark.parametrize("draft", [right, wrong], ids=["right", "wrong"])
@pytest.mark.parametrize("num_blocks", [9, 14, 25])
def test_drafts_preempt_nobody_and_leave_the_blocks_they_had(draft, num_blocks):
    asks = [ask(0, 6 + i, temperature=0, ignore_eos=True, max_tokens=12, frequency_penalty=0.3) for i in range(4)]
    plain, engine, _ = compared(asks, 7, draft, num_blocks=num_blocks, enable_prefix_caching=False)
    if draft is wrong:
        assert engine.metrics().num_preemptions == plain.metrics().num_preemptions
    assert engine.metrics().num_steps <= plain.metrics().num_steps


def test_between_steps_a_sequence_has_the_blocks_that_it_has_without_drafts():
    engine = drafting(7, wrong, {"ask 0/0": oracle(GREEDY, 0).token_ids})

    def check_blocks() -> None:
        running = engine.scheduler.running
        for sequence in running.decoding:
            assert running.computed[sequence.row] == sequence.num_tokens - 1
            assert running.capacity[sequence.row] == -(-(sequence.num_tokens - 1) // 4) * 4

    run(engine, [GREEDY], after_step=check_blocks)


@pytest.mark.parametrize("budget", range(1, 9))
def test_prompts_go_before_drafts(budget):
    driver = Driver(num_blocks=200, max_num_batched_tokens=budget, max_num_seqs=4, drafts="right", vocab_size=90)
    for start in range(2):
        driver.add([start + 1], SamplingParams(max_tokens=20))
    for i in range(4):
        driver.step()
        driver.add(list(range(i, i + 20)), SamplingParams(max_tokens=2))
    while driver.scheduler.waiting or driver.scheduler.running.prefilling:
        plan = driver.step()
        if driver.scheduler.running.prefilling:  # a prompt that is not at its end got all that was left
            assert plan.drafts is None
    driver.drain()


def test_numbers_that_mean_nothing_behind_a_wrong_draft_end_nobody():
    driver = Driver(num_blocks=50, drafts="wrong", max_num_seqs=2)
    driver.add([1, 2, 3], SamplingParams(max_tokens=9))
    while driver.scheduler.has_unfinished:
        plan = driver.scheduler.schedule()
        result = driver.runner.execute(plan)
        if plan.drafts is not None:
            result.is_bad[1:] = True
        driver.take(driver.scheduler.update(plan, result))
    assert [output.finish_reason for output in driver.ended.values()] == [FinishReason.LENGTH]


def test_counts_add_up():
    asks = [ask(i, 5 + i, temperature=i % 2, max_tokens=6 + 2 * i) for i in range(6)]
    _, engine, answers = compared(asks, 6, Mixed(6))
    counts = engine.metrics()
    assert counts.num_accepted_tokens == sum(counts.num_accepted_tokens_per_pos) <= counts.num_draft_tokens
    assert counts.num_accepted_tokens_per_pos == tuple(sorted(counts.num_accepted_tokens_per_pos, reverse=True))
    assert counts.num_generated_tokens == sum(len(answer.token_ids) for answer in answers)


def test_a_request_may_do_without_and_a_large_batch_does():
    asks = [ask(4, 9, temperature=0, ignore_eos=True, speculative=False)]
    engine = make_engine(4)
    run(engine, asks)
    assert engine.metrics().num_draft_tokens == 0 == engine.scheduler.running.num_speculating
    config = EngineConfig(
        max_model_len=64, max_num_batched_tokens=64, block_size=4, num_blocks=99, max_num_seqs=9,
        speculative_config={"method": "ngram", "disable_by_batch_size": 2},
    )  # fmt: skip
    engine = Engine(model(), config, eos_token_ids={EOS})
    drafters.use(engine, lambda request_id, index: Drafter([], wrong))
    run(engine, [ask(4, 9 + i, temperature=0, ignore_eos=True) for i in range(3)])
    assert engine.metrics().num_draft_tokens == 0
    run(engine, [ask(4, 9 + i, temperature=0, ignore_eos=True) for i in range(2)])
    assert engine.metrics().num_draft_tokens > 0


def test_a_repeating_answer_takes_fewer_steps_with_ngrams():
    asked = ask(20, 9, temperature=0, ignore_eos=True, max_tokens=60, frequency_penalty=-2.0)
    plain, engine = make_engine(), make_engine(4)
    assert run(plain, [asked])[0].token_ids == run(engine, [asked])[0].token_ids
    assert engine.metrics().num_steps < plain.metrics().num_steps / 2
