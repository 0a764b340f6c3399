"""Sampling on a CPU: each rule by hand, rows that are bad, rows in any company, log-probabilities, penalty state."""

import math

import numpy as np
import pytest
import torch

from llama.kernels.cpu.sampling import logprobs, sample, token_logprobs
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW, SamplerState
from tests import naive_sampling
from tests.naive_sampling import Params
from tests.ops.naive_rows import distribution, make_rows, random_logits

INF, NAN = math.inf, math.nan
LN2 = math.log(2)


def logs(*weights):
    return [math.log(weight) for weight in weights]


# Weights come in sixteenths and the like, so that sums and their comparisons with a threshold are exact.
BY_HAND = {
    "temperature below 1 sharpens": (logs(1, 2), {"temperature": 0.5}, [1 / 5, 4 / 5]),
    "temperature above 1 flattens": (logs(1, 4), {"temperature": 2.0}, [1 / 3, 2 / 3]),
    "min_p keeps what reaches its share of the best": ([0, 0, -1, -3], {"min_p": 0.25}, "keep 0 1 2"),
    "min_p 1 keeps all that tie with the best": ([2, 1, 2], {"min_p": 1.0}, "keep 0 2"),
    "top_k 1 keeps the best": ([1, 3, 2], {"top_k": 1}, "keep 1"),
    "top_k keeps all ties at its last place": ([1, 2, 1, 3, 1], {"top_k": 3}, "keep 0 1 2 3 4"),
    "top_k counts ties above its last place once each": ([2, 2, 1, 0], {"top_k": 2}, "keep 0 1"),
    "top_k beyond the vocabulary is off": ([1, 2, 3], {"top_k": 7}, "keep 0 1 2"),
    "top_p keeps the token that crosses": (logs(8, 4, 2, 2), {"top_p": 0.6}, [8 / 12, 4 / 12, 0, 0]),
    "top_p stops at equality": ([0, 0, 0, 0], {"top_p": 0.5}, "keep 0 1"),
    "top_p just above equality goes on": ([0, 0, 0, 0], {"top_p": 0.5000001}, "keep 0 1 2"),
    "top_p breaks ties by the lower id": ([0, 1, 0, 1, 0], {"top_p": 0.7}, "keep 0 1 3"),
    "top_p 0 keeps the best alone": ([0, 3, 3], {"top_p": 0.0}, "keep 1"),
    "top_p near 0 is never empty": ([0, 0, 0], {"top_p": 1e-300}, "keep 0"),
    "top_p 1 is off": ([0, -700, -800], {"top_p": 1.0}, "keep 0 1 2"),
    "top_p renormalises what top_k left": ([1, 1, 0, 0, 0, 0], {"top_k": 2, "top_p": 0.5}, "keep 0"),
    "top_p renormalises what min_p left": ([1, 1, 0, 0, 0, 0], {"min_p": 0.9, "top_p": 0.5}, "keep 0"),
    "min_p looks at the tempered distribution": ([0, -1], {"temperature": 2.0, "min_p": 0.6}, "keep 0 1"),
    "-inf is never kept": ([0, -INF, 0], {"top_k": 3}, "keep 0 2"),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_filters_by_hand(case):
    logits, params, expected = BY_HAND[case]
    if isinstance(expected, str):
        kept = [int(word) for word in expected.split()[1:]]
        weights = [math.exp(logits[i] / params.get("temperature", 1)) if i in kept else 0 for i in range(len(logits))]
        expected = [weight / sum(weights) for weight in weights]
    probs, token = distribution(logits, **params)
    assert probs == pytest.approx(expected, rel=1e-12, abs=0)
    assert expected[token] > 0


# What the logits are before the softmax; every case is far from what another order of the rules would give.
ADJUSTED = {
    "bias": ([1, 2], {"logit_bias": {0: 3.0}}, [4, 2]),
    "repetition divides above zero, multiplies below": ([2, -2, 2], {"repetition_penalty": 2.0}, [1, -4, 2]),
    "repetition below 1 rewards": ([2, -2, 2], {"repetition_penalty": 0.5}, [4, -1, 2]),
    "frequency counts, and only what was generated": ([1, 1, 1], {"frequency_penalty": 0.5}, [1, 0, 0.5]),
    "presence does not count": ([1, 1, 1], {"presence_penalty": 0.75}, [1, 0.25, 0.25]),
    "negative penalties reward": (
        [1, 1, 1],
        {"frequency_penalty": -1.0, "presence_penalty": -1.0},
        [1, 4, 3],
    ),
    "bias comes before repetition": ([-1, 0, 0], {"logit_bias": {0: 3.0}, "repetition_penalty": 2.0}, [1, 0, 0]),
    "repetition comes before frequency": (
        [0, 4, 0],
        {"repetition_penalty": 2.0, "frequency_penalty": 1.0},
        [0, 0, -1],
    ),
    "temperature comes last": ([0, 2, 0], {"temperature": 0.5, "frequency_penalty": 0.5}, [0, 2, -1]),
}


@pytest.mark.parametrize("case", ADJUSTED)
def test_penalties_by_hand(case):
    """The prompt holds tokens 0 and 1; 1 has been generated twice and 2, where there is one, once."""
    logits, params, expected = ADJUSTED[case]
    generated = [1, 2, 1] if len(logits) == 3 else []
    if case.startswith(("repetition d", "repetition b")):
        generated = [1]
    probs, _ = distribution(logits, prompt=[0, 1, 1], generated=generated, **params)
    weights = np.exp(expected)
    assert probs == pytest.approx(weights / weights.sum(), rel=1e-12)


def test_greedy_takes_the_lowest_id_and_ignores_filters():
    logits = torch.tensor([[1.0, 3, 2, 3], [0, 0, 0, 0], [-INF, -5, -INF, -5]])
    params = Params(temperature=0, top_p=0.1, top_k=1, min_p=1.0)
    assert sample(logits, make_rows([params] * 3)).token_ids.tolist() == [1, 0, 1]


def test_greedy_sees_bias_penalties_and_mask():
    logits, greedy = [3.0, 2.0, 1.0], {"temperature": 0.0}
    assert distribution(logits, logit_bias={2: 5.0}, **greedy)[1] == 2
    assert distribution(logits, prompt=[0], repetition_penalty=2.0, **greedy)[1] == 1
    assert distribution(logits, generated=[0, 0], frequency_penalty=0.6, **greedy)[1] == 1
    assert distribution(logits, allowed=[False, False, True], **greedy)[1] == 2


def test_processed_logprobs_of_greedy_rows_are_those_after_the_penalties():
    probs, _ = distribution([1.0, 2.0], generated=[1], presence_penalty=1.5, temperature=0.0, top_k=1)
    assert probs == pytest.approx(np.exp([1, 0.5]) / np.exp([1, 0.5]).sum())


def test_mask_forbids_and_its_padding_means_nothing():
    allowed = [token % 3 == 1 for token in range(70)]
    probs, token = distribution([0.0] * 70, allowed=allowed)
    assert probs == pytest.approx([ok / sum(allowed) for ok in allowed])
    assert allowed[token]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_bad_rows_are_marked_and_harm_no_other(temperature, filters):
    good = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bad = torch.zeros(5, 100, dtype=torch.float64)
    bad[0, 5], bad[1, 99], bad[2], bad[3, 7], bad[4] = NAN, NAN, -INF, INF, NAN
    logits = torch.cat([good[:1], bad, good[1:]])
    params = Params(temperature=temperature, repetition_penalty=1.5, **filters)
    state = SamplerState(7, 100)
    rows = make_rows([params] * 7, modes=[LOGPROBS_RAW, *[LOGPROBS_PROCESSED] * 6], num_logprobs=3)
    sampled = sample(logits, rows, state)
    assert sampled.is_bad.tolist() == [False, True, True, True, True, True, False]
    assert sampled.token_ids[1:6].tolist() == [0] * 5
    assert state.counts.sum(1).tolist() == [1, 0, 0, 0, 0, 0, 1]
    alone = sample(good, make_rows([params] * 2, [0, 6]), SamplerState(2, 100))
    assert alone.token_ids.tolist() == sampled.token_ids[[0, 6]].tolist()


def test_nan_under_the_mask_or_a_ban_is_seen():
    logits = torch.tensor([[1.0, NAN, 2.0]] * 2, dtype=torch.float64)
    allowed = np.array([[True, False, True], [True, True, True]])
    rows = make_rows([Params(), Params(logit_bias={1: -INF})], allowed=allowed)
    assert sample(logits, rows).is_bad.tolist() == [True, True]


def test_a_mask_that_allows_nothing_is_bad():
    rows = make_rows([Params()], allowed=np.zeros((1, 40), bool))
    assert sample(torch.zeros(1, 40), rows).is_bad.tolist() == [True]


def test_tiny_temperatures_do_not_overflow():
    logits = torch.tensor([[1e4, 1e4 - 1e-2, -1e4]] * 2)
    params = [Params(temperature=1e-30), Params(temperature=1e-30, top_p=0.5, min_p=0.1)]
    sampled = sample(logits, make_rows(params, dtype=torch.float32))
    assert sampled.token_ids.tolist() == [0, 0] and not sampled.is_bad.any()


def test_a_row_draws_the_same_among_any_others():
    params = [Params(), Params(top_p=0.7), Params(top_k=9), Params(temperature=0.0), Params(presence_penalty=1.0)] * 8
    logits, seeds = random_logits(40, 900), [i * 31 for i in range(40)]
    together = sample(logits, make_rows(params, seeds), SamplerState(40, 900)).token_ids
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    shuffled = make_rows([params[i] for i in order], [seeds[i] for i in order])
    assert torch.equal(sample(logits[order], shuffled, SamplerState(40, 900)).token_ids, together[order])
    for row in range(0, 40, 3):
        alone = sample(logits[row : row + 1], make_rows([params[row]], [seeds[row]]), SamplerState(1, 900))
        assert alone.token_ids.tolist() == [together[row]]


def test_rows_are_the_same_in_parts(monkeypatch):
    params = [Params(logit_bias={3: 2.0}), Params(top_p=0.7), Params(temperature=0.0, frequency_penalty=0.5)] * 5
    logits, modes = random_logits(15, 200), [LOGPROBS_OFF, LOGPROBS_RAW, LOGPROBS_PROCESSED] * 5
    allowed = np.random.default_rng(0).random((15, 200)) < 0.9
    rows = make_rows(params, modes=modes, num_logprobs=4, allowed=allowed)
    whole = sample(logits, rows, SamplerState(15, 200))
    monkeypatch.setattr(logprobs, "ELEMENTS_AT_ONCE", 4 * 200)
    parts = sample(logits, rows, SamplerState(15, 200))
    assert torch.equal(parts.token_ids, whole.token_ids)
    for name in ("logprob", "rank", "top_ids", "top_logprobs"):
        assert torch.equal(getattr(parts.logprobs, name), getattr(whole.logprobs, name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_are_widened_first(dtype):
    logits = random_logits(6, 300).to(dtype)
    params = [Params(temperature=0.0), Params(), Params(top_p=0.6), Params(top_k=5), Params(min_p=0.1), Params()]
    rows = make_rows(params, dtype=torch.float32, modes=[LOGPROBS_RAW] * 6, num_logprobs=3)
    narrow, wide = sample(logits, rows), sample(logits.float(), rows)
    assert torch.equal(narrow.token_ids, wide.token_ids)
    assert narrow.logprobs.logprob.dtype == torch.float32
    assert torch.equal(narrow.logprobs.top_logprobs, wide.logprobs.top_logprobs)


def test_no_rows():
    sampled = sample(torch.zeros(0, 50), make_rows([], num_logprobs=2))
    assert sampled.token_ids.shape == (0,) and sampled.logprobs.top_ids.shape == (0, 2)


def test_penalties_need_a_state():
    with pytest.raises(ValueError, match="SamplerState"):
        sample(torch.zeros(1, 9), make_rows([Params(presence_penalty=1.0)]))


def test_token_logprobs():
    logits = random_logits(3, 777)
    logits[1, 100:] = -INF
    ids = torch.tensor([5, 99, 700])
    answer = token_logprobs(logits, ids, 20)
    expected = logits.log_softmax(1)
    assert torch.equal(answer.logprob, expected[torch.arange(3), ids])
    assert answer.rank.tolist() == [1 + (row > row[token]).sum().item() for row, token in zip(logits, ids, strict=True)]
    values, top_ids = expected.topk(20)
    assert torch.equal(answer.top_ids, top_ids) and torch.equal(answer.top_logprobs, values)


def test_token_logprobs_breaks_ties_by_the_lower_id():
    logits = torch.tensor([[0.0, 2, 1, 2, 1, 2, 1]])
    answer = token_logprobs(logits, torch.tensor([4]), 5)
    assert answer.top_ids.tolist() == [[1, 3, 5, 2, 4]]
    assert answer.rank.tolist() == [4]
    assert token_logprobs(logits, torch.tensor([4]), 0).top_ids.shape == (1, 0)


def test_token_logprobs_names_no_token_without_probability():
    logits = torch.tensor([[0.0, -INF, 1.0]])
    answer = token_logprobs(logits, torch.tensor([2]), 5)
    assert answer.top_ids.tolist() == [[2, 0, -1, -1, -1]]
    assert answer.top_logprobs[0, 2:].tolist() == [-INF] * 3


def test_a_row_of_the_state_is_set():
    state = SamplerState(3, 70)
    state.set_row(0, [69, 31, 0, 31], [5, 5, 31])
    words = state.prompt_mask[0].numpy().view(np.uint32).tolist()
    assert words == [1 | 1 << 31, 0, 1 << 5]
    assert state.counts[0].nonzero().squeeze(1).tolist() == [5, 31]
    assert state.counts[0, [5, 31]].tolist() == [2, 1]
    state.set_row(0, [1], [])
    assert state.prompt_mask[0].tolist() == [2, 0, 0] and state.counts[0].sum() == 0
    assert state.counts[1:].sum() == 0 and not state.prompt_mask[1:].any()


def test_counts_follow_the_drawn_tokens():
    """Generated step by step, or set from the tokens: one and the same state and the same next token."""
    params, logits = [Params(frequency_penalty=0.5, repetition_penalty=1.2)] * 2, random_logits(1, 40, scale=1.0)
    state, tokens = SamplerState(2, 40), []
    state.set_row(0, [1, 2, 3], [])
    for step in range(30):
        rows = make_rows(params[:1], [11], [3 + step])
        tokens.append(int(sample(logits, rows, state).token_ids))
        past = {"prompt": [1, 2, 3], "generated": tokens[:-1]}
        expected = naive_sampling.sample(logits[0].numpy(), params[0], 11, 3 + step, **past)
        assert tokens[-1] == expected.token
    state.set_row(1, [1, 2, 3], tokens)
    assert torch.equal(state.counts[0], state.counts[1]) and torch.equal(*state.prompt_mask)
