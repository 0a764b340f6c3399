"""SamplerTable: what rows want, as tensors; key words and seeds against the plain specification."""

import numpy as np
import pytest
import torch

from llama.api.params import MAX_SEED, SamplingParams
from llama.engine.sampler import SamplerTable, Seeds, child_seed, noise_keys
from llama.kernels.cpu.sampling import sample
from llama.kernels.types import LOGPROBS_OFF, LOGPROBS_PROCESSED, LOGPROBS_RAW
from tests import naive_sampling

EOS = frozenset({2, 3})
VOCAB = 100


def make_table(*params, prompt=(1, 5, 7), outputs=(), **kwargs):
    """A table whose row i holds params[i] with seed 10 + i."""
    table = SamplerTable(8, VOCAB, EOS, **kwargs)
    for row, each in enumerate(params):
        table.set_row(row, each, 10 + row, prompt, outputs)
    return table


def rows_of(table, row_ids, positions, masks=None):
    return table.rows(np.array(row_ids, np.int32), np.array(positions, np.int32), masks)


def bias_of(rows, row):
    if rows.bias_starts is None:
        return {}
    span = slice(*rows.bias_starts[row : row + 2].tolist())
    return dict(zip(rows.bias_ids[span].tolist(), rows.bias_values[span].tolist(), strict=True))


@pytest.mark.parametrize("number", [1, 2, 4, 5, 100])
def test_noise_keys_follow_the_specification(number):
    random = np.random.default_rng(number)
    seeds = random.integers(0, 2**64, number, dtype=np.uint64)
    seeds[0] = 2**64 - 1
    for positions in (random.integers(0, 2**31, number), np.arange(number, dtype=np.int32)):
        words = noise_keys(seeds, positions).view(np.uint32)
        pairs = zip(seeds.tolist(), positions.tolist(), strict=True)
        assert words.tolist() == [list(naive_sampling.keys(seed, position)) for seed, position in pairs]


def test_children_have_seeds_of_their_own():
    for given in (77, MAX_SEED, 2**53, 2**63, 2**64 - 1):
        seeds = [child_seed(given, index) for index in range(128)]
        assert len(set(seeds)) == 128 and max(seeds) <= MAX_SEED == 2**53 - 1, "JavaScript holds them"
        assert seeds == [naive_sampling.child_seed(given, index) for index in range(128)]
        assert [child_seed(seed, 0) for seed in seeds] == seeds, "sent back, each gives its completion again"
    assert child_seed(77, 0) == 77


def test_seeds_are_fresh_or_repeatable():
    assert Seeds(None).next() != Seeds(None).next()
    first, second, other = Seeds(0), Seeds(0), Seeds(1)
    drawn = [first.next() for _ in range(100)]
    assert drawn == [second.next() for _ in range(100)]
    assert len(set(drawn)) == 100 and all(0 <= seed <= MAX_SEED for seed in drawn)
    assert not set(drawn) & {other.next() for _ in range(100)}


def test_columns():
    params = [
        SamplingParams(temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=4),
        SamplingParams(temperature=0.0, top_p=0.9, top_k=7, min_p=0.1),
        SamplingParams(repetition_penalty=1.5, frequency_penalty=0.5, presence_penalty=-0.5, logprobs=3),
        SamplingParams(top_k=VOCAB, logprobs=5, logprobs_mode="processed"),
    ]
    rows = rows_of(make_table(*params, dtype=torch.float64), [0, 1, 2, 3], [3, 4, 5, 6])
    assert len(rows) == 4
    assert rows.temperature.tolist() == [0.5, 0, 1, 1] and rows.temperature.dtype == torch.float64
    assert rows.top_p.tolist() == [0.9, 1, 1, 1]  # greedy rows have no filters, nor is a top_k of all tokens one
    assert rows.top_k.tolist() == [7, 0, 0, 0] and rows.top_k.dtype == torch.int32
    assert rows.min_p.tolist() == [0.1, 0, 0, 0]
    assert rows.penalty_rows.tolist() == [-1, -1, 2, -1]
    assert rows.repetition_penalty.tolist() == [1, 1, 1.5, 1]
    assert rows.frequency_penalty.tolist() == [0, 0, 0.5, 0]
    assert rows.presence_penalty.tolist() == [0, 0, -0.5, 0]
    assert rows.logprobs_modes.tolist() == [LOGPROBS_OFF, LOGPROBS_OFF, LOGPROBS_RAW, LOGPROBS_PROCESSED]
    assert rows.keys.numpy().view(np.uint32).tolist() == [list(naive_sampling.keys(10 + i, 3 + i)) for i in range(4)]
    assert (rows.num_logprobs, rows.any_penalty, rows.any_filter, rows.all_greedy, rows.any_processed) == (
        5, True, True, False, True)  # fmt: skip
    assert rows.bias_starts is rows.bias_ids is rows.bias_values is rows.mask is None


def test_flags_are_those_of_the_rows_asked_for():
    table = make_table(
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_p=0.5),
        SamplingParams(presence_penalty=1.0, temperature=0.0),
    )

    def flags(*row_ids):
        rows = rows_of(table, row_ids, [9] * len(row_ids))
        return rows.any_penalty, rows.any_filter, rows.all_greedy, rows.num_logprobs

    assert flags(0) == (False, False, True, -1)
    assert flags(0, 1) == (False, False, False, -1)
    assert flags(2, 0) == (False, True, False, -1)
    assert flags(3, 0) == (True, False, True, -1)
    assert flags() == (False, False, True, -1)


def test_float32_holds_every_legal_value():
    params = [SamplingParams(temperature=1e-300, repetition_penalty=1e-300), SamplingParams(repetition_penalty=1e300)]
    rows = rows_of(make_table(*params), [0, 1], [0, 0])
    assert rows.temperature.dtype == torch.float32 and rows.temperature[0] > 0
    assert (rows.repetition_penalty > 0).all() and rows.repetition_penalty.isfinite().all()


def test_tensors_stay_while_the_rows_stay():
    table = make_table(SamplingParams(logit_bias={4: 1.0}), SamplingParams(top_p=0.5))
    first, second = rows_of(table, [0, 1], [5, 6]), rows_of(table, [0, 1], [6, 7])
    assert second.top_p is first.top_p and second.bias_ids is first.bias_ids
    assert not torch.equal(second.keys, first.keys)
    other = rows_of(table, [1, 0], [7, 6])
    assert other.top_p.tolist() == [0.5, 1.0] and torch.equal(other.keys, second.keys.flip(0))
    table.set_row(1, SamplingParams(top_p=0.25), 99, (1,))
    again = rows_of(table, [1, 0], [7, 6])
    assert again.top_p.tolist() == [0.25, 1.0]
    assert first.top_p.tolist() == [1.0, 0.5]  # what was handed out before is not touched


def test_a_row_may_be_drawn_from_more_than_once():
    table = make_table(SamplingParams(), SamplingParams(logit_bias={1: 2.0}))
    rows = rows_of(table, [1, 1, 0], [4, 5, 4])
    assert [bias_of(rows, row) for row in range(3)] == [{1: 2.0}, {1: 2.0}, {}]


def test_min_tokens_forbids_every_end_until_then():
    """The prompt has 3 tokens, so the token at position 3 is the first generated one."""
    params = SamplingParams(min_tokens=2, stop_token_ids=[9], logit_bias={4: 1.0, 2: 5.0})
    table = make_table(params, SamplingParams(logit_bias={5: -1.0}), SamplingParams())
    for position in (3, 4, 5, 6, 4):
        rows = rows_of(table, [2, 0, 1], [position, position, 0])
        banned = {2: -np.inf, 3: -np.inf, 9: -np.inf}
        assert bias_of(rows, 1) == {4: 1.0, 2: 5.0} | (banned if position < 5 else {})
        assert bias_of(rows, 0) == {} and bias_of(rows, 2) == {5: -1.0}


def test_min_tokens_with_ignore_eos_forbids_stop_ids_alone():
    table = make_table(
        SamplingParams(min_tokens=1, ignore_eos=True, stop_token_ids=[9]), SamplingParams(min_tokens=1, ignore_eos=True)
    )
    rows = rows_of(table, [0, 1], [3, 3])
    assert bias_of(rows, 0) == {9: -np.inf} and bias_of(rows, 1) == {}
    assert rows_of(table, [0, 1], [4, 4]).bias_ids is None


def test_a_completed_grammar_may_end_before_min_tokens():
    """Where the mask allows nothing but ends, banning them would leave no token at all."""
    table = make_table(*[SamplingParams(min_tokens=2, stop_token_ids=[63])] * 3)
    masks = np.zeros((3, 4), np.int32)
    masks[:2, 0] = 1 << 2  # the first EOS token
    masks[:2, 1] = -(1 << 31)  # 63
    masks[1, 3] = 1 << 3  # 99, which does not end
    masks[2] = -1
    rows = rows_of(table, [0, 1, 2], [3, 3, 3], masks)
    banned = {2: -np.inf, 3: -np.inf, 63: -np.inf}
    assert [bias_of(rows, row) for row in range(3)] == [{}, banned, banned]
    assert not sample(torch.zeros(3, VOCAB), rows, None).is_bad.any()


def test_an_eos_id_beyond_the_vocabulary_is_never_banned():
    """generation_config.json may name one; as a place in the logits it would end every request of the step."""
    table = SamplerTable(1, VOCAB, {2, VOCAB})
    table.set_row(0, SamplingParams(min_tokens=2), 0, [1])
    assert bias_of(rows_of(table, [0], [1]), 0) == {2: -np.inf}


def test_state_is_made_when_the_first_penalty_comes():
    table = make_table(SamplingParams(), SamplingParams(temperature=0.0, logit_bias={1: 1.0}))
    assert table.state is None
    table.set_row(3, SamplingParams(frequency_penalty=0.5), 1, np.array([4, 4, 40], np.int32), [6, 6, 7])
    assert table.state.counts[3].nonzero().squeeze(1).tolist() == [6, 7] and table.state.counts[3, 6] == 2
    table.set_row(3, SamplingParams(frequency_penalty=0.5), 1, np.array([8], np.int32))
    assert table.state.counts[3].sum() == 0 and table.state.prompt_mask[3].tolist() == [1 << 8, 0, 0, 0]


def test_masks_are_handed_on():
    masks = np.arange(8, dtype=np.int32).reshape(2, 4)
    assert rows_of(make_table(SamplingParams()), [0, 0], [1, 2], masks).mask.tolist() == masks.tolist()


def test_a_sequence_draws_its_tokens_in_any_company():
    """Step by step, alone and among strangers, rebuilt in the middle: the naive oracle's tokens."""
    params = SamplingParams(temperature=0.9, top_p=0.8, presence_penalty=0.5, min_tokens=4, repetition_penalty=1.3)
    plain = naive_sampling.Params(0.9, 0.8, repetition_penalty=1.3, presence_penalty=0.5)
    stranger = SamplingParams(temperature=2.0, frequency_penalty=1.0)
    prompt, seed = [5, 6, 7], 12345
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[:, 2] = 6.0  # the end would come soon

    expected = []
    for step in range(8):
        bans = dict.fromkeys(EOS, -np.inf) if step < 4 else {}
        banning = naive_sampling.Params(**{**vars(plain), "logit_bias": bans})
        past = {"prompt": prompt, "generated": expected}
        expected.append(naive_sampling.sample(logits[0].numpy(), banning, seed, 3 + step, **past).token)

    alone, crowd = make_table(dtype=torch.float64), make_table(stranger, dtype=torch.float64)
    alone.set_row(0, params, seed, prompt)
    crowd.set_row(4, params, seed, prompt)
    tokens = {"alone": [], "crowd": []}
    for step in range(8):
        if step == 5:
            crowd.set_row(1, params, seed, prompt, tokens["crowd"])
        row = 4 if step < 5 else 1
        tokens["alone"].append(int(sample(logits[:1], rows_of(alone, [0], [3 + step]), alone.state).token_ids))
        drawn = sample(logits.flip(0), rows_of(crowd, [0, row], [50 + step, 3 + step]), crowd.state)
        tokens["crowd"].append(int(drawn.token_ids[1]))
    assert tokens["alone"] == tokens["crowd"] == expected
