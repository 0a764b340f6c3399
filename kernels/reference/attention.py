"""Attention over the paged cache in plain PyTorch.

No copy of K or V per query head: grouped heads share them through a dimension of stride 0 (prefill) or lie beside one
another as the queries of one head (decode). Slots past a sequence's context are never read, so that whatever lies there
cannot leak.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Entries of one mask at most (queries x keys), which bounds what a chunk of a long prompt allocates.
MASK_ENTRIES = 1 << 20


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    num_decodes: int,
    max_query_len: int,
    max_context_len: int,
    scale: float,
) -> Tensor:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    if num_decodes:
        tables, lens = block_tables[:num_decodes], context_lens[:num_decodes]
        out[:num_decodes] = _decode(q[:num_decodes], k_cache, v_cache, tables, lens, scale)
    starts, lens = query_starts.tolist(), context_lens.tolist()
    for sequence in range(num_decodes, len(lens)):
        start, end, context = starts[sequence], starts[sequence + 1], lens[sequence]
        if end > start:
            k, v = (_contiguous(cache, block_tables[sequence], context) for cache in (k_cache, v_cache))
            out[start:end] = _causal(q[start:end], k, v, scale)
    return out


def _decode(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, block_tables: Tensor, context_lens: Tensor, scale: float
) -> Tensor:
    """One query per sequence: the heads of a group become the queries of their KV head."""
    sequences, heads, head_dim = q.shape
    block_size, kv_heads = k_cache.shape[1:3]
    keys = torch.arange(int(context_lens.max()), device=q.device)
    lens = context_lens.to(torch.int64)[:, None]
    # Past its end a sequence reads its own last token again, which the mask then drops: no foreign slot is touched.
    columns = torch.minimum(keys, (lens - 1).clamp_(min=0))  # [sequences, keys]
    slots = block_tables.to(torch.int64).gather(1, columns // block_size) * block_size + columns % block_size
    k, v = (
        cache.flatten(0, 1).index_select(0, slots.flatten()).view(sequences, -1, kv_heads, head_dim).transpose(1, 2)
        for cache in (k_cache, v_cache)
    )
    grouped = q.reshape(sequences, kv_heads, heads // kv_heads, head_dim)
    mask = (keys < lens)[:, None, None, :]
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


def _contiguous(cache: Tensor, block_table: Tensor, context_len: int) -> Tensor:
    """A sequence's rows [context_len, kv_heads, head_dim]; a view where its blocks lie in one run."""
    num_blocks = -(-context_len // cache.shape[1])
    blocks = block_table[:num_blocks].tolist()
    if blocks == list(range(blocks[0], blocks[0] + num_blocks)):
        return cache[blocks[0] : blocks[0] + num_blocks].flatten(0, 1)[:context_len]
    return cache.index_select(0, block_table[:num_blocks]).flatten(0, 1)[:context_len]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[queries, heads, head_dim] against the keys up to each query's own, the last query seeing all of them."""
    queries, heads, head_dim = q.shape
    context, kv_heads = k.shape[:2]
    group = heads // kv_heads
    q = q.view(queries, kv_heads, group, head_dim).permute(1, 2, 0, 3)  # KV heads take the place of a batch
    k, v = (x.transpose(0, 1)[:, None].expand(-1, group, -1, -1) for x in (k, v))
    if queries == context:
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        return mixed.permute(2, 0, 1, 3).reshape(queries, heads, head_dim)
    out = torch.empty(queries, heads, head_dim, dtype=q.dtype, device=q.device)
    step = max(16, MASK_ENTRIES // context)
    for start in range(0, queries, step):
        end = min(start + step, queries)
        visible = context - queries + end
        rows = torch.arange(visible - (end - start), visible, device=q.device)
        mask = torch.arange(visible, device=q.device) <= rows[:, None]
        mixed = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :visible], v[:, :, :visible], attn_mask=mask, scale=scale
        )
        out[start:end] = mixed.permute(2, 0, 1, 3).reshape(end - start, heads, head_dim)
    return out
