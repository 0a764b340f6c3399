"""Sampling on a CPU against transformers, against the naive oracle, and as a distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.kernels.cpu.sampling import sample
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW, SamplerState
from tests import naive_sampling
from tests.naive_sampling import Params
from tests.ops.naive_rows import chi_square_score, distribution, make_rows, random_logits

INF = math.inf

# transformers' processors work on scores alone; the tokens they leave finite are compared, and their values.


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.7}, [("TemperatureLogitsWarper", 0.7)]),
        ({"top_k": 40}, [("TopKLogitsWarper", 40)]),
        ({"top_p": 0.9}, [("TopPLogitsWarper", 0.9)]),
        ({"top_p": 0.05}, [("TopPLogitsWarper", 0.05)]),
        ({"min_p": 0.02}, [("MinPLogitsWarper", 0.02)]),
        ({"repetition_penalty": 1.3}, [("RepetitionPenaltyLogitsProcessor", 1.3)]),
        (
            {"repetition_penalty": 0.8, "temperature": 1.5, "top_k": 100, "top_p": 0.8},
            [
                ("RepetitionPenaltyLogitsProcessor", 0.8),
                ("TemperatureLogitsWarper", 1.5),
                ("TopKLogitsWarper", 100),
                ("TopPLogitsWarper", 0.8),
            ],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_equal_to_transformers(ours, theirs, seed):
    """On logits without ties: at the edge of a nucleus theirs depend on an unstable sort, ours keep the lower ids."""
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits, prompt = random_logits(1, seed=seed), [3, 1, 4, 1, 5, 92, 65, 35]
    scores = logits.clone()
    for name, argument in theirs:
        scores = getattr(processors, name)(argument)(torch.tensor([prompt]), scores)
    probs, _ = distribution(logits[0], prompt=prompt[:4], generated=prompt[4:], **ours)
    assert (np.array(probs) > 0).tolist() == scores[0].isfinite().tolist()
    assert probs == pytest.approx(scores[0].softmax(0).tolist(), rel=1e-9)


def test_top_k_keeps_ties_as_transformers_does():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(1, scale=1.0).round()
    for top_k in (1, 5, 50, 400):
        scores = processors.TopKLogitsWarper(top_k)(None, logits)
        probs, _ = distribution(logits[0], top_k=top_k)
        assert (np.array(probs) > 0).tolist() == scores[0].isfinite().tolist()


# Against the naive oracle, in float64, token for token.

params_strategy = st.builds(
    Params,
    temperature=st.sampled_from([0.0, 0.1, 0.6, 1.0, 1.7, 5.0]),
    top_p=st.sampled_from([1.0, 1.0, 0.0, 0.01, 0.3, 0.5, 0.9, 0.999]),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 70, 10_000]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.1, 0.7, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.25, 3.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, -0.5, 0.25, 2.0]),
    presence_penalty=st.sampled_from([0.0, 0.0, -1.0, 0.75]),
    logit_bias=st.dictionaries(st.integers(0, 6), st.sampled_from([-100.0, -INF, -1.0, 2.5]), max_size=3),
)


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equal_to_the_naive_oracle(data):
    vocab = data.draw(st.sampled_from([7, 8, 33, 64, 65, 130, 700]), label="vocab")
    params = data.draw(st.lists(params_strategy, min_size=1, max_size=5), label="params")
    size = len(params)
    random = np.random.default_rng(data.draw(st.integers(0, 2**32), label="logits"))
    logits = random.standard_normal((size, vocab)) * data.draw(st.sampled_from([0.05, 1.0, 6.0]), label="scale")
    if data.draw(st.booleans(), label="ties"):
        logits = logits.round()
    seeds = data.draw(st.lists(st.integers(0, 2**63 - 1), min_size=size, max_size=size), label="seeds")
    positions = random.integers(0, 200_000, size).tolist()
    prompts, outputs = ([random.integers(0, vocab, random.integers(0, 12)) for _ in params] for _ in range(2))
    allowed = random.random((size, vocab)) < 0.8 if data.draw(st.booleans(), label="mask") else None
    if allowed is not None:
        allowed[:, -1] = True
    modes = random.integers(0, 3, size).tolist()
    state = SamplerState(size, vocab)
    for row in range(size):
        state.set_row(row, prompts[row].tolist(), outputs[row].tolist())

    rows = make_rows(params, seeds, positions, modes=modes, num_logprobs=5, allowed=allowed)
    before = torch.from_numpy(logits.copy())
    sampled = sample(before, rows, state)
    assert np.array_equal(before.numpy(), logits)  # raw logits stay as they were
    for row in range(size):
        expected = naive_sampling.sample(
            logits[row],
            params[row],
            seeds[row],
            positions[row],
            prompt=prompts[row].tolist(),
            generated=outputs[row].tolist(),
            allowed=None if allowed is None else allowed[row],
        )
        assert sampled.token_ids[row] == expected.token
        drawn_from = logits[row] if modes[row] == LOGPROBS_RAW else expected.adjusted
        probs = np.exp(drawn_from - drawn_from.max())
        if modes[row] == LOGPROBS_PROCESSED and params[row].temperature:
            probs = expected.probs
        check_logprobs(sampled.logprobs, row, modes[row], expected.token, probs / probs.sum())
        counted = rows.penalty_rows[row] >= 0
        assert state.counts[row, expected.token] == (outputs[row] == expected.token).sum() + counted


def check_logprobs(logprobs, row, mode, token, probs):
    top_ids, top = logprobs.top_ids[row], logprobs.top_logprobs[row]
    if mode == LOGPROBS_OFF:
        assert logprobs.logprob[row] == 0 and logprobs.rank[row] == 0
        assert (top_ids == -1).all() and (top == -INF).all()
        return
    assert logprobs.logprob[row].exp().item() == pytest.approx(probs[token], rel=1e-9, abs=1e-300)
    if probs[token] > 1e-200:
        assert logprobs.rank[row] == 1 + (probs > probs[token] * (1 + 1e-12)).sum()
    order = sorted(np.flatnonzero(probs > 1e-200), key=lambda each: (-round(math.log(probs[each]), 9), each))[:5]
    assert top_ids[: len(order)].tolist() == order
    assert top[: len(order)].exp().tolist() == pytest.approx(probs[order], rel=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.01, 1.0, 4.0])
def test_equal_to_the_naive_oracle_over_a_real_vocabulary(scale):
    """Flat and peaked rows of 49,152 logits: every shortcut is taken, and every way back from one."""
    params = [Params(), *(Params(top_p=share) for share in (0.0, 0.9, 0.999))]
    params += [Params(top_k=1000, top_p=0.5), Params(min_p=1e-3), Params(min_p=0.01, top_p=0.5)]
    logits = random_logits(len(params), 49_152, seed=3, scale=scale)
    sampled = sample(logits, make_rows(params, positions=[9] * len(params)))
    for row, each in enumerate(params):
        expected = naive_sampling.sample(logits[row].numpy(), each, row, 9)
        assert sampled.token_ids[row] == expected.token


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.4, "top_k": 30},
        {"top_p": 0.8},
        {"min_p": 0.05, "top_p": 0.95},
        {"logit_bias": {3: 2.0, 5: -100.0}, "temperature": 2.0},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """20,000 draws over fixed seeds and positions, chi-square against the exact probabilities."""
    number, logits = 20_000, random_logits(1, 60, seed=7, scale=1.5)[0]
    seeds, positions = [7 + i // 100 for i in range(number)], [5 + i % 100 for i in range(number)]
    rows = make_rows([Params(**params)] * number, seeds, positions, dtype=torch.float32)
    tokens = sample(logits.float().expand(number, -1), rows).token_ids.numpy()
    adjusted = naive_sampling.adjust(logits.numpy(), Params(**params))
    probs = naive_sampling.distribution(adjusted, Params(**params))
    assert abs(chi_square_score(np.bincount(tokens, minlength=60), probs)) < 4
