"""Attention over the paged cache in plain PyTorch.

No copy of K or V per query head: grouped heads share them through a dimension of stride 0 (prefill) or lie beside one
another as the queries of one head (decode). Slots past a sequence's context are never read, so that whatever lies there
cannot leak. What depends on the step alone, and not on the layer, is worked out once, in `plan_attention`.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Entries of one mask at most (queries x keys), which bounds what a chunk of a long prompt allocates.
MASK_ENTRIES = 1 << 22

Rows = slice | Tensor  # of a cache [slots, kv_heads, head_dim]: a run, or indices


@dataclass(slots=True)
class AttentionPlan:
    """Where the keys of each sequence lie. `buffers` is working memory that the layers of one step share."""

    decode_rows: Rows  # of all decodes, one after the other, each padded to the longest
    decode_mask: Tensor | None  # [decodes, 1, 1, keys] bool; None where nothing is padded
    prefills: list[tuple[int, int, Rows]]  # first token, end, rows
    buffers: dict[str, Tensor] = field(default_factory=dict)

    def gather(self, cache: Tensor, rows: Rows, name: str) -> Tensor:
        """[keys, kv_heads, head_dim]: a view, or a copy that holds until the next gather under the same name."""
        cache = cache.flatten(0, 1)
        if isinstance(rows, slice):
            return cache[rows]
        buffer = self.buffers.get(name)
        if buffer is None or buffer.shape[0] < rows.shape[0] or buffer.dtype != cache.dtype:
            buffer = self.buffers[name] = cache.new_empty(rows.shape[0], *cache.shape[1:])
        return torch.index_select(cache, 0, rows, out=buffer[: rows.shape[0]])


def plan_attention(
    block_tables: Tensor, query_starts: Tensor, context_lens: Tensor, *, num_decodes: int, block_size: int
) -> AttentionPlan | None:
    starts, lens = query_starts.tolist(), context_lens.tolist()
    prefills = [
        (starts[s], starts[s + 1], _rows(block_tables[s], lens[s], block_size))
        for s in range(num_decodes, len(lens))
        if starts[s + 1] > starts[s]
    ]
    if num_decodes <= 1:
        # A padding row without context reads the first slot of its first block, which its mask then drops.
        rows = _rows(block_tables[0], max(1, lens[0]), block_size) if num_decodes else slice(0)
        mask = context_lens.new_zeros(1, 1, 1, 1, dtype=torch.bool) if num_decodes and not lens[0] else None
        return AttentionPlan(rows, mask, prefills)
    longest = max(1, *lens[:num_decodes])
    keys = torch.arange(longest, device=block_tables.device)
    ends = context_lens[:num_decodes, None].to(torch.int64)
    # Past its end a sequence reads its own last token again: no slot that is not its own.
    columns = torch.minimum(keys, (ends - 1).clamp_(min=0))  # [decodes, keys]
    blocks = block_tables[:num_decodes].to(torch.int64).gather(1, columns // block_size)
    rows = (blocks * block_size + columns % block_size).flatten()
    padded = min(lens[:num_decodes]) < longest
    return AttentionPlan(rows, (keys < ends)[:, None, None, :] if padded else None, prefills)


def _rows(block_table: Tensor, context_len: int, block_size: int) -> Rows:
    num_blocks = -(-context_len // block_size)
    blocks = block_table[:num_blocks].tolist()
    first = blocks[0]
    if blocks == list(range(first, first + num_blocks)):
        return slice(first * block_size, first * block_size + context_len)
    offsets = torch.arange(block_size, device=block_table.device)
    return (block_table[:num_blocks, None].to(torch.int64) * block_size + offsets).flatten()[:context_len]


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
    plan: AttentionPlan | None = None,
) -> Tensor:
    if plan is None:
        plan = plan_attention(
            block_tables, query_starts, context_lens, num_decodes=num_decodes, block_size=k_cache.shape[1]
        )
    parts = []
    if num_decodes:
        k, v = plan.gather(k_cache, plan.decode_rows, "k"), plan.gather(v_cache, plan.decode_rows, "v")
        parts.append(_decode(q[:num_decodes], k, v, plan.decode_mask, scale))
    for start, end, rows in plan.prefills:
        k, v = plan.gather(k_cache, rows, "k"), plan.gather(v_cache, rows, "v")
        parts.append(_causal(q[start:end], k, v, scale))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if parts else torch.empty_like(q, memory_format=torch.contiguous_format)


def _decode(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query per sequence: the heads of a group become the queries of their KV head."""
    sequences, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    k = k.view(sequences, -1, kv_heads, head_dim).transpose(1, 2)
    v = v.view(sequences, -1, kv_heads, head_dim).transpose(1, 2)
    grouped = q.view(sequences, kv_heads, heads // kv_heads, head_dim)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale).reshape(q.shape)


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
