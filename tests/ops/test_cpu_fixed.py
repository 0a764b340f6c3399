"""Ops whose rows have the same bits in any crowd: attention in round numbers of keys, pieces of rows, silu, norms."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from llama.kernels.cpu.activation import silu_mul
from llama.kernels.cpu.fixed_attention import find_pieces, num_keys
from llama.kernels.cpu.norm import rms_norm
from llama.kernels.cpu.pieces import Pieces, cancelling, find
from llama.kernels.ops import paged_attention
from llama.kernels.types import KVLayer, Ragged
from llama.model.weights.packed import pack

HEADS, KV_HEADS, DIM, BLOCK = 6, 2, 32, 16


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_num_keys_by_hand():
    asked = {1: 64, 64: 64, 65: 128, 512: 512, 513: 576, 1024: 1024, 1025: 1152, 2048: 2048, 2049: 2304, 0: 64}
    assert {context: num_keys(context) for context in asked} == asked


class Cache:
    """Sequences in blocks of their own; what lies in no sequence is NaN."""

    def __init__(self, dtype: torch.dtype, lens: tuple[int, ...], *, in_a_row: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.lens, self.most = lens, -(-max(lens) // BLOCK)
        blocks = torch.randperm(len(lens) * self.most, generator=generator).to(torch.int32)
        blocks = blocks.sort().values if in_a_row else blocks
        self.tables = blocks.view(len(lens), -1)
        shape = len(blocks), BLOCK, KV_HEADS, DIM
        self.kv = KVLayer(*(torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)))
        self.q = [torch.randn(n, HEADS, DIM, generator=generator).mul(2).to(dtype) for n in lens]
        for table, n in zip(self.tables, lens, strict=True):
            places = torch.arange(n)
            slots = table[places // BLOCK].long() * BLOCK + places % BLOCK
            for cache in (self.kv.k, self.kv.v):
                cache.flatten(0, 1)[slots] = torch.randn(n, KV_HEADS, DIM, generator=generator).to(dtype)
        self.pieces = find_pieces(HEADS, KV_HEADS, DIM, dtype)

    def attend(self, parts: list[tuple[int, int, int]], fixed: bool = True) -> list[torch.Tensor]:
        """parts: sequence, first position, end; those of one position first."""
        counts = [end - start for _, start, end in parts]
        ragged = Ragged(
            block_tables=self.tables[[s for s, _, _ in parts]],
            query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
            context_lens=torch.tensor([end for _, _, end in parts]).int(),
            slots=torch.zeros(sum(counts), dtype=torch.int64),
            num_decodes=sum(count == 1 for count in counts),
            block_size=BLOCK,
            fixed=self.pieces if fixed else None,
        )
        q = torch.cat([self.q[s][start:end] for s, start, end in parts])
        return list(paged_attention(q, self.kv, ragged, DIM**-0.5).split(counts))


def test_find_prefers_pieces_that_one_row_fills_little():
    """oneDNN with AMX: 1 to 32 rows have the same bits, and multiples of 64 have others."""

    def product(x, few=32):
        kind = 0 if len(x) <= few else 1 if len(x) % 64 == 0 else 1 + len(x)
        return x + kind

    x = torch.arange(128.0)[:, None]
    assert find(product, x) == Pieces(1, 32)
    assert find(partial(product, few=0), x) == Pieces(64, 128), "nothing smaller"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attention_has_the_same_bits_decoded_chunked_and_in_a_crowd(dtype):
    cache = Cache(dtype, (1, 5, 64, 65, 200, 700))
    whole = [cache.attend([(s, 0, n)])[0] for s, n in enumerate(cache.lens)]
    for attended, ordinary in zip(
        whole, [cache.attend([(s, 0, n)], fixed=False)[0] for s, n in enumerate(cache.lens)], strict=True
    ):
        assert torch.allclose(attended, ordinary, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=1e-2)
    parts = [(s, n - 1, n) for s, n in enumerate(cache.lens)] + [(5, p, p + 1) for p in (0, 63, 64, 511, 512, 640)]
    parts += [(5, 60, 131), (4, 100, 200), (5, 300, 699), (3, 0, 65), (5, 500, 577)]
    for (s, start, end), rows in zip(parts, cache.attend(parts), strict=True):
        assert torch.equal(rows, whole[s][start:end]), (s, start, end)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_where_keys_lie_changes_no_bit(dtype):
    """In blocks that are neighbours, up to the cache's last slot, and in any others; alone and in a crowd."""
    lens = 700, 320, 200, 192, 5, 704
    in_a_row, scattered = (Cache(dtype, lens, in_a_row=where) for where in (True, False))
    parts = [(s, n - 1, n) for s, n in enumerate(lens)] + [(1, 100, 319), (5, 640, 704)]
    crowd = scattered.attend(parts)
    for part, rows in zip(parts, crowd, strict=True):
        assert torch.equal(in_a_row.attend([part])[0], rows), part
        assert torch.equal(scattered.attend([part])[0], rows), part
    assert all(torch.equal(a, b) for a, b in zip(in_a_row.attend(parts), crowd, strict=True))


def test_pieces_are_filled_and_cut():
    seen: list[int] = []

    def product(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.shape[0])
        return x * 2

    x = torch.arange(11.0)[:, None].expand(11, 3)
    assert torch.equal(Pieces(3, 6).apply(product, x), x * 2) and seen == [6, 6]
    assert torch.equal(Pieces(3, 6).apply(product, x[4:5]), x[4:5] * 2) and seen[2:] == [3]
    few = Pieces(4, 12, (3, 6, 7))
    assert [few.filled(rows) for rows in range(1, 13)] == [3, 3, 3, 4, 6, 6, 7, 8, 12, 12, 12, 12]
    assert torch.equal(few.apply(product, x[:5]), x[:5] * 2) and seen[3:] == [6]


def test_find_tells_classes_apart():
    """Products that add one where the number of rows, or a row's place, is a wrong one."""
    x = torch.randn(128, 4)
    assert find(lambda x: x, x) == Pieces(1, 128)
    assert find(lambda x: x + (x.shape[0] % 3 > 0), x, 64) == Pieces(3, 63)
    assert find(lambda x: x + (x.shape[0] > 64), x) == Pieces(1, 64)
    wrong = {1, 2, 7, 14, *(rows for rows in range(17, 129) if rows % 6 in (1, 2))}
    assert find(lambda x: x + (x.shape[0] in wrong), x) == Pieces(3, 126, (4, 5, 8, 10, 11, 13, 16))
    assert find(lambda x: x + (x.shape[0] < 40) + 2 * (x.shape[0] > 64), x) == Pieces(1, 32)
    assert find(lambda x: x + torch.arange(len(x))[:, None], x) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_a_product_have_the_same_bits_in_any_number(dtype):
    x, source = cancelling(576, dtype)
    taken = torch.randn(640, 576, generator=torch.Generator().manual_seed(0)).to(dtype)[:, source]
    product = pack(taken) or partial(F.linear, weight=taken)
    pieces = find(product, x)
    assert pieces is not None
    whole = pieces.apply(product, x)
    for rows in range(1, 129):
        for start in {0, (128 - rows) // 2, 128 - rows}:
            assert torch.equal(pieces.apply(product, x[start : start + rows]), whole[start : start + rows]), rows


@pytest.mark.parametrize("columns", [6, 7, 576])
def test_products_that_cancel_leave_rounding_errors_alone(columns):
    x, source = cancelling(columns, torch.bfloat16)
    weight = torch.randn(5, columns, dtype=torch.float64)[:, source]
    errors, sizes = (x.double() @ weight.T).abs(), x.double().abs() @ weight.T.abs()
    assert bool((errors <= 1e-15 * sizes).all()) and x.double().norm() > 1
    errors = x.float() @ weight.float().T
    assert columns < 10 or errors.bfloat16().count_nonzero() > errors.numel() / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_elementwise_ops(dtype, threads):
    generator = torch.Generator().manual_seed(0)
    for count in (1, 2, 3):
        threads(count)
        gate_up = torch.randn(400, 2 * 172, generator=generator, dtype=torch.float64).mul(4).to(dtype)
        x = torch.randn(400, 48, generator=generator, dtype=torch.float64).to(dtype)
        weight = torch.rand(48, generator=generator).to(dtype)
        whole, normed = silu_mul(gate_up), rms_norm(x, weight, 1e-5)
        for rows in (1, 2, 7, 100, 191, 193, 201, 399):
            assert torch.equal(silu_mul(gate_up[:rows]), whole[:rows]), (count, rows)
            assert torch.equal(rms_norm(x[rows - 1 : rows], weight, 1e-5), normed[rows - 1 : rows])


def test_the_order_of_a_sum_shows_in_whole_numbers_too():
    x, source = cancelling(64, torch.bfloat16)
    w = torch.randint(-127, 128, (32, 64), generator=torch.Generator().manual_seed(0)).float()[:, source]
    forwards, backwards = torch.zeros(128, 32), torch.zeros(128, 32)
    for column in range(64):
        forwards += x[:, column, None].float() * w[:, column]
        backwards += x[:, 63 - column, None].float() * w[:, 63 - column]
    assert (forwards != backwards).float().mean() > 0.5
