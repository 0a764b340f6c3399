"""The Triton log-probabilities against the CPU's, in the interpreter."""

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import sampling as cpu_sampling
from llama.kernels.gpu.sampling import rules
from tests.sampling_rows import make_rows, make_state

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TOLERANCE = 2e-6  # float32: the order of the sum of exponentials, and exp and log in the last place


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(rules, "TILE", 256)


def _logits(rows, vocab, dtype=torch.float32):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab)) * 3).to(dtype)


def _close(actual, expected):
    assert torch.equal(actual.rank, expected.rank)
    assert torch.equal(actual.top_ids, expected.top_ids)
    torch.testing.assert_close(actual.logprob, expected.logprob, rtol=TOLERANCE, atol=TOLERANCE)
    torch.testing.assert_close(actual.top_logprobs, expected.top_logprobs, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("vocab", "num_top"), [(1, 1), (50, 0), (257, 20), (1000, 5), (60, 60)])
def test_token_logprobs(vocab, num_top, dtype):
    logits = _logits(3, vocab, dtype)
    token_ids = torch.tensor([0, vocab - 1, vocab // 2])
    _close(ops.token_logprobs(logits, token_ids, num_top), cpu_sampling.token_logprobs(logits, token_ids, num_top))


def test_ties_signed_zeros_and_forbidden_tokens():
    logits = torch.zeros(3, 400)
    logits[0, ::2] = -0.0
    logits[1, 100:] = -torch.inf
    logits[2] = -torch.inf
    logits[2, [399, 5, 270]] = torch.tensor([1.0, 2.0, 1.0])
    token_ids = torch.tensor([7, 50, 399])
    _close(ops.token_logprobs(logits, token_ids, 6), cpu_sampling.token_logprobs(logits, token_ids, 6))


def test_no_rows():
    logprobs = ops.token_logprobs(torch.empty(0, 50), torch.empty(0, dtype=torch.int64), 4)
    assert logprobs.rank.shape == (0,) and logprobs.top_logprobs.shape == (0, 4)


def test_modes_of_a_draw():
    slots = [([1, 2, 3], [4, 4, 5])]
    penalties = {"penalty_row": 0, "repetition_penalty": 1.4, "frequency_penalty": 0.6}
    params = [
        {"logprobs": "raw", **penalties},
        {"logprobs": "processed", **penalties},
        {"logprobs": "processed", "temperature": 0.0, "bias": {9: 4.0}, **penalties},
        {"logprobs": "processed", "temperature": 0.7, "top_k": 5},
        {"logprobs": "processed", "top_p": 0.6, "min_p": 0.01, "allowed": list(range(0, 300, 2))},
        {"top_k": 5},
        {"logprobs": "raw", "temperature": 0.0},
    ]
    logits = _logits(len(params), 300)
    states = [make_state(300, slots) for _ in range(2)]
    rows = make_rows(params, 300, num_logprobs=8)
    actual, expected = ops.sample(logits, rows, states[0]), cpu_sampling.sample(logits, rows, states[1])
    assert torch.equal(actual.token_ids, expected.token_ids)
    _close(actual.logprobs, expected.logprobs)
    assert torch.equal(states[0].counts, states[1].counts)
    assert actual.logprobs.logprob[5] == 0 and actual.logprobs.rank[5] == 0


def test_chosen_token_alone():
    rows = make_rows([{"logprobs": "raw"}, {"logprobs": "processed", "top_p": 0.5}], 300, num_logprobs=0)
    logits = _logits(2, 300)
    actual, expected = ops.sample(logits, rows), cpu_sampling.sample(logits, rows, None)
    _close(actual.logprobs, expected.logprobs)
    assert actual.logprobs.top_ids.shape == (2, 0)
