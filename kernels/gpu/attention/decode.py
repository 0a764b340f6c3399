"""Decode: one query per sequence, or a short run, against its whole paged context (split-KV; the split changes no bit).

    out = softmax(scale q K^T) V      reads 2 context kv_heads D elements per sequence: K and V once per group of heads

A context is cut into chunks whose size follows from that context alone: at most MAX_CHUNKS of at least MIN_CHUNK keys.
A fixed number of programs takes equal, contiguous shares of all tiles of all (sequence, KV head) pairs. So the grid
depends on the device alone, any contexts up to any capacity fit one CUDA graph, and no program is without work.

Why the shares cannot change a result: each chunk starts from nothing, and a pair's chunks are added in order. Maxima
are rounded up to integers in the base-2 domain, so every rescaling is by a power of two, which commutes with rounding
(above underflow): a sum has the same bits whether a program folds the chunks in registers or the second kernel adds
them from memory, or the program that has the last of them does (`counters`). A request's answer does not depend on its
neighbours.

A program folds a pair's chunks as long as it has them from the first on. Where its share ends within a pair it writes
that prefix; the later chunks are written one by one by the programs that own them, and `covered` tells the second
kernel where the prefix ends.

A run's queries are further rows of its group: keys and values are read once for all of them, each sees those up to its
own place, and each has the bits that it has alone where its context is cut into chunks like the run's. That is so but
where their widths differ: in contexts of more than MAX_CHUNKS smallest chunks, at one place in that many tiles.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.checks import multiprocessor_count
from llama.kernels.gpu.attention import split
from llama.kernels.gpu.attention.config import LOG2_E, check_attention, decode_options, has_room, padded
from llama.kernels.gpu.attention.split import NOTHING, chunking, merge_members, power_of_two
from llama.kernels.gpu.attention.tiles import key_rows, load_blocks, row_mask
from llama.kernels.gpu.chain import launch_options, take_turn
from llama.kernels.gpu.e4m3 import load_as
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, next_power_of_2
from llama.kernels.gpu.rope import rotated_rows, store_own
from llama.kernels.types import KVLayer, Ragged, kind_of

# Sequences that a program looks at together when it finds its share.
_SEQUENCES = tl.constexpr(128)


@triton.jit
def _tiles_of(context_lens, first, num_sequences, BLOCK_KEYS: tl.constexpr):
    index = first + tl.arange(0, _SEQUENCES)
    contexts = tl.load(context_lens + index, mask=index < num_sequences, other=0)
    return tl.where(index < num_sequences, tl.maximum(tl.cdiv(contexts, BLOCK_KEYS), 1), 0)


@triton.jit
def _owner(position, quotient, remainder):
    """The program whose share holds a tile: `remainder` shares of quotient + 1 tiles come before those of quotient."""
    longer = (quotient + 1) * remainder
    behind = remainder + (position - longer) // tl.maximum(quotient, 1)
    return tl.where(position < longer, position // (quotient + 1), behind)


@triton.jit
def _attend_chunk(
    query,  # [ROWS, DIMS]
    k_head,
    v_head,
    block_table,
    start,
    end,
    limits,  # [ROWS], how many keys each row sees; None = all
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """-> integer maximum (base 2), sum of weights and weighted sum of values over the keys start .. end - 1."""
    ROWS: tl.constexpr = query.shape[0]
    DIMS: tl.constexpr = query.shape[1]
    dims = tl.arange(0, DIMS)[None, :]
    top = tl.full([ROWS], NOTHING, tl.float32)
    # Added over keys at the end alone: a sum across warps in every step would cost two more barriers.
    sums = tl.zeros([ROWS, BLOCK_KEYS], tl.float32)
    values = tl.zeros([ROWS, DIMS], tl.float32)
    blocks = load_blocks(block_table, start, end, BLOCK_SIZE, BLOCK_KEYS)
    for first in range(start, end, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        valid = keys < end
        rows = key_rows(blocks, first, BLOCK_SIZE, BLOCK_KEYS, BLOCK_STRIDE, SLOT_STRIDE)[:, None]
        blocks = load_blocks(block_table, first + BLOCK_KEYS, end, BLOCK_SIZE, BLOCK_KEYS)
        # Places that are not in use may hold NaN, and 0 * NaN is NaN: they are read as 0.
        mask = row_mask(valid, DIMS, HEAD_DIM)
        k = load_as(k_head + rows + dims, mask, query.dtype)
        v = load_as(v_head + rows + dims, mask, query.dtype)

        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        seen = valid[None, :] if limits is None else keys[None, :] < limits[:, None]
        scores = tl.where(seen, scores, -float("inf"))
        higher = tl.maximum(top, tl.ceil(tl.max(scores, axis=1) * scale_log2))
        weights = tl.exp2(scores * scale_log2 - higher[:, None])
        rescale = power_of_two(top - higher)[:, None]
        top = higher
        sums = sums * rescale + weights
        values = tl.dot(weights.to(query.dtype), v, values * rescale, input_precision=PRECISION)
    return top, tl.sum(sums, axis=1), values


# What varies from step to step makes no further variants of the kernel.
@triton.jit(
    do_not_specialize=["num_sequences", "num_programs", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _decode_kernel(
    out,
    partial_values,  # see split.allocate
    partial_stats,
    covered,
    q,
    k_cache,
    v_cache,
    kv_scales,  # [2, KV_HEADS] float32, where the caches are e4m3
    block_tables,
    query_starts,
    context_lens,
    rotation,  # if ROTATES: cos, sin and slots of the tokens; q is as projected, with k and v behind
    num_sequences,
    num_programs,
    scale_log2,
    q_token_stride,
    q_head_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,  # the most of a run
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    EARLY: tl.constexpr,
    ROTATES: tl.constexpr,
    MERGES: tl.constexpr,  # QUERIES * GROUP as a power of two: who completes a pair merges it; 0 = the next kernel does
):
    if EARLY:
        take_turn()
    program = tl.program_id(0)
    # A lone sequence, where each microsecond counts most, is not searched for.
    if num_sequences == 1:
        all_tiles = tl.maximum(tl.cdiv(tl.load(context_lens), BLOCK_KEYS), 1)
    else:
        all_tiles = 0
        for first in range(0, num_sequences, _SEQUENCES):
            all_tiles += tl.sum(_tiles_of(context_lens, first, num_sequences, BLOCK_KEYS))
    all_tiles *= KV_HEADS
    quotient, remainder = all_tiles // num_programs, all_tiles % num_programs
    share_start = program * quotient + tl.minimum(program, remainder)
    share_end = share_start + quotient + tl.where(program < remainder, 1, 0)
    if share_start == share_end:
        return

    # The sequence in which the share starts, and that sequence's first tile.
    sequence = 0
    sequence_start = 0
    if num_sequences > 1:
        before = 0
        for first in range(0, num_sequences, _SEQUENCES):
            of_each = _tiles_of(context_lens, first, num_sequences, BLOCK_KEYS)
            ends = (before + tl.cumsum(of_each)) * KV_HEADS
            passed = (ends <= share_start) & (of_each > 0)
            sequence += tl.sum(passed.to(tl.int32))
            sequence_start = tl.maximum(sequence_start, tl.max(tl.where(passed, ends, 0)))
            before += tl.sum(of_each)

    context = tl.load(context_lens + sequence)
    tiles, width, chunks = chunking(context, BLOCK_KEYS, MIN_CHUNK, MAX_CHUNKS)
    head = (share_start - sequence_start) // tiles
    # A chunk belongs to the share in which its first tile lies.
    chunk = tl.cdiv((share_start - sequence_start) % tiles, width)
    pair_start = sequence_start + head * tiles

    group = tl.arange(0, ROWS)
    dims = tl.arange(0, DIMS)[None, :]
    row_valid = group < QUERIES * GROUP
    group_mask = row_mask(row_valid, DIMS, HEAD_DIM)
    while pair_start + tl.minimum(chunk * width, tiles) < share_end:
        pair = sequence * KV_HEADS + head
        if QUERIES == 1:
            limits = None
            query_offset = sequence.to(tl.int64) * q_token_stride + (head * GROUP + group[:, None]) * q_head_stride
        else:
            start = tl.load(query_starts + sequence)
            place = group // GROUP
            num_queries = tl.load(query_starts + sequence + 1) - start
            group_mask = row_mask(place < num_queries, DIMS, HEAD_DIM)
            limits = tl.where(place < num_queries, context - num_queries + 1 + place, 0)
            query_head = head * GROUP + group % GROUP
            query_offset = (start + place).to(tl.int64)[:, None] * q_token_stride + query_head[:, None] * q_head_stride
        if ROTATES:
            query = rotated_rows(q + query_offset, rotation, sequence, group_mask, HEAD_DIM, DIMS)
        else:
            query = tl.load(q + query_offset + dims, mask=group_mask, other=0.0)
        block_table = block_tables + sequence.to(tl.int64) * table_stride
        last = tl.minimum(chunks, tl.cdiv(share_end - pair_start, width))
        has_prefix = chunk == 0
        k_scale = 1.0
        v_scale = 1.0
        if HAS_SCALES:
            k_scale = tl.load(kv_scales + head)
            v_scale = tl.load(kv_scales + KV_HEADS + head)
        if ROTATES:
            slot = tl.load(rotation[2] + sequence)
            if (last == chunks) & (last > chunk) & (slot >= 0):
                # The last chunk alone has the token's own key and value, and this program alone reads that.
                place = slot // BLOCK_SIZE * BLOCK_STRIDE + slot % BLOCK_SIZE * SLOT_STRIDE + head * HEAD_STRIDE
                source = q + sequence.to(tl.int64) * q_token_stride + (KV_HEADS * GROUP + head) * q_head_stride
                v = source + KV_HEADS * q_head_stride
                store_own(k_cache + place, v_cache + place, source, v, rotation, sequence, HEAD_DIM, DIMS)
                tl.debug_barrier()
        row = tl.where(num_sequences * KV_HEADS <= num_programs, pair, _owner(pair_start, quotient, remainder))
        top = tl.full([ROWS], NOTHING, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, DIMS], tl.float32)
        for index in range(chunk, last):
            chunk_top, chunk_total, chunk_values = _attend_chunk(
                query,
                k_cache + head * HEAD_STRIDE,
                v_cache + head * HEAD_STRIDE,
                block_table,
                index * width * BLOCK_KEYS,
                tl.minimum(context, (index + 1) * width * BLOCK_KEYS),
                limits,
                scale_log2 * k_scale,
                HEAD_DIM,
                BLOCK_SIZE,
                BLOCK_STRIDE,
                SLOT_STRIDE,
                BLOCK_KEYS,
                PRECISION,
            )
            if HAS_SCALES:
                chunk_values *= v_scale
            top = tl.where(has_prefix, top, NOTHING)
            higher = tl.maximum(top, chunk_top)
            old, new = power_of_two(top - higher), power_of_two(chunk_top - higher)
            top = higher
            total = total * old + chunk_total * new
            values = values * old[:, None] + chunk_values * new[:, None]

            if has_prefix & (index + 1 == chunks):
                # Only an empty context has a sum of 0; its rows become 0.
                result = tl.div_rn(values, tl.where(total > 0, total, 1.0)[:, None])
                if QUERIES == 1:
                    offset = pair.to(tl.int64) * GROUP + group[:, None]
                else:
                    offset = ((start + place).to(tl.int64) * (KV_HEADS * GROUP) + query_head)[:, None]
                tl.store(out + offset * HEAD_DIM + dims, result.to(out.dtype.element_ty), mask=group_mask)
            elif (not has_prefix) | (index + 1 == last):
                part = row.to(tl.int64) * MAX_CHUNKS + tl.where(has_prefix, 0, index)
                target = (part * (QUERIES * GROUP) + group[:, None]) * HEAD_DIM + dims
                tl.store(partial_values + target, values, mask=group_mask)
                tl.store(partial_stats + part * 2 * (QUERIES * GROUP) + group, top, mask=row_valid)
                tl.store(partial_stats + (part * 2 + 1) * (QUERIES * GROUP) + group, total, mask=row_valid)
        COLUMNS: tl.constexpr = 3 if MERGES else 2
        if has_prefix:
            tl.store(covered + pair * COLUMNS, last)
            tl.store(covered + pair * COLUMNS + 1, row)
        if MERGES:
            if (last > chunk) & (last - chunk < chunks):
                # A program counts its chunks when all of its threads have written them; who completes the count merges.
                tl.debug_barrier()
                count = covered + pair * COLUMNS + 2
                if tl.atomic_add(count, last - chunk, sem="acq_rel") + last - chunk == chunks:
                    tl.store(count, 0)
                    if QUERIES == 1:
                        first_query, query_count = sequence.to(tl.int64), 1
                    else:
                        first_query, query_count = start.to(tl.int64), num_queries
                    merge_members(
                        out,
                        partial_values,
                        partial_stats,
                        row.to(tl.int64) * MAX_CHUNKS,
                        tl.load(covered + pair * COLUMNS, cache_modifier=".cg"),
                        chunks,
                        first_query,
                        query_count,
                        head,
                        KV_HEADS,
                        GROUP,
                        QUERIES,
                        MERGES,
                        HEAD_DIM,
                        DIMS,
                        MAX_CHUNKS,
                    )

        pair_start += tiles
        chunk = 0
        head += 1
        if head == KV_HEADS:
            head = 0
            sequence += 1
            context = tl.load(context_lens + sequence, mask=sequence < num_sequences, other=0)
            tiles, width, chunks = chunking(context, BLOCK_KEYS, MIN_CHUNK, MAX_CHUNKS)


_launch_decode = Launcher(_decode_kernel)


class _Settled(NamedTuple):
    attend: Launch
    partials: split.Sizes
    merge: Launch | None
    merges: bool  # the kernel itself, with counters


_KINDS: Kinds[_Settled] = Kinds()


def _settle(
    q: Tensor,
    kv_layer: KVLayer,
    ragged: Ragged,
    scale: float,
    *,
    num_programs: int | None,
    counters: Tensor | None,
    rotates: bool,
) -> _Settled:
    check_attention(q, kv_layer, ragged, scale)
    k_cache, block_tables, queries = kv_layer.k, ragged.block_tables, ragged.run_len
    sequences = len(block_tables) if queries > 1 else ragged.num_decodes
    (heads, head_dim), (block_size, kv_heads) = q.shape[1:], k_cache.shape[1:3]
    group, pairs = heads // kv_heads, sequences * kv_heads
    is_e4m3 = kv_layer.scales is not None
    programs, options = decode_options(head_dim, q.element_size(), queries * group, is_e4m3=is_e4m3)
    if num_programs is None:
        num_programs = programs * multiprocessor_count(q.device)
    early = launch_options(q.device, counters is not None)
    merges = counters is not None and has_room(head_dim, q.element_size(), queries * group, is_e4m3=is_e4m3)
    assert counters is None or pairs <= len(counters)
    constants = {"KV_HEADS": kv_heads, "GROUP": group, "QUERIES": queries, "HEAD_DIM": head_dim}
    constants |= {"DIMS": padded(head_dim), "MIN_CHUNK": split.MIN_CHUNK, "MAX_CHUNKS": split.max_chunks(kv_heads)}
    constants["EARLY"] = bool(early)
    attend = Launch(
        _launch_decode,
        (num_programs,),
        (sequences, num_programs, scale * LOG2_E, *q.stride()[:2], block_tables.stride(0)),
        **constants,
        BLOCK_SIZE=block_size,
        BLOCK_STRIDE=k_cache.stride(0),
        SLOT_STRIDE=k_cache.stride(1),
        HEAD_STRIDE=k_cache.stride(2),
        PRECISION="ieee",
        HAS_SCALES=is_e4m3,
        ROTATES=rotates,
        MERGES=next_power_of_2(queries * group) if merges else 0,
        **(options | early),
    )
    merge = None
    if not merges and block_tables.shape[1] * block_size > split.MIN_CHUNK:  # else no context is ever split
        merge = split.settle_merge(pairs, heads, constants | {"BLOCK_KEYS": options["BLOCK_KEYS"]}, early)
    return _Settled(attend, split.sizes_of(q, pairs, num_programs, kv_heads, queries), merge, merges)


def decode_attention(
    out: Tensor,
    q: Tensor,
    kv_layer: KVLayer,
    ragged: Ragged,
    scale: float,
    *,
    num_programs: int | None = None,
    counters: Tensor | None = None,
    rotation: tuple[Tensor, ...] | None = None,
) -> None:
    """Write the rows of the decodes, or of the runs, to `out`; `num_programs` is for tests alone and changes no bit.
    `counters`: see `attend`. With `rotation`, cos, sin and slots of the tokens, q is a view of the q, k and v that lie
    behind one another as they were projected; all sequences are decodes, and store their own keys and values."""
    addresses = None if rotation is None else tuple(tensor.data_ptr() & 15 for tensor in rotation)
    kind = *kind_of(q), kv_layer.kind, ragged.kind, scale, num_programs, counters is None, addresses
    settled = _KINDS.get(kind)
    if settled is None:
        rotates = rotation is not None
        made = _settle(q, kv_layer, ragged, scale, num_programs=num_programs, counters=counters, rotates=rotates)
        settled = _KINDS.keep(kind, made)
    attend, sizes, merge, merges = settled
    partials = split.partials_of(ragged, sizes, q.device, counters if merges else None)
    k_cache, starts, lens = kv_layer.k, ragged.query_starts, ragged.context_lens
    scales = k_cache if kv_layer.scales is None else kv_layer.scales
    attend(out, *partials, q, k_cache, kv_layer.v, scales, ragged.block_tables, starts, lens, rotation or (q,))
    if merge is not None:
        merge(out, *partials, starts, lens)
