"""Products in pieces of a few exact sizes."""

import pytest
import torch

from llama.kernels.cpu.pieces import cancelling
from llama.kernels.exact_pieces import LEAST, MOST, ExactPieces, find_exact


def seen_by(pieces: ExactPieces, rows: int) -> list[int]:
    """The numbers of rows that a product is asked for; what it gives comes back in order."""
    counts = []

    def product(x):
        counts.append(len(x))
        return 2 * x

    x = torch.arange(rows * 3.0).view(rows, 3)
    assert torch.equal(pieces.apply(product, x), 2 * x)
    return counts


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [
        (0, [64]),
        (1, [64]),
        (64, [64]),
        (65, [128]),
        (200, [256]),
        (256, [256]),
        (257, [256, 64]),
        (511, [256, 256]),
        (1300, [1024, 256, 64]),
    ],
)
def test_few_rows_are_filled_up_and_many_are_cut(rows, sizes):
    assert seen_by(ExactPieces((64, 128, 256, 512, 1024)), rows) == sizes


def test_rows_beyond_the_largest_size_are_cut():
    every = ExactPieces(tuple(LEAST << i for i in range(7)))
    assert every.sizes[-1] == MOST
    assert seen_by(every, MOST + 1) == [MOST, 64] and seen_by(every, 2 * MOST) == [MOST, MOST]


def test_sizes_that_do_not_agree_are_left_out():
    assert seen_by(ExactPieces((64, 1024)), 200) == [64, 64, 64, 64]
    assert seen_by(ExactPieces((64,)), 5000) == [64] * 79
    x, source = cancelling(300, torch.float32, 256)
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))[:, source].double()

    def product(x, split_from=128):
        """Sums in one order up to 64 rows and from 256 on, and in another between."""
        parts = x.double() @ weight.T if len(x) != split_from else x[:, 1:].double() @ weight[:, 1:].T
        return parts.float() + x[:, :1] * weight[:, 0].float() * (len(x) == split_from)

    assert find_exact(product, x).sizes == (64, 256)


def test_a_product_in_which_a_rows_place_shows_has_no_sizes():
    x, source = cancelling(300, torch.float32, 128)
    weight = torch.randn(40, 300, generator=torch.Generator().manual_seed(1))[:, source]

    def product(x):
        y = torch.stack([(row * weight).sum(1) for row in x])
        y[0] = (x[0].flip(0) * weight.flip(1)).cumsum(1)[:, -1]
        return y

    assert find_exact(product, x) is None
