"""The chunks of a context, and how those that several programs computed add up. See `decode` for why this is exact.

Decodes and runs are added up here: by a second kernel, or with `counters` by the last of the programs that have chunks
of a pair; prefill has chunks and a merge of its own, of the same parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.gpu.chain import take_turn
from llama.kernels.gpu.launch import Launch, Launcher, next_power_of_2
from llama.kernels.types import Ragged

MIN_CHUNK = 128

# Below every maximum of scores, yet finite: the difference of two of them is 0, not NaN.
NOTHING = tl.constexpr(-1.0e30)
# Chunks that are loaded together.
_UNROLL = tl.constexpr(32)
_UNROLL_MEMBERS = tl.constexpr(4)


def max_chunks(kv_heads: int) -> int:
    """Enough for one long sequence to keep a GPU of some 130 multiprocessors busy, few enough to be added quickly."""
    return min(max(16, next_power_of_2(256 // kv_heads)), 128)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent for integers <= 0 held as floats, exactly; 0 below the smallest normal number."""
    bits = (tl.maximum(exponent, -127.0).to(tl.int32) + 127) << 23
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def chunking(context, BLOCK_KEYS: tl.constexpr, MIN_CHUNK: tl.constexpr, max_chunks):
    """-> tiles of a context (one for an empty one), tiles of a chunk, chunks."""
    tiles = tl.maximum(tl.cdiv(context, BLOCK_KEYS), 1)
    width = tl.maximum(tl.cdiv(tiles, max_chunks), MIN_CHUNK // BLOCK_KEYS)
    return tiles, width, tl.cdiv(tiles, width)


@triton.jit
def add_chunks(
    partial_values,
    partial_stats,
    row,  # int64, of the partials' first two dimensions as one: where chunk 0 lies
    member,
    prefix,  # so many chunks are in the place of chunk 0
    chunks,
    MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """-> the weighted sum of values [DIMS] and the sum of weights of one member, over all chunks in order."""
    dims = tl.arange(0, DIMS)
    stats = partial_stats + row * 2 * MEMBERS + member
    index = tl.arange(0, MAX_CHUNKS)
    written = (index == 0) | ((index >= prefix) & (index < chunks))
    tops = tl.load(stats + index * 2 * MEMBERS, mask=written, other=NOTHING)
    top = tl.max(tops, axis=0)

    total = 0.0
    values = tl.zeros([DIMS], tl.float32)
    # Step 0 adds the prefix, the further ones the chunks behind it, in order.
    for first in range(prefix - 1, chunks, _UNROLL):
        for step in tl.static_range(_UNROLL):
            place = tl.where(first + step < prefix, 0, first + step)
            used = first + step < chunks
            factor = power_of_two(tl.load(stats + place * 2 * MEMBERS, mask=used, other=NOTHING) - top)
            total += factor * tl.load(stats + (place * 2 + 1) * MEMBERS, mask=used, other=0.0)
            part = partial_values + ((row + place) * MEMBERS + member) * HEAD_DIM + dims
            values += factor * tl.load(part, mask=used & (dims < HEAD_DIM), other=0.0)
    return values, total


@triton.jit
def merge_members(
    out,
    partial_values,
    partial_stats,
    row,
    prefix,
    chunks,
    first_query,  # int64, and its num_queries - 1 next ones
    num_queries,
    head,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    PADDED: tl.constexpr,  # QUERIES * GROUP, the members, as a power of two
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """What `_merge_kernel` writes of a pair, all members at once, added in the same order. The L1 cache is not asked:
    other programs of the same launch have written what is read."""
    MEMBERS: tl.constexpr = QUERIES * GROUP
    UNROLL: tl.constexpr = _UNROLL_MEMBERS if PADDED * DIMS <= 1024 else 1  # as registers allow
    members = tl.arange(0, PADDED)
    dims = tl.arange(0, DIMS)[None, :]
    stats = partial_stats + row * 2 * MEMBERS + members
    index = tl.arange(0, MAX_CHUNKS)[None, :]
    written = (index == 0) | ((index >= prefix) & (index < chunks))
    places = stats[:, None] + index * 2 * MEMBERS
    tops = tl.load(places, mask=written & (members < MEMBERS)[:, None], other=NOTHING, cache_modifier=".cg")
    top = tl.max(tops, axis=1)

    total = tl.zeros([PADDED], tl.float32)
    values = tl.zeros([PADDED, DIMS], tl.float32)
    for first in range(prefix - 1, chunks, UNROLL):
        for step in tl.static_range(UNROLL):
            place = tl.where(first + step < prefix, 0, first + step)
            used = (first + step < chunks) & (members < MEMBERS)
            chunk_top = tl.load(stats + place * 2 * MEMBERS, mask=used, other=NOTHING, cache_modifier=".cg")
            factor = power_of_two(chunk_top - top)
            weights = tl.load(stats + (place * 2 + 1) * MEMBERS, mask=used, other=0.0, cache_modifier=".cg")
            total += factor * weights
            part = partial_values + ((row + place) * MEMBERS + members[:, None]) * HEAD_DIM + dims
            mask = used[:, None] & (dims < HEAD_DIM)
            values += factor[:, None] * tl.load(part, mask=mask, other=0.0, cache_modifier=".cg")
    query_heads = (first_query + members // GROUP) * KV_HEADS * GROUP + head * GROUP + members % GROUP
    target = out + query_heads[:, None] * HEAD_DIM + dims
    result = tl.div_rn(values, tl.where(total > 0, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(target, result, mask=(members // GROUP < num_queries)[:, None] & (dims < HEAD_DIM))


@triton.jit(do_not_specialize_on_alignment=["query_starts", "context_lens"])
def _merge_kernel(
    out,
    partial_values,
    partial_stats,
    covered,
    query_starts,
    context_lens,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        take_turn()
    sequence, query_head = tl.program_id(0), tl.program_id(1)
    pair = sequence * KV_HEADS + query_head // GROUP
    member = query_head % GROUP
    if QUERIES == 1:
        query = sequence
    else:
        query = tl.load(query_starts + sequence) + tl.program_id(2)
        if query >= tl.load(query_starts + sequence + 1):
            return
        member += tl.program_id(2) * GROUP
    prefix = tl.load(covered + pair * 2)
    _, _, chunks = chunking(tl.load(context_lens + sequence), BLOCK_KEYS, MIN_CHUNK, MAX_CHUNKS)
    if prefix >= chunks:
        return
    row = tl.load(covered + pair * 2 + 1).to(tl.int64) * MAX_CHUNKS
    values, total = add_chunks(
        partial_values, partial_stats, row, member, prefix, chunks, QUERIES * GROUP, HEAD_DIM, DIMS, MAX_CHUNKS
    )
    dims = tl.arange(0, DIMS)
    target = out + (query.to(tl.int64) * KV_HEADS * GROUP + query_head) * HEAD_DIM + dims
    tl.store(target, tl.div_rn(values, total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)


Partials = tuple[Tensor, Tensor, Tensor]


class Sizes(NamedTuple):
    """Of the partials of a launch: a row per pair, or per program where there are more pairs."""

    rows: int
    chunks: int
    members: int  # a run's queries x the heads of one group
    head_dim: int
    pairs: int


def sizes_of(q: Tensor, pairs: int, num_programs: int, kv_heads: int, queries: int) -> Sizes:
    heads, head_dim = q.shape[1:]
    return Sizes(min(pairs, num_programs), max_chunks(kv_heads), queries * (heads // kv_heads), head_dim, pairs)


def partials_of(ragged: Ragged, sizes: Sizes, device: torch.device, counters: Tensor | None) -> Partials:
    """What the programs of one launch leave for the merge: values [rows, chunks, members, head_dim] float32; maxima and
    sums [rows, chunks, 2, members] float32; and [pairs, 2] int32: how many chunks are folded into the prefix, and in
    which row. Or `counters`, whose third column says how many chunks have been written. All layers of a step have the
    same memory."""
    partials = ragged.buffers.get(sizes) or ragged.buffers.setdefault(sizes, _allocate(sizes, device))
    return partials if counters is None else (*partials[:2], counters)


def _allocate(sizes: Sizes, device: torch.device) -> Partials:
    rows, chunks, members, head_dim, pairs = sizes
    return (
        torch.empty((rows, chunks, members, head_dim), dtype=torch.float32, device=device),
        torch.empty((rows, chunks, 2, members), dtype=torch.float32, device=device),
        torch.empty((pairs, 2), dtype=torch.int32, device=device),
    )


_launch_merge = Launcher(_merge_kernel)


def settle_merge(pairs: int, heads: int, constants: dict[str, int], early: dict[str, bool]) -> Launch:
    """Of (out, *partials, query_starts, context_lens): it writes the rows of `out` whose chunks several programs
    computed. `early`: how it is launched before the kernel in front has ended."""
    # Four dimensions per lane: registers for all the loads of an unrolled step at once.
    warps = max(1, constants["DIMS"] // 128)
    grid = (pairs // constants["KV_HEADS"], heads, constants["QUERIES"])
    return Launch(_launch_merge, grid, (), **constants, **early, num_warps=warps, maxnreg=255)
