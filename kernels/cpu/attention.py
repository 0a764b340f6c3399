"""Attention over the paged cache in plain PyTorch.

No copy of K or V per query head: grouped heads share them through a dimension of stride 0 (prefill) or lie beside one
another as the queries of one head (decode). Slots past a sequence's context are never read, so that whatever lies there
cannot leak.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.kernels.cpu.layout import AttentionPlan, StepPlan, plan_attention

# Entries of one mask at most (queries x keys), which bounds what a chunk of a long prompt allocates.
MASK_ENTRIES = 1 << 22


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
    plan: StepPlan | None = None,
) -> Tensor:
    where = (
        plan_attention(block_tables, query_starts, context_lens, num_decodes, k_cache.shape[1])
        if plan is None
        else plan.attention
    )
    if num_decodes == len(q) and num_decodes:
        return _decode(q, k_cache, v_cache, where, scale)
    parts = []
    if num_decodes:
        parts.append(_decode(q[:num_decodes], k_cache, v_cache, where, scale))
    for start, end, rows in where.prefills:
        k, v = where.gather(k_cache, rows, "k"), where.gather(v_cache, rows, "v")
        parts.append(_causal(q[start:end], k, v, scale))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty_like(q, memory_format=torch.contiguous_format)


def _decode(q: Tensor, k_cache: Tensor, v_cache: Tensor, where: AttentionPlan, scale: float) -> Tensor:
    """One query per sequence: the heads of a group become the queries of their KV head."""
    sequences, heads, head_dim = q.shape
    kv_heads = k_cache.shape[2]
    rows = where.decode_rows
    if isinstance(rows, slice):
        k, v = _run(k_cache, rows), _run(v_cache, rows)
    else:
        shape = (sequences, -1, kv_heads, head_dim)
        k = where.gather(k_cache, rows, "k").view(shape).transpose(1, 2)
        v = where.gather(v_cache, rows, "v").view(shape).transpose(1, 2)
    grouped = q.view(sequences, kv_heads, heads // kv_heads, head_dim)
    mixed = F.scaled_dot_product_attention(grouped, k, v, attn_mask=where.decode_mask, scale=scale)
    return mixed.reshape(q.shape)


def _run(cache: Tensor, rows: slice) -> Tensor:
    """[1, kv_heads, keys, head_dim] of neighbouring slots, in one call."""
    _, _, kv_heads, head_dim = cache.shape
    _, slot, head, _ = cache.stride()
    start = cache.storage_offset() + rows.start * slot
    return cache.as_strided((1, kv_heads, rows.stop - rows.start, head_dim), (0, head, slot, 1), start)


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
        mask = torch.full((end - start, visible), -math.inf, dtype=q.dtype, device=q.device)
        mask.triu_(visible - (end - start) + 1)
        mixed = F.scaled_dot_product_attention(
            q[:, :, start:end], k[:, :, :visible], v[:, :, :visible], attn_mask=mask, scale=scale
        )
        out[start:end] = mixed.permute(2, 0, 1, 3).reshape(end - start, heads, head_dim)
    return out
