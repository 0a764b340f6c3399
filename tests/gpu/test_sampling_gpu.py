"""The sampler on a GPU: against the CPU's in float64, as a distribution, alone and in a crowd, within a CUDA graph."""

import dataclasses
import math

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import sampling as cpu_sampling
from llama.kernels.gpu import sampling
from llama.kernels.types import SamplerRows
from tests.sampling_rows import gumbel, make_rows, make_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
VOCAB = 128_256
# Scores that float64 tells apart by less than this may come out the other way in float32: a score is about 10, its
# last place 1e-6, and two logarithms, a division and a sum are rounded on the way.
CLOSE = 2e-5

PARAMS = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.9},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 50, "top_p": 0.9, "temperature": 0.7},
    {"top_k": 20_000, "top_p": 0.95},
    {"top_k": VOCAB - 1},
    {"top_p": 0.0},
    {"top_p": 0.3, "temperature": 1.5},
    {"top_p": 0.9999},
    {"min_p": 0.05},
    {"min_p": 0.01, "top_p": 0.8, "top_k": 1000},
    {"bias": {5: 30.0, 7: -float("inf")}, "top_p": 0.5},
    {"allowed": list(range(0, VOCAB, 7)), "top_k": 40},
    {"penalty_row": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "presence_penalty": 0.5, "top_p": 0.9},
]
SLOTS = [(list(range(0, 4000, 3)), list(range(0, 1000, 2)) * 2)]


def _logits(rows, vocab=None, *, scale=3.0, dtype=torch.float32, seed=0):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return (torch.randn(rows, vocab or VOCAB, generator=generator, device=DEVICE) * scale).to(dtype)


def _on_cpu(rows: SamplerRows) -> SamplerRows:
    """The same rows for the CPU in float64."""
    moved = {}
    for field in dataclasses.fields(rows):
        value = getattr(rows, field.name)
        if isinstance(value, torch.Tensor):
            moved[field.name] = value.cpu().double() if value.is_floating_point() else value.cpu()
    return dataclasses.replace(rows, **moved)


def _gap(logits, param, key, state, tokens):
    """By how much float64 tells the scores of two tokens of a row apart; infinite where one could not be drawn."""
    rows = make_rows([{**param, "key": key, "logprobs": "processed"}], len(logits), num_logprobs=len(logits))
    logprobs = cpu_sampling.sample(logits.cpu().double()[None], _on_cpu(rows), state).logprobs
    x = dict(zip(logprobs.top_ids[0].tolist(), logprobs.top_logprobs[0].tolist(), strict=True))
    first, second = (x.get(token, -math.inf) + gumbel(token, key) for token in tokens)
    return abs(first - second)


def _check(logits, params, *, seed=0):
    """Tokens and counts equal those of float64 on the CPU, but where float64 itself hardly tells two tokens apart."""
    vocab = logits.shape[1]
    rows = make_rows(params, vocab, seed=seed, device=DEVICE)
    slots = [tuple([token for token in ids if token < vocab] for ids in slot) for slot in SLOTS]
    state, oracle_state = make_state(vocab, slots, DEVICE), make_state(vocab, slots)
    before = make_state(vocab, slots)
    sampled = ops.sample(logits, rows, state)
    expected = cpu_sampling.sample(logits.cpu().double(), _on_cpu(rows), oracle_state)
    assert sampled.is_bad.tolist() == expected.is_bad.tolist()
    pairs = list(zip(sampled.token_ids.tolist(), expected.token_ids.tolist(), strict=True))
    for row, pair in enumerate(pairs):
        if pair[0] != pair[1]:
            key = tuple(rows.keys[row].tolist())
            assert _gap(logits[row], params[row], key, before, pair) < CLOSE, f"row {row} {params[row]}: {pair}"
    if all(a == b for a, b in pairs):
        assert torch.equal(state.counts.cpu(), oracle_state.counts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_tokens_equal_the_cpus(scale, dtype):
    for seed in range(2):
        _check(_logits(len(PARAMS), scale=scale, dtype=dtype, seed=seed), PARAMS, seed=seed)


def test_logits_as_a_model_makes_them():
    # Some tokens stand out of a crowd that lies about 15 below them.
    logits = _logits(len(PARAMS), scale=2.0)
    logits[:, ::4001] += 15
    _check(logits, PARAMS)


def test_all_tokens_equal():
    _check(torch.zeros(len(PARAMS), VOCAB, device=DEVICE), PARAMS)


def test_odd_vocabularies():
    params = [param for param in PARAMS if "allowed" not in param]
    for vocab in (1, 31, 1000, 1025, 49_153):
        _check(_logits(len(params), vocab), [{**p, "bias": {}} for p in params])


def test_bad_rows_harm_nobody():
    logits = _logits(6)
    logits[0, VOCAB - 1] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    params = [{"top_p": 0.9}, {}, {"temperature": 0.0}, {}, {"top_k": 9}, {"temperature": 0.0}]
    _check(logits, params)
    assert ops.sample(logits, make_rows(params, VOCAB, device=DEVICE)).is_bad.tolist() == [True] * 3 + [False] * 3


# --- as a distribution


@pytest.mark.parametrize(
    "param",
    [{}, {"temperature": 0.5}, {"top_k": 20}, {"top_p": 0.7}, {"min_p": 0.05}, {"top_k": 30, "top_p": 0.8}],
    ids=str,
)
def test_draws_follow_the_distribution(param):
    vocab, draws = 500, 20_000
    logits = _logits(1, vocab, scale=2.0)
    rows = make_rows([{**param, "logprobs": "processed"}], vocab, num_logprobs=vocab)
    top = cpu_sampling.sample(logits.cpu().double(), _on_cpu(rows), None).logprobs
    probabilities = torch.zeros(vocab, dtype=torch.float64)
    kept = top.top_ids[0] >= 0
    probabilities[top.top_ids[0][kept]] = top.top_logprobs[0][kept].exp()
    tokens = ops.sample(logits.expand(draws, vocab), make_rows([param] * draws, vocab, device=DEVICE)).token_ids
    seen = torch.bincount(tokens.cpu(), minlength=vocab).double()
    assert not seen[probabilities == 0].any()
    expected = probabilities * draws
    common = expected >= 5
    rest = torch.stack((expected[~common].sum(), seen[~common].sum()))
    expected, seen = torch.cat((expected[common], rest[:1])), torch.cat((seen[common], rest[1:]))
    if expected[-1] < 5:
        expected, seen = expected[:-1], seen[:-1]
    freedom = len(expected) - 1
    chi_square = ((seen - expected).square() / expected).sum()
    # The keys are fixed, so this passes always or never; six standard deviations above the mean are no bad luck.
    assert chi_square < freedom + 6 * (2 * freedom) ** 0.5


# --- alone and in a crowd, again and again


def _answers(logits, params):
    """Of rows that each have a penalty row of their own, where they have one."""
    own = [{"penalty_row": row} if "penalty_row" in p else {} for row, p in enumerate(params)]
    params = [{**p, "logprobs": "processed"} | row for p, row in zip(params, own, strict=True)]
    rows = make_rows(params, VOCAB, num_logprobs=5, device=DEVICE)
    logprobs = (sampled := ops.sample(logits, rows, make_state(VOCAB, SLOTS * len(params), DEVICE))).logprobs
    return sampled.token_ids, logprobs.logprob, logprobs.rank, logprobs.top_ids, logprobs.top_logprobs


def test_a_row_does_not_depend_on_its_batch():
    params = [{**PARAMS[row % len(PARAMS)], "key": (row, -row)} for row in range(256)]
    logits = _logits(256, dtype=torch.bfloat16)
    together = _answers(logits, params)
    for start, stop in ((0, 1), (15, 16), (3, 20), (200, 256)):
        part = _answers(logits[start:stop], params[start:stop])
        assert all(torch.equal(a, b[start:stop]) for a, b in zip(part, together, strict=True))


def test_the_same_call_gives_the_same_bits():
    logits = _logits(len(PARAMS), scale=0.3)
    first = _answers(logits, PARAMS)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, _answers(logits, PARAMS), strict=True))


def test_cuts_by_sorting_and_by_searching_are_the_same(monkeypatch):
    params = [{**param, "key": (row, -row)} for row, param in enumerate(PARAMS)]
    for scale in (0.3, 3.0):
        logits = _logits(len(params), scale=scale).mul(8).round().div(8)  # equals
        by_default = _answers(logits, params)
        for size in (0, 64):
            monkeypatch.setattr(sampling, "sort_size", lambda vocab, size=size: size)
            assert all(torch.equal(a, b) for a, b in zip(by_default, _answers(logits, params), strict=True))
        monkeypatch.undo()


# --- log-probabilities


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_token_logprobs(dtype):
    logits = _logits(33, dtype=dtype)
    token_ids = torch.randint(0, VOCAB, (33,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    actual = ops.token_logprobs(logits, token_ids, 20)
    expected = cpu_sampling.token_logprobs(logits.cpu().double(), token_ids.cpu(), 20)
    assert torch.equal(actual.rank.cpu(), expected.rank)
    assert torch.equal(actual.top_ids.cpu(), expected.top_ids)
    # float32: 128,256 exponentials are summed, each right to about 1e-6.
    torch.testing.assert_close(actual.logprob.cpu().double(), expected.logprob, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(actual.top_logprobs.cpu().double(), expected.top_logprobs, rtol=1e-5, atol=1e-5)


# --- graphs and sizes


def test_a_graph_replays_what_the_eager_call_does():
    rows = make_rows([{**p, "logprobs": "processed"} for p in PARAMS], VOCAB, num_logprobs=3, device=DEVICE)
    logits = _logits(len(PARAMS), dtype=torch.bfloat16)
    state, eager_state = make_state(VOCAB, SLOTS, DEVICE), make_state(VOCAB, SLOTS, DEVICE)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ops.sample(logits, rows, make_state(VOCAB, SLOTS, DEVICE))  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample(logits, rows, state)
    for seed in range(4):
        logits.copy_(_logits(len(PARAMS), dtype=torch.bfloat16, scale=1 + seed, seed=seed))
        rows.keys.copy_(torch.randint(-(2**31), 2**31, rows.keys.shape, dtype=torch.int32, device=DEVICE))
        graph.replay()
        eager = ops.sample(logits, rows, eager_state)
        assert torch.equal(captured.token_ids, eager.token_ids)
        assert torch.equal(captured.logprobs.logprob, eager.logprobs.logprob)
        assert torch.equal(captured.logprobs.top_ids, eager.logprobs.top_ids)
        assert torch.equal(state.counts, eager_state.counts)


@pytest.mark.alone
def test_offsets_beyond_32_bits():
    rows = 2**31 // VOCAB + 8
    logits = torch.zeros(rows, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    wanted = torch.arange(rows, device=DEVICE) * 7919 % VOCAB
    logits[torch.arange(rows, device=DEVICE), wanted] = 40
    for param in ({"temperature": 0.0}, {"top_p": 0.5}):
        sampled = ops.sample(logits, make_rows([param] * rows, VOCAB, device=DEVICE))
        assert torch.equal(sampled.token_ids, wanted)
