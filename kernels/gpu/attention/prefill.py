"""Prefill and chunks of it: any number of queries per sequence, causal, against any paged context before them.

    out = softmax(scale q K^T + causal mask) V      4 D context heads FLOP per query (half of that for a whole prompt)

A program takes a tile of ROWS rows: consecutive queries of one sequence x the heads of one group, so that K and V are
read once for the group (a group of 3 leaves a few rows idle). Online softmax in float32. The tiles of keys that every
row sees go through a loop without masks; those on the diagonal and at the context's end through one with them.

The launch has queries // tile + sequences programs per KV head, which is enough for any lengths: sequence i owns the
tiles from (its first query) // tile + i on, and a program finds the last sequence that starts no later than its tile.

Where so few tiles would leave most of a GPU without work (a question behind a long cached context), contexts are cut
into chunks too: a program takes one chunk, a second kernel adds them up. How many chunks depends on the step's number
of queries, so the last bits of a result do; the deterministic mode has runs of queries, which `decode` computes.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from llama.kernels.checks import multiprocessor_count
from llama.kernels.gpu.attention.config import (
    LOG2_E,
    PrefillTile,
    check_attention,
    padded,
    prefill_options,
    prefill_tile,
)
from llama.kernels.gpu.attention.split import NOTHING, add_chunks, chunking
from llama.kernels.gpu.attention.tiles import key_rows, load_blocks, row_mask
from llama.kernels.gpu.e4m3 import load_all_as, load_as
from llama.kernels.gpu.launch import Kinds, Launch, Launcher, cdiv
from llama.kernels.types import KVLayer, Ragged, kind_of

# Sequences that a program looks at together when it finds its own.
_SEQUENCES = tl.constexpr(128)

# Keys of a chunk at least, which take about three times as long as to write and to add up a part; chunks at most.
MIN_CHUNK = 512
MAX_CHUNKS = 64


@triton.jit
def _attend(
    query,  # [ROWS, DIMS]
    top,
    total,
    values,
    k_head,
    v_head,
    k_tiles,  # descriptors of the caches as [slots, KV_HEADS * HEAD_DIM], or None
    v_tiles,
    column,
    block_table,
    start,
    end,
    visible,  # [ROWS] keys that a row sees
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
):
    DIMS: tl.constexpr = query.shape[1]
    dims = tl.arange(0, DIMS)[None, :]
    blocks = load_blocks(block_table, start, end, BLOCK_SIZE, BLOCK_KEYS)
    for first in range(start, end, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        rows = key_rows(blocks, first, BLOCK_SIZE, BLOCK_KEYS, BLOCK_STRIDE, SLOT_STRIDE)[:, None]
        if k_tiles is not None:
            slot = blocks * BLOCK_SIZE + first % BLOCK_SIZE
        blocks = load_blocks(block_table, first + BLOCK_KEYS, end, BLOCK_SIZE, BLOCK_KEYS)
        if MASKED or DIMS != HEAD_DIM:
            # Places that are not in use may hold NaN, and 0 * NaN is NaN: they are read as 0.
            mask = row_mask(keys < end, DIMS, HEAD_DIM)
            k = load_as(k_head + rows + dims, mask, query.dtype)
            v = load_as(v_head + rows + dims, mask, query.dtype)
        elif k_tiles is not None:
            k = k_tiles.load([slot, column])
            v = v_tiles.load([slot, column])
        else:
            k = load_all_as(k_head + rows + dims, query.dtype)
            v = load_all_as(v_head + rows + dims, query.dtype)

        scores = tl.dot(query, tl.trans(k), input_precision=PRECISION)
        if MASKED:
            scores = tl.where(keys[None, :] < visible[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - higher[:, None])
        rescale = tl.exp2(top - higher)
        top = higher
        total = total * rescale + tl.sum(weights, axis=1)
        values = tl.dot(weights.to(query.dtype), v, values * rescale[:, None], input_precision=PRECISION)
    return top, total, values


@triton.jit
def _tile_queries(query_starts, tile, num_decodes, num_sequences, QUERIES: tl.constexpr):
    """-> the sequence of a tile, where its queries start, how many it has, and which of them is the tile's first."""
    passed = 0
    for first in range(num_decodes, num_sequences, _SEQUENCES):
        index = first + tl.arange(0, _SEQUENCES)
        starts = tl.load(query_starts + index, mask=index < num_sequences, other=0)
        first_tiles = (starts - num_decodes) // QUERIES + index - num_decodes
        passed += tl.sum(((first_tiles <= tile) & (index < num_sequences)).to(tl.int32))
    sequence = num_decodes + passed - 1
    query_start = tl.load(query_starts + sequence)
    queries = tl.load(query_starts + sequence + 1) - query_start
    first_query = (tile - (query_start - num_decodes) // QUERIES - (sequence - num_decodes)) * QUERIES
    return sequence, query_start, queries, first_query


# What varies from step to step makes no further variants of the kernel.
@triton.jit(
    do_not_specialize=["num_decodes", "num_sequences", "max_chunks", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _prefill_kernel(
    out,
    partial_values,  # where SPLIT, see `_allocate`
    partial_stats,
    q,
    k_cache,
    v_cache,
    kv_scales,  # [2, KV_HEADS] float32, where the caches are e4m3
    block_tables,
    query_starts,
    context_lens,
    num_decodes,
    num_sequences,
    max_chunks,
    scale_log2,
    q_token_stride,
    q_head_stride,
    table_stride,
    k_tiles,  # see `_attend`
    v_tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    SPLIT: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    # The last tiles of a prompt see the most keys: they start first, and short work fills the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence, query_start, queries, first_query = _tile_queries(query_starts, tile, num_decodes, num_sequences, QUERIES)
    if first_query >= queries:
        return

    context = tl.load(context_lens + sequence)
    row = tl.arange(0, ROWS)
    token, member = row // GROUP, row % GROUP
    dims = tl.arange(0, DIMS)[None, :]
    row_valid = (first_query + token < queries) & (row < QUERIES * GROUP)
    mask = row_mask(row_valid, DIMS, HEAD_DIM)
    # One 64-bit offset for the tile and 32 bits within it: rows of 64-bit offsets would stay in registers meanwhile.
    first_token = (query_start + first_query).to(tl.int64)
    q += first_token * q_token_stride + head * GROUP * q_head_stride
    query = tl.load(q + (token * q_token_stride + member * q_head_stride)[:, None] + dims, mask=mask, other=0.0)

    if HAS_SCALES:
        scale_log2 *= tl.load(kv_scales + head)
    past = context - queries
    visible = past + first_query + token + 1
    seen_by_all = (past + first_query + 1) // BLOCK_KEYS * BLOCK_KEYS
    end = past + tl.minimum(first_query + QUERIES, queries)
    if SPLIT:
        _, width, chunks = chunking(context, BLOCK_KEYS, MIN_CHUNK, max_chunks)
        chunk_start = tl.program_id(2) * width * BLOCK_KEYS
        chunk_end = chunk_start + width * BLOCK_KEYS
        if chunk_start >= end:
            return
    top = tl.full([ROWS], NOTHING, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIMS], tl.float32)
    for masked in tl.static_range(2):
        first = seen_by_all * masked
        last = end if masked else seen_by_all
        if SPLIT:
            first = tl.maximum(first, chunk_start)
            last = tl.minimum(last, chunk_end)
        top, total, values = _attend(
            query,
            top,
            total,
            values,
            k_cache + head * HEAD_STRIDE,
            v_cache + head * HEAD_STRIDE,
            k_tiles,
            v_tiles,
            head * HEAD_DIM,
            block_tables + sequence.to(tl.int64) * table_stride,
            first,
            last,
            visible,
            scale_log2,
            HEAD_DIM,
            BLOCK_SIZE,
            BLOCK_STRIDE,
            SLOT_STRIDE,
            BLOCK_KEYS,
            PRECISION,
            masked == 1,
        )
    if HAS_SCALES:
        values *= tl.load(kv_scales + KV_HEADS + head)
    if SPLIT:
        if chunks > 1:
            whole = tl.ceil(top)  # then adding up rescales by powers of two
            factor = tl.exp2(top - whole)
            part = (tile * KV_HEADS + head).to(tl.int64) * max_chunks + tl.program_id(2)
            partial_values += part * (QUERIES * GROUP * HEAD_DIM)
            tl.store(partial_values + row[:, None] * HEAD_DIM + dims, values * factor[:, None], mask=mask)
            stats = partial_stats + part * (2 * QUERIES * GROUP) + row
            tl.store(stats, whole, mask=row_valid)
            tl.store(stats + QUERIES * GROUP, total * factor, mask=row_valid)
            return
    # Key 0 is visible to every row: the first tile already gave each a finite maximum.
    out += (first_token * KV_HEADS + head) * GROUP * HEAD_DIM
    result = (values / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + ((token * KV_HEADS * GROUP + member) * HEAD_DIM)[:, None] + dims, result, mask=mask)


@triton.jit(
    do_not_specialize=["num_decodes", "num_sequences", "max_chunks"],
    do_not_specialize_on_alignment=["query_starts", "context_lens"],
)
def _merge_chunks_kernel(
    out,
    partial_values,
    partial_stats,
    query_starts,
    context_lens,
    num_decodes,
    num_sequences,
    max_chunks,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    MIN_CHUNK: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """A program for each row of each tile, where its context has more than one chunk."""
    QUERIES: tl.constexpr = ROWS // GROUP
    tile, head, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence, query_start, queries, first_query = _tile_queries(query_starts, tile, num_decodes, num_sequences, QUERIES)
    query = first_query + member // GROUP
    if query >= queries:
        return
    context = tl.load(context_lens + sequence)
    _, width, chunks = chunking(context, BLOCK_KEYS, MIN_CHUNK, max_chunks)
    if chunks == 1:
        return
    seen = context - queries + query + 1
    chunks = tl.cdiv(tl.cdiv(seen, BLOCK_KEYS), width)
    row = (tile * KV_HEADS + head).to(tl.int64) * max_chunks
    values, total = add_chunks(
        partial_values, partial_stats, row, member, 1, chunks, QUERIES * GROUP, HEAD_DIM, DIMS, MAX_CHUNKS
    )
    dims = tl.arange(0, DIMS)
    query_head = (query_start + query).to(tl.int64) * (KV_HEADS * GROUP) + head * GROUP + member % GROUP
    result = tl.div_rn(values, total).to(out.dtype.element_ty)
    tl.store(out + query_head * HEAD_DIM + dims, result, mask=dims < HEAD_DIM)


_launch_prefill = Launcher(_prefill_kernel)
_launch_merge = Launcher(_merge_chunks_kernel)


def num_chunks(tiles: int, kv_heads: int, capacity: int, multiprocessors: int) -> int:
    """Into how many chunks contexts of up to `capacity` keys are cut at most, where there are so many tiles of queries
    per KV head: as few as keep the multiprocessors busy."""
    return max(1, min(multiprocessors // (tiles * kv_heads), capacity // MIN_CHUNK, MAX_CHUNKS))


def _allocate(out: Tensor, parts: int, members: int) -> tuple[Tensor, Tensor]:
    """For each tile, KV head and chunk: values [parts, members, head_dim] float32, and maxima (of the base 2, integers)
    and sums of weights [parts, 2, members] float32. A tile's members are its rows in use."""
    return (
        torch.empty((parts, members, out.shape[2]), dtype=torch.float32, device=out.device),
        torch.empty((parts, 2, members), dtype=torch.float32, device=out.device),
    )


def _descriptors(kv_layer: KVLayer, dtype: torch.dtype, keys: int) -> tuple[TensorDescriptor, ...] | None:
    """Of K and V as [slots, kv_heads * head_dim], for tiles of so many keys of one head. None where such a tile may lie
    in several blocks, or would have to be converted or padded.

    Made for each launch: one that is kept would outlive the memory that a KV cache gives back and takes again.
    """
    _, block_size, _, head_dim = kv_layer.k.shape
    is_plain = kv_layer.k.is_contiguous() and kv_layer.k.dtype == dtype and head_dim == padded(head_dim)
    if block_size < keys or not is_plain:
        return None
    rows = (cache.flatten(2).flatten(0, 1) for cache in (kv_layer.k, kv_layer.v))
    return tuple(TensorDescriptor.from_tensor(cache, [keys, head_dim]) for cache in rows)


class _Settled(NamedTuple):
    grid: tuple[int, ...]
    arguments: tuple[int | float, ...]  # behind the tensors
    constants: dict[str, Any]
    attend: Launch
    parts: tuple[int, int] | None  # and members, of what there is to be merged
    merge: Launch | None


_KINDS: Kinds[_Settled] = Kinds()


def _settle(q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float, tile: PrefillTile) -> _Settled:
    check_attention(q, kv_layer, ragged, scale)
    k_cache, block_tables, num_decodes = kv_layer.k, ragged.block_tables, ragged.num_decodes
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    options = prefill_options(tile, group)
    tile_queries = options["ROWS"] // group
    queries, sequences = q.shape[0] - num_decodes, block_tables.shape[0] - num_decodes
    programs, members = queries // tile_queries + sequences, tile_queries * group
    tiles = max(cdiv(queries, tile_queries), sequences, 1)
    chunks = num_chunks(tiles, kv_heads, block_tables.shape[1] * block_size, multiprocessor_count(q.device))
    sizes = {"KV_HEADS": kv_heads, "GROUP": group, "HEAD_DIM": head_dim, "DIMS": padded(head_dim)}
    sizes |= {"ROWS": options["ROWS"], "BLOCK_KEYS": options["BLOCK_KEYS"], "MIN_CHUNK": MIN_CHUNK}
    of_sequences = num_decodes, block_tables.shape[0], chunks
    grid = programs, kv_heads, chunks
    arguments = *of_sequences, scale * LOG2_E, *q.stride()[:2], block_tables.stride(0)
    constants = {
        **sizes,
        **options,
        "BLOCK_SIZE": block_size,
        "BLOCK_STRIDE": k_cache.stride(0),
        "SLOT_STRIDE": k_cache.stride(1),
        "HEAD_STRIDE": k_cache.stride(2),
        "PRECISION": "ieee",
        "HAS_SCALES": kv_layer.scales is not None,
        "SPLIT": chunks > 1,
    }
    attend = Launch(_launch_prefill, grid, arguments, **constants, k_tiles=None, v_tiles=None)
    parts, merge = None, None
    if chunks > 1:
        parts = programs * kv_heads * chunks, members
        warps = max(1, sizes["DIMS"] // 128)
        whole = sizes | {"MAX_CHUNKS": MAX_CHUNKS, "num_warps": warps, "maxnreg": 255}
        merge = Launch(_launch_merge, (programs, kv_heads, members), of_sequences, **whole)
    return _Settled(grid, arguments, constants, attend, parts, merge)


def prefill_attention(out: Tensor, q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> None:
    """Write the rows of all sequences behind the decodes to `out`."""
    tile = prefill_tile(q.shape[2], q.element_size())
    kind = *kind_of(q), kv_layer.kind, ragged.kind, scale, tile
    settled = _KINDS.get(kind) or _KINDS.keep(kind, _settle(q, kv_layer, ragged, scale, tile))
    partials = (out, out) if settled.parts is None else _allocate(out, *settled.parts)
    k_cache, starts, lens = kv_layer.k, ragged.query_starts, ragged.context_lens
    scales = k_cache if kv_layer.scales is None else kv_layer.scales
    tensors = out, *partials, q, k_cache, kv_layer.v, scales, ragged.block_tables, starts, lens
    descriptors = _descriptors(kv_layer, q.dtype, tile.keys) if tile.descriptors else None
    if descriptors is None:
        settled.attend(*tensors)
    else:  # Triton encodes descriptors at each launch, so with them it has to launch the kernel itself
        k_tiles, v_tiles = descriptors
        launch = _prefill_kernel[settled.grid]
        launch(*tensors, *settled.arguments, k_tiles=k_tiles, v_tiles=v_tiles, **settled.constants)
    if settled.merge is not None:
        settled.merge(out, *partials, starts, lens)
