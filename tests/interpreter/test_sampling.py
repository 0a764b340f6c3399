"""The Triton sampler against the CPU's, in the interpreter: which token, which tokens could have been drawn, flags."""

import pytest
import torch
import triton
import triton.language as tl

from llama.kernels import ops
from llama.kernels.cpu import sampling as cpu_sampling
from llama.kernels.gpu import sampling
from llama.kernels.gpu.sampling import few_groups, filters, noise, rules
from llama.kernels.types import SamplerState
from tests.naive_sampling import M32, lowbias32
from tests.sampling_rows import make_rows, make_state

# Infinities are subtracted from one another on purpose: NumPy, which carries the interpreter out, would warn.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Rows of some hundred tokens then have several tiles, as real ones do."""
    monkeypatch.setattr(rules, "TILE", 512)


def _logits(rows, vocab, *, seed=0, scale=3.0, dtype=torch.float32):
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def _check(logits, params, *, state=None, seed=0, num_logprobs=0):
    """Same tokens, flags and counts as the CPU's. The token's processed log-probability tells what else was kept: it
    moves with the mass of the kept tokens."""
    params = [{**param, "logprobs": "processed"} for param in params]
    rows = make_rows(params, logits.shape[1], num_logprobs=num_logprobs, seed=seed)
    states = [None, None]
    if state is not None:
        states = [make_state(logits.shape[1], state) for _ in range(2)]
    actual, expected = ops.sample(logits, rows, states[0]), cpu_sampling.sample(logits, rows, states[1])
    assert actual.is_bad.tolist() == expected.is_bad.tolist()
    assert actual.token_ids.tolist() == expected.token_ids.tolist()
    good = ~expected.is_bad
    assert torch.equal(actual.logprobs.top_ids[good], expected.logprobs.top_ids[good])
    assert torch.equal(actual.logprobs.rank[good], expected.logprobs.rank[good])
    torch.testing.assert_close(actual.logprobs.logprob[good], expected.logprobs.logprob[good], rtol=4e-6, atol=4e-6)
    if state is not None:
        assert torch.equal(states[0].counts, states[1].counts)
    return actual


# --- noise


@triton.jit
def _noise_kernel(out, low, high, N: tl.constexpr):
    ids = tl.arange(0, N)
    key_low = tl.load(low).to(tl.uint32, bitcast=True)
    key_high = tl.load(high).to(tl.uint32, bitcast=True)
    tl.store(out + ids, noise.noise_bits(ids.to(tl.uint32), key_low, key_high).to(tl.int32))


@pytest.mark.parametrize("key", [(0, 0), (-1, -1), (123456789, -987654321), (-(2**31), 2**31 - 1)])
def test_noise_integers(key):
    out = torch.empty(1024, dtype=torch.int32)
    low, high = torch.tensor(key, dtype=torch.int32).view(2, 1)
    _noise_kernel[(1,)](out, low, high, N=1024)
    assert out.tolist() == [lowbias32(lowbias32(i ^ key[0] & M32) ^ key[1] & M32) >> 8 for i in range(1024)]


# --- greedy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("vocab", [1, 31, 256, 700])
def test_greedy(vocab, dtype):
    logits = _logits(3, vocab, dtype=dtype)
    rows = make_rows([{"temperature": 0.0}] * 3, vocab)
    sampled = ops.sample(logits, rows)
    assert sampled.token_ids.tolist() == logits.argmax(1).tolist()
    assert not sampled.is_bad.any() and sampled.logprobs is None


def test_greedy_takes_the_lowest_id_on_ties():
    logits = torch.zeros(4, 700)
    logits[1, [300, 301, 650]] = 1
    logits[2, [699, 255, 256]] = 1
    logits[3] = -torch.inf
    logits[3, [600, 500]] = -5
    tokens = ops.sample(logits, make_rows([{"temperature": 0.0}] * 4, 700)).token_ids
    assert tokens.tolist() == [0, 300, 255, 500]


def test_no_rows():
    sampled = ops.sample(torch.empty(0, 50), make_rows([], 50, num_logprobs=3))
    assert sampled.token_ids.shape == sampled.is_bad.shape == (0,)
    assert sampled.logprobs.top_ids.shape == (0, 3)


# --- draws


def test_draws_equal_the_cpus():
    logits = _logits(1, 500).expand(20, -1).contiguous()
    params = [{"temperature": 0.5 + row / 8} for row in range(20)]
    rows = make_rows(params, 500)
    tokens = ops.sample(logits, rows).token_ids
    assert tokens.tolist() == cpu_sampling.sample(logits, rows, None).token_ids.tolist()
    assert tokens.unique().numel() > 8


FILTERS = [
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 599},
    {"top_k": 600},
    {"top_k": 2**31 - 1},
    {"top_p": 0.0},
    {"top_p": 1e-7},
    {"top_p": 0.5},
    {"top_p": 0.999},
    {"top_p": 0.9999999},
    {"min_p": 0.01},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7},
    {"top_k": 400, "top_p": 0.95, "min_p": 1e-4},
    {"top_p": 0.8, "min_p": 0.05, "temperature": 0.3},
    {"top_k": 5, "top_p": 0.0, "min_p": 1.0, "temperature": 5.0},
]


@pytest.fixture
def many_groups(monkeypatch):
    """Takes the way of rows whose cuts lie among very many tokens."""
    monkeypatch.setattr(few_groups, "FEW_GROUPS", tl.constexpr(0))


@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_filters(scale):
    _check(_logits(len(FILTERS), 600, scale=scale), FILTERS)


def test_filters_by_the_long_way(many_groups):
    _check(_logits(len(FILTERS), 600, seed=2), FILTERS, seed=2)


def test_filters_among_ties(many_groups):
    # Few different values, so every cut falls into a crowd of equals.
    logits = (_logits(len(FILTERS), 600, scale=1.5) * 2).round() / 2
    _check(logits, FILTERS)


def test_filters_in_float16_with_forbidden_tokens():
    logits = _logits(len(FILTERS), 600, dtype=torch.float16, scale=20.0)
    logits[:, ::3] = -torch.inf
    _check(logits, FILTERS)


def test_filters_without_few(monkeypatch, many_groups):
    # What is surely kept then takes part in the draw before the candidates do.
    monkeypatch.setattr(filters, "_FEW", tl.constexpr(8))
    params = [
        {"top_k": 300},
        {"top_p": 0.5},
        {"top_p": 0.95},
        {"min_p": 0.01},
        {"top_p": 0.9, "min_p": 0.1},
        {"top_k": 1},
    ]
    for scale in (0.2, 3.0):
        _check(_logits(len(params), 600, scale=scale, seed=1), params, seed=1)


def test_more_candidates_than_one_chunk(many_groups):
    params = [{"top_k": 2500, "top_p": 0.9}, {"top_p": 0.6}, {"top_k": 1500}, {"top_p": 0.4, "min_p": 0.2}]
    logits = _logits(4, 3000, scale=0.3)
    logits[3] = 0
    _check(logits, params)


# --- cuts by sorting, as a GPU finds them


@pytest.mark.parametrize("groups", [0, 512])
def test_filters_by_sorting(groups, monkeypatch):
    monkeypatch.setattr(few_groups, "FEW_GROUPS", tl.constexpr(groups))
    monkeypatch.setattr(sampling, "sort_size", lambda vocab: 32)  # more candidates are searched
    logits = _logits(len(FILTERS), 60, seed=3)
    logits[::2] = (logits[::2] * 2).round() / 2
    _check(logits, FILTERS, seed=3)


def test_equal_tokens_share_a_nucleus_by_id():
    # 300 of 600 equal tokens: the 300th starts below half of the mass, the 301st at half.
    sampled = _check(torch.zeros(1, 600), [{"top_p": 0.5}], num_logprobs=302)
    assert sampled.logprobs.top_ids[0].tolist() == [*range(300), -1, -1]


def test_the_crossing_token_is_kept_and_equality_stops():
    logits = torch.full((3, 40), -torch.inf)
    logits[:, [3, 17, 20]] = torch.tensor([0.5, 0.25, 0.25]).log()  # exact sums of powers of two
    sampled = _check(logits, [{"top_p": 0.5}, {"top_p": 0.5000001}, {"top_p": 0.75}], num_logprobs=3)
    kept = [[i for i in row if i >= 0] for row in sampled.logprobs.top_ids.tolist()]
    assert kept == [[3], [3, 17], [3, 17]]


def test_mixed_rows():
    params = [{"temperature": 0.0}, {}, {"top_k": 3}, {"temperature": 0.0, "top_p": 0.1}, {"top_p": 0.3}]
    _check(_logits(5, 400), params)


# --- penalties, bias, mask


def test_penalties_and_counts():
    generator = torch.Generator().manual_seed(5)
    slots = [
        (torch.randint(0, 300, (40,), generator=generator).tolist(), torch.randint(0, 300, (n,)).tolist())
        for n in (0, 30, 100)
    ]
    params = [
        {"penalty_row": 0, "repetition_penalty": 1.3},
        {"penalty_row": 1, "repetition_penalty": 0.6, "temperature": 0.0},
        {"penalty_row": 1, "frequency_penalty": 0.7, "presence_penalty": -1.5},
        {"penalty_row": -1, "top_k": 9},
        {"penalty_row": 2, "frequency_penalty": -2.0, "presence_penalty": 2.0, "repetition_penalty": 1.1, "top_p": 0.8},
        {"penalty_row": 2},
    ]
    _check(_logits(6, 300), params, state=slots)


def test_rows_that_share_a_slot_are_all_counted():
    state = SamplerState(2, 50)
    rows = make_rows([{"penalty_row": 1, "temperature": 0.0}] * 3 + [{"penalty_row": 0, "temperature": 0.0}], 50)
    logits = torch.zeros(4, 50)
    logits[:, 33] = 1
    ops.sample(logits, rows, state)
    assert state.counts[:, 33].tolist() == [1, 3] and state.counts.sum() == 4


def test_tokens_are_counted_once_where_few_candidates_decide():
    params = [{"top_k": 3}, {"top_p": 0.8}, {"min_p": 0.2}, {"top_k": 40, "top_p": 0.5}, {"temperature": 0.0}, {}]
    params = [{**param, "penalty_row": row % 2, "presence_penalty": 0.5} for row, param in enumerate(params)]
    logits, rows = _logits(len(params), 100), make_rows(params, 100)
    states = [make_state(100, [([1], [2]), ([], [])]) for _ in range(2)]
    tokens = ops.sample(logits, rows, states[0]).token_ids
    assert tokens.tolist() == cpu_sampling.sample(logits, rows, states[1]).token_ids.tolist()
    assert torch.equal(states[0].counts, states[1].counts) and states[0].counts.sum() == 1 + len(params)


def test_bias_and_mask():
    inf = float("inf")
    params = [
        {"bias": {0: 100.0}, "temperature": 0.0},
        {"bias": {299: 5.0, 12: -100.0, 13: -inf}},
        {"allowed": [5, 64, 298]},
        {"allowed": [7], "top_p": 0.2},
        {"bias": {7: -inf, 8: 3.0}, "allowed": [7, 8, 9], "top_k": 2},
        {},
    ]
    sampled = _check(_logits(6, 300), params)
    assert sampled.token_ids[0] == 0 and sampled.token_ids[3] == 7


def test_many_biases_are_read_together():
    """More than are read at once, in one tile and in many; where a row's begin is no round number."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randperm(1200, generator=generator).tolist()
    values = (torch.randn(1200, generator=generator) * 4).tolist()
    pairs = list(zip(ids, values, strict=True))
    inf = float("inf")
    params = [
        {"bias": dict(pairs[:3]), "temperature": 0.0},
        {"bias": dict(pairs[:300])},
        {"bias": {id: value for id, value in pairs if id < 150} | {1199: -inf}, "top_k": 9},
        {},
        {"bias": dict(pairs) | {5: -inf, 7: 90.0}, "temperature": 0.0},
    ]
    sampled = _check(_logits(5, 1200), params)
    assert sampled.token_ids[4] == 7


def test_bias_comes_before_penalties_and_the_mask_after():
    slots = [([4, 5], [5, 6])]
    params = [{"penalty_row": 0, "repetition_penalty": 2.0, "presence_penalty": 1.0, "bias": {4: -9.0, 5: 2.5, 6: 1.0}}]
    _check(_logits(1, 40), params, state=slots)
    _check(_logits(1, 40), [{**params[0], "allowed": [4, 5, 6, 7]}], state=slots)


# --- bad rows


def test_bad_rows_are_flagged_and_harm_nobody():
    logits = _logits(7, 600)
    logits[0, 599] = torch.nan
    logits[1] = -torch.inf
    logits[2, 3] = torch.inf
    logits[3, 10] = torch.nan  # where the mask forbids, too
    params = [
        {"top_p": 0.9},
        {},
        {"temperature": 0.0},
        {"allowed": [1, 2], "top_k": 2},
        {"allowed": []},
        {},
        {"top_k": 9},
    ]
    params = [{**param, "penalty_row": 0} for param in params]
    sampled = _check(logits, params, state=[([1, 2], [3])])
    assert sampled.is_bad.tolist() == [True] * 5 + [False] * 2
    assert sampled.token_ids[:5].tolist() == [0] * 5


# --- splits and neighbours


def test_results_do_not_depend_on_splits_or_neighbours(monkeypatch):
    monkeypatch.setattr(few_groups, "FEW_GROUPS", tl.constexpr(8))
    params = [*FILTERS[4:15:2], {}, {"temperature": 0.0}]
    logits = _logits(len(params), 900)

    def run(chosen):
        part = [{**params[row], "key": (row, 7), "logprobs": "processed"} for row in chosen]
        sampled = ops.sample(logits[chosen], make_rows(part, 900, num_logprobs=4))
        logprobs = sampled.logprobs
        fields = (sampled.token_ids, logprobs.logprob, logprobs.rank, logprobs.top_ids, logprobs.top_logprobs)
        return [[field[index] for field in fields] for index in range(len(chosen))]

    together = run(list(range(len(params))))
    monkeypatch.setattr(rules, "PROGRAMS", 1)
    unsplit = run(list(range(len(params))))
    alone = [run([row])[0] for row in range(0, len(params), 3)]
    for first, second in ((together, unsplit), (together[::3], alone)):
        assert all(torch.equal(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def test_rows_beyond_32_bit_offsets():
    stride = 2**31 + 2**20
    values = _logits(2, 300, dtype=torch.float16)
    logits = torch.empty(stride + 300, dtype=torch.float16).as_strided((2, 300), (stride, 1))
    logits.copy_(values)
    _check_equal_draw(logits, values, [{"top_p": 0.8, "logprobs": "processed"}] * 2, None, None)


def test_penalty_rows_beyond_32_bit_offsets():
    vocab, row = 1024, 2**21 + 3
    far = object.__new__(SamplerState)
    far.prompt_mask = torch.empty(row + 1, vocab // 32, dtype=torch.int32)
    far.counts = torch.empty(row + 1, vocab, dtype=torch.int32)
    near = make_state(vocab, [([1, 2, 3], [3, 4, 4])])
    far.prompt_mask[row], far.counts[row] = near.prompt_mask[0], near.counts[0]
    logits = _logits(1, vocab)
    penalties = {"repetition_penalty": 1.5, "frequency_penalty": 0.5}
    params, near_params = ([{**penalties, "penalty_row": each}] for each in (row, 0))
    _check_equal_draw(logits, logits, params, far, near, near_params=near_params)
    assert torch.equal(far.counts[row], near.counts[0])


def _check_equal_draw(logits, near_logits, params, state, near_state, near_params=None):
    actual = ops.sample(logits, make_rows(params, logits.shape[1]), state)
    expected = cpu_sampling.sample(near_logits, make_rows(near_params or params, logits.shape[1]), near_state)
    assert actual.token_ids.tolist() == expected.token_ids.tolist()


# --- refusals


def test_refusals():
    rows = make_rows([{}], 50)
    with pytest.raises(ValueError, match=r"sample: logits is torch\.bfloat16"):
        ops.sample(torch.empty(1, 50, dtype=torch.bfloat16), rows)
    with pytest.raises(ValueError, match=r"float64"):
        ops.sample(torch.empty(1, 50, dtype=torch.float64), rows)
    with pytest.raises(ValueError, match="SamplerState"):
        ops.sample(torch.empty(1, 50), make_rows([{"penalty_row": 0}], 50))
    with pytest.raises(ValueError, match="50 logits per row, 40 counts"):
        ops.sample(torch.empty(1, 50), make_rows([{"penalty_row": 0}], 50), SamplerState(1, 40))
