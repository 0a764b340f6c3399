"""The attention kernels in the interpreter, against softmax written out in float64. Tiles are those of the GPU."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from llama.engine.plan import aligned_runs
from llama.kernels import ops
from llama.kernels.gpu.attention import config, decode, paged_attention, prefill, split
from llama.kernels.gpu.launch import Kinds
from llama.kernels.types import KVLayer, Runs
from tests.paged_attention import answer, as_runs, each_alone, make_problem

# float16 probabilities and outputs are rounded to 11 bits.
TOLERANCES = {torch.float32: 3e-6, torch.float16: 3e-3}


def check(problem):
    out = problem.run(paged_attention)
    assert out.dtype == problem.q.dtype and out.shape == problem.q.shape
    error = (out.double() - answer(problem)).abs().max()
    assert error <= TOLERANCES[out.dtype], f"off by {error:.2e}"
    return out


def decodes(contexts, **options):
    return make_problem([1] * len(contexts), contexts, num_decodes=len(contexts), **options)


def decode_with(problem, num_programs, counters=None):
    out = torch.full_like(problem.q, torch.nan)
    decode.decode_attention(
        out,
        problem.q,
        problem.kv_layer,
        problem.ragged,
        problem.scale,
        num_programs=num_programs,
        counters=counters,
    )
    return out


def decode_at_once(problem, num_programs, monkeypatch):
    """In one kernel, which leaves its counters as it found them."""
    counters = torch.full((64, 3), -7, dtype=torch.int32)
    counters[:, 2] = 0
    with monkeypatch.context() as patch:
        patch.setattr(decode, "has_room", lambda *shape, is_e4m3: True)
        patch.setattr(split, "settle_merge", None)
        patch.setattr(split, "_UNROLL_MEMBERS", decode.tl.constexpr(2))
        out = decode_with(problem, num_programs, counters)
    assert not counters[:, 2].any()
    return out


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_decode_across_edges_of_tiles_and_chunks(dtype):
    tile = config.decode_options(32, dtype.itemsize, 2)[1]["BLOCK_KEYS"]
    check(decodes([1, 15, 16, 17, tile, tile + 1, split.MIN_CHUNK, split.MIN_CHUNK + 1], dtype=dtype))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1), (4, 1), (16, 2), (16, 1), (20, 1)])
def test_decode_of_groups(heads, kv_heads):
    check(decodes([40, 100], heads=(heads, kv_heads), head_dim=16))


@pytest.mark.parametrize("block_size", [1, 2, 16, 32, 256])
def test_decode_over_blocks(block_size):
    check(decodes([1, 37, 300], block_size=block_size, dtype=torch.float16, heads=(2, 1)))


@pytest.mark.parametrize("head_dim", [1, 16, 24, 64, 80, 128])
def test_decode_of_head_dims(head_dim):
    check(decodes([9, 70], head_dim=head_dim, heads=(2, 1)))


def test_decode_of_an_empty_context_is_zero():
    problem = decodes([0, 5, 0])
    out = check(problem)
    assert not out[0].any() and not out[2].any()


def test_decode_with_more_chunks_than_the_cap(monkeypatch):
    monkeypatch.setattr(split, "MIN_CHUNK", 32)
    monkeypatch.setattr(split, "max_chunks", lambda kv_heads: 4)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    check(decodes([33, 64, 161, 500], heads=(2, 1)))


def test_decode_over_more_sequences_than_one_look(monkeypatch):
    monkeypatch.setattr(decode, "_SEQUENCES", decode.tl.constexpr(4))
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    problem = decodes([3, 0, 70, 5, 33, 1, 64, 0, 129], heads=(1, 1), head_dim=16)
    expected = check(problem)
    assert torch.equal(decode_with(problem, 3), expected)
    assert torch.equal(decode_at_once(problem, 3, monkeypatch), expected)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_decode_does_not_depend_on_who_does_the_work(dtype, monkeypatch):
    """Any number of programs, so any split of a context among them, gives the same bits; so do any neighbours."""
    monkeypatch.setattr(split, "MIN_CHUNK", 64)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    problem = decodes([300, 65, 0, 130], dtype=dtype, heads=(2, 1), head_dim=16, spread=4.0)
    alone = decode_with(problem, 1)
    assert (alone.double() - answer(problem)).abs().max() <= TOLERANCES[dtype]
    for num_programs in (2, 3, 5, 16):
        assert torch.equal(decode_with(problem, num_programs), alone)
    for num_programs in (1, 5, 16):
        assert torch.equal(decode_at_once(problem, num_programs, monkeypatch), alone)
    assert torch.equal(decode_with(problem.only(0), 3), alone[:1])
    assert torch.equal(decode_with(problem.only(3, 1), 4), alone[[3, 1]])


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize(
    ("dtype", "heads"), [(torch.float32, (4, 2)), (torch.float32, (3, 1)), (torch.float16, (8, 1))], ids=str
)
def test_queries_of_a_run_have_the_bits_that_each_has_alone(dtype, heads, monkeypatch):
    """Runs that begin in one tile or chunk and end in the next, empty ones, and padding behind them."""
    monkeypatch.setattr(split, "MIN_CHUNK", 64)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    problem = make_problem([2, 3, 4, 2, 1, 0], [2, 33, 67, 129, 50, 0], dtype=dtype, heads=heads, head_dim=16)
    out = check(as_runs(problem, 4))
    assert torch.equal(out, decode_with(each_alone(problem), 3))
    assert torch.equal(out, decode_with(as_runs(problem, 4), 3))
    assert torch.equal(out, decode_at_once(as_runs(problem, 4), 7, monkeypatch))


def test_runs_with_more_chunks_than_the_cap(monkeypatch):
    """Where a chunk's width grows within a run its queries are right, though the bits may be others."""
    monkeypatch.setattr(split, "MIN_CHUNK", 32)
    monkeypatch.setattr(split, "max_chunks", lambda kv_heads: 4)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    check(as_runs(make_problem([8, 3, 2], [130, 64, 161], heads=(2, 1), head_dim=16), 8))


def in_aligned_runs(problem, start, stop):
    """Those queries of the only sequence whose positions are start .. stop - 1; the keys up to there are stored."""
    heads, kv_heads = problem.q.shape[1], problem.kv_layer.k.shape[2]
    most = Runs.of(heads // kv_heads).most
    _, lens, contexts = aligned_runs(np.array([stop - start]), np.array([stop]), most)
    ragged = replace(
        problem.ragged,
        block_tables=problem.ragged.block_tables.repeat(len(lens), 1),
        query_starts=torch.tensor([0, *lens.cumsum()], dtype=torch.int32),
        context_lens=torch.from_numpy(contexts),
        run_len=most,
    )
    past = int(problem.context_lens[0]) - len(problem.q)
    return paged_attention(problem.q[start - past : stop - past], problem.kv_layer, ragged, problem.scale)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize(("dtype", "heads"), [(torch.float32, (2, 1)), (torch.float16, (6, 2))], ids=str)
def test_queries_in_aligned_runs_have_the_same_bits_however_they_are_cut(dtype, heads, monkeypatch):
    """Where chunks are as many as may be, too, so that their width grows with the context."""
    monkeypatch.setattr(split, "MIN_CHUNK", 32)
    monkeypatch.setattr(split, "max_chunks", lambda kv_heads: 2)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    edge = 2 * config.decode_options(16, dtype.itemsize, 32)[1]["BLOCK_KEYS"]  # from here on a chunk has two tiles
    first, last = edge - 5, edge + 5
    whole = make_problem([last - first], [last], heads=heads, head_dim=16, dtype=dtype)
    expected = in_aligned_runs(whole, first, last)
    assert (expected.double() - answer(whole)).abs().max() <= TOLERANCES[dtype]
    parts = [in_aligned_runs(whole, start, stop) for start, stop in pairwise([first, edge - 1, edge, edge + 2, last])]
    assert torch.equal(torch.cat(parts), expected)


@pytest.mark.usefixtures("row_by_row")
def test_a_run_over_an_fp8_cache():
    problem = make_problem([3, 1, 2], [40, 9, 70], heads=(4, 2), head_dim=16, dtype=torch.float16)
    data = [torch.randint(0, 120, cache.shape, dtype=torch.uint8) for cache in (problem.kv_layer.k, problem.kv_layer.v)]
    cache = KVLayer(*data, torch.tensor([[0.5, 0.25], [2.0, 1.0]]))
    problem = replace(problem, kv_layer=cache)
    assert torch.equal(as_runs(problem, 4).run(paged_attention), each_alone(problem).run(paged_attention))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_prefill_of_ragged_sequences(dtype):
    """A prompt, a chunk at a context's end, an empty sequence, a single query; over edges of tiles."""
    check(make_problem([40, 9, 0, 1, 33, 5], [40, 150, 0, 64, 65, 7], dtype=dtype))


def test_prefill_that_needs_several_query_tiles():
    rows = config.prefill_tile(16, 4).rows
    check(make_problem([rows + 1, 2 * rows], [rows + 1, 2 * rows + 30], heads=(1, 1), head_dim=16))


@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (3, 1), (8, 2), (8, 1), (40, 1)])
def test_prefill_of_groups(heads, kv_heads):
    check(make_problem([14, 3], [14, 50], heads=(heads, kv_heads), head_dim=16))


@pytest.mark.parametrize("block_size", [1, 4, 64, 128])
def test_prefill_over_blocks(block_size):
    check(make_problem([7, 20], [70, 133], block_size=block_size, dtype=torch.float16))


@pytest.mark.parametrize("head_dim", [8, 64, 80, 128])
def test_prefill_of_head_dims(head_dim):
    check(make_problem([6], [41], head_dim=head_dim, heads=(2, 1)))


def test_prefill_finds_its_sequence_among_many(monkeypatch):
    monkeypatch.setattr(prefill, "_SEQUENCES", prefill.tl.constexpr(4))
    check(make_problem([2, 0, 3, 1, 40, 1, 0, 5], [9, 0, 3, 8, 40, 33, 1, 20], head_dim=16))


@pytest.fixture
def many_chunks(monkeypatch):
    """Contexts are cut as by a GPU with many multiprocessors, into up to four chunks. -> The parts of each launch."""
    parts = []

    def allocate(out, number, members, real=prefill._allocate):
        parts.append(number)
        return [tensor.fill_(torch.nan) for tensor in real(out, number, members)]

    monkeypatch.setattr(prefill, "_allocate", allocate)
    monkeypatch.setattr(prefill, "MIN_CHUNK", 32)
    monkeypatch.setattr(prefill, "MAX_CHUNKS", 4)
    monkeypatch.setattr(prefill, "multiprocessor_count", lambda device: 1000)
    monkeypatch.setattr(split, "_UNROLL", decode.tl.constexpr(2))
    for key in config._PREFILL:
        monkeypatch.setitem(config._PREFILL, key, config.PrefillTile(16, 32, 4, 2))
    return parts


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_prefill_in_chunks(dtype, many_chunks):
    """A long context before few queries, queries in several tiles and of which the first see fewer chunks than the
    last, a context of one chunk, an empty one, a single query; behind a decode."""
    problem = make_problem([1, 5, 0, 9, 1], [9, 170, 0, 70, 3], num_decodes=1, heads=(4, 1), dtype=dtype)
    check(problem)
    assert many_chunks == [(15 // 4 + 4) * 4]


@pytest.mark.parametrize(
    ("heads", "head_dim", "block_size"), [((3, 1), 24, 1), ((2, 2), 80, 128), ((16, 1), 16, 16)], ids=str
)
def test_prefill_in_chunks_of_other_shapes(heads, head_dim, block_size, many_chunks):
    check(make_problem([3], [101], heads=heads, head_dim=head_dim, block_size=block_size))
    assert many_chunks


def test_prefill_in_chunks_over_an_fp8_cache(many_chunks):
    problem = make_problem([2], [70], heads=(2, 1), head_dim=16, dtype=torch.float16)
    data = [torch.randint(0, 120, cache.shape, dtype=torch.uint8) for cache in (problem.kv_layer.k, problem.kv_layer.v)]
    problem = replace(problem, kv_layer=KVLayer(*data, torch.tensor([[0.5], [2.0]])))
    cut = problem.run(paged_attention)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefill, "multiprocessor_count", lambda device: 1)
        patch.setattr(prefill, "_KINDS", Kinds())
        torch.testing.assert_close(cut, problem.run(paged_attention), rtol=2e-3, atol=0)
    assert len(many_chunks) == 1


def by_descriptors(problem):
    """Where tiles ask for descriptors, and get them."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        for key, tile in list(config._PREFILL.items()):
            patch.setitem(config._PREFILL, key, tile._replace(descriptors=True))
        real = prefill._descriptors
        patch.setattr(prefill, "_descriptors", lambda *given: made.append(real(*given)) or made[-1])
        out = problem.run(paged_attention)
    assert len(made) == 1 and made[0] is not None
    return out


@pytest.mark.parametrize(("dtype", "block_size"), [(torch.float32, 64), (torch.float16, 128)], ids=str)
def test_prefill_by_descriptors_has_the_bits_of_prefill_by_pointers(dtype, block_size):
    """A tile of keys is a whole block or a part of one; several tiles of queries, and what is not in use is NaN."""
    lens = {torch.float32: ([40, 0, 1], [140, 0, 64]), torch.float16: ([130, 0, 1], [290, 0, 128])}[dtype]
    problem = make_problem(*lens, heads=(1, 1), block_size=block_size, dtype=dtype)
    assert torch.equal(by_descriptors(problem), check(problem))


@pytest.mark.parametrize(("name", "block_size"), [("128x64", 64), ("128x64", 128), ("128x128", 128)])
def test_candidates_by_descriptors(name, block_size, monkeypatch):
    monkeypatch.setitem(config._PREFILL, (128, 2), config.PREFILL_CANDIDATES[name])
    problem = make_problem([3], [300], heads=(4, 1), head_dim=128, block_size=block_size, dtype=torch.float16)
    assert torch.equal(by_descriptors(problem), check(problem))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_prefill_in_chunks_by_descriptors(dtype, many_chunks):
    problem = make_problem([5, 1], [130, 3], heads=(4, 1), head_dim=16, block_size=64, dtype=dtype)
    assert torch.equal(by_descriptors(problem), check(problem))
    assert len(many_chunks) == 2


def test_descriptors_are_of_caches_without_gaps_whose_blocks_hold_a_tile():
    def has(kv_layer, dtype=torch.float16, keys=64):
        return prefill._descriptors(kv_layer, dtype, keys) is not None

    cache = torch.zeros(4, 64, 2, 32, dtype=torch.float16)
    both, codes = torch.stack((cache, cache), 1), cache.to(torch.uint8)
    assert has(KVLayer(cache, cache))
    assert not has(KVLayer(cache, cache), keys=128)
    assert not has(KVLayer(both[:, 0], both[:, 1]))
    assert not has(KVLayer(cache[..., :24].contiguous(), cache[..., :24].contiguous()))
    assert not has(KVLayer(codes, codes, torch.ones(2, 2)))


@pytest.mark.parametrize(
    ("tiles", "kv_heads", "capacity", "chunks"),
    [
        (1, 8, 131_072, 16),  # up to 32 queries of Llama 3.1 8B
        (4, 8, 131_072, 4),
        (9, 8, 131_072, 1),
        (300, 8, 131_072, 1),
        (1, 1, 131_072, 64),
        (1, 8, 2048, 4),
        (1, 8, 1023, 1),
    ],
)
def test_contexts_are_cut_for_a_gpu_of_132_multiprocessors(tiles, kv_heads, capacity, chunks):
    assert prefill.num_chunks(tiles, kv_heads, capacity, 132) == chunks


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_decodes_before_prefills(dtype):
    check(make_problem([1, 1, 1, 20, 1], [33, 0, 129, 52, 9], num_decodes=3, dtype=dtype))


def test_chunks_of_a_prompt_give_what_the_whole_gives():
    whole = make_problem([50], [50], heads=(2, 1), head_dim=16)
    expected = check(whole)
    for start, end in ((0, 17), (17, 18), (18, 50)):
        ragged = replace(
            whole.ragged,
            query_starts=torch.tensor([0, end - start], dtype=torch.int32),
            context_lens=torch.tensor([end], dtype=torch.int32),
            num_decodes=int(end - start == 1),
        )
        out = paged_attention(whole.q[start:end], whole.kv_layer, ragged, whole.scale)
        torch.testing.assert_close(out, expected[start:end], rtol=0, atol=3e-6)


def test_caches_and_queries_may_be_views():
    problem = make_problem([1, 6], [20, 30], num_decodes=1)
    fused = torch.randn(7, 9, 32)
    fused[:, 3:7] = problem.q
    both = torch.stack((problem.kv_layer.k, problem.kv_layer.v), dim=1)  # a block's K and V beside one another
    out = replace(problem, q=fused[:, 3:7], kv_layer=KVLayer(both[:, 0], both[:, 1]))
    torch.testing.assert_close(out.run(paged_attention), problem.run(paged_attention), rtol=0, atol=0)


@pytest.mark.parametrize("queries", [1, 3])
def test_cache_of_more_than_2_to_the_31_elements(queries):
    """By strides alone: an element that 32 bits cannot count lies in a mapping of which a few pages are touched."""
    problem = make_problem([queries], [30], num_decodes=int(queries == 1), dtype=torch.float16, heads=(2, 1))
    blocks, _, _, head_dim = problem.kv_layer.k.shape
    block_stride = (1 << 31) // (blocks - 1) + 16 & ~15
    storage = torch.empty(block_stride * blocks, dtype=torch.float16)
    strides = (block_stride, head_dim, head_dim, 1)
    caches = [
        storage.as_strided(cache.shape, strides, index * (block_stride // 2)).copy_(cache)
        for index, cache in enumerate((problem.kv_layer.k, problem.kv_layer.v))
    ]
    assert caches[0].stride(0) * (blocks - 1) >= 1 << 31
    check(replace(problem, kv_layer=KVLayer(*caches)))


def test_public_op_takes_the_kernel():
    problem = make_problem([1, 4], [20, 4], num_decodes=1)
    assert torch.equal(problem.run(ops.paged_attention), problem.run(paged_attention))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"dtype": torch.float64}, "float64"),
        ({"block_size": 3}, "power of two"),
        ({"head_dim": 257}, "head_dim"),
    ],
)
def test_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        make_problem([1], [5], num_decodes=1, **change).run(paged_attention)
