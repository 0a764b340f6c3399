"""Paged attention on a CPU against softmax written out, one query at a time."""

import math
from dataclasses import replace

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu import attention
from llama.kernels.cpu.layout import _PADDED_KEYS, _PADDED_NUMBERS, Layout
from llama.kernels.types import KVLayer, Ragged

TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def problem(queries, contexts, *, dtype=torch.float64, heads=(6, 2), head_dim=16, block_size=4, consecutive=False):
    """Random q and caches; everything outside the sequences' contexts is NaN."""
    generator = torch.Generator().manual_seed(3)
    needed = [-(-context // block_size) for context in contexts]
    total = sum(needed) + 2
    order = torch.arange(total) if consecutive else torch.randperm(total, generator=generator)
    tables = torch.full((len(contexts), max(needed, default=0)), int(order[-1]), dtype=torch.int32)
    caches = [torch.full((total, block_size, heads[1], head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    used = 0
    for row, (count, context) in enumerate(zip(needed, contexts, strict=True)):
        tables[row, :count] = order[used : used + count]
        used += count
        slots = (tables[row].long()[:, None] * block_size + torch.arange(block_size)).flatten()[:context]
        for cache in caches:
            values = torch.randn(context, heads[1], head_dim, generator=generator, dtype=torch.float64)
            cache.flatten(0, 1)[slots] = values.to(dtype)
    q = torch.randn(sum(queries), heads[0], head_dim, generator=generator, dtype=torch.float64).to(dtype) * 2
    ragged = Ragged(
        block_tables=tables,
        query_starts=torch.tensor([0, *torch.tensor(queries).cumsum(0).tolist()], dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        slots=torch.empty(0, dtype=torch.int64),
        num_decodes=next((i for i, n in enumerate(queries) if n != 1), len(queries)),
        block_size=block_size,
    )
    return {"q": q, "kv_layer": KVLayer(*caches), "ragged": ragged, "scale": head_dim**-0.5}


def expected(p):
    out = []
    ragged, kv_layer = p["ragged"], p["kv_layer"]
    block_size, kv_heads = kv_layer.k.shape[1:3]
    starts = ragged.query_starts.tolist()
    for row, context in enumerate(ragged.context_lens.tolist()):
        slots = (ragged.block_tables[row].long()[:, None] * block_size + torch.arange(block_size)).flatten()
        group = p["q"].shape[1] // kv_heads
        rows = (cache.flatten(0, 1)[slots[:context]] for cache in (kv_layer.k, kv_layer.v))
        k, v = (x.double().repeat_interleave(group, 1) for x in rows)
        queries = starts[row + 1] - starts[row]
        for j in range(queries):
            seen = context - queries + j + 1
            scores = torch.einsum("hd,khd->hk", p["q"][starts[row] + j].double(), k[:seen]) * p["scale"]
            out.append(torch.einsum("hk,khd->hd", scores.softmax(-1), v[:seen]))
    return torch.stack(out) if out else torch.zeros(p["q"].shape, dtype=torch.float64)


def check(p):
    out = ops.paged_attention(**p)
    for _ in range(2):  # layers share a layout and its working memory
        assert torch.equal(ops.paged_attention(**p), out)
    tolerance = TOLERANCES[p["q"].dtype]
    assert out.dtype == p["q"].dtype
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), expected(p), atol=tolerance, rtol=tolerance)


LENGTHS = [[*range(1, 321, 5)], [700, 3, 3, 3, 3], [0, 300, 299, 0], [40] * 9 + [600], [*range(30, 60)]]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("head_dim", [16, 128])
@pytest.mark.parametrize("contexts", LENGTHS, ids=len)
def test_decodes_of_unequal_lengths(contexts, head_dim, dtype):
    """In any order, and with a sequence or two in blocks that lie in a row."""
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(1)).tolist()
    p = problem([1] * len(contexts), [contexts[i] for i in order], dtype=dtype, head_dim=head_dim)
    out, wanted = ops.paged_attention(**p), expected(p)
    has_keys = p["ragged"].context_lens > 0
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out[has_keys].double(), wanted[has_keys], atol=tolerance, rtol=tolerance)
    decodes, most = p["ragged"].cpu_layout.decodes, max(_PADDED_KEYS, _PADDED_NUMBERS // (2 * head_dim))
    assert sum(some.stop - some.first for some in decodes) == len(contexts)
    for some in decodes:
        assert some.missing is None or len(some.missing) <= most
    assert (len(decodes) > 1) == (len(contexts) * max(contexts) - sum(contexts) > most)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("contexts", [[37], [64], [30, 33, 37]], ids=str)
def test_where_blocks_lie_changes_no_bit(contexts, dtype):
    p = problem([1] * len(contexts), contexts, dtype=dtype, block_size=16)
    tables, kv_layer = p["ragged"].block_tables, p["kv_layer"]
    in_a_row = torch.arange(tables.numel(), dtype=torch.int32).view_as(tables)
    moved = KVLayer(*(cache[tables.flatten().long()] for cache in (kv_layer.k, kv_layer.v)))
    there = {**p, "kv_layer": moved, "ragged": replace(p["ragged"], block_tables=in_a_row)}
    assert torch.equal(ops.paged_attention(**p), ops.paged_attention(**there))
    found = [one["ragged"].cpu_layout.decodes[0].keys for one in (p, there)]
    assert [isinstance(keys, slice) for keys in found] == [False, len(contexts) == 1]


@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40])
@pytest.mark.parametrize("contexts", [[37], [64, 64], [30, 37, 33], [*range(1, 90, 3)]], ids=str)
def test_keys_and_values_read_where_they_lie(contexts, head_dim, heads, monkeypatch):
    """Of float32 nothing is copied, and where the blocks lie changes no bit."""
    monkeypatch.setattr(attention, "IN_PLACE", 0)
    monkeypatch.setattr(Layout, "gather", None)
    p = problem([1] * len(contexts), contexts, dtype=torch.float32, heads=heads, head_dim=head_dim)
    check(p)
    tables, kv_layer = p["ragged"].block_tables, p["kv_layer"]
    in_a_row = torch.arange(tables.numel(), dtype=torch.int32).view_as(tables)
    moved = KVLayer(*(cache[tables.flatten().long()] for cache in (kv_layer.k, kv_layer.v)))
    there = {**p, "kv_layer": moved, "ragged": replace(p["ragged"], block_tables=in_a_row)}
    assert torch.equal(ops.paged_attention(**p), ops.paged_attention(**there))


def test_small_steps_other_dtypes_and_many_readers_gather(monkeypatch):
    few, enough = [20, 9, 29], [20, 9, 30]
    monkeypatch.setattr(attention, "IN_PLACE", sum(enough) * 2 * 16)
    monkeypatch.setattr(attention, "_where_they_lie", None)
    for dtype in TOLERANCES:
        check(problem([1] * 3, few if dtype == torch.float32 else enough, dtype=dtype))
    check(problem([1] * 3, enough, dtype=torch.float32, heads=(10, 2)))
    with pytest.raises(TypeError):
        check(problem([1] * 3, enough, dtype=torch.float32, heads=(8, 2)))


CASES = [
    ([1], [1]),
    ([1, 1, 1], [9, 1, 30]),
    ([5], [5]),
    ([5], [23]),
    ([1, 1, 7, 3, 1], [12, 4, 7, 19, 8]),  # a last chunk of one token comes after the longer ones
    ([40, 33], [40, 50]),
]


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("consecutive", [False, True])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ragged_batches(case, block_size, consecutive):
    check(problem(*case, block_size=block_size, consecutive=consecutive))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", [CASES[1], CASES[4]], ids=str)
def test_dtypes(dtype, case):
    check(problem(*case, dtype=dtype))
    check(problem(*case, dtype=dtype, consecutive=True))


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 40, 128])
def test_heads(heads, head_dim):
    check(problem([1, 1, 6], [3, 17, 20], heads=heads, head_dim=head_dim))


def test_long_chunks_are_tiled(monkeypatch):
    monkeypatch.setattr(attention, "MASK_ENTRIES", 100)
    check(problem([45, 1, 40], [60, 30, 40]))


def test_nothing_to_do():
    assert ops.paged_attention(**problem([], [])).shape == (0, 6, 16)
    check(problem([0, 3, 0], [8, 5, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decode_without_context_gives_zeros(dtype, monkeypatch):
    """Padding rows of a fixed-size batch."""
    monkeypatch.setattr(attention, "IN_PLACE", 0)
    p = problem([1, 1], [5, 5], dtype=dtype)
    p["ragged"] = replace(p["ragged"], context_lens=torch.tensor([5, 0], dtype=torch.int32))
    out = ops.paged_attention(**p)
    assert not bool(out.isnan().any())
    assert not bool(out[1].any())


def test_large_scores_do_not_overflow():
    p = problem([1, 4], [9, 9], dtype=torch.float32)
    p["q"] = p["q"] * 1e4
    check(p)


def test_softmax_is_at_least_float32():
    """Values of equal weight over many keys: sums in half precision would stall."""
    p = problem([1, 2], [4001, 4001], dtype=torch.float16, heads=(1, 1))
    p["q"].zero_()
    for cache in (p["kv_layer"].k, p["kv_layer"].v):
        cache.nan_to_num_(1.0).fill_(1.0)
    assert math.isclose(ops.paged_attention(**p).double().mean(), 1.0, abs_tol=1e-3)


def test_refusals():
    p = problem([1, 3], [4, 9])
    for changed in (
        {"q": p["q"].float()},
        {"q": p["q"][:, :5]},
        {"ragged": replace(p["ragged"], block_size=8)},
    ):
        with pytest.raises(ValueError, match="paged_attention"):
            ops.paged_attention(**{**p, **changed})
    ragged, kv_layer = p["ragged"], p["kv_layer"]
    with pytest.raises(ValueError, match=r"must be int32 and slots int64, got .*int32, torch\.int64, torch\.int64"):
        replace(ragged, context_lens=ragged.context_lens.long())
    for changed in ({"block_tables": ragged.block_tables[:1]}, {"num_decodes": 3}):
        with pytest.raises(ValueError, match="block_tables, query_starts, context_lens and num_decodes do not fit"):
            replace(ragged, **changed)
    for changed in ({"v": kv_layer.v[:1]}, {"v": kv_layer.v.float()}, {"v": kv_layer.v.mT.contiguous().mT}):
        with pytest.raises(ValueError, match="k and v of a cache"):
            replace(kv_layer, **changed)
