"""However requests are chunked, batched, cached, preempted, lagged or disturbed: exactly the oracle's tokens.

The model is tiny and float64, where the last bit of a matrix product cannot tip a choice. The oracle computes every
token anew, without cache and alone, and draws it with a sorting sampler. Log-probabilities agree to 1e-9.
"""

import itertools
import random
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pytest
import torch

from llama.api.outputs import FinishReason
from llama.api.params import SamplingParams
from llama.engine.config import EngineConfig
from llama.engine.engine import Engine
from llama.engine.sequence import TokenOutput
from tests import drafters, naive, naive_sampling
from tests.engine.fakes import add
from tests.model.models import hugging_face_weights, tiny_model

EOS = 11
SPECULATIVE_CONFIG = {"method": "ngram", "num_speculative_tokens": 5, "disable_by_batch_size": 1000}
TOLERANCE = 1e-9
SYSTEM = [random.Random(1).randrange(97) for _ in range(48)]


@cache
def model():
    return tiny_model()


@cache
def weights():
    return hugging_face_weights(model())


def prompt(shared: int, own: int, seed: int) -> tuple[int, ...]:
    return (*SYSTEM[:shared], *(random.Random(seed).randrange(97) for _ in range(own)))


@dataclass(frozen=True, eq=False)
class Ask:
    prompt: tuple[int, ...]
    params: SamplingParams


def ask(shared: int, own: int, **fields) -> Ask:
    return Ask(prompt(shared, own, own + 100), SamplingParams(**{"max_tokens": 12, "seed": own, **fields}))


ASKS = (
    ask(0, 1, temperature=0),
    ask(40, 3, temperature=0, logprobs=2),
    ask(48, 16, temperature=0, ignore_eos=True, max_tokens=20),
    ask(32, 32, temperature=0.8, top_p=0.9, logprobs=3),
    ask(32, 32, temperature=0.8, top_p=0.9, prompt_logprobs=2),
    ask(17, 5, n=3, temperature=1.5, top_k=20, logprobs=0),
    ask(48, 0, n=4, temperature=1.0, min_p=0.02, ignore_eos=True),
    ask(20, 9, temperature=1.0, repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=0.3),
    ask(20, 10, n=2, temperature=0, frequency_penalty=1.0, logprobs=1, logprobs_mode="processed"),
    ask(5, 21, temperature=0.7, top_k=10, logprobs=4, logprobs_mode="processed", prompt_logprobs=0),
    ask(10, 11, temperature=2.0, logit_bias={3: 5.0, 7: -100.0}, min_tokens=6, stop_token_ids=(3,)),
    ask(48, 2, temperature=1.0, stop_token_ids=(1, 2, 4, 8, 16, 32, 64)),
)


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, tuple[float, int]]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, tuple[float, int]] | None] | None = None
    finish_reason: FinishReason | None = None


def entry(logprobs: np.ndarray, token: int, count: int) -> dict[int, tuple[float, int]]:
    best = sorted(range(len(logprobs)), key=lambda i: (-logprobs[i], i))[:count]
    return {i: (float(logprobs[i]), 1 + int((logprobs > logprobs[i]).sum())) for i in dict.fromkeys([token, *best])}


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


@cache
def oracle(asked: Ask, index: int) -> Answer:
    """What completion `index` must be."""
    params, answer = asked.params, Answer()
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
    rules = naive_sampling.Params(**{name: getattr(params, name) for name in names}, logit_bias=params.logit_bias or {})
    seed = naive_sampling.child_seed(params.seed, index)
    ends = set(params.stop_token_ids) | (set() if params.ignore_eos else {EOS})

    def choose(logits: torch.Tensor, token_ids) -> int:
        generated = token_ids[len(asked.prompt) :]
        allowed = np.array([t not in ends or len(generated) >= params.min_tokens for t in range(len(logits))])
        outcome = naive_sampling.sample(
            logits.numpy(), rules, seed, len(token_ids), prompt=asked.prompt, generated=generated, allowed=allowed
        )
        if params.logprobs is not None:
            logprobs = log_softmax(logits.numpy())
            if params.logprobs_mode == "processed":
                with np.errstate(divide="ignore"):
                    logprobs = np.log(outcome.probs) if params.temperature else log_softmax(outcome.adjusted)
            answer.logprobs.append(entry(logprobs, outcome.token, params.logprobs))
        return outcome.token

    args = (weights(), model().config, list(asked.prompt), params.max_tokens)
    answer.token_ids = naive.generate(*args, choose=choose, stop_token_ids=ends)
    answer.finish_reason = FinishReason.STOP if answer.token_ids[-1] in ends else FinishReason.LENGTH
    if params.prompt_logprobs is not None and index == 0:
        logits = naive.forward(weights(), model().config, asked.prompt).numpy()
        scored = zip(logits[:-1], asked.prompt[1:], strict=True)
        answer.prompt_logprobs = [None, *(entry(log_softmax(row), t, params.prompt_logprobs) for row, t in scored)]
    return answer


def assert_same_entry(ours, theirs) -> None:
    if theirs is None:
        assert ours is None
        return
    finite = {token for token, (logprob, _) in theirs.items() if np.isfinite(logprob)}
    assert {token for token, item in ours.items() if np.isfinite(item.logprob)} == finite
    for token in finite:
        assert ours[token].logprob == pytest.approx(theirs[token][0], abs=TOLERANCE)
        assert ours[token].rank == theirs[token][1]


@dataclass(frozen=True)
class Case:
    """How the requests are run."""

    budget: int = 64
    block_size: int = 4
    max_num_seqs: int = 16
    cache: str = "on"  # off, on, warm
    num_tokens: int = 2048  # that the KV cache holds
    preempt: bool = False  # random sequences at random steps
    strangers: bool = False  # neighbours come, and are aborted in the middle
    lag: int = 0
    poison: bool = False  # all that is not in use holds NaN
    drafts: str = "none"  # ngram, or of a kind of tests/drafters.py
    seed: int = 0

    def config(self, **options) -> EngineConfig:
        values = {
            "max_model_len": 256,
            "max_num_batched_tokens": self.budget,
            "max_num_seqs": self.max_num_seqs,
            "block_size": self.block_size,
            "num_blocks": max(self.num_tokens // self.block_size, 1),
            "enable_prefix_caching": self.cache != "off",
            "speculative_config": None if self.drafts == "none" else SPECULATIVE_CONFIG,
        }
        return EngineConfig(**values | options)


def answer_to(request_id: str, index: int) -> list[int]:
    """Of request "ask N"; of strangers nothing is known."""
    kind, number = request_id.split()
    return oracle(ASKS[int(number)], index).token_ids if kind == "ask" else []


def make_engine(case: Case, made=None, *, runner=None, answers=answer_to, **options) -> Engine:
    """`made` in place of the model. `runner` makes one of a model and a configuration. Drafts follow `answers`."""
    made, config = made or model(), case.config(**options)
    engine = Engine(made, config, eos_token_ids={EOS}, runner=runner and runner(made, config))
    engine.runner.lag = case.lag
    engine.runner._scored_rows = 7  # prompts are scored in several pieces
    if case.drafts not in ("none", "ngram"):
        drafters.use(engine, lambda request_id, index: drafters.KINDS[case.drafts](answers(request_id, index)))
    return engine


class Run:
    """Steps an engine, disturbs it as the case wants, and gathers what comes."""

    def __init__(self, case: Case, engine: Engine) -> None:
        self.case, self.engine = case, engine
        self.random = random.Random(case.seed)
        self.strangers: list[str] = []
        self.outputs: dict[tuple[str, int], list[TokenOutput]] = {}

    def answers(self, asks) -> list[tuple[Ask, int, list[TokenOutput]]]:
        waiting = list(enumerate(asks))
        while waiting or self.engine.has_unfinished:
            for _ in range(min(len(waiting), self.random.randint(0, 3))):
                number, asked = waiting.pop(0)
                add(self.engine, f"ask {number}", list(asked.prompt), asked.params)
            self.disturb()
            for output in self.engine.step():
                assert output.finish_reason != FinishReason.ERROR, output
                self.outputs.setdefault((output.request_id, output.index), []).append(output)
            self.engine.check()
        return [(a, i, self.outputs[f"ask {number}", i]) for number, a in enumerate(asks) for i in range(a.params.n)]

    def disturb(self) -> None:
        case, scheduler = self.case, self.engine.scheduler
        running = [*scheduler.running.prefilling, *scheduler.running.decoding]
        # Not for ever: a long prompt in small chunks would hardly get to its end.
        if case.preempt and running and scheduler.num_preemptions < 60 and self.random.random() < 0.3:
            scheduler.preempt(self.random.choice(running))
        if case.strangers:
            if len(self.strangers) < 12 and self.random.random() < 0.5:
                name = f"stranger {len(self.strangers)}"
                tokens = prompt(self.random.randint(0, 48), self.random.randint(1, 20), self.random.randint(0, 9))
                self.strangers.append(name)
                add(self.engine, name, list(tokens), SamplingParams(n=self.random.randint(1, 3), max_tokens=20))
            if self.strangers and self.random.random() < 0.3:
                self.engine.abort(self.random.choice(self.strangers))
        if case.poison:
            self.poison()

    def poison(self) -> None:
        running, pool = self.engine.scheduler.running, self.engine.pool
        kept = torch.zeros(pool.num_blocks, pool.block_size, dtype=torch.bool)
        kept[list(pool._cached)] = True
        for sequence in (*running.prefilling, *running.decoding):
            for i, block in enumerate(running.blocks(sequence.row)):
                kept[block, : max(0, int(running.computed[sequence.row]) - i * pool.block_size)] = True
        self.engine.runner.kv.data[:, :, ~kept] = float("nan")


def check(case: Case, asks=ASKS) -> Engine:
    engine = make_engine(case)
    if case.poison:
        engine.runner.kv.data.fill_(float("nan"))
    if case.cache == "warm":
        Run(case, engine).answers(asks)
    for asked, index, outputs in Run(case, engine).answers(asks):
        expected = oracle(asked, index)
        assert [token for output in outputs for token in output.token_ids] == expected.token_ids, (asked, index)
        assert [output.finish_reason for output in outputs] == [None] * (len(outputs) - 1) + [expected.finish_reason]
        if expected.logprobs:
            entries = [item for output in outputs for item in output.logprobs]
            for ours, theirs in zip(entries, expected.logprobs, strict=True):
                assert_same_entry(ours, theirs)
        if expected.prompt_logprobs is not None:
            for ours, theirs in zip(outputs[0].prompt_logprobs, expected.prompt_logprobs, strict=True):
                assert_same_entry(ours, theirs)
    assert engine.metrics().num_used_blocks == 0
    return engine


@pytest.mark.parametrize("block_size", [1, 4, 16, 64, 128, 256])
@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_block_sizes_and_budgets(budget, block_size):
    check(Case(budget=budget, block_size=block_size))


ALONE = {
    "one at a time": {"max_num_seqs": 1},
    "three at a time": {"max_num_seqs": 3},
    "budget below max_num_seqs": {"budget": 3},
    "no prefix cache": {"cache": "off"},
    "warm prefix cache": {"cache": "warm"},
    "few blocks": {"num_tokens": 96},
    "preempted at random": {"preempt": True},
    "neighbours aborted": {"strangers": True},
    "update lags": {"lag": 1},
    "poisoned": {"poison": True, "strangers": True},
}


@pytest.mark.parametrize("changes", ALONE.values(), ids=ALONE)
def test_alone(changes):
    engine = check(replace(Case(), **changes))
    metrics = engine.metrics()
    if "num_tokens" in changes or "preempt" in changes:
        assert metrics.num_preemptions > 0
    assert (metrics.num_prefix_hits > 0) == (changes.get("cache") != "off")


def combined(seed: int) -> Case:
    pick = random.Random(seed)
    return Case(
        budget=pick.choice([3, 7, 16, 64, 4096]),
        block_size=pick.choice([1, 2, 4, 8, 16]),
        max_num_seqs=pick.choice([1, 2, 5, 16]),
        cache=pick.choice(["off", "on", "on", "warm"]),
        num_tokens=pick.choice([96, 128, 256, 2048]),
        preempt=pick.random() < 0.5,
        strangers=pick.random() < 0.5,
        lag=pick.randint(0, 1),
        poison=pick.random() < 0.5,
        seed=seed,
        drafts=pick.choice(["none", "ngram", *drafters.KINDS]),
    )


DRAFTED = {
    "ngram": {"drafts": "ngram", "strangers": True},
    "right": {"drafts": "right", "poison": True},
    "wrong, preempted, poisoned": {"drafts": "wrong", "preempt": True, "poison": True},
    "mixed, few blocks of one": {"drafts": "mixed", "num_tokens": 96, "block_size": 1},
    "mixed, update lags": {"drafts": "mixed", "lag": 1, "strangers": True},
}


@pytest.mark.parametrize("changes", DRAFTED.values(), ids=DRAFTED)
def test_drafts(changes):
    counts = check(replace(Case(), **changes)).metrics()
    assert counts.num_draft_tokens > 40
    assert (counts.num_accepted_tokens > 5) == (changes["drafts"] != "wrong")


@pytest.mark.parametrize("seed", range(8))
def test_combined(seed):
    check(combined(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8, 200))
def test_combined_at_length(seed):
    check(combined(seed))


def test_a_seed_gives_the_same_tokens_alone_and_among_thirty_strangers():
    asked = ask(10, 20, temperature=1.3, top_p=0.95, max_tokens=24, ignore_eos=True)
    check(Case(), [asked])
    strangers = [ask(i, 31 - i, temperature=1.0, max_tokens=3 + i % 7) for i in range(30)]
    check(Case(budget=48), [*strangers[:15], asked, *strangers[15:]])


def test_four_completions_are_different_and_the_first_is_that_of_one():
    one, four = (ask(8, 13, n=n, temperature=1.0, ignore_eos=True) for n in (1, 4))
    check(Case(), [one, four])
    answers = [tuple(oracle(four, i).token_ids) for i in range(4)]
    assert len(set(answers)) == 4 and list(answers[0]) == oracle(one, 0).token_ids


def test_every_way_of_ending_is_met():
    """The matrix above would prove little if no request ended early."""
    reasons = [oracle(a, i).finish_reason for a, i in itertools.product(ASKS, range(1))]
    assert set(reasons) == {FinishReason.STOP, FinishReason.LENGTH}
