"""The attention kernels on a GPU against float64: error budgets, long contexts, 64-bit offsets, bits and graphs.

Every problem has NaN wherever no sequence's keys lie, so each test is one of poisoned memory as well.
"""

from dataclasses import replace

import pytest
import torch

from llama.kernels import ops
from llama.kernels.cpu.e4m3 import from_e4m3, to_e4m3
from llama.kernels.gpu.attention import config, decode, paged_attention, rotate_and_attend
from llama.kernels.gpu.rope import rope_and_store
from llama.kernels.types import KVLayer
from tests.paged_attention import answer, as_runs, each_alone, make_problem, projected

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]

DEVICE = "cuda"
# ||out - answer|| / ||answer||. 16 bits: probabilities and output are rounded once each, by a quarter of this on
# average or a bit more. float32: exponentials and sums of some thousand terms.
BUDGET = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 5e-6}
# head_dim, (heads, KV heads), block size: Llama 3.1 8B and 70B, 3.2 1B, SmolLM2, one KV head per GPU, padded, wide
SHAPES = [
    (128, (32, 8), 16),
    (128, (64, 8), 128),
    (64, (32, 8), 16),
    (64, (9, 3), 32),
    (128, (16, 1), 1),
    (80, (8, 8), 16),
    (256, (8, 1), 64),
]
MIXED = {"queries": [1, 1, 1, 1, 300, 1, 0, 17, 128], "contexts": [1, 129, 0, 5000, 300, 64, 0, 2049, 1000]}


def problem(queries, contexts, **options):
    return make_problem(queries, contexts, device=DEVICE, **options)


def decodes(contexts, **options):
    return problem([1] * len(contexts), contexts, num_decodes=len(contexts), **options)


def check(case, out=None):
    out = case.run(ops.paged_attention) if out is None else out
    expected = answer(case)
    error = ((out.double() - expected).norm() / expected.norm()).item()
    assert error <= BUDGET[out.dtype], f"relative error {error:.2e}"  # NaN fails
    return out


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    head_dim, heads, block_size = shape
    for spread in (1.0, 8.0):  # many keys matter; few do
        check(
            problem(
                **MIXED,
                num_decodes=4,
                head_dim=head_dim,
                heads=heads,
                block_size=block_size,
                dtype=dtype,
                spread=spread,
            )
        )


@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(group):
    case = problem([1, 1, 50], [77, 600, 90], num_decodes=2, heads=(group * 2, 2), head_dim=64, dtype=torch.bfloat16)
    check(case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_context_of_131072_tokens(dtype):
    options = {"heads": (8, 2), "head_dim": 128, "dtype": dtype}
    check(decodes([131_072, 131_071, 1], **options))
    check(problem([1, 33], [131_072, 131_072], num_decodes=1, **options))


def narrow(case):
    """The same over e4m3's bytes, each head with a scale, and what these bytes stand for in float32."""
    kv_heads = case.kv_layer.k.shape[2]
    scales = torch.stack((torch.linspace(0.01, 0.03, kv_heads), torch.linspace(0.02, 0.01, kv_heads))).to(DEVICE)
    caches = [to_e4m3(cache, scale) for cache, scale in zip((case.kv_layer.k, case.kv_layer.v), scales, strict=True)]
    wide = [from_e4m3(cache, torch.float32) * scale[:, None] for cache, scale in zip(caches, scales, strict=True)]
    return replace(case, kv_layer=KVLayer(*caches, scales)), replace(case, kv_layer=KVLayer(*wide))


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_a_cache_in_fp8(shape, dtype):
    head_dim, heads, block_size = shape
    options = {"head_dim": head_dim, "heads": heads, "block_size": block_size, "dtype": dtype}
    for case in (
        problem(**MIXED, num_decodes=4, **options),
        decodes([131_072, 131_071, 1], **options),
        problem([1, 33], [131_072, 131_072], num_decodes=1, **options),
    ):
        stored, wide = narrow(case)
        check(wide, stored.run(ops.paged_attention).to(dtype))


@pytest.mark.alone
@pytest.mark.parametrize("queries", [1, 40])
def test_cache_of_more_than_2_to_the_31_elements(queries):
    """The blocks in use are the last of a cache of 4.3 GB each for K and V."""
    small = problem([queries], [500], num_decodes=int(queries == 1), heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    blocks = small.kv_layer.k.shape[0]
    total = (1 << 31) // small.kv_layer.k[0].numel() + blocks
    caches = []
    for cache in (small.kv_layer.k, small.kv_layer.v):
        caches.append(torch.full((total, *cache.shape[1:]), torch.nan, dtype=cache.dtype, device=DEVICE))
        caches[-1][total - blocks :] = cache
    ragged = replace(small.ragged, block_tables=small.ragged.block_tables + (total - blocks))
    large = replace(small, kv_layer=KVLayer(*caches), ragged=ragged)
    assert torch.equal(large.run(paged_attention), check(small))


def test_decode_has_the_same_bits_in_any_company():
    """Alone, in another order, among 255 others; and however many programs share the work."""
    contexts = [131, 4097, 1, 20_000, 64, 8192, 700, 3]
    case = decodes(contexts, heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    together = check(case)
    for sequence in range(len(contexts)):
        assert torch.equal(case.only(sequence).run(paged_attention), together[sequence : sequence + 1])
    order = [5, 2, 7, 0, 1, 3, 6, 4]
    assert torch.equal(case.only(*order).run(paged_attention), together[order])
    crowd = [i % len(contexts) for i in range(256)]
    assert torch.equal(case.only(*crowd).run(paged_attention), together[crowd])
    for num_programs in (1, 7, 132, 1000):
        out = torch.full_like(case.q, torch.nan)
        decode.decode_attention(out, case.q, case.kv_layer, case.ragged, case.scale, num_programs=num_programs)
        assert torch.equal(out, together)


@pytest.mark.parametrize("run_len", [1, 8])
def test_decode_in_one_kernel_has_the_bits_of_two(run_len):
    """Whichever of the programs of a pair is the last to have written its chunks."""
    lens = [5, 8, 1, 3, 7, 2] if run_len > 1 else [1] * 6
    case = problem(lens, [4097, 131, 20_000, 64, 8192, 700], heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    case = as_runs(case, 8) if run_len > 1 else each_alone(case)
    together, counters = check(case), torch.zeros(48, 3, dtype=torch.int32, device=DEVICE)
    for num_programs in (None, 1, 7, 132, 1000) * 50:
        out = torch.full_like(case.q, torch.nan)
        options = {"num_programs": num_programs, "counters": counters}
        decode.decode_attention(out, case.q, case.kv_layer, case.ragged, case.scale, **options)
        assert torch.equal(out, together) and not counters[:, 2].any()


def test_decodes_that_rotate_and_store_their_tokens():
    """A product's rounding may be another in this kernel than in that of its own: then a bit of q or k is."""
    lens = [4097, 131, 20_000, 64, 8192, 700, 0, 1]
    case = decodes(lens, heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    qkv, by, case = projected(case)
    own, theirs = (KVLayer(case.kv_layer.k.clone(), case.kv_layer.v.clone()) for _ in range(2))
    q = rope_and_store(*qkv.split([32, 8, 8], dim=1), by, theirs, case.ragged)
    expected = paged_attention(q, theirs, case.ragged, case.scale)
    counters, seen = torch.zeros(64, 3, dtype=torch.int32, device=DEVICE), []
    for _ in range(50):
        out = rotate_and_attend(qkv, by, own, case.ragged, case.scale, counters)
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)
        seen.append(out)
    assert all(torch.equal(out, seen[0]) for out in seen)
    torch.testing.assert_close(own.k, theirs.k, rtol=1e-2, atol=1e-2, equal_nan=True)
    torch.testing.assert_close(own.v, theirs.v, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group", [1, 4, 8])
def test_queries_of_a_run_have_the_bits_that_each_has_alone(group):
    """Where all of a run's contexts are cut into chunks alike."""
    lens = [5, 8, 1, 3, 7, 2, 0]
    case = problem(lens, [5, 4000, 300, 129, 64, 130, 0], heads=(2 * group, 2), head_dim=128, dtype=torch.bfloat16)
    assert torch.equal(check(as_runs(case, 8)), check(each_alone(case)))


def test_decode_of_300_sequences():
    case = decodes([(37 * i) % 400 for i in range(300)], heads=(8, 2), head_dim=64, dtype=torch.bfloat16)
    check(case)


def test_prefill_has_the_same_bits_in_any_company():
    """In contexts that are too short to be cut into chunks."""
    case = problem([64, 1, 130, 9, 500], [64, 300, 900, 9, 700], heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    together = check(case)
    for sequence in range(5):
        assert torch.equal(case.only(sequence).run(paged_attention), together[case.rows(sequence)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prefill_of_few_queries_behind_long_contexts(shape):
    head_dim, heads, block_size = shape
    sizes = {"heads": heads, "head_dim": head_dim, "block_size": block_size, "dtype": torch.bfloat16}
    for queries, contexts in (([30], [20_000]), ([1, 40, 0, 3], [1, 9000, 0, 3]), ([1, 128, 1], [700, 5000, 2049])):
        case = problem(queries, contexts, num_decodes=int(contexts[0] == 700), **sizes)
        out = check(case)
        assert torch.equal(case.run(paged_attention), out)


@pytest.mark.parametrize(("name", "block_size"), [("128x64", 64), ("128x64", 128), ("128x128", 128)])
def test_prefill_by_descriptors_has_the_bits_of_prefill_by_pointers(name, block_size, monkeypatch):
    """Over several tiles of queries and keys, and in chunks."""
    sizes = {"heads": (32, 8), "head_dim": 128, "block_size": block_size, "dtype": torch.bfloat16}
    for case in (problem(**MIXED, num_decodes=4, **sizes), problem([30], [20_000], **sizes)):
        monkeypatch.setitem(config._PREFILL, (128, 2), config.PREFILL_CANDIDATES[name])
        by_pointers = check(case)
        monkeypatch.setitem(config._PREFILL, (128, 2), config.PREFILL_CANDIDATES[f"{name} descriptors"])
        assert torch.equal(case.run(paged_attention), by_pointers)


def test_prefill_of_a_whole_prompt():
    check(problem([8192], [8192], heads=(8, 2), head_dim=128, dtype=torch.bfloat16))


def test_graph_of_decodes_holds_for_any_contexts():
    """Captured at short contexts, replayed at long ones and with padding rows: the bits of an eager call."""
    case = decodes([1, 9, 30, 2], heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    longer = decodes([5000, 0, 70, 129], heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    width = longer.ragged.block_tables.shape[1]
    q, lens = case.q.clone(), case.context_lens.clone()
    tables = torch.zeros(4, width, dtype=torch.int32, device=DEVICE)
    tables[:, : case.ragged.block_tables.shape[1]] = case.ragged.block_tables
    caches = [torch.full_like(cache, torch.nan) for cache in (longer.kv_layer.k, longer.kv_layer.v)]
    for cache, filled in zip(caches, (case.kv_layer.k, case.kv_layer.v), strict=True):
        cache[: filled.shape[0]] = filled

    def step():
        ragged = replace(case.ragged, block_tables=tables, context_lens=lens)
        return paged_attention(q, KVLayer(*caches), ragged, case.scale)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    graph.replay()
    check(case, out.clone())

    q.copy_(longer.q)
    lens.copy_(longer.context_lens)
    tables.copy_(longer.ragged.block_tables)
    for cache, filled in zip(caches, (longer.kv_layer.k, longer.kv_layer.v), strict=True):
        cache.copy_(filled)
    for _ in range(3):
        out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, step())
    check(longer, out)


def test_repeated_calls_have_the_same_bits():
    case = decodes([3000] * 30, heads=(32, 8), head_dim=128, dtype=torch.bfloat16)
    first = check(case)
    for _ in range(50):
        assert torch.equal(case.run(paged_attention), first)
