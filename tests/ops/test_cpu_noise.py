"""The noise of sampling: its integers are literal, and they behave as independent uniform numbers."""

import numpy as np
import pytest
import torch

from llama.engine.sampler import noise_keys
from llama.kernels.cpu.sampling.noise import GUMBEL_SPAN, block_noise_bits, gumbel, noise_bits
from tests import naive_sampling
from tests.ops.naive_rows import chi_square_score


def bits_of(ids, seeds, positions):
    """noise_bits [rows, ids] as an array."""
    seeds, positions = np.broadcast_arrays(np.array(seeds, np.uint64), np.array(positions, np.int64))
    keys = torch.from_numpy(noise_keys(seeds.ravel(), positions.ravel()))
    return noise_bits(torch.as_tensor(ids).expand(len(keys), -1), keys).numpy()


# Made once with the plain form of the specification, tests/naive_sampling.py; they may never change.
LITERAL = [
    # seed, position, token id, low key word, high key word, h >> 8
    (0, 0, 0, 0xFF3CD4BF, 0x48218226, 3338589),
    (0, 0, 1, 0xFF3CD4BF, 0x48218226, 10914495),
    (0, 1, 0, 0x82C0D5B8, 0xDCE423FC, 13042011),
    (1, 0, 0, 0x3A33AAF7, 0x9E016029, 5422445),
    (42, 17, 49151, 0x211ED0D0, 0x8C0BB049, 654403),
    (123456789, 131071, 128255, 0x2E650D18, 0x5A9BB6C9, 10563127),
    (9223372036854775807, 4096, 65536, 0xD6D59363, 0x9A76808A, 7174245),
    (9223372036854775807, 0, 1048583, 0x9134C140, 0x396887B9, 16306386),
]


@pytest.mark.parametrize(("seed", "position", "token_id", "low", "high", "bits"), LITERAL)
def test_literal_integers(seed, position, token_id, low, high, bits):
    keys = noise_keys(np.array([seed], np.uint64), np.array([position]))
    assert keys.view(np.uint32).tolist() == [[low, high]]
    assert noise_bits(torch.tensor([[token_id]]), torch.from_numpy(keys)).tolist() == [[bits]]
    assert naive_sampling.keys(seed, position) == (low, high)
    mixed = naive_sampling.lowbias32(naive_sampling.lowbias32(token_id ^ low) ^ high)
    assert mixed >> 8 == bits


def test_blocks_hold_the_same_integers():
    generator = np.random.default_rng(1)
    keys = torch.from_numpy(generator.integers(-(2**31), 2**31, (50, 2), dtype=np.int64).astype(np.int32))
    blocks = torch.from_numpy(generator.integers(0, 4096, 50))
    ids = blocks[:, None] * 64 + torch.arange(64)
    whole = block_noise_bits(blocks, 64, keys)
    assert torch.equal(whole, noise_bits(ids, keys))
    for row, column in ((0, 0), (7, 63), (49, 31)):
        low, high = (word & 0xFFFFFFFF for word in keys[row].tolist())
        plain = naive_sampling.lowbias32(naive_sampling.lowbias32(int(ids[row, column]) ^ low) ^ high)
        assert whole[row, column] == plain >> 8


def test_gumbel_is_finite_and_within_its_span():
    values = gumbel(torch.tensor([0, 1, 2**23, 2**24 - 1], dtype=torch.int32), torch.float64)
    u = torch.tensor([2.0**-24, 2.0**-24, 0.5, 1 - 2.0**-24], dtype=torch.float64)
    assert torch.equal(values, -torch.log(-torch.log(u)))
    assert values.max() - values.min() < GUMBEL_SPAN
    torch.testing.assert_close(
        gumbel(torch.arange(0, 2**24, 4097), torch.float32).double(),
        gumbel(torch.arange(0, 2**24, 4097), torch.float64),
        rtol=1e-6,
        atol=1e-6,
    )


@pytest.mark.parametrize("along", ["ids", "positions", "seeds"])
def test_uniform(along):
    number = 1 << 16
    span = np.arange(number)
    bits = {
        "ids": lambda: bits_of(span, 5, 100),
        "positions": lambda: bits_of([1234], 5, span),
        "seeds": lambda: bits_of([1234], span, 100),
    }[along]().ravel()
    for shift in (16, 8, 0):  # each byte of the 24 bits
        counts = np.bincount(bits >> shift & 255, minlength=256)
        assert abs(chi_square_score(counts, np.full(256, 1 / 256))) < 4
    # Bytes of neighbours are independent too: 64 x 64 cells of the top bits.
    cells = (bits[::2] >> 18) * 64 + (bits[1::2] >> 18)
    assert abs(chi_square_score(np.bincount(cells, minlength=4096), np.full(4096, 1 / 4096))) < 4


@pytest.mark.parametrize("distance", [1, 2, 3, 64, 1 << 16, 1 << 31, 1 << 32])
@pytest.mark.parametrize("of", ["positions", "seeds"])
def test_rows_are_uncorrelated(of, distance):
    """What two rows get whose positions or seeds differ by little, or by one bit."""
    ids = np.arange(50_000)
    seeds, positions = ([9, 9], [40, 40 + distance]) if of == "positions" else ([9, 9 ^ distance], [40, 40])
    first, second = bits_of(ids, seeds, positions) / 2.0**24
    assert abs(np.corrcoef(first, second)[0, 1]) < 4 / len(ids) ** 0.5
    assert abs(np.corrcoef(first[1:], second[:-1])[0, 1]) < 4 / len(ids) ** 0.5
    flips = np.bitwise_count((first * 2**24).astype(np.int64) ^ (second * 2**24).astype(np.int64))
    assert abs(flips.mean() - 12) < 4 * 6**0.5 / len(ids) ** 0.5


def test_the_largest_of_many_has_the_right_law():
    """max of n gumbels - log n is a gumbel: its mean is Euler's constant, its variance pi^2 / 6."""
    rows, ids = 2000, np.arange(1000)
    largest = gumbel(torch.from_numpy(bits_of(ids, np.arange(rows), 7)), torch.float64).amax(1).numpy() - np.log(1000)
    assert abs(largest.mean() - 0.577216) < 4 * (np.pi**2 / 6 / rows) ** 0.5
    assert abs(largest.var() / (np.pi**2 / 6) - 1) < 0.15
