"""Prefill and chunks of it: any number of queries per sequence, causal, against any paged context before them.

    out = softmax(scale q K^T + causal mask) V      4 D context heads FLOP per query (half of that for a whole prompt)

A program takes a tile of ROWS rows: consecutive queries of one sequence x the heads of one group, so that K and V are
read once for the group (a group of 3 leaves a few rows idle). Online softmax in float32. The tiles of keys that every
row sees go through a loop without masks; those on the diagonal and at the context's end through one with them.

The launch has queries // tile + sequences programs per KV head, which is enough for any lengths: sequence i owns the
tiles from (its first query) // tile + i on, and a program finds the last sequence that starts no later than its tile.
"""

import triton
import triton.language as tl
from torch import Tensor

from llama.kernels.gpu.attention.config import LOG2_E, padded, prefill_options
from llama.kernels.gpu.attention.tiles import key_rows, load_blocks, row_mask
from llama.kernels.gpu.e4m3 import load_all_as, load_as
from llama.kernels.gpu.launch import Launcher
from llama.kernels.types import KVLayer, Ragged

# Sequences that a program looks at together when it finds its own.
_SEQUENCES = tl.constexpr(128)


@triton.jit
def _attend(
    query,  # [ROWS, DIMS]
    top,
    total,
    values,
    k_head,
    v_head,
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
        blocks = load_blocks(block_table, first + BLOCK_KEYS, end, BLOCK_SIZE, BLOCK_KEYS)
        if MASKED or DIMS != HEAD_DIM:
            # Places that are not in use may hold NaN, and 0 * NaN is NaN: they are read as 0.
            mask = row_mask(keys < end, DIMS, HEAD_DIM)
            k = load_as(k_head + rows + dims, mask, query.dtype)
            v = load_as(v_head + rows + dims, mask, query.dtype)
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


# What varies from step to step makes no further variants of the kernel.
@triton.jit(
    do_not_specialize=["num_decodes", "num_sequences", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def _prefill_kernel(
    out,
    q,
    k_cache,
    v_cache,
    kv_scales,  # [2, KV_HEADS] float32, where the caches are e4m3
    block_tables,
    query_starts,
    context_lens,
    num_decodes,
    num_sequences,
    scale_log2,
    q_token_stride,
    q_head_stride,
    table_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SCALES: tl.constexpr,
):
    QUERIES: tl.constexpr = ROWS // GROUP
    # The last tiles of a prompt see the most keys: they start first, and short work fills the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)

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
    if first_query >= queries:
        return

    context = tl.load(context_lens + sequence)
    row = tl.arange(0, ROWS)
    token, member = row // GROUP, row % GROUP
    dims = tl.arange(0, DIMS)[None, :]
    mask = row_mask((first_query + token < queries) & (row < QUERIES * GROUP), DIMS, HEAD_DIM)
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
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    values = tl.zeros([ROWS, DIMS], tl.float32)
    for masked in tl.static_range(2):
        top, total, values = _attend(
            query,
            top,
            total,
            values,
            k_cache + head * HEAD_STRIDE,
            v_cache + head * HEAD_STRIDE,
            block_tables + sequence.to(tl.int64) * table_stride,
            seen_by_all * masked,
            end if masked else seen_by_all,
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
    # Key 0 is visible to every row: the first tile already gave each a finite maximum.
    out += (first_token * KV_HEADS + head) * GROUP * HEAD_DIM
    if HAS_SCALES:
        values *= tl.load(kv_scales + KV_HEADS + head)
    result = (values / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + ((token * KV_HEADS * GROUP + member) * HEAD_DIM)[:, None] + dims, result, mask=mask)


_launch_prefill = Launcher(_prefill_kernel)


def prefill_attention(out: Tensor, q: Tensor, kv_layer: KVLayer, ragged: Ragged, scale: float) -> None:
    """Write the rows of all sequences behind the decodes to `out`."""
    k_cache, block_tables, num_decodes = kv_layer.k, ragged.block_tables, ragged.num_decodes
    sequences = block_tables.shape[0]
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    options = prefill_options(head_dim, q.element_size(), group)
    programs = (q.shape[0] - num_decodes) // (options["ROWS"] // group) + sequences - num_decodes
    _launch_prefill(
        (programs, kv_heads),
        out,
        q,
        k_cache,
        kv_layer.v,
        k_cache if kv_layer.scales is None else kv_layer.scales,
        block_tables,
        ragged.query_starts,
        ragged.context_lens,
        num_decodes,
        sequences,
        scale * LOG2_E,
        *q.stride()[:2],
        block_tables.stride(0),
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        BLOCK_STRIDE=k_cache.stride(0),
        SLOT_STRIDE=k_cache.stride(1),
        HEAD_STRIDE=k_cache.stride(2),
        DIMS=padded(head_dim),
        PRECISION="ieee",
        HAS_SCALES=kv_layer.scales is not None,
        **options,
    )
